"""The demonstration: what it compares, and how it ends. CI runs the whole of it."""

from __future__ import annotations

import argparse
import json

import pytest

from credit_parallel.app.cli import demo_command
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import check


def losses_of(folder, losses):
    folder.mkdir()
    lines = [{"event": "train", "step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("other", "status"), [(0.5 + 1e-9, 0), (0.5 + 1e-5, 1), (float("nan"), 1)])
def test_curves_that_part_are_a_failure(other, status, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    args = argparse.Namespace(ranks=4, domain=2, folder=str(tmp_path), steps=3)
    checked = check(RunConfig.from_dict(demo_command._configuration(args)), 4)
    assert len(set(checked.partition.sizes)) == 2  # uneven rows
    several, one = losses_of(tmp_path / "a", [1.0, other, 0.25]), losses_of(tmp_path / "b", [1.0, 0.5, 0.25])
    assert demo_command._compare(args, checked, tmp_path, several, one) == status
    assert ("the curves part" in capsys.readouterr().out) == bool(status)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("loss.png", "layout.png"))
