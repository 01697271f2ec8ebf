"""Rules of the layout that nothing else would notice: see CONTRIBUTING.md."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.name for path in (ROOT / "packages").glob("credit-*"))


@pytest.mark.parametrize("package", PACKAGES)
def test_test_files_carry_the_name_of_their_layer(package):
    layer = package.removeprefix("credit-")
    tests = {path.name for path in (ROOT / "packages" / package / "tests").rglob("test_*.py")}
    assert tests, "every package has tests"
    assert not {name for name in tests if not name.startswith(f"test_{layer}_")}


def test_no_two_modules_of_the_tests_share_a_name():
    # pytest imports each by its bare name, so that a function in it can be sent to another process.
    modules = [p.name for p in ROOT.glob("packages/*/tests/**/*.py")] + [p.name for p in ROOT.glob("tests/*.py")]
    shared = {name for name, count in Counter(modules).items() if count > 1} - {"conftest.py"}
    assert not shared


def test_no_two_files_of_the_packages_share_a_name():
    # But for names of the reference, and what is one thing in each package. See "Words" in CONTRIBUTING.md.
    alike = {"__init__", "__main__", "_torch_private", "_version", "extend"}
    reference = {"collectives", "convert", "domain", "fsdp2", "halo_exchange", "layers", "manager", "mesh", "sharding"}
    files = [path.stem for path in ROOT.glob("packages/*/src/**/*.py")]
    assert len(files) > 150
    shared = {name for name, count in Counter(files).items() if count > 1}
    assert not shared - alike - reference


def test_tests_of_the_repository_are_not_marked_slow():
    # The mark keeps a test out of the run of all packages together, which is the only one in which these run.
    marked = [p.name for p in ROOT.glob("tests/*.py") if re.search(r"^[^#]*\bpytest\.mark\.slow", p.read_text(), re.M)]
    assert not marked


@pytest.mark.parametrize("package", PACKAGES)
def test_licence_is_that_of_the_repository(package):
    assert (ROOT / "packages" / package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
