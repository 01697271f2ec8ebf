"""A forecast of real temperatures, trained and made by the command line: better than persistence, on any ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from credit_parallel.app.cli.main import main

FILE = "era5-t2m-uk-2019-03.nc"
DATA = Path(os.environ.get("CREDIT_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
EXAMPLE = Path(__file__).parents[3] / "examples" / "era5-t2m.yml"


def command(*arguments):
    """On several ranks as it is typed; on one rank here, which saves the start of a process."""
    arguments = list(map(str, arguments))
    if "--ranks" not in arguments:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main(arguments) == 0
        return output.getvalue()
    done = subprocess.run(
        [sys.executable, "-m", "credit_parallel", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(folder, *more):
    found = json.loads(command("forecast", folder, "--steps", 1, "--every", 3, "--quiet", "--json", *more))
    return found["rmse"]["t2m"][0], found["persistence_rmse"]["t2m"][0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_six_hours_ahead_on_days_that_were_not_seen(tmp_path):
    """Trained until the 24th of March, and scored from then on."""
    pytest.importorskip("netCDF4")
    if not (DATA / FILE).exists():
        pytest.skip(f"no {FILE} in {DATA}: set CREDIT_TEST_DATA")
    source = ["--set", f"data.source={DATA / FILE}", "--set", "trainer.steps=50", "--set", "trainer.warmup=10"]
    train = ["train", "-c", EXAMPLE, "--quiet", *source, "--set", "trainer.valid_every=0"]
    command(*train, "--folder", tmp_path / "4", "--ranks", 4)
    command(*train, "--folder", tmp_path / "1", "--set", "trainer.parallelism={}")
    one, persistence = scores(tmp_path / "1")
    four, same = scores(tmp_path / "4", "--ranks", 4)
    assert same == pytest.approx(persistence, rel=1e-6)
    assert one < 0.8 * persistence
    assert four == pytest.approx(one, rel=1e-3)
    elsewhere, _ = scores(tmp_path / "4")  # the weights of four ranks, on one
    assert elsewhere == pytest.approx(four, rel=1e-5)
