"""Every command of the README is run: by CI as it is typed, or here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BY_CI = {
    "pip install nox && nox -s demo": "nox -s demo",
    "pip install nox && nox -s tests-gloo tests-gpu": "nox -s tests-gloo tests-gpu",
    # What the nox sessions install, in the same words.
    "pip install -c constraints.txt ./packages/credit-mesh ./packages/credit-halo ./packages/credit-domain "
    '"./packages/credit-parallel[data,plot]"': None,
}


def commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_ci_runs_those_that_install():
    script = (ROOT / ".ci" / "run").read_text()
    listed = commands()
    for command, run in BY_CI.items():
        assert command in listed
        assert run is None or re.search(rf"^{run}", script, re.MULTILINE)
    assert all(command in BY_CI or command.startswith("credit-parallel ") for command in listed)


@pytest.mark.timeout(600)
def test_the_others_run_as_they_are_typed(tmp_path):
    for package in ("netCDF4", "xarray", "matplotlib"):
        pytest.importorskip(package)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    ran = [command for command in commands() if command not in BY_CI]
    assert len(ran) >= 5
    for command in ran:
        _, *arguments = shlex.split(command)
        done = subprocess.run(
            [sys.executable, "-m", "credit_parallel", *arguments],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "forecast.nc").exists()
