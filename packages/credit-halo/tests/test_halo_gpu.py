"""On a GPU: the same rows as on a CPU, a host that never waits, and exchanges as CUDA graphs.

What can be runs on a CPU too. The host waits for nothing there; the names of operations tell what it would wait for.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from halo_reference import edge_rule, padded_rows, shard, whole_numbers
from torch import Tensor

from credit_halo import exchange_rows, plan_halo, post_rows
from credit_halo.plan import ExchangePlan
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PARTITION = RowPartition((3, 1, 4, 2))

# Operations that read a tensor on the host, or bring one from there: lift_fresh is that of torch.tensor.
WAITING = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh"}


def needed(rank: int, partition: RowPartition = PARTITION) -> list[int]:
    return list(range(partition.offsets[rank] - 2, partition.offsets[rank + 1] + 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("edge", ["zeros", "circular", "pole"])
def test_threads_on_one_device_exchange_rows_channels_last(edge: str, dtype: torch.dtype, device: str) -> None:
    whole = whole_numbers((2, 2, 10, 4)).to(device, dtype).contiguous(memory_format=torch.channels_last)
    weights = [whole_numbers((2, 2, len(needed(rank)), 4), seed=rank).to(device, dtype) for rank in range(4)]
    reference = whole.double().clone().requires_grad_()
    sum((padded_rows(reference, needed(rank), edge) * weights[rank]).sum() for rank in range(4)).backward()

    def rank_main(rank: int) -> None:
        x = shard(whole, PARTITION, rank).clone(memory_format=torch.channels_last).requires_grad_()
        out = exchange_rows(x, plan_halo(PARTITION, 2, 2, rank=rank, edge=edge_rule(edge)))
        assert torch.equal(out, padded_rows(whole, needed(rank), edge))
        assert out.is_contiguous(memory_format=torch.channels_last)
        (out * weights[rank]).sum().backward()
        assert torch.equal(x.grad.double(), shard(reference.grad, PARTITION, rank))

    run_threads(rank_main, 4)


WAYS: tuple[Callable[..., Tensor], ...] = (
    exchange_rows,
    lambda x, plan, group: post_rows(x, plan, group=group).wait(),
)


def step(x: Tensor, plan: ExchangePlan, group: dist.ProcessGroup) -> list[Tensor]:
    """What every way gives, and its gradient."""
    found = []
    for way in WAYS:
        out = way(x, plan, group=group)
        found += [out.detach(), *torch.autograd.grad(out, x, out.detach())]
    return found


def names_of_a_second_step(rank: int, edge: str) -> set[str]:
    partition = RowPartition((3, 4, 2))
    plan = plan_halo(partition, 2, 2, rank=rank, edge=edge_rule(edge))
    x = shard(whole_numbers((2, 2, 9, 4)), partition, rank).clone().requires_grad_()
    step(x, plan, dist.group.WORLD)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(x, plan, dist.group.WORLD)
    return {event.key.removeprefix("aten::") for event in profile.key_averages()}


@pytest.mark.parametrize("edge", ["zeros", "reflect", "pole", "pole on a row"])
def test_a_second_step_has_nothing_to_wait_for(edge: str) -> None:
    for names in run_processes(names_of_a_second_step, 3, edge):
        assert "copy_" in names, "the profiler did not look into the exchange"
        assert not names & WAITING


def nccl() -> dist.ProcessGroup:
    """A group of this rank alone."""
    torch.cuda.set_device(0)
    return dist.new_group([0], backend="nccl")


def alone(edge: str) -> tuple[Tensor, ExchangePlan]:
    """Rows of a single rank, and a plan that needs more of them than there are."""
    x = whole_numbers((2, 2, 6, 4)).cuda().requires_grad_()
    return x, plan_halo(RowPartition((6,)), 2, 2, rank=0, edge=edge_rule(edge))


def silent(rank: int, edge: str) -> None:
    group, (x, plan) = nccl(), alone(edge)
    step(x, plan, group)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(x, plan, group)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = padded_rows(x.detach(), list(range(-2, 8)), edge)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[2], expected)
    assert torch.equal(found[1], found[3])


@pytest.mark.gpu
@pytest.mark.parametrize("edge", ["circular", "reflect", "pole"])
def test_the_host_does_not_wait_for_the_gpu(edge: str) -> None:
    run_processes(silent, 1, edge, timeout=120)


def captured(rank: int, edge: str) -> None:
    group, (x, plan) = nccl(), alone(edge)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is done once is not part of the graph
        for _ in range(3):
            step(x, plan, group)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = step(x, plan, group)
    with torch.no_grad():
        x.copy_(whole_numbers((2, 2, 6, 4), seed=1))
    graph.replay()
    for replayed, expected in zip(found, step(x, plan, group), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("edge", ["circular", "pole"])
def test_an_exchange_within_one_rank_can_be_captured(edge: str) -> None:
    run_processes(captured, 1, edge, timeout=120)
