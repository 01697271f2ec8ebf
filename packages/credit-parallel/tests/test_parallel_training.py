"""The training loop: the same on every layout, and after every interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from credit_halo.testing import run_processes
from credit_parallel.app.config import RunConfig, TrainerConfig
from credit_parallel.app.training import Reporter, check, train
from credit_parallel.app.training.log import FILE, MetricsLog, read_metrics
from credit_parallel.app.training.schedule import make_optimizer, make_scheduler

DATA = Path(os.environ.get("CREDIT_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
CPU = torch.device("cpu")


def conf_of(folder, parallelism=None, **trainer):
    """A small training in float64; 41 rows, so that no number of ranks divides them."""
    return {
        "folder": str(folder),
        "data": {
            "options": {"height": 41, "width": 16, "trajectories": 2, "times": 12},
            "history": 2,
            "forcings": ["solar", "position"],
            "valid": [0.75, 1.0],  # three samples, which two replicas do not share evenly
        },
        "model": {"name": "unet", "width": 8, "levels": 2, "groups": 2},
        "trainer": {
            "parallelism": parallelism or {},
            "steps": 5,
            "batch_size": 4,
            "lr": 1e-2,
            "warmup": 2,
            "rollout": 2,
            "dtype": "float64",
            "device": "cpu",
            **trainer,
        },
    }


class StopAt(Reporter):
    """Asks this process to stop after a step, as a scheduler would."""

    def __init__(self, step):
        self.step = step

    def stepped(self, record):
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trained(rank, conf, stop=None):
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    checked = check(RunConfig.from_dict(conf), world)
    outcome = train(checked, CPU, None if stop is None else StopAt(stop))
    return outcome.step, outcome.finished


def run(conf, ranks, stop=None):
    if ranks == 1:
        return trained(0, conf, stop)
    outcomes = run_processes(trained, ranks, conf, stop, timeout=900)
    assert len(set(outcomes)) == 1
    return outcomes[0]


def logged(folder, event="train"):
    return [line for line in read_metrics(Path(folder) / FILE) if line["event"] == event]


def losses(folder):
    return [line["loss"] for line in logged(folder)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One rank, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("alone")
    assert run(conf_of(folder, grad_accum_steps=2, valid_every=3), 1) == (5, True)
    return folder


LAYOUTS = [
    (2, {"data": "none", "domain": 2}),
    (3, {"data": "ddp", "domain": 3}),
    (4, {"data": "fsdp2", "domain": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallelism"), LAYOUTS, ids=str)
def test_every_layout_has_the_losses_and_scores_of_one_rank(ranks, parallelism, alone, tmp_path):
    assert run(conf_of(tmp_path, parallelism, grad_accum_steps=1 if ranks == 4 else 2, valid_every=3), ranks) == (
        5,
        True,
    )
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-9)
    norms, expected = ([line["grad_norm"] for line in logged(where)] for where in (tmp_path, alone))
    assert norms == pytest.approx(expected, rel=1e-9)
    assert [line["step"] for line in logged(tmp_path, "valid")] == [3, 5]
    for line, other in zip(logged(tmp_path, "valid"), logged(alone, "valid"), strict=True):
        for score in ("rmse", "bias", "acc", "persistence_rmse"):
            assert list(line[score]) == ["u", "v", "vorticity", "streamfunction"][: len(line[score])]
            for label, values in line[score].items():
                assert len(values) == 2  # steps of the rollout
                assert values == pytest.approx(other[score][label], rel=1e-8, abs=1e-12)


def test_it_learns(tmp_path):
    """An untrained model predicts no change, whose loss is 1 on average; a trained one beats that on other waves."""
    conf = conf_of(tmp_path, steps=60, rollout=1, dtype="float32", lr=3e-3)
    conf["data"]["options"]["trajectories"] = 4
    run(conf, 1)
    found = losses(tmp_path)
    assert 0.2 < found[0] < 3
    assert found[-1] < 0.6 * found[0]
    (line,) = logged(tmp_path, "valid")
    assert all(line["rmse"][label][0] < line["persistence_rmse"][label][0] for label in line["rmse"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((1, {}), (1, {})), ((2, {"domain": 2}), (2, {"domain": 2})), ((2, {"domain": 2}), (2, {"data": "ddp"}))],
    ids=["one rank", "two ranks", "another layout"],
)
def test_interrupted_and_resumed(first, then, alone, tmp_path):
    """In the middle of an epoch; on the same layout to the last bit."""
    settings = {"grad_accum_steps": 2, "valid_every": 3}
    reference = tmp_path / "whole"
    same = first == then
    if same and first[0] > 1:
        run(conf_of(reference, first[1], **settings), first[0])
    else:
        reference = alone
    folder = tmp_path / "parts"
    assert run(conf_of(folder, first[1], **settings), first[0], stop=2) == (3, False)  # asked after its second step
    assert [line["event"] for line in read_metrics(folder / FILE)][-1] == "stop"
    assert run(conf_of(folder, then[1], **settings), then[0]) == (5, True)
    if same:
        assert losses(folder) == losses(reference)
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-9)
    assert [line["step"] for line in logged(folder)] == [1, 2, 3, 4, 5]
    # Nothing is left to do: no step, no second validation.
    before = (folder / FILE).read_text()
    assert run(conf_of(folder, then[1], **settings), then[0]) == (5, True)
    assert len(logged(folder)) == 5
    assert before.count('"valid"') == (folder / FILE).read_text().count('"valid"')


def test_what_was_logged_after_the_last_checkpoint_is_dropped(tmp_path):
    conf = conf_of(tmp_path, checkpoint_every=2, steps=3)
    run(conf, 1)
    log = MetricsLog(tmp_path, True, step=3)
    log.write("train", step=4, loss=0.0)  # a run that was killed after its step 4
    log.close()
    conf["trainer"]["steps"] = 5
    run(conf, 1)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5]
    assert losses(tmp_path)[3] != 0


def test_a_line_that_was_cut_off(tmp_path):
    (tmp_path / FILE).write_text('{"event": "train", "step": 1}\n{"event": "tra')
    assert read_metrics(tmp_path / FILE) == [{"event": "train", "step": 1}]


WAYS = [
    ("fsdp2", {"activation_checkpoint": True}, 1e-9),
    ("fsdp2", {"amp": True, "dtype": "float32"}, 3e-2),
    ("ddp", {"amp": True, "dtype": "float32"}, 3e-2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "settings", "tolerance"), WAYS, ids=str)
def test_ways_to_compute(data, settings, tolerance, alone, tmp_path):
    run(conf_of(tmp_path, {"data": data, "domain": 2}, **settings), 2)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=tolerance)


def trained_compiled(rank, conf):
    """With torch's own code for what is traced: compiling that too takes minutes, and is tested with the layers."""
    compiled, original = [], torch.compile

    def traced(forward, **options):
        compiled.append(forward)
        return original(forward, backend="aot_eager", **options)

    with mock.patch.object(torch, "compile", traced):
        trained(rank, conf)
    return len(compiled)


