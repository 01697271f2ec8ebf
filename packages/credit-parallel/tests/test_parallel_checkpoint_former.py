"""Checkpoints of the format before safetensors load, are exported, and are gone on from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from parallel_former_format import as_former, unpacked
from safetensors.torch import load_file
from test_parallel_checkpoint import on
from test_parallel_checkpoint_files import Odd, assert_filled, half_complex, load_and_look
from torch import nn

from credit_halo.testing import run_threads
from credit_parallel.app.cli.main import main
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import check, train
from credit_parallel.app.training.log import FILE, read_metrics
from credit_parallel.checkpoint import export_plain, latest, load_checkpoint, load_plain, save_checkpoint


def test_what_version_1_has_saved(tmp_path):
    """A training goes on along its curve, on other layouts too."""
    folder = unpacked(tmp_path) / "training"
    assert latest(folder) == folder / "step-00000003"
    whole = on(None, "adamw", 0, None, None, 5)[0][3:]
    for layout in (None, ("fsdp2", 2, 2, 1)):
        for losses in on(layout, "adamw", 7, folder, None, 2):
            torch.testing.assert_close(losses, whole, rtol=1e-9, atol=1e-9)
    export_plain(folder, tmp_path / "out.safetensors")
    export_plain(folder, tmp_path / "out.pt")
    expected = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors"), expected, rtol=0, atol=0)


@half_complex
def test_dtypes_that_version_1_has_saved(tmp_path):
    folder = unpacked(tmp_path) / "dtypes"
    load_and_look(0, folder)
    run_threads(load_and_look, 2, folder)
    for form in ("torch", "safetensors"):
        export_plain(folder, tmp_path / "plain", format=form)
        model = Odd(filled=False)
        load_plain(tmp_path / "plain", model)
        assert_filled(model.state_dict())


def test_a_folder_with_both_formats(tmp_path):
    """The last saved counts, whichever it is, and older ones go in their order."""
    for step in range(4):
        save = save_checkpoint(tmp_path, nn.Linear(2, 2), step=step, keep=3)
        if step % 2 == 0:
            as_former(save.folder)
    assert load_checkpoint(tmp_path, nn.Linear(2, 2)).step == 3
    assert load_checkpoint(tmp_path / "step-00000002", nn.Linear(2, 2)).step == 2
    save_checkpoint(tmp_path, nn.Linear(2, 2), step=4, keep=2)
    assert [path.name for path in sorted(tmp_path.glob("step*"))] == ["step-00000003", "step-00000004"]


@pytest.mark.slow
def test_the_former_format_between_processes(tmp_path):
    folder = unpacked(tmp_path) / "training"
    whole = on(None, "adamw", 0, None, None, 5)[0][3:]
    for losses in on(("fsdp2", 1, 1, 3), "adamw", 7, folder, None, 2, fork=False):
        torch.testing.assert_close(losses, whole, rtol=1e-9, atol=1e-9)


def trained(folder):
    """Train up to four steps; the losses so far."""
    conf = {
        "folder": str(folder),
        "data": {"options": {"height": 12, "width": 8, "times": 12}, "valid": None},
        "model": {"name": "unet", "width": 8, "levels": 2, "groups": 2},
        "trainer": {"steps": 4, "batch_size": 2, "device": "cpu", "checkpoint_every": 2},
    }
    train(check(RunConfig.from_dict(conf), 1), torch.device("cpu"))
    return [line["loss"] for line in read_metrics(folder / FILE) if line["event"] == "train"]


def forecast(folder, capsys):
    capsys.readouterr()
    assert main(["forecast", str(folder), "--steps", "2", "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)["rmse"]


@pytest.mark.slow
def test_training_and_forecasts_go_on_from_the_former_format(tmp_path, capsys):
    losses, rmse = trained(tmp_path), forecast(tmp_path, capsys)
    for step in (tmp_path / "checkpoints").glob("step-*"):
        as_former(step)
    assert forecast(tmp_path, capsys) == rmse
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    assert trained(tmp_path) == losses
    assert [path.name for path in (tmp_path / "checkpoints" / "step-00000004").glob("rank*")] == [
        "rank-00000.safetensors"
    ]
