"""The exchange on threads, where many ranks cost little: exact forward, exact adjoint, every kind of tensor."""

import itertools

import pytest
import torch
import torch.distributed as dist
from halo_reference import EDGES, edge_rule, padded_rows, partitions, reach, shard, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from credit_halo import (
    exchange_rows,
    plan_halo,
    plan_rows,
    pole_crossing,
    post_rows,
    repartition_rows,
    take_rows,
)
from credit_halo.testing import dot_test, matrix_of, run_threads
from credit_mesh import RowPartition

FUSED = [False, True]


def run_exchange(x: Tensor, plan, split: bool, dim: int = 2) -> Tensor:
    return post_rows(x, plan, dim=dim).wait() if split else exchange_rows(x, plan, dim=dim)


def check(partition: RowPartition, needs: list, name: str, split: bool) -> None:
    """Forward is slicing the padded whole; <Fx, y> = <x, F'y> exactly; every gradient that of the padded whole."""
    whole = whole_numbers((2, 2, partition.rows, 4))
    weights = [whole_numbers((2, 2, len(need), 4), seed=1 + rank) for rank, need in enumerate(needs)]

    def rank_main(rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
        plan = plan_rows(partition, needs, rank=rank, edge=edge_rule(name))
        x = shard(whole, partition, rank).clone().requires_grad_()
        before = x.detach().clone()
        out = run_exchange(x, plan, split)
        (grad,) = torch.autograd.grad(out, x, weights[rank])
        assert torch.equal(x.detach(), before), "the input is never modified"
        sides = (0.0, 0.0) if name == "constant" else dot_test(lambda t: run_exchange(t, plan, split), x)
        return out.detach(), grad, sides

    results = run_threads(rank_main, partition.ranks, timeout=20)
    reference = whole.clone().requires_grad_()
    outs = [padded_rows(reference, list(need), name) for need in needs]
    total = (reference * 0).sum()  # has a gradient even where everything that is needed lies beyond the edges
    (total + sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))).backward()
    for rank, (out, grad, sides) in enumerate(results):
        assert torch.equal(out, outs[rank].detach())
        assert torch.equal(grad, shard(reference.grad, partition, rank))
        assert sides[0] == sides[1]


@settings(max_examples=80)
@given(st.data(), partitions(), st.sampled_from(EDGES), st.booleans())
def test_halos(data: st.DataObject, partition: RowPartition, name: str, split: bool) -> None:
    most = reach(name, partition.rows)
    before, after = data.draw(st.integers(0, most)), data.draw(st.integers(0, most))
    needs = [range(partition.offsets[r] - before, partition.offsets[r + 1] + after) for r in range(partition.ranks)]
    check(partition, needs, name, split)


@settings(max_examples=80)
@given(st.data(), partitions(empty=True), st.sampled_from(EDGES), st.booleans())
def test_any_rows(data: st.DataObject, partition: RowPartition, name: str, split: bool) -> None:
    most = max(0, reach(name, partition.rows))
    row = st.integers(-most, partition.rows - 1 + most)
    needs = [data.draw(st.lists(row, max_size=8)) for _ in range(partition.ranks)]
    check(partition, needs, name, split)


@settings(max_examples=25)
@given(st.data(), partitions(empty=True))
def test_repartition_and_back(data: st.DataObject, source: RowPartition) -> None:
    cuts = sorted(
        data.draw(st.lists(st.integers(0, source.rows), min_size=source.ranks - 1, max_size=source.ranks - 1))
    )
    ends = [0, *cuts, source.rows]
    target = RowPartition(tuple(b - a for a, b in itertools.pairwise(ends)), allow_empty=True)
    whole = whole_numbers((3, source.rows))

    def rank_main(rank: int) -> None:
        x = shard(whole, source, rank, 1)
        moved = repartition_rows(x, source, target, dim=1)
        assert torch.equal(moved, shard(whole, target, rank, 1))
        assert torch.equal(repartition_rows(moved, target, source, dim=1), x)
        left, right = dot_test(lambda t: repartition_rows(t, source, target, dim=1), x)
        assert left == right

    run_threads(rank_main, source.ranks)


UNEVEN = RowPartition((3, 1, 4, 2))