@pytest.mark.slow
def test_compiled(alone, tmp_path):
    """Blocks of several shapes, in training and in validation; each is traced as one graph."""
    conf = conf_of(tmp_path, {"data": "ddp", "domain": 2}, grad_accum_steps=2, valid_every=3, compile=True)
    assert run_processes(trained_compiled, 2, conf, timeout=900) == [5, 5]
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-9)
    scores = [logged(folder, "valid")[0]["rmse"]["u"] for folder in (tmp_path, alone)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


def real_conf(folder, name, parallelism):
    conf = conf_of(folder, parallelism, rollout=1, steps=3)
    if name == "eraint_uvz.nc":
        data = {"source": str(DATA / name), "levels": [500], "train": [0, 1], "valid": None}
        conf["trainer"]["batch_size"] = 1
    else:
        data = {"source": str(DATA / name), "lead": "6h", "history": 2, "forcings": ["solar"], "train": [0, 0.1]}
    return {**conf, "data": data}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eraint_uvz.nc", "era5-t2m-uk-2019-03.nc"])
def test_real_fields(name, tmp_path):
    pytest.importorskip("netCDF4")
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA}: set CREDIT_TEST_DATA")
    found = {}
    four = {"data": "ddp", "domain": 4} if name.startswith("eraint") else {"data": "fsdp2", "domain": 2}
    for ranks, parallelism in ((1, {}), (2, {"domain": 2}), (4, four)):
        run(real_conf(tmp_path / str(ranks), name, parallelism), ranks)
        found[ranks] = losses(tmp_path / str(ranks))
    assert found[2] == pytest.approx(found[1], rel=1e-9)
    assert found[4] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.slow
def test_a_transformer_divided_three_ways(tmp_path):
    """Its heads and hidden channels over two ranks, its rows over two."""
    for name, ranks, parallelism in (("one", 1, {}), ("four", 4, {"tensor": 2, "domain": 2})):
        conf = conf_of(tmp_path / name, parallelism, steps=3)
        conf["model"] = {"name": "transformer", "width": 8, "heads": [2, 2], "depths": [2, 1], "window": [2, 4]}
        run(conf, ranks)
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)


@pytest.mark.slow
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(conf_of(tmp_path, tensorboard=True, steps=2), 1)
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(tmp_path), rel=1e-6)
    (line,) = logged(tmp_path, "valid")
    for lead, value in enumerate(line["rmse"]["u"], 1):
        assert board.Scalars(f"valid/rmse/u/{lead}")[0].value == pytest.approx(value, rel=1e-6)


