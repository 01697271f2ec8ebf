"""Dividing another dim: the parts of the whole, its exact adjoint, and mistakes."""

from __future__ import annotations

import pytest
import torch
from halo_reference import partitions, shard, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from credit_halo import transpose_rows
from credit_halo.testing import RankError, dot_test, run_processes, run_threads
from credit_mesh import RowPartition


@settings(max_examples=40)
@given(st.data(), partitions(empty=True), st.sampled_from([torch.float64, torch.float32, torch.complex64, torch.int64]))
def test_parts_and_adjoint(data: st.DataObject, partition: RowPartition, dtype: torch.dtype) -> None:
    columns = data.draw(st.integers(1, 7))
    cuts = sorted(
        data.draw(st.lists(st.integers(0, columns), min_size=partition.ranks - 1, max_size=partition.ranks - 1))
    )
    target = RowPartition(tuple(b - a for a, b in zip([0, *cuts], [*cuts, columns], strict=True)), allow_empty=True)
    dim, to_dim = data.draw(st.permutations(range(3)))[:2]
    shape = [2, 2, 2]
    shape[dim], shape[to_dim] = partition.rows, columns
    whole = whole_numbers(tuple(shape)).to(dtype)

    def rank_main(rank: int) -> None:
        mine = shard(whole, partition, rank, dim)
        out = transpose_rows(mine, partition, target, dim=dim, to_dim=to_dim - 3)
        assert torch.equal(out, shard(whole, target, rank, to_dim))
        assert out.is_contiguous()
        assert torch.equal(transpose_rows(out, target, partition, dim=to_dim, to_dim=dim), mine)
        if dtype == torch.float64:
            left, right = dot_test(lambda x: transpose_rows(x, partition, target, dim=dim, to_dim=to_dim), mine)
            assert left == right
            again = mine.clone().requires_grad_()
            made = transpose_rows(again, partition, target, dim=dim, to_dim=to_dim)
            (grad,) = torch.autograd.grad(made.pow(3).sum(), again, create_graph=True)
            assert torch.equal(grad, 3 * mine.square())
            (second,) = torch.autograd.grad(grad.sum(), again)
            assert torch.equal(second, 6 * mine)

    run_threads(rank_main, partition.ranks)


def through_gloo(rank: int) -> None:
    torch.set_num_threads(1)
    partition, target = RowPartition((3, 0, 2), allow_empty=True), RowPartition((1, 4, 0), allow_empty=True)
    whole = whole_numbers((5, 2, 5))
    mine = shard(whole, partition, rank, 0).clone().requires_grad_()
    out = transpose_rows(mine, partition, target, dim=0, to_dim=2)
    assert torch.equal(out, shard(whole, target, rank, 2))
    out.backward(shard(whole, target, rank, 2))
    assert torch.equal(mine.grad, shard(whole, partition, rank, 0))
    compiled = torch.compile(
        lambda x: transpose_rows(x * 2, partition, target, dim=0, to_dim=2), fullgraph=True, backend="aot_eager"
    )
    again = mine.detach().requires_grad_()
    made = compiled(again)
    assert torch.equal(made, 2 * shard(whole, target, rank, 2))
    made.sum().backward()
    assert torch.equal(again.grad, torch.full_like(again, 2.0))


def test_through_gloo_and_compiled() -> None:
    run_processes(through_gloo, 3, fork=True)


def test_a_single_rank_gets_a_copy() -> None:
    x = torch.randn(3, 4)
    out = transpose_rows(x, RowPartition((3,)), RowPartition((4,)), dim=0, to_dim=1)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("partition", "target", "dims", "message"),
    [
        ((2, 2), (3, 2), (0, 1), "must have 2 of dim 0"),
        ((2, 2), (2, 2), (0, 0), "must be two dims"),
        ((2, 2), (2, 2), (0, 5), "must be two dims"),
        ((4,), (2, 2), (0, 1), "must be for the 2 ranks"),
    ],
)
def test_mistakes_are_refused_on_all_ranks(
    partition: tuple[int, ...], target: tuple[int, ...], dims: tuple[int, int], message: str
) -> None:
    def rank_main(rank: int) -> None:
        transpose_rows(torch.zeros(2, 4), RowPartition(partition), RowPartition(target), dim=dims[0], to_dim=dims[1])

    with pytest.raises(RankError, match=message) as caught:
        run_threads(rank_main, 2)
    assert all(isinstance(error, ValueError) for error in caught.value.errors.values())


def test_ranks_that_differ_are_refused() -> None:
    def rank_main(rank: int) -> None:
        dtype = torch.float32 if rank else torch.float64
        even = RowPartition((2, 2))
        transpose_rows(torch.zeros(2, 4, dtype=dtype), even, even, dim=0, to_dim=1)

    with pytest.raises(RankError, match="disagree"):
        run_threads(rank_main, 2)
