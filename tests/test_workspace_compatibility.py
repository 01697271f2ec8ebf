"""The table of what ran on which torch, and that one number says the oldest."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from compatibility import BEGIN, END, merged, read  # noqa: E402

sys.path.pop(0)

from credit_mesh.torch_floor import TORCH_FLOOR, check_torch  # noqa: E402

REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="20"
timestamp="2026-11-30T20:00:00.1+00:00" time="9.1"><testcase name="a"/></testsuite></testsuites>"""


def test_a_report_becomes_a_row_which_replaces_its_like() -> None:
    page = f"# Page\n\n{BEGIN}\n{END}\nmore\n"
    old = read(REPORT, "2.10.0", "3.11", "Linux")
    assert (old.passed, old.failed, old.skipped, old.on) == (14, 3, 3, "2026-11-30")
    page = merged(merged(page, old), read(REPORT, "2.9.1", "3.11", "Linux"))
    page = merged(page, old._replace(passed=17, failed=0))
    assert page.startswith("# Page\n\n")
    assert page.endswith(f"\n{END}\nmore\n")
    assert [line for line in page.splitlines() if line.startswith("| 2")] == [
        "| 2.9.1 | 3.11 | Linux | 14 | 3 | 3 | 2026-11-30 |",
        "| 2.10.0 | 3.11 | Linux | 17 | 0 | 3 | 2026-11-30 |",
    ]


def test_no_test_and_no_table_are_refused() -> None:
    row = read(REPORT, "2.10.0", "3.11", "Linux")
    with pytest.raises(ValueError, match="no test"):
        read("<testsuites><testsuite tests='0'/></testsuites>", "2.10.0", "3.11", "Linux")
    with pytest.raises(ValueError, match="no table"):
        merged("# Page", row)


def test_wheels_ask_for_the_torch_that_is_checked_at_import() -> None:
    floor = ".".join(map(str, TORCH_FLOOR))
    for project in sorted(ROOT.glob("packages/*/pyproject.toml")):
        assert re.findall(r'"(torch\b[^"]*)"', project.read_text()) == [f"torch>={floor}"], project


def test_the_page_names_the_floors_of_other_packages() -> None:
    project = (ROOT / "packages" / "credit-parallel" / "pyproject.toml").read_text()
    asked = set(re.findall(r'"([a-z0-9]+)>=([\d.]+)[";]', project.partition("dependencies = [")[2]))
    section = (ROOT / "docs" / "compatibility.md").read_text().partition("## Other packages")[2]
    said = set(re.findall(r"^\| (\w+)(?: on Python 3.10)? \|[^|]*\| ([\d.]+) \|", section, re.MULTILINE))
    assert said == {(name, floor) for name, floor in asked if name != "torch"}
    assert len({name for name, _ in said}) == 12


@pytest.mark.parametrize("package", ["credit_mesh.manager", "credit_mesh.mesh", "credit_halo", "credit_domain"])
def test_an_old_torch_is_refused_by_name(package: str) -> None:
    code = f"import torch; torch.__version__ = '2.4.1+cu124'; import {package}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    floor = ".".join(map(str, TORCH_FLOOR))
    last = ended.stderr.splitlines()[-1]
    assert last == (
        f"ImportError: the credit packages need torch {floor} or later, and torch 2.4.1+cu124 is installed: "
        f"pip install 'torch>={floor}'"
    )


@pytest.mark.parametrize("version", ["2.15.0", "3.0", "2.13.0a0+gitabc", "2.100.1"])
def test_newer_versions_are_taken(version: str) -> None:
    check_torch(version)