@pytest.mark.parametrize("split", FUSED)
@pytest.mark.parametrize("name", [edge for edge in EDGES if edge != "constant"])
def test_the_adjoint_is_the_transpose_and_counts_how_often_a_row_is_held(name: str, split: bool) -> None:
    shape = (1, 2, UNEVEN.rows, 2)
    needs = [range(UNEVEN.offsets[r] - 3, UNEVEN.offsets[r + 1] + 2) for r in range(4)]

    def rank_main(rank: int) -> tuple[Tensor, Tensor]:
        plan = plan_rows(UNEVEN, needs, rank=rank, edge=edge_rule(name))

        def forward(whole: Tensor) -> Tensor:
            return run_exchange(shard(whole, UNEVEN, rank), plan, split)

        def adjoint(y: Tensor) -> Tensor:
            x = torch.zeros(1, 2, UNEVEN.sizes[rank], 2, dtype=torch.float64, requires_grad=True)
            (grad,) = torch.autograd.grad(run_exchange(x, plan, split), x, y[:, :, at : at + plan.out_rows])
            return grad

        at = sum(len(need) for need in needs[:rank])
        everything = sum(len(need) for need in needs)
        return matrix_of(forward, shape), matrix_of(adjoint, (1, 2, everything, 2))

    results = run_threads(rank_main, 4)
    # Rows of F by rank and then (B, C, H, W) within the rank; bring both to one order of outputs and of inputs.
    forward = torch.cat([f.view(2, -1, 2, f.shape[-1]) for f, _ in results], dim=1).reshape(-1, results[0][0].shape[-1])
    adjoint = torch.cat([a.view(2, -1, 2, a.shape[-1]) for _, a in results], dim=1).reshape(-1, results[0][1].shape[-1])
    assert torch.equal(adjoint, forward.T)
    held = (adjoint @ forward).diagonal()
    assert torch.equal(held, forward.abs().sum(0)), "each row's own entry is how many copies of it there are"
    assert torch.equal(adjoint @ forward, torch.diag(held)), "F'F is the multiplicity, and nothing else"


def test_it_is_linear() -> None:
    whole, other = whole_numbers((2, 3, 10, 4)), whole_numbers((2, 3, 10, 4), seed=1)

    def rank_main(rank: int) -> None:
        plan = plan_halo(UNEVEN, 4, 3, rank=rank, edge="reflect")
        x, y = shard(whole, UNEVEN, rank), shard(other, UNEVEN, rank)
        both = exchange_rows(3 * x - 2 * y, plan)
        assert torch.equal(both, 3 * exchange_rows(x, plan) - 2 * exchange_rows(y, plan))

    run_threads(rank_main, 4)


class _Shard(torch.autograd.Function):
    """This rank's rows of a tensor that all ranks hold; the gradients of all ranks make up that of the whole."""

    @staticmethod
    def forward(ctx, whole, partition, rank):
        ctx.partition, ctx.rank = partition, rank
        return shard(whole, partition, rank).clone()

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.partition.sizes, ctx.partition, ctx.rank), None, None


class _Gather(torch.autograd.Function):
    """The rows of all ranks, held by all; each rank's share of the gradient is that of its own rows."""

    @staticmethod
    def forward(ctx, x, sizes, partition, rank):
        ctx.sizes, ctx.partition, ctx.rank = sizes, partition, rank
        most = max(sizes)
        mine = torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[2]))
        parts = [torch.empty_like(mine) for _ in sizes]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat([part[:, :, :size] for part, size in zip(parts, sizes, strict=True)], dim=2)

    @staticmethod
    def backward(ctx, grad):
        return _Shard.apply(grad, RowPartition(tuple(ctx.sizes), allow_empty=True), ctx.rank), None, None, None


