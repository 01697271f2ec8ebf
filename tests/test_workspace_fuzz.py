"""The session that draws new examples, and the examples that all other runs draw."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**env, **environment}, capture_output=True, text=True, check=False
    )


def fuzz(folder: Path, body: str, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_drawn.py").write_text(
        "from hypothesis import given, settings, strategies as st\n\n"
        f"@settings(database=None)\n@given(st.integers(0, 2**30))\ndef test_drawn(x):\n    {body}\n"
    )
    return run(str(ROOT / "tools" / "fuzz.py"), "--workers", "1", *args, "test_drawn.py", cwd=folder)


def test_a_failure_ends_it_with_the_command_that_repeats_it(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "assert x < 2**20", "--minutes", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    seed = re.findall(r"^round \d+: seed (\d+)$", done.stdout, flags=re.MULTILINE)[-1]
    command = f"python -m pytest --hypothesis-seed={seed} 'test_drawn.py::test_drawn'"
    assert done.stdout.splitlines()[-1] == f"repeat: HYPOTHESIS_PROFILE=fuzz {command}"
    again = run("-m", "pytest", f"--hypothesis-seed={seed}", "test_drawn.py::test_drawn", cwd=tmp_path)
    assert again.returncode == 1


def test_each_round_draws_anew_until_the_time_is_up(tmp_path: Path) -> None:
    log = tmp_path / "drawn.txt"
    done = fuzz(tmp_path, f"print(x, file=open({str(log)!r}, 'a'))", "--minutes", "0.1", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    seeds = re.findall(r"^round \d+: seed (\d+)$", done.stdout, flags=re.MULTILINE)
    assert seeds[0] == "7"
    assert len(set(seeds)) == len(seeds)
    assert "no failure" in done.stdout.splitlines()[-1]
    assert len(set(log.read_text().split())) > 50


@pytest.mark.parametrize(
    ("environment", "same"), [({}, True), ({"CI": "1"}, True), ({"HYPOTHESIS_PROFILE": "dev"}, False)], ids=str
)
def test_the_same_examples_at_a_desk_as_in_ci(environment: dict[str, str], same: bool) -> None:
    ask = "import conftest, hypothesis; print(hypothesis.settings().derandomize)"
    assert run("-c", ask, **environment).stdout.split() == [str(same)]


def test_there_are_property_tests_in_the_packages() -> None:
    ask = "import sys; sys.path.insert(0, 'tools'); from fuzz import test_files; print(*test_files(['packages']))"
    files = run("-c", ask).stdout
    for layer in ("credit-mesh", "credit-halo", "credit-domain", "credit-parallel"):
        assert f"packages/{layer}/tests/test_" in files
