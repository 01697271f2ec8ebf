"""What goes wrong: the same error on all ranks before data moves, and no hang and no wrong number after."""

import copy
import gc
import os
import pickle
import re
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from halo_reference import shard, whole_numbers
from torch.utils.checkpoint import checkpoint

from credit_halo import (
    EdgeRule,
    ExchangeError,
    HaloExchange,
    broadcast,
    exchange_rows,
    ops,
    plan_halo,
    plan_rows,
    pole_crossing,
    post_rows,
)
from credit_halo.testing import RankError, run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 2, 3))


def good(rank: int, label: str = "rows") -> None:
    whole = whole_numbers((1, 1, 8, 2))
    out = exchange_rows(shard(whole, PARTITION, rank), plan_halo(PARTITION, 1, 1, rank=rank), label=label)
    rows = slice(PARTITION.offsets[rank], PARTITION.offsets[rank + 1] + 2)
    assert torch.equal(out, torch.nn.functional.pad(whole, (0, 0, 1, 1))[:, :, rows])


def disagree(rank: int, what: str) -> str:
    x = torch.ones(1, 2, PARTITION.sizes[rank], 4)
    plan, dim, label = plan_halo(PARTITION, 1, 1, rank=rank), -2, "conv1"
    if rank == 1:
        if what == "dtype":
            x = x.double()
        elif what == "shape":
            x = torch.ones(1, 3, PARTITION.sizes[rank], 4)
        elif what == "halo":
            plan = plan_halo(PARTITION, 2, 2, rank=rank)
        elif what == "edge":
            plan = plan_halo(PARTITION, 1, 1, rank=rank, edge="circular")
        elif what == "partition":
            x, plan = torch.ones(1, 2, 3, 4), plan_halo(RowPartition((3, 3, 2)), 1, 1, rank=rank)
        elif what == "nothing to do":
            plan = plan_halo(PARTITION, 0, 0, rank=rank)
        elif what == "label":
            label = "conv2"
        elif what == "rows":
            x = torch.ones(1, 2, 5, 4)
        elif what == "dim":
            dim = 7
    with pytest.raises(ValueError, match="exchange 'conv") as info:
        exchange_rows(x, plan, dim=dim, label=label)
    good(rank)  # nothing is left behind
    return str(info.value)


