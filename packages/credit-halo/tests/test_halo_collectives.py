"""Collectives: their values, and that each is followed by its exact adjoint."""

import pytest
import torch
import torch.distributed as dist
from halo_reference import partitions, shard, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from credit_halo import all_mean, all_sum, broadcast, gather_rows, scatter_rows
from credit_halo.testing import dot_test, run_processes, run_threads
from credit_mesh import RowPartition

UNEVEN = RowPartition((3, 1, 4, 2))


def every_collective(rank: int) -> None:
    partition, whole = UNEVEN, whole_numbers((10, 3))
    mine = shard(whole, partition, rank, 0)
    same_shape = whole_numbers((2, 3), seed=rank)
    summed = sum(whole_numbers((2, 3), seed=q) for q in range(4))
    assert torch.equal(all_sum(same_shape), summed)
    assert torch.equal(all_mean(same_shape), summed / 4)
    assert torch.equal(broadcast(same_shape, 2), whole_numbers((2, 3), seed=2))
    assert torch.equal(gather_rows(mine, partition), whole)
    gathered = gather_rows(mine, partition, dst=1)
    assert torch.equal(gathered, whole if rank == 1 else whole[:0])
    source = whole if rank == 3 else whole[:0]
    assert torch.equal(scatter_rows(source, partition, src=3), mine)
    assert torch.equal(scatter_rows(whole, partition, src=0, dim=0), mine), "others' rows are not read"

    for fn, x in (
        (all_sum, same_shape),
        (lambda t: all_mean(t) * 4, same_shape),
        (lambda t: broadcast(t, 2), same_shape),
        (lambda t: gather_rows(t, partition), mine),
        (lambda t: gather_rows(t, partition, dst=1), mine),
        (lambda t: scatter_rows(t, partition, src=3), source),
    ):
        left, right = dot_test(fn, x)
        assert left == right
        again = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fn(again).pow(3).sum(), again, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), again)
        assert second.shape == x.shape


def test_on_threads() -> None:
    run_threads(every_collective, 4)


@pytest.mark.slow
def test_in_processes() -> None:
    run_processes(every_collective, 4)


@settings(max_examples=25)
@given(partitions(empty=True), st.integers(0, 2), st.data())
def test_scatter_then_gather(partition: RowPartition, dim: int, data: st.DataObject) -> None:
    src = data.draw(st.integers(0, partition.ranks - 1))
    shape = [2, 3, 4]
    shape[dim] = partition.rows
    whole = whole_numbers(tuple(shape))

    def rank_main(rank: int) -> None:
        source = whole if rank == src else whole.narrow(dim, 0, 0)
        mine = scatter_rows(source, partition, src=src, dim=dim)
        assert torch.equal(mine, shard(whole, partition, rank, dim))
        assert torch.equal(gather_rows(mine, partition, dim=dim), whole)

    run_threads(rank_main, partition.ranks)


def test_a_mean_of_uneven_shards_by_hand() -> None:
    """The convention at work: each rank's loss is its share of the global mean, so gradients are those of one rank."""
    whole = torch.randn(10, 3, dtype=torch.float64)

    def rank_main(rank: int) -> tuple[float, Tensor]:
        x = shard(whole, UNEVEN, rank, 0).clone().requires_grad_()
        mean = all_sum(x.sum(0)) / 10
        loss = ((x - mean) ** 3).sum() / 10
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return float(total), x.grad

    reference = whole.clone().requires_grad_()
    loss = ((reference - reference.mean(0)) ** 3).sum() / 10
    loss.backward()
    for rank, (total, grad) in enumerate(run_threads(rank_main, 4)):
        assert total == pytest.approx(loss.item())
        torch.testing.assert_close(grad, shard(reference.grad, UNEVEN, rank, 0))


def test_without_a_world_they_are_the_identity() -> None:
    x = whole_numbers((5, 2))
    alone = RowPartition((5,))
    for out in (all_sum(x), all_mean(x), broadcast(x), gather_rows(x, alone), scatter_rows(x, alone)):
        assert torch.equal(out, x)


def test_mistakes_are_named_on_all_ranks() -> None:
    def rank_main(rank: int) -> None:
        with pytest.raises(ValueError, match="all_mean needs a floating-point or complex tensor; got torch.int64"):
            all_mean(torch.ones(2, dtype=torch.int64))
        for bad in (3, -1, True, None):
            with pytest.raises(ValueError, match=r"src must be a rank of the group, 0\.\.2; got"):
                broadcast(torch.ones(2), bad)
        with pytest.raises(ValueError, match=r"dst must be a rank of the group"):
            gather_rows(torch.ones(1), RowPartition((1, 1, 1)), dim=0, dst=3)
        with pytest.raises(ValueError, match=r"rank 0, 2: all_sum of float32 of shape \(2,\); rank 1: .* \(3,\)"):
            all_sum(torch.ones(3 if rank == 1 else 2))
        with pytest.raises(ValueError, match="float64"):
            all_sum(torch.ones(2, dtype=torch.float64 if rank == 2 else torch.float32))
        assert torch.equal(all_sum(torch.ones(2)), torch.full((2,), 3.0)), "nothing is left behind"

    run_threads(rank_main, 3)
