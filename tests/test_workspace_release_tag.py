import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("check_release_tag", ROOT / "tools" / "check_release_tag.py")
check_release_tag = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_release_tag)


@pytest.fixture
def check(tmp_path):
    """The check, on a repository with credit-mesh at 0.2.0, of which 0.1.0 and 0.2.0 are in the changelog."""
    package = tmp_path / "packages" / "credit-mesh"
    package.mkdir(parents=True)
    (package / "pyproject.toml").touch()
    (package / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-02-03\n\n- See 0.3.0.\n\n## [0.1.0] - 2026-01-02\n"
    )

    def check(tag, version="0.2.0"):
        return check_release_tag.check(tag, tmp_path, lambda _: version)

    return check


def test_accepts_the_tag_of_the_present_version(check):
    assert check("credit-mesh-v0.2.0") == ("credit-mesh", "0.2.0")


@pytest.mark.parametrize("tag", ["v0.2.0", "credit-mesh-0.2.0", "mesh-v0.2.0", "credit-mesh-v", "credit-../x-v1"])
def test_refuses_what_is_no_release_tag(check, tag):
    with pytest.raises(ValueError, match="is not of the form"):
        check(tag)


def test_refuses_a_package_that_is_not_there(check):
    with pytest.raises(ValueError, match="no packages/credit-moon"):
        check("credit-moon-v0.2.0")


@pytest.mark.parametrize("tag", ["credit-mesh-v0.1.0", "credit-mesh-v0.2.0rc1", "credit-mesh-v0.2"])
def test_refuses_another_version(check, tag):
    with pytest.raises(ValueError, match=r"is at 0\.2\.0"):
        check(tag)


@pytest.mark.parametrize("version", ["0.3.0", "0.2", "0.20"])
def test_refuses_a_version_without_a_heading_in_the_changelog(check, version):
    with pytest.raises(ValueError, match="no heading"):
        check(f"credit-mesh-v{version}", version)
