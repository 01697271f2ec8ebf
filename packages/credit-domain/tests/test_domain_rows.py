"""Moving sharded rows: what torch makes of the whole, for every partition, dim and parameter."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from domain_cases import cases, check, dims_of
from domain_reference import randn, shard
from hypothesis import given, settings
from hypothesis import strategies as st

from credit_domain.ops import rearranging as rows
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel


@settings(max_examples=60)
@given(st.data(), cases())
def test_roll(data, case):
    whole, partition, dim, declare = case
    number = data.draw(st.integers(1, 3))
    dims = data.draw(st.lists(st.integers(-whole.ndim, whole.ndim - 1), min_size=number, max_size=number))
    shifts = data.draw(st.lists(st.integers(-40, 40), min_size=number, max_size=number))
    if number == 1 and data.draw(st.booleans()):
        dims, shifts = dims[0], shifts[0]
    check(
        lambda x: torch.roll(x, shifts, dims),
        lambda x: rows.roll(x, shifts, dims, dim=dim),
        *(whole, partition, dim),
        target=partition,
        declare=declare,
    )


@settings(max_examples=40)
@given(st.data(), cases())
def test_flip(data, case):
    whole, partition, dim, declare = case
    dims = dims_of(data.draw, whole.ndim)
    check(
        lambda x: torch.flip(x, (dims,) if isinstance(dims, int) else dims),
        lambda x: rows.flip(x, dims, dim=dim),
        *(whole, partition, dim),
        target=partition,
        declare=declare,
    )


@settings(max_examples=40)
@given(st.data(), cases())
def test_crop(data, case):
    whole, partition, dim, declare = case
    height = partition.rows
    start = data.draw(st.integers(0, height - 1))
    stop = data.draw(st.integers(start + 1, height))
    cuts = sorted(data.draw(st.lists(st.integers(0, stop - start), min_size=partition.ranks, max_size=partition.ranks)))
    cuts[-1] = stop - start
    target = RowPartition(tuple(b - a for a, b in pairwise([0, *cuts])), allow_empty=True)
    default = data.draw(st.booleans())
    first = start - height if start and data.draw(st.booleans()) else start
    last = data.draw(st.sampled_from([stop, stop - height if stop < height else None]))
    check(
        lambda x: x.narrow(dim, start, stop - start),
        lambda x: rows.crop(x, first, last, target=None if default else target, dim=dim),
        *(whole, partition, dim),
        target=partition.strided(1, stop - start) if default else target,
        declare=declare,
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(st.data(), cases())
def test_repartition_there_and_back(data, case):
    whole, partition, dim, declare = case
    others = partition.ranks - 1
    cuts = data.draw(st.lists(st.integers(0, partition.rows), min_size=others, max_size=others))
    target = RowPartition(tuple(b - a for a, b in pairwise([0, *sorted(cuts), partition.rows])), allow_empty=True)
    layout = (whole, partition, dim)
    check(torch.sin, lambda x: rows.repartition(x, target, dim=dim).sin(), *layout, target=target, declare=declare)
    check(
        torch.sin,
        lambda x: rows.repartition(rows.repartition(x, target, dim=dim).sin(), partition, dim=dim, partition=target),
        *layout,
        target=partition,
        declare=declare,
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(st.data(), cases())
def test_regroup_any_rows(data, case):
    whole, partition, dim, declare = case
    some = st.lists(st.integers(0, partition.rows - 1), max_size=8)
    wanted = [data.draw(some) for _ in range(partition.ranks)]
    wanted[0] = data.draw(st.sampled_from([range(partition.rows), range(partition.rows - 1, -1, -2)]))
    index = torch.tensor([row for need in wanted for row in need])
    check(
        lambda x: x.index_select(dim, index),
        lambda x: rows.regroup(x, wanted, dim=dim),
        *(whole, partition, dim),
        target=RowPartition(tuple(map(len, wanted)), allow_empty=True),
        declare=declare,
    )


@pytest.mark.slow
@settings(max_examples=30)
@given(st.data(), cases())
def test_regroup_and_back(data, case):
    """Sums over every n-th row, as a dilated window takes them, on whoever has them."""
    whole, partition, dim, declare = case
    step = data.draw(st.integers(1, partition.rows))
    groups = [range(first, partition.rows, step) for first in range(step)]
    held = [[] for _ in range(partition.ranks)]  # groups of each rank
    for group in groups:
        held[data.draw(st.integers(0, partition.ranks - 1))].append(group)
    wanted = [[row for group in mine for row in group] for mine in held]

    def plain(x):
        parts = [x.index_select(dim, torch.tensor(group)).cumsum(dim) for group in groups]
        return torch.zeros_like(x).index_copy(
            dim, torch.tensor([row for group in groups for row in group]), torch.cat(parts, dim)
        )

    def sharded(x):
        x = rows.regroup(x, wanted, dim=dim)
        lengths = [len(group) for group in held[torch.distributed.get_rank()]]
        sums = [part.cumsum(dim) for part in x.split(lengths, dim)] if lengths else [x]
        return rows.regroup_back(torch.cat(sums, dim), wanted, partition, dim=dim)

    check(plain, sharded, whole, partition, dim, target=partition, declare=declare)


def test_moving_needs_no_other_ranks():
    """On one rank, with or without torch.distributed."""
    x = randn(2, 3, 7, 4)
    assert torch.equal(rows.roll(x, (2, 1), (-2, -1)), x.roll((2, 1), (-2, -1)))
    assert torch.equal(rows.flip(x, 2), x.flip(2))
    assert torch.equal(rows.crop(x, 1, -2), x[:, :, 1:-2])
    assert torch.equal(rows.regroup(x, [[3, 3, 0]]), x[:, :, [3, 3, 0]])
    order = [[6, 0, 5, 1, 4, 2, 3]]
    assert torch.equal(rows.regroup_back(rows.regroup(x, order), order, RowPartition((7,))), x)
    assert rows.partition_of(x) == RowPartition((7,))
    with pytest.raises(ValueError, match="regroup_back: rows lists 7 rows; got a tensor of shape"):
        rows.regroup_back(x[:, :, :6], order, RowPartition((7,)))
    rolled = rows.roll(x, 7, -2)
    rolled += 1
    assert not torch.equal(rolled, x)


def test_partition_of():
    partition = RowPartition((3, 0, 4), allow_empty=True)

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        x = shard(randn(2, 7, 3), partition, rank)
        assert rows.partition_of(x) == partition
        assert rows.partition_of(x.mT, dim=-1, manager=manager) == partition

    run_threads(rank_main, 3)


def test_mistakes_in_moving_are_named():
    partition = RowPartition((3, 1, 2))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = shard(randn(2, 6, 3), partition, rank)
        with pytest.raises(ValueError, match="roll: expected one shift for each dim; got shifts=1 and dims="):
            rows.roll(x, 1, (0, 1))
        with pytest.raises(ValueError, match="roll: dims=3 names dim 3; the tensor has 3 dims"):
            rows.roll(x, 1, 3)
        with pytest.raises(ValueError, match="flip: the sharded dim must be one of the last 3"):
            rows.flip(x, 1, dim=4)
        with pytest.raises(ValueError, match="flip: dims=.* names a dim twice"):
            rows.flip(x, (1, -2))
        with pytest.raises(ValueError, match=r"crop: cannot keep the rows \[4, 4\) of 6 rows"):
            rows.crop(x, 4, -2)
        with pytest.raises(ValueError, match=r"crop: cannot keep the rows \[0, 7\) of 6 rows"):
            rows.crop(x, 0, 7)
        with pytest.raises(ValueError, match="crop: cannot move rows from .*5 rows.* must have the same rows"):
            rows.crop(x, 1, target=partition)
        with pytest.raises(ValueError, match="move1: cannot move rows from .* must have the same rows and ranks"):
            rows.repartition(x, RowPartition((3, 3)), label="move1")
        with pytest.raises(ValueError, match="regroup: rows must hold one list for each of the 3 ranks; got 2"):
            rows.regroup(x, [[1], [2]])
        with pytest.raises(ValueError, match=r"regroup: rows\[1\] names rows -1 to 2; there are 6"):
            rows.regroup(x, [[], [2, -1], []])
        lists = [[0, 5], [1, 4], [2, 3]]
        with pytest.raises(ValueError, match="regroup_back: rows must name each of the rows of target=.* exactly once"):
            rows.regroup_back(x, [[0, 1], [2, 3], [3, 4]], partition)
        with pytest.raises(ValueError, match="regroup_back: on rank 0 the tensor .* has 3 rows .* on rank 1 .* has 1"):
            rows.regroup_back(x, lists, partition)

    run_threads(rank_main, 3)
