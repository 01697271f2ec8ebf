"""A rank that has ended or was stopped is named in all that ranks do together, within the timeout."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from credit_halo import ExchangeError, set_timeouts
from credit_halo.testing import RankError, run_processes
from credit_parallel import parallelize
from credit_parallel.app.config import RunConfig
from credit_parallel.app.data.statistics import compute_statistics
from credit_parallel.app.forecast import open_writer, run_forecast
from credit_parallel.app.training.experiment import Experiment, check, prepare

TIMEOUT = 3.0


@contextmanager
def one_is_lost(rank: int, how: str, folder: Path) -> Iterator[None]:
    """Rank 2 ends or stops; the others write down what they get inside."""
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    set_timeouts(TIMEOUT if how == "stops" else 300)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    try:
        yield
    except ExchangeError as error:
        (folder / f"said-{rank}.part").write_text(str(error))
        (folder / f"said-{rank}.part").rename(folder / f"said-{rank}")
    if rank == 0 and how == "stops":
        while not (folder / "said-1").exists():
            time.sleep(0.05)
        os.kill(int((folder / "pid-2").read_text()), signal.SIGKILL)


def gradients(rank: int, how: str, folder: Path, parallelism: dict[str, object], backward: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1))
    context = parallelize(model, {"trainer": {"parallelism": parallelism}})
    if context.layout.domain > 1:
        context.manager.declare(9)
    optimizer = torch.optim.AdamW(context.model.parameters())
    x = torch.ones(1, 1, 9 // context.layout.domain, 4)

    def forward_and_backward() -> None:
        with context.accumulate():
            context.mean(context.model(x) ** 2).backward()

    forward_and_backward()
    context.step(optimizer)
    if not backward:
        forward_and_backward()
    with one_is_lost(rank, how, folder):
        if backward:
            forward_and_backward()
        context.step(optimizer)


def ddp(rank: int, how: str, folder: Path) -> None:
    gradients(rank, how, folder, {"data": "ddp"}, True)


def fsdp2(rank: int, how: str, folder: Path) -> None:
    gradients(rank, how, folder, {"data": "fsdp2"}, True)


def domain(rank: int, how: str, folder: Path) -> None:
    gradients(rank, how, folder, {"domain": 3}, False)


def saving(rank: int, how: str, folder: Path) -> None:
    context = parallelize(nn.Linear(4, 4), {"trainer": {"parallelism": {"data": "ddp"}}})
    with one_is_lost(rank, how, folder):
        context.save(folder / "checkpoints", step=1)


def experiment(folder: Path) -> Experiment:
    conf = {
        "folder": str(folder / "run"),
        "data": {"options": {"height": 21, "width": 8, "trajectories": 1, "times": 10}},
        "model": {"name": "unet", "width": 8, "levels": 2, "groups": 2},
        "trainer": {"parallelism": {"data": "ddp"}, "steps": 1, "batch_size": 3, "device": "cpu"},
    }
    checked = check(RunConfig.from_dict(conf), 3)
    return prepare(checked, torch.device("cpu"))


def statistics(rank: int, how: str, folder: Path) -> None:
    made = experiment(folder)
    with one_is_lost(rank, how, folder):
        compute_statistics(made.checked.source, range(6), 1, made.rows, made.context.manager)


def forecast(rank: int, how: str, folder: Path) -> None:
    made = experiment(folder)
    run_forecast(made, [0, 1, 2], 1)
    with one_is_lost(rank, how, folder):
        run_forecast(made, [0, 1, 2], 1)


def writing(rank: int, how: str, folder: Path) -> None:
    pytest.importorskip("netCDF4")
    made = experiment(folder)
    writer = open_writer(made, folder / "forecast.nc", [0, 1, 2], 1)
    with one_is_lost(rank, how, folder):
        writer.flush()


WHERE = {
    ddp: "forward and backward",
    fsdp2: "forward and backward",
    domain: "step, averaging gradients",
    saving: "saving a checkpoint",
    statistics: "",  # which the agreement before it tells
    forecast: "forecast",
    writing: "writing a forecast",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize("what", WHERE)
def test_the_survivors_name_the_rank_that_is_gone(
    what: Callable[[int, str, Path], None], how: str, tmp_path: Path
) -> None:
    with pytest.raises(RankError) as info:
        run_processes(what, 3, how, tmp_path, timeout=280, group_timeout=200)
    assert list(info.value.failures) == [2], f"the others raised as they should, and returned: {info.value}"
    for rank in (0, 1):
        said = (tmp_path / f"said-{rank}").read_text()
        assert re.search(r"rank 2 \(dp \d, tp 0, domain \d\) does not answer: it has ended, or been stopped", said), (
            said
        )
        assert not re.search(r"rank [01].{0,30} do(es)? not answer", said), said
        assert WHERE[what] in said


def timeouts(rank: int, data: str, by: str) -> tuple[set[float], set[float]]:
    """The timeouts of all groups of this process, before and after the first step."""
    from torch.distributed import distributed_c10d

    def now() -> set[float]:
        backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
        assert len(backends) >= 3  # of the world, dp and domain
        return {backend.options._timeout.total_seconds() for backend in backends}

    conf = {"trainer": {"parallelism": {"data": data, "tensor": 1, "domain": 2}}}
    options = {}
    if by == "configuration":
        conf["trainer"].update(timeout=77, startup_timeout=99)
    else:
        options = {"timeout": timedelta(seconds=77), "startup_timeout": 99.0}
    context = parallelize(nn.Conv2d(1, 1, 3, padding=1), conf, **options)
    context.manager.declare(8)
    before = now()
    optimizer = torch.optim.SGD(context.model.parameters(), 0.1)
    context.mean(context.model(torch.ones(1, 1, 4, 4)) ** 2).backward()
    context.step(optimizer)
    return before, now()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["configuration", "argument"])
@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
def test_every_group_has_the_timeout(data: str, by: str) -> None:
    for before, after in run_processes(timeouts, 4, data, by, timeout=240, group_timeout=200):
        assert before == {99.0}
        assert after == {77.0}


@pytest.mark.parametrize("key", ["timeout", "startup_timeout"])
@pytest.mark.parametrize("wrong", [0, -5, "60s", True, None, float("nan"), float("inf"), 1e12])
def test_a_timeout_in_the_configuration_is_a_positive_number(key: str, wrong: object) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{key} must be a number of seconds above 0"):
        RunConfig.from_dict({"trainer": {"steps": 1, key: wrong}})


def test_the_first_timeout_is_never_the_shorter_one() -> None:
    def first(**trainer: float) -> float:
        return RunConfig.from_dict({"trainer": {"steps": 1, **trainer}}).trainer.first_timeout

    assert (first(), first(timeout=7200), first(startup_timeout=60, timeout=20)) == (1800, 7200, 60)


@pytest.mark.parametrize("wrong", [0, -1, "60", True, timedelta(0)])
def test_parallelize_refuses_a_timeout_that_is_no_time(wrong: object) -> None:
    for key in ("timeout", "startup_timeout"):
        with pytest.raises(ValueError, match=f"{key} must be a number of seconds above 0"):
            parallelize(nn.Linear(1, 1), {"trainer": {"parallelism": {}}}, **{key: wrong})
