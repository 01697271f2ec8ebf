"""Random cases of functions on sharded rows: any number of dims, any of them sharded, ranks without rows too."""

from __future__ import annotations

from itertools import pairwise

from domain_reference import check_layer, partitions, randn
from hypothesis import strategies as st
from torch import nn

from credit_mesh import RowPartition


class Op(nn.Module):
    """A function in the place of a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def check(plain, sharded, whole, partition, dim, **more):
    check_layer(Op(plain), lambda _: Op(sharded), whole, partition, dim, **more)


@st.composite
def any_partition(draw):
    """A partition with or without empty ranks, which cannot be declared, and whether it is."""
    rows = st.integers(1, 17)
    if draw(st.booleans()):
        return draw(partitions(rows)), draw(st.booleans())
    height, ranks = draw(rows), draw(st.integers(1, 6))
    cuts = sorted(draw(st.lists(st.integers(0, height), min_size=ranks - 1, max_size=ranks - 1)))
    return RowPartition(tuple(b - a for a, b in pairwise([0, *cuts, height])), allow_empty=True), False


def tensor_of(partition, at, ndim, seed=0):
    sizes = [2, 3, 4, 2][: ndim - 1]
    return randn(*sizes[:at], partition.rows, *sizes[at:], seed=seed)


@st.composite
def cases(draw):
    partition, declare = draw(any_partition())
    ndim = draw(st.integers(1, 5))
    at = draw(st.integers(0, ndim - 1))
    whole = tensor_of(partition, at, ndim)
    return whole, partition, draw(st.sampled_from([at, at - ndim])), declare


def dims_of(draw, ndim):
    """One dim, or several different ones."""
    dims = st.integers(-ndim, ndim - 1)
    listed = draw(st.lists(dims, min_size=1, max_size=ndim, unique_by=lambda d: d % ndim))
    return listed[0] if len(listed) == 1 and draw(st.booleans()) else tuple(listed)
