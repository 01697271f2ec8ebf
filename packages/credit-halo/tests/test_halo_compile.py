"""torch.compile(fullgraph=True): the same numbers, forward and backward, without a graph break, on uneven rows."""

import pytest
import torch
import torch.nn.functional as F
from halo_reference import shard, whole_numbers

from credit_halo import (
    HaloExchange,
    all_sum,
    broadcast,
    exchange_rows,
    gather_rows,
    plan_halo,
    pole_crossing,
    post_rows,
    repartition_rows,
    take_rows,
)
from credit_halo.testing import run_processes
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 1, 4))
OTHER = RowPartition((2, 4, 2))


def compiled(rank: int, backend: str, dynamic: bool | None) -> None:
    manager = initialize_domain_parallel(3, 3)
    manager.declare(PARTITION)
    halo = HaloExchange(1, edge="replicate")
    weight = whole_numbers((2, 2, 3, 3), seed=1) / 8
    plan = plan_halo(PARTITION, 2, 1, rank=rank, edge="circular")
    missing = plan_halo(PARTITION, 1, 1, rank=rank)

    def with_layer(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(halo(x * 2), weight, padding=(0, 1)).sin()

    def with_plan(x: torch.Tensor) -> torch.Tensor:
        return exchange_rows(x * 2, plan).sin() * 3

    def split(x: torch.Tensor) -> torch.Tensor:
        pending = post_rows(x * 2, missing)
        inner = x.sin().sum((2, 3), keepdim=True)
        return pending.wait() * inner

    def several(x: torch.Tensor) -> torch.Tensor:
        moved = repartition_rows(x.cos(), PARTITION, OTHER)
        mean = all_sum(moved.sum((2, 3), keepdim=True)) / 8
        return halo(x) * mean + exchange_rows(x, missing, label="second")

    def lists(x: torch.Tensor) -> torch.Tensor:
        residues = take_rows(x, [range(r, 8, 3) for r in range(3)], partition=PARTITION)
        mirrored = take_rows(x.sin(), [[1, 0, 5], [2], [7]], partition=PARTITION, label="mirrored")
        whole = gather_rows(broadcast(x[:, :, :1], 1), RowPartition((1, 1, 1)))
        return (residues.sum() + mirrored.sum()) * whole

    for fn in (with_layer, with_plan, split, several, lists):
        for height in (4, 6):  # of another dim, so that something is dynamic where it may be
            whole = whole_numbers((2, 2, 8, height)) / 8
            results = []
            for run in (fn, torch.compile(fn, fullgraph=True, backend=backend, dynamic=dynamic)):
                for _ in range(2):
                    x = shard(whole, PARTITION, rank).clone().requires_grad_()
                    out = run(x)
                    (out * out.detach().cos()).sum().backward()
                results.append((out.detach(), x.grad))
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)

    # A new partition is noticed, also on ranks that hold as many rows as before.
    run = torch.compile(with_layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for partition in (PARTITION, RowPartition((3, 2, 3)), RowPartition((4, 1, 4)), PARTITION):
        manager.declare(partition)
        x = shard(whole_numbers((1, 2, partition.rows, 4)), partition, rank)
        torch.testing.assert_close(run(x), with_layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)], ids=str
)
def test_compiled_equals_eager(backend: str, dynamic: bool | None) -> None:
    run_processes(compiled, 3, backend, dynamic, timeout=900)


def empty_on_one_rank(rank: int) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return take_rows(x, [[1], [], [0]], partition=PARTITION).sum()

    if rank == 1:
        with pytest.raises(Exception, match="whose result is empty on this rank"):
            torch.compile(fn, fullgraph=True)(torch.ones(1, 1, PARTITION.sizes[rank], 2))


@pytest.mark.slow
def test_what_inductor_would_leave_out_is_refused() -> None:
    run_processes(empty_on_one_rank, 3, timeout=120)


@pytest.mark.slow
def test_compiled_code_checks_when_it_runs() -> None:
    halo = HaloExchange(1, edge=pole_crossing())
    run = torch.compile(halo, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(torch.ones(1, 1, 3, 4)), torch.ones(1, 1, 5, 4))
    with pytest.raises(ValueError, match="half the longitudes: their number must be even, and is 5"):
        run(torch.ones(1, 1, 3, 5))
