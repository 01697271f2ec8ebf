"""Who is gone: a rank that has ended or was stopped is named, whatever the survivors were in."""

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from credit_halo import ExchangeError, all_sum, as_timeout, exchange_rows, naming_missing_ranks, plan_halo, set_timeouts
from credit_halo.faults import between_ranks
from credit_halo.testing import RankError, run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 2, 3))
TIMEOUT = 3.0


def exchange(rank: int) -> None:
    plan = plan_halo(PARTITION, 1, 1, rank=rank)
    exchange_rows(torch.ones(1, 1, PARTITION.sizes[rank], 2), plan)


def reduce(rank: int) -> None:
    with naming_missing_ranks("my own sums"):
        dist.all_reduce(torch.ones(3))


def summed(rank: int) -> None:
    all_sum(torch.ones(3))


def loses_one(rank: int, what: Callable[[int], None], how: str, folder: Path) -> None:
    """Rank 2 ends or stops, after all ranks have done something together; the others write down what they get."""
    initialize_domain_parallel(3, 3)
    for warm in (exchange, reduce, summed):
        warm(rank)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    set_timeouts(TIMEOUT if how == "stops" else 300)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    try:
        what(rank)
    except ExchangeError as error:
        (folder / f"said-{rank}.part").write_text(str(error))
        (folder / f"said-{rank}.part").rename(folder / f"said-{rank}")
    # A rank without an error stays until the other has asked, or it would have ended too.
    if rank == 0 and (how == "stops" or not (folder / "said-0").exists()):
        while not (folder / "said-1").exists():
            time.sleep(0.05)
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(int((folder / "pid-2").read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "stops"])
@pytest.mark.parametrize("what", [exchange, reduce, summed])
def test_the_survivors_name_the_rank_that_is_gone(what: Callable[[int], None], how: str, tmp_path: Path) -> None:
    with pytest.raises(RankError) as info:
        run_processes(loses_one, 3, what, how, tmp_path, timeout=280, group_timeout=120)
    assert list(info.value.failures) == [2], "the others raised as they should, and returned"
    for rank in (0, 1):
        if what is exchange and rank == 0:
            continue  # whose only neighbour is rank 1, and which may be done
        said = (tmp_path / f"said-{rank}").read_text()
        assert re.search(r"rank 2 \(dp 0, tp 0, domain 2\) does not answer: it has ended, or been stopped", said), said
        assert not re.search(r"rank [01].{0,30} do(es)? not answer", said), said
    if what is reduce:
        assert "my own sums" in said


def late(rank: int) -> str:
    reduce(rank)
    dist.barrier()
    set_timeouts(TIMEOUT)
    if rank == 2:
        time.sleep(TIMEOUT + 20)
        return ""
    with pytest.raises(ExchangeError) as info:
        reduce(rank)
    return str(info.value)


@pytest.mark.slow
def test_a_rank_that_is_late_is_not_called_dead() -> None:
    said = run_processes(late, 3, timeout=200, group_timeout=120)
    for rank in (0, 1):
        assert not re.search("do(es)? not answer", said[rank])
        assert "gave up before" in said[rank] or re.search(r"all ranks are alive.*rank 2 elsewhere", said[rank])


def passes_others(rank: int) -> None:
    for error in (ValueError("timed out"), RuntimeError("a mistake of the model"), torch.OutOfMemoryError("NCCL")):
        with pytest.raises(type(error), match=str(error)), naming_missing_ranks("anything"):
            raise error


def test_other_errors_pass_as_they_are() -> None:
    passes_others(0)
    run_threads(passes_others, 2)
    assert between_ranks(dist.DistNetworkError("x"))
    assert not between_ranks(RuntimeError("size mismatch"))


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), 1e9, True, "60", timedelta(0), None])
def test_a_timeout_is_a_positive_time(wrong: object) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
        as_timeout(wrong)  # type: ignore[arg-type]


def test_a_timeout_is_taken_in_seconds_or_as_a_timedelta() -> None:
    assert as_timeout(90) == as_timeout(timedelta(minutes=1.5)) == timedelta(seconds=90)
    set_timeouts(5)  # without a world there is nothing to set
