"""A run that goes on with a changed configuration, or a checkpoint of another dtype, says so and says what holds."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from credit_halo.testing import run_threads
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import check, train
from credit_parallel.app.training.log import FILE, read_metrics
from credit_parallel.app.training.resuming import changes
from credit_parallel.checkpoint import export_plain, load_checkpoint, load_plain, save_checkpoint

CPU = torch.device("cpu")


def conf_of(folder, **trainer):
    return {
        "folder": str(folder),
        "data": {"options": {"height": 12, "width": 8, "times": 12}, "valid": None},
        "model": {"name": "unet", "width": 8, "levels": 2, "groups": 2},
        "trainer": {"steps": 2, "batch_size": 2, "lr": 1e-2, "final_lr": 0.5, "device": "cpu", **trainer},
    }


def run(conf):
    return train(check(RunConfig.from_dict(conf), 1), CPU)


def lines(folder):
    return [line for line in read_metrics(folder / FILE) if line["event"] == "train"]


@pytest.mark.slow
def test_new_values_hold_from_the_step_on(tmp_path, caplog):
    """What changed is listed once, and the schedule goes on on the new curve."""
    run(conf_of(tmp_path))
    with caplog.at_level(logging.WARNING):
        run(conf_of(tmp_path, steps=5, lr=2e-2, weight_decay=0.3, betas=[0.8, 0.9], max_grad_norm=0.1, keep=2))
    (said,) = [record.getMessage() for record in caplog.records if "going on" in record.getMessage()]
    assert said.startswith("going on from step 2 with the new values")
    for text in (
        "trainer.steps: 2 in the checkpoint, 5 now",
        "trainer.lr: 0.01 in the checkpoint, 0.02 now",
        "trainer.weight_decay: 0.01 in the checkpoint, 0.3 now",
        "trainer.betas: [0.9, 0.95] in the checkpoint, [0.8, 0.9] now",
        "trainer.max_grad_norm: 1.0 in the checkpoint, 0.1 now",
    ):
        assert text in said
    assert "keep" not in said
    assert not any("settings of the checkpoint" in record.getMessage() for record in caplog.records)
    run(conf_of(tmp_path / "curve", steps=5, lr=2e-2))
    rates, curve = ([line["lr"] for line in lines(where)] for where in (tmp_path, tmp_path / "curve"))
    assert rates[2:] == curve[2:]
    saved = load_state(tmp_path)
    assert [group["weight_decay"] for group in saved] == [0.3, 0.0]
    assert {group["betas"] for group in saved} == {(0.8, 0.9)}


def load_state(folder):
    checked = check(RunConfig.from_dict(conf_of(folder, steps=5)), 1)
    from credit_parallel.app.training.schedule import make_optimizer

    optimizer = make_optimizer(checked.model, checked.config.trainer)
    load_checkpoint(folder / "checkpoints", checked.model, optimizer)
    return optimizer.param_groups


@pytest.mark.slow
def test_an_unchanged_run_says_nothing_and_has_the_same_numbers(tmp_path, caplog):
    """In two parts and in one: the same losses and rates to the last bit, and no word of a change."""
    whole = tmp_path / "whole"
    run(conf_of(whole, steps=4, checkpoint_every=2, keep=3))
    for later in (whole / "checkpoints").glob("*4"):
        for file in later.rglob("*"):
            file.unlink()
        later.rmdir()
    before = lines(whole)
    with caplog.at_level(logging.WARNING):
        run(conf_of(whole, steps=4, checkpoint_every=1, grad_accum_steps=2))
    assert not [record for record in caplog.records if record.name.startswith("credit_parallel")]
    for line, other in zip(before, lines(whole), strict=True):
        assert line["lr"] == other["lr"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("batch_size", 4), ("seed", 3), ("rollout", 2)])
def test_what_cannot_change_is_refused_by_name(key, value, tmp_path):
    run(conf_of(tmp_path))
    with pytest.raises(ValueError, match=key if key != "rollout" else "trainer.rollout|samples is"):
        run(conf_of(tmp_path, steps=4, **{key: value}))


def test_changes_of_a_configuration():
    saved = RunConfig.from_dict(conf_of("a")).to_dict()
    now = RunConfig.from_dict(conf_of("b", parallelism={"domain": 2}, valid_every=3)).to_dict()
    assert changes(saved, now) == []
    del saved["trainer"]["max_grad_norm"]  # of a version that did not have it
    assert changes(saved, now) == []
    now["model"]["groups"] = 4
    del now["model"]["levels"]
    now["data"]["options"]["width"] = 16
    assert changes(saved, now) == [
        "data.options.width: 8 in the checkpoint, 16 now",
        "model.groups: 2 in the checkpoint, 4 now",
        "model.levels: 2 in the checkpoint, not there now",
    ]
    now["trainer"]["batch_size"] = 8
    with pytest.raises(ValueError, match=r"trainer\.batch_size: 2 in the checkpoint, 8 now: this cannot change"):
        changes(saved, now)


# load_checkpoint in a program of one's own


def test_settings_of_an_optimizer(tmp_path, caplog):
    model = nn.Linear(3, 3)
    save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1), step=1)
    for settings, expected in (("checkpoint", (1e-3, 0.1)), ("optimizer", (5e-3, 0.2))):
        caplog.clear()
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.2)
        with caplog.at_level(logging.WARNING):
            load_checkpoint(tmp_path, model, optimizer, settings=settings)
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == expected
        said = [record.getMessage() for record in caplog.records]
        if settings == "optimizer":
            assert said == []
        else:
            (text,) = said
            assert "lr of group 0: 0.001 in the checkpoint, 0.005 here" in text
            assert "weight_decay of group 0: 0.1 in the checkpoint, 0.2 here" in text
            assert "settings='optimizer'" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1))
    assert caplog.records == []
    with pytest.raises(ValueError, match="settings must be"):
        load_checkpoint(tmp_path, model, settings="mine")


class Some(nn.Module):
    def __init__(self, real, complex_dtype):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.ones(3, dtype=real)) for _ in "ab")
        self.w = nn.Parameter(torch.full((3,), 1 + 2j if complex_dtype.is_complex else 1.0, dtype=complex_dtype))


PAIRS = [
    (torch.float32, torch.complex64, torch.float64, torch.complex128),
    (torch.float32, torch.complex64, torch.bfloat16, torch.complex64),
    (torch.float64, torch.complex128, torch.float32, torch.complex64),
]


@pytest.mark.parametrize(("real", "compl", "own_real", "own_complex"), PAIRS, ids=str)
def test_casts_are_said(real, compl, own_real, own_complex, tmp_path, caplog):
    save_checkpoint(tmp_path, trained := Some(real, compl), optimizer := stepped(trained), step=1)
    export_plain(tmp_path, tmp_path / "plain.pt")
    for plain in (False, True):
        caplog.clear()
        model = Some(own_real, own_complex)
        mine = stepped(model)
        with caplog.at_level(logging.WARNING):
            if plain:
                load_plain(tmp_path / "plain.pt", model)
            else:
                load_checkpoint(tmp_path, model, mine)
        (said,) = [record.getMessage() for record in caplog.records]
        short = [str(dtype).removeprefix("torch.") for dtype in (real, own_real, compl, own_complex)]
        assert f"2 tensor(s) from {short[0]} to {short[1]} (a, ...)" in said
        assert (f"1 tensor(s) from {short[2]} to {short[3]} (w)" in said) == (compl != own_complex)
        torch.testing.assert_close(model.w, trained.w.to(own_complex))
        if not plain:
            assert mine.state[model.w]["exp_avg"].dtype == own_complex
            torch.testing.assert_close(
                mine.state[model.w]["exp_avg"], optimizer.state[trained.w]["exp_avg"].to(own_complex)
            )
            mine.step()


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_complex_values_do_not_become_real(tmp_path):
    save_checkpoint(tmp_path, Some(torch.float32, torch.complex64), step=1)
    export_plain(tmp_path, tmp_path / "plain.pt")
    model = Some(torch.float32, torch.float32)
    for load in (lambda: load_checkpoint(tmp_path, model), lambda: load_plain(tmp_path / "plain.pt", model)):
        with pytest.raises(
            ValueError, match="complex tensors do not fit into real ones: w is complex64 there, float32"
        ):
            load()
    assert torch.equal(model.w, torch.ones(3))


def test_only_the_first_rank_says_it(tmp_path, caplog):
    model = nn.Linear(3, 3)
    save_checkpoint(tmp_path, model, step=1)

    def rank_main(rank):
        load_checkpoint(tmp_path, nn.Linear(3, 3).double())

    with caplog.at_level(logging.WARNING):
        run_threads(rank_main, 2)
    assert len([record for record in caplog.records if "cast" in record.getMessage()]) == 1