def test_the_optimizer_and_its_schedule():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2))
    config = TrainerConfig(steps=10, lr=2.0, warmup=3, final_lr=0.25, weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.5, 0.0, 0.0, 0.0]
    scheduler = make_scheduler(optimizer, config, 10)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == pytest.approx(0.5)


MISTAKES = [
    ({"trainer": {"parallelism": {"domain": 3}}}, 2, "trainer.parallelism: world_size=2 is not divisible"),
    ({"trainer": {"parallelism": {"domain": 32}}}, 32, "ranks fit 41 rows"),
    ({"trainer": {"parallelism": {"data": "none"}}}, 2, "trainer.parallelism.data: none keeps 2 replicas apart"),
    ({"trainer": {"batch_size": 3, "parallelism": {"data": "ddp"}}}, 2, "trainer.batch_size counts the samples of all"),
    ({"trainer": {"batch_size": 64}}, 1, "and trainer.batch_size is 64: take more times, or a smaller batch"),
    ({"model": {"name": "unit"}}, 1, "unit"),
    ({"model": {"name": "unet", "widht": 8}}, 1, "widht"),
    ({"data": {"source": "nowhere.nc"}}, 1, "nowhere.nc"),
]


@pytest.mark.parametrize(("change", "ranks", "message"), MISTAKES, ids=[m[:30] for _, _, m in MISTAKES])
def test_mistakes_are_found_before_a_rank_starts(change, ranks, message, tmp_path):
    conf = conf_of(tmp_path)
    for block, values in change.items():
        conf[block] = {**conf[block], **values} if block == "trainer" else values
    with pytest.raises(ValueError, match=re.escape(message)):
        check(RunConfig.from_dict(conf), ranks)


@pytest.mark.parametrize("time", [2, 10], ids=["training", "validation"])
def test_values_that_are_missing(time, tmp_path):
    """Found before the first step, also in what is validated on."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("netCDF4")
    values = torch.randn(12, 8, 16).numpy()
    values[time, 3, 4] = float("nan")
    hours = [f"2020-01-01T{hour:02}" for hour in range(12)]
    coordinates = {
        "time": ("time", [np.datetime64(hour, "ns") for hour in hours]),
        "latitude": ("latitude", torch.linspace(70, -70, 8).numpy(), {"units": "degrees_north"}),
        "longitude": ("longitude", (torch.arange(16) * 22.5).numpy(), {"units": "degrees_east"}),
    }
    data = xarray.Dataset({"t": (("time", "latitude", "longitude"), values)}, coordinates)
    data.to_netcdf(tmp_path / "t.nc")
    conf = {**conf_of(tmp_path / "run"), "data": {"source": str(tmp_path / "t.nc")}}
    with pytest.raises(
        ValueError, match=rf"'t' has 1 value\(s\) that are missing or not finite, first at {hours[time]}"
    ):
        run({**conf, "trainer": {**conf["trainer"], "rollout": 1}}, 1)
    assert not (tmp_path / "run" / FILE).exists()


def command(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "credit_parallel", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        **kwargs,
    )


def written(path, conf):
    path.write_text(json.dumps(conf))  # which is YAML
    return path


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """Ranks of its own; a mistake is one line and status 2; a signal ends all of them with a checkpoint."""
    config = written(tmp_path / "c.yml", conf_of(tmp_path / "a", {"domain": 2}, steps=4))
    done = command("train", "-c", config, "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) = domain 2 (none) on cpu, gloo; " in done.stdout
    assert "rows per rank 24, 17" in done.stdout or "rows per rank 20, 21" in done.stdout
    assert "step 4 of 4: finished" in done.stdout
    assert "loss" in done.stderr
    assert "MiB/rank" in done.stderr

    bad = conf_of(tmp_path / "b", {"domain": 2}, steps=4)
    bad["trainer"]["stepz"] = 1
    wrong = command("train", "-c", written(tmp_path / "bad.yml", bad), "--ranks", 2)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "credit-parallel train: " in wrong.stderr
    assert "did you mean steps?" in wrong.stderr
    assert not (tmp_path / "b").exists()

    endless = written(tmp_path / "e.yml", conf_of(tmp_path / "e", {"domain": 2}, steps=100000))
    line = [sys.executable, "-m", "credit_parallel", "train", "-c", str(endless), "--ranks", "2"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(logged(tmp_path / "e")) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped; the same command goes on from here" in out
    taken = len(logged(tmp_path / "e"))
    assert (tmp_path / "e" / "checkpoints" / f"step-{taken:08}").is_dir()


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    config = written(tmp_path / "c.yml", conf_of(tmp_path / "a", {"domain": 2}, steps=2))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "credit_parallel"]
    done = subprocess.run(
        [sys.executable, *line, "train", "-c", str(config), "--quiet"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "a")) == 2