@pytest.mark.parametrize("split", FUSED)
@pytest.mark.parametrize("name", ["zeros", "constant", "reflect", "circular", "pole"])
def test_gradcheck_and_gradgradcheck(name: str, split: bool) -> None:
    """All ranks perturb the same entry of the whole tensor at the same time, so that numbers and gradients compare."""
    partition = RowPartition((2, 1, 2))
    whole = torch.randn(1, 2, 5, 2, dtype=torch.float64)

    def rank_main(rank: int) -> None:
        plan = plan_halo(partition, 2, 1, rank=rank, edge=edge_rule(name))
        sizes = [size + 3 for size in partition.sizes]

        def fn(t: Tensor) -> Tensor:
            halo = run_exchange(_Shard.apply(t, partition, rank), plan, split)
            return _Gather.apply(halo.sin() * halo, sizes, partition, rank)

        x = whole.clone().requires_grad_()
        assert torch.autograd.gradcheck(fn, (x,))
        assert torch.autograd.gradgradcheck(fn, (x,))

    run_threads(rank_main, 3, timeout=60)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool),
    ],
)
def test_dtypes(dtype: torch.dtype) -> None:
    whole = whole_numbers((2, 3, 10, 4)).abs().to(dtype)

    def rank_main(rank: int) -> None:
        plan = plan_halo(UNEVEN, 2, 2, rank=rank, edge="circular")
        x = shard(whole, UNEVEN, rank).clone()
        x.requires_grad_(dtype.is_floating_point or dtype.is_complex)
        for split in FUSED:
            out = run_exchange(x, plan, split)
            expected = padded_rows(
                whole, list(range(UNEVEN.offsets[rank] - 2, UNEVEN.offsets[rank + 1] + 2)), "circular"
            )
            assert out.dtype == dtype
            assert torch.equal(out, expected)
            if x.requires_grad:
                (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
                assert grad.dtype == dtype
                total = grad.sum().reshape(1).to(torch.complex128)
                dist.all_reduce(total)
                assert total.item() == 2 * 3 * 4 * (10 + 4 * 4)

    run_threads(rank_main, 4)


@pytest.mark.parametrize("split", FUSED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("dims", [4, 5])
def test_memory_formats(dims: int, layout: str, split: bool) -> None:
    shape = (2, 3, 10, 4) if dims == 4 else (2, 3, 2, 10, 4)
    whole = whole_numbers(shape)
    channels_last = torch.channels_last if dims == 4 else torch.channels_last_3d

    def rank_main(rank: int) -> None:
        x = shard(whole, UNEVEN, rank, -2)
        if layout == "channels_last":
            x = x.contiguous(memory_format=channels_last)
        elif layout == "sliced channels_last":
            x = shard(whole.contiguous(memory_format=channels_last), UNEVEN, rank, -2)
        elif layout == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "expanded":
            x = x[:1].expand_as(x)
        else:
            x = x.contiguous()
        plan = plan_halo(UNEVEN, 1, 1, rank=rank)
        rows = range(UNEVEN.offsets[rank], UNEVEN.offsets[rank + 1] + 2)
        reference = whole[:1].expand_as(whole) if layout == "expanded" else whole
        expected = torch.nn.functional.pad(reference, (0, 0, 1, 1)).narrow(-2, rows.start, len(rows))
        x = x.detach().requires_grad_()
        out = run_exchange(x, plan, split, dim=-2)
        assert torch.equal(out, expected)
        wanted = channels_last if "channels_last" in layout else torch.contiguous_format
        assert out.is_contiguous(memory_format=wanted)
        (grad,) = torch.autograd.grad(out, x, out)
        assert grad.shape == x.shape

    run_threads(rank_main, 4)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dim(dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = UNEVEN.rows
    whole = whole_numbers(tuple(shape))

    def rank_main(rank: int) -> None:
        plan = plan_halo(UNEVEN, 3, 1, rank=rank, edge="replicate")
        rows = [min(max(r, 0), 9) for r in range(UNEVEN.offsets[rank] - 3, UNEVEN.offsets[rank + 1] + 1)]
        x = shard(whole, UNEVEN, rank, dim)
        assert torch.equal(exchange_rows(x, plan, dim=dim), whole.index_select(dim, torch.tensor(rows)))
        left, right = dot_test(lambda t: exchange_rows(t, plan, dim=dim), x)
        assert left == right

    run_threads(rank_main, 4)


def test_one_dimension_and_no_batch() -> None:
    whole = whole_numbers((10,))

    def rank_main(rank: int) -> None:
        plan = plan_halo(UNEVEN, 1, 1, rank=rank)
        rows = slice(UNEVEN.offsets[rank], UNEVEN.offsets[rank + 1] + 2)
        padded = torch.nn.functional.pad(whole, (1, 1))
        assert torch.equal(exchange_rows(shard(whole, UNEVEN, rank, 0), plan, dim=0), padded[rows])
        empty = torch.empty(0, UNEVEN.sizes[rank], requires_grad=True)
        for split in FUSED:
            out = run_exchange(empty, plan, split, dim=1)
            assert out.shape == (0, UNEVEN.sizes[rank] + 2)
            out.sum().backward()

    run_threads(rank_main, 4)


def test_ranks_of_a_sub_group() -> None:
    partition = RowPartition((3, 2))
    whole = whole_numbers((2, 1, 5, 4))

    def rank_main(rank: int) -> None:
        groups = [dist.new_group([0, 2]), dist.new_group([3, 1], sort_ranks=True)]
        group = groups[0] if rank in (0, 2) else groups[1]
        at = dist.get_rank(group)
        plan = plan_halo(partition, 1, 1, rank=at)
        x = (shard(whole, partition, at) + 100 * (rank % 2)).requires_grad_()
        out = exchange_rows(x, plan, group=group)
        expected = torch.nn.functional.pad(whole + 100 * (rank % 2), (0, 0, 1, 1))
        assert torch.equal(out, expected[:, :, partition.offsets[at] : partition.offsets[at + 1] + 2])
        out.sum().backward()
        dist.barrier()

    run_threads(rank_main, 4)


def test_take_rows_is_a_plan_made_on_the_way() -> None:
    whole = whole_numbers((1, 1, 10, 2))
    needs = [range(rank, 10, 4) for rank in range(4)]

    def rank_main(rank: int) -> None:
        out = take_rows(shard(whole, UNEVEN, rank), needs, partition=UNEVEN)
        assert torch.equal(out, whole[:, :, rank::4])

    run_threads(rank_main, 4)


def test_a_rank_that_needs_nothing_else_gets_a_new_tensor() -> None:
    def rank_main(rank: int) -> None:
        x = torch.ones(1, UNEVEN.sizes[rank], 2)
        out = exchange_rows(x, plan_halo(UNEVEN, 0, 0, rank=rank))
        assert torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()

    run_threads(rank_main, 4)


def test_several_exchanges_under_way_are_waited_for_in_any_order() -> None:
    whole = whole_numbers((1, 1, 10, 2))

    def rank_main(rank: int) -> None:
        x = shard(whole, UNEVEN, rank).clone().requires_grad_()
        plans = [plan_halo(UNEVEN, width, width, rank=rank) for width in (1, 2)]
        first, second = (post_rows(x, plan, label=f"{i}") for i, plan in enumerate(plans))
        order = [second, first] if rank % 2 else [first, second]
        total = sum(pending.wait().sum() for pending in order)
        (grad,) = torch.autograd.grad(total, x)
        expected = sum(torch.autograd.grad(exchange_rows(x, plan).sum(), x)[0] for plan in plans)
        assert torch.equal(grad, expected)

    run_threads(rank_main, 4)


def test_what_was_posted_may_be_overwritten() -> None:
    whole = whole_numbers((1, 1, 10, 2))

    def rank_main(rank: int) -> None:
        x = shard(whole, UNEVEN, rank).clone()
        plan = plan_halo(UNEVEN, 1, 1, rank=rank, edge="replicate")
        expected = exchange_rows(x, plan)
        pending = post_rows(x, plan)
        x.zero_()
        dist.barrier()
        assert torch.equal(pending.wait(), expected)

    run_threads(rank_main, 4)


def test_longitude_must_allow_half_a_turn() -> None:
    def rank_main(rank: int) -> None:
        plan = plan_halo(UNEVEN, 1, 1, rank=rank, edge=pole_crossing())
        with pytest.raises(ValueError, match="half the longitudes: their number must be even, and is 5"):
            exchange_rows(torch.ones(1, 1, UNEVEN.sizes[rank], 5), plan)
        with pytest.raises(ValueError, match="lon_dim=-1 must be a dim .* other than the sharded one, 1"):
            exchange_rows(torch.ones(4, UNEVEN.sizes[rank]), plan, dim=1)
        plan = plan_halo(UNEVEN, 1, 1, rank=rank, edge=pole_crossing(signs=(1, -1)))
        with pytest.raises(ValueError, match="2 signs do not fit channel_dim=1"):
            exchange_rows(torch.ones(1, 3, UNEVEN.sizes[rank], 4), plan)

    run_threads(rank_main, 4)


def test_one_rank_needs_no_world() -> None:
    partition = RowPartition((5,))
    whole = whole_numbers((1, 1, 5, 4))
    for name in EDGES[:-1]:
        plan = plan_halo(partition, 2, 2, rank=0, edge=edge_rule(name))
        x = whole.clone().requires_grad_()
        for split in FUSED:
            out = run_exchange(x, plan, split)
            assert torch.equal(out, padded_rows(x, list(range(-2, 7)), name))
            out.sum().backward()
    with pytest.raises(ValueError, match="the plan is for 4 ranks, the group has 1; torch.distributed is not init"):
        exchange_rows(torch.ones(3, 2), plan_halo(UNEVEN, 1, 1, rank=0))