MESSAGES = {
    "dtype": r"rank 0, 2: float32 of shape .*; rank 1: float64 of shape",
    "shape": r"rank 1: float32 of shape \(1, 3, rows, 4\)",
    "halo": "the ranks disagree on what they exchange. rank 0, 2: .* rank 1: ",
    "edge": "rank 1: .* edge circular",
    "partition": r"rank 1: .*RowPartition\(8 rows over 3: 3 x 2, 2\)",
    "nothing to do": "the ranks disagree",
    "label": "rank 1: .*exchange 'conv2'",
    "rows": r"on rank 1 the tensor of shape \(1, 2, 5, 4\) has 5 rows in dim -2, where .* says 2",
    "dim": r"on rank 1 dim=7 is out of range for a tensor of shape \(1, 2, 2, 4\)",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_ranks_that_disagree_get_the_same_error(what: str) -> None:
    messages = run_threads(disagree, 3, what, timeout=10)
    texts = {message.replace("'conv2'", "'conv1'") if what != "label" else message[20:] for message in messages}
    assert len(texts) == 1, "the same on all ranks"
    assert all(re.search(MESSAGES[what], message) for message in messages)


def test_ranks_that_disagree_in_processes() -> None:
    for what in ("dtype", "rows"):
        messages = run_processes(disagree, 3, what)
        assert all(re.search(MESSAGES[what], message) for message in messages)


def test_halo_layers_that_disagree_get_the_same_error() -> None:
    def rank_main(rank: int) -> str:
        initialize_domain_parallel(3, 3)
        x = torch.ones(1, 2 if rank else 1, PARTITION.sizes[rank], 4)
        with pytest.raises(ValueError, match="exchange 'stem'") as info:
            HaloExchange(1, label="stem")(x)
        with pytest.raises(ValueError, match="exchange 'stem': on rank 2 dim=9 is out of range"):
            HaloExchange(1, 9 if rank == 2 else -2, label="stem")(x[:, :1])
        return str(info.value)

    (message,) = set(run_threads(rank_main, 3))
    assert "exchange 'stem': the ranks disagree" in message


def one_mistake_later(rank: int) -> str:
    good(rank)
    plan = plan_halo(PARTITION, 1, 1, rank=rank)
    rows = PARTITION.sizes[rank] + (rank == 1)
    try:
        exchange_rows(torch.ones(1, 1, rows, 2, dtype=torch.float64), plan)
    except (ValueError, ExchangeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_mistake_after_the_first_use_reaches_everybody() -> None:
    messages = run_processes(one_mistake_later, 3, timeout=600, group_timeout=2)
    assert messages[1].startswith("ValueError: exchange 'rows': on rank 1 the tensor of shape (1, 1, 3, 2) has 3 rows")
    for rank in (0, 2):
        assert messages[rank].startswith("ExchangeError: exchange 'rows' (forward")
        assert "for rank 1" in messages[rank]


def stall(rank: int, how: str, labels: tuple[str, str, str]) -> tuple[str, str, float]:
    """Rank 1 stalls or dies between the first exchange and the second; what the others get for the last two."""
    first, second, third = labels
    good(rank, first)
    if rank == 1:
        if how == "dies":
            os._exit(7)
        time.sleep(12)
    started = time.monotonic()
    with pytest.raises(ExchangeError) as info:
        good(rank, second)
    seconds = time.monotonic() - started
    with pytest.raises(ExchangeError) as again:
        good(rank, third)
    return str(info.value), str(again.value), seconds


STEADY = ("rows", "rows", "rows")


@pytest.mark.slow
def test_a_rank_that_stalls() -> None:
    results = run_processes(stall, 3, "stalls", ("before", "after", "later"), timeout=600, group_timeout=1.5)
    for rank in (0, 2):
        message, again, seconds = results[rank]
        assert "exchange 'after' (forward" in message or "exchange 'after': rank" in message
        assert seconds < 10
        assert "exchange 'later'" in again
        assert "an earlier exchange failed on its group" in again


@pytest.mark.slow
def test_the_peer_that_was_waited_for_is_named() -> None:
    results = run_processes(stall, 3, "stalls", STEADY, timeout=600, group_timeout=1.5)
    for rank in (0, 2):
        message, again, seconds = results[rank]
        assert re.search(rf"exchange 'rows' \(forward.* failed on rank {rank} of 3 while waiting for rank 1", message)
        assert seconds < 10
        assert "was not started, since an earlier exchange failed" in again


def test_a_rank_that_dies() -> None:
    with pytest.raises(RankError) as info:
        run_processes(stall, 3, "dies", STEADY, timeout=600, group_timeout=5)
    assert info.value.failures == {1: "ended with exit code 7"}, "the others raised as they should, and returned"


def test_waiting_twice_is_an_error() -> None:
    def rank_main(rank: int) -> None:
        pending = post_rows(torch.ones(1, 1, PARTITION.sizes[rank], 2), plan_halo(PARTITION, 1, 1, rank=rank))
        pending.wait()
        with pytest.raises(ExchangeError, match="was waited for twice"):
            pending.wait()

    run_threads(rank_main, 3)


def traced(rank: int) -> str:
    import io
    import logging

    from credit_halo import debug

    stream = io.StringIO()
    debug.logger.addHandler(logging.StreamHandler(stream))
    debug.logger.setLevel(logging.DEBUG)
    good(rank)
    os.environ["CREDIT_HALO_DEBUG"] = "1"
    whole = torch.ones(1, 1, PARTITION.sizes[rank], 2, dtype=torch.float64, requires_grad=True)
    exchange_rows(whole, plan_halo(PARTITION, 1, 1, rank=rank), label="stem").sum().backward()
    return stream.getvalue()


def test_debug_prints_one_line_for_each_exchange() -> None:
    lines = run_processes(traced, 3)[1].splitlines()
    assert len(lines) == 2, "forward and backward, and nothing before it was switched on"
    for line, direction in zip(lines, ("forward", "backward"), strict=True):
        assert re.fullmatch(
            rf"exchange 'stem' \({direction}, RowPartition\(8 rows over 3: 3, 2, 3\)\), rank 1 of 3: "
            r"to 0 \(1 rows\), 2 \(1 rows\); from 0 \(1 rows\), 2 \(1 rows\); 32 bytes sent, \d+\.\d+ ms",
            line,
        )


@pytest.mark.slow
def test_debug_is_seen_without_any_setup_of_logging() -> None:
    import subprocess
    import sys

    code = (
        "import torch; from credit_halo import HaloExchange;[HaloExchange(1)(torch.ones(1, 1, 4, 2)) for _ in range(2)]"
    )
    env = {**os.environ, "CREDIT_HALO_DEBUG": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert len([line for line in done.stderr.splitlines() if line.startswith("exchange 'halo' (forward")]) == 2


def test_a_group_that_did_not_fail_goes_on() -> None:
    def rank_main(rank: int) -> None:
        other = dist.new_group([0, 1, 2])
        plan = plan_halo(PARTITION, 1, 1, rank=rank)
        x = torch.ones(1, 1, PARTITION.sizes[rank], 2)
        exchange_rows(x, plan, group=other)
        good(rank)

    run_threads(rank_main, 3)


def test_what_one_rank_would_refuse_alone_is_refused_by_all() -> None:
    """Mistakes that only the ranks at an edge would trip over."""
    whole = torch.ones(1, 2, 8, 4)

    def rank_main(rank: int) -> None:
        x = shard(whole, PARTITION, rank)
        refused = [
            (EdgeRule("constant", value=float("-inf")), x.long(), "edge value -inf does not fit the dtype torch.int64"),
            (EdgeRule("constant", value=0.5), x.int(), "edge value 0.5 does not fit"),
            (pole_crossing(signs=-1), x.bool(), "need a dtype with negative numbers; got torch.bool"),
            (pole_crossing(signs=(1, -1, 1)), x, "3 signs do not fit channel_dim=1"),
        ]
        for edge, tensor, message in refused:
            with pytest.raises(ValueError, match=message):
                exchange_rows(tensor, plan_halo(PARTITION, 1, 1, rank=rank, edge=edge))
            with pytest.raises(ValueError, match=message):
                HaloExchange(1, edge=edge, manager=manager)(tensor)
        with pytest.raises(ValueError, match="the group has 3"):
            exchange_rows(x, plan_halo(PARTITION if rank != 1 else RowPartition((2, 2)), 1, 1, rank=rank))
        with pytest.raises(ValueError, match="rank 0: .* with gradient, .* rank 1, 2: .* without gradient"):
            exchange_rows(x.clone().requires_grad_(rank == 0), plan_halo(PARTITION, 1, 1, rank=rank))
        with pytest.raises(ValueError, match="with gradient"):
            broadcast(torch.ones(2, requires_grad=rank == 0))
        good(rank)

    manager = None
    run_threads(lambda rank: (initialize_domain_parallel(3, 3), rank_main(rank)), 3, timeout=10)


@pytest.mark.parametrize("rank", range(3))
def test_a_need_that_cannot_be_filled_is_refused_by_ranks_without_rows_too(rank: int) -> None:
    with pytest.raises(ValueError, match="'reflect' reaches 5 rows beyond a tensor of 6 rows; row -9 was needed"):
        plan_rows(RowPartition((3, 0, 3), allow_empty=True), [[-9], [0], [1]], rank=rank, edge="reflect")


def test_double_backward_asks_nobody() -> None:
    """A rank whose plan is the identity has no node in the graph, and must not be waited for."""

    def rank_main(rank: int) -> None:
        partition = RowPartition((2, 2, 2))
        needs = [range(-1, 3), range(1, 4), range(4, 6)]
        plan = plan_rows(partition, needs, rank=rank, edge=EdgeRule("constant", value=2.0))
        x = torch.ones(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        out = exchange_rows(x, plan) ** 2
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (again,) = torch.autograd.grad((grad**2).sum(), x)
        assert again.shape == x.shape

    run_threads(rank_main, 3, timeout=10)


def test_nothing_is_left_of_exchanges_that_recomputation_does_not_wait_for() -> None:
    def rank_main(rank: int) -> None:
        plan = plan_halo(PARTITION, 1, 1, rank=rank)

        def block(x: torch.Tensor) -> torch.Tensor:
            pending = post_rows(x, plan)
            inner = x * x
            return pending.wait()[:, :, 1:-1] + inner

        for _ in range(3):
            x = torch.ones(1, 1, PARTITION.sizes[rank], 2, requires_grad=True)
            checkpoint(block, x, use_reentrant=False).sum().backward()
            assert torch.equal(x.grad[:, :, :1], torch.full((1, 1, 1, 2), 3.0))
        dist.barrier()

    run_threads(rank_main, 3, timeout=10)
    gc.collect()
    assert not ops._in_flight


def test_copies_and_pickles_of_a_layer_work() -> None:
    halo = HaloExchange((1, 2), edge=pole_crossing(signs=-1))
    x = torch.randn(1, 1, 5, 4)
    for other in (copy.deepcopy(halo), pickle.loads(pickle.dumps(halo))):
        assert torch.equal(other(x), halo(x))
        assert other._layer != halo._layer
    plan = pickle.loads(pickle.dumps(plan_halo(RowPartition((5,)), 1, 1, rank=0)))
    assert exchange_rows(x, plan).shape == (1, 1, 7, 4)


def test_a_manager_may_be_a_stand_in() -> None:
    def rank_main(rank: int) -> None:
        manager = SimpleNamespace(domain_parallel_size=3, domain_group=dist.group.WORLD, domain_rank=rank)
        assert HaloExchange(1, manager=manager)(torch.ones(1, 1, 2, 2)).shape == (1, 1, 4, 2)

    run_threads(rank_main, 3)


@pytest.mark.parametrize("first_use", ["dtype", "shape", "label", "dim"])
def test_every_first_use_is_agreed_on(first_use: str) -> None:
    """A plan that was used before is new again with another dtype, shape, label or dim; then a mistake reaches all."""

    def rank_main(rank: int) -> str:
        good(rank)
        rows = PARTITION.sizes[rank] + (rank == 1)
        shape, dim, label, dtype = [1, 1, rows, 2], 2, "rows", torch.float64
        if first_use == "dtype":
            dtype = torch.float32
        elif first_use == "shape":
            shape[0] = 3
        elif first_use == "label":
            label = "another"
        else:
            shape, dim = [1, 1, 2, rows], 3
        x = torch.ones(shape, dtype=dtype)
        with pytest.raises(ValueError, match="on rank 1 the tensor of shape .* rows in dim") as info:
            exchange_rows(x, plan_halo(PARTITION, 1, 1, rank=rank), dim=dim, label=label)
        good(rank)
        return str(info.value)

    assert len(set(run_threads(rank_main, 3, timeout=10))) == 1
