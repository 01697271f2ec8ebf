"""Operators that put rows of several values together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from credit_domain.ops.rearranging import Regroup
from credit_domain.partitioner import steps
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import Rows, kept
from credit_domain.partitioner.rules.pointwise import aligned, common
from credit_domain.partitioner.rules.table import replicated, rule
from credit_domain.partitioner.steps import named, partition

aten = torch.ops.aten


@rule("cat", "concat", "concatenate")
def cat(b: Builder, values: Sequence[Value], dim: int = 0) -> Any:
    """Along another dim than the rows, all lie as the largest; along the rows, each rank brings its part of each."""
    like = b.meta
    values = [v for v in values if v.shape != (0,)]  # which torch passes over
    ndim = like.ndim
    dim = dim % ndim
    layout = common(b, values, ndim)
    if layout is None or layout.dim != dim:
        if layout is not None and int(like.shape[layout.dim]) != layout.units * layout.outer:
            layout = None
        return b.value(b.emit(aten.cat.default, [b.at(v, layout) for v in values], dim), layout)
    if layout.outer > 1:
        return replicated(b, values, dim)
    return _cat_rows(b, values, dim)


def _cat_rows(b: Builder, values: Sequence[Value], dim: int) -> Value:
    largest = max((v for v in values if v.layout is not None), key=lambda v: v.shape[dim])
    assert largest.layout is not None
    sizes = kept(largest.layout.sizes, sum(v.shape[dim] for v in values))
    ends = [0, *accumulate(sizes)]
    pieces, start = [], 0
    for value in values:
        rows = value.shape[dim]
        needs = [range(min(max(a - start, 0), rows), min(max(z - start, 0), rows)) for a, z in pairwise(ends)]
        start += rows
        pieces.append(_part(b, value, dim, needs))
    return b.value(b.emit(aten.cat.default, pieces, dim), largest.layout._replace(dim=dim, outer=1, sizes=sizes))


def _part(b: Builder, value: Value, dim: int, needs: Sequence[range]) -> Any:
    own = needs[b.place.rank]
    if value.fill is not None:
        shape = [len(own) if d == dim else size for d, size in enumerate(value.shape)]
        return b.emit(aten.full.default, shape, value.fill, dtype=value.dtype, device=value.device)
    layout = value.layout
    if layout is None or layout.dim != dim or layout.outer > 1:
        return b.emit(aten.slice.Tensor, b.at(value, None), dim, own.start, own.stop)
    b.brings("take", value, Regroup(tuple(needs)).footprint(partition(layout.sizes)))
    return b.emit(steps.taken(layout, list(needs), b.place, b.label, "take_rows"), b.at(value, layout))


@rule("stack")
def stack(b: Builder, values: Sequence[Value], dim: int = 0) -> Any:
    """A new dim."""
    ndim = b.meta.ndim
    dim = dim % ndim
    layout = common(b, values, ndim - 1)
    nodes = [b.at(v, layout) for v in values]
    if layout is not None and layout.dim >= dim:
        layout = layout._replace(dim=layout.dim + 1)
    return b.value(b.emit(aten.stack.default, nodes, dim), layout)


@rule("slice_scatter")
def slice_scatter(
    b: Builder,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Any:
    """Rows in the place of others: each rank brings those that fall among its own."""
    dim = dim % x.ndim
    rows = range(*slice(start, stop, step).indices(x.shape[dim]))
    layout = _layout_for(b, x, source, dim)
    if layout is None or layout.dim != dim:
        node = _put(b, b.at(x, layout), aligned(b, source, layout, x.ndim), dim, rows.start, rows.stop, rows.step)
        return b.value(node, layout)
    if layout.outer > 1 or not rows:
        return replicated(b, x, source, dim, start, stop, step)
    ends = [0, *accumulate(layout.sizes)]
    needs = []
    for a, z in pairwise(ends):
        first = max(0, -(-(a - rows.start) // rows.step))
        last = min(len(rows), max(0, -(-(z - rows.start) // rows.step)))
        needs.append(range(first, max(first, last)))
    own, first_row = needs[b.place.rank], ends[b.place.rank]
    piece = _part(b, source, dim, needs)
    if not len(own):
        # The piece has no rows, and stays in the graph so that every rank takes part in its backward.
        node = _put(b, b.at(x, layout), piece, dim, 0, 0, 1)
    else:
        begin = rows[own.start] - first_row
        end = rows[own.stop - 1] - first_row + 1
        node = _put(b, b.at(x, layout), piece, dim, begin, end, rows.step)
    return b.value(node, layout)


def _layout_for(b: Builder, x: Value, source: Value, dim: int) -> Rows | None:
    """The layout of the larger; of the source, only where its rows are all rows."""
    if x.layout is not None and x.fill is None:
        return x.layout
    rows = source.layout if source.fill is None else None
    if rows is None:
        return None
    if rows.dim == dim:
        if rows.outer > 1 or x.shape[dim] < source.shape[dim]:
            return None
        return rows._replace(sizes=kept(rows.sizes, x.shape[dim]))
    return rows


@rule("select_scatter")
def select_scatter(b: Builder, x: Value, source: Value, dim: int, index: int) -> Any:
    """One row in the place of another, on the rank that owns it."""
    dim = dim % x.ndim
    layout = x.layout if x.fill is None else None
    if layout is None:
        rows = source.layout if source.fill is None else None
        layout = None if rows is None else rows._replace(dim=rows.dim + (rows.dim >= dim))
    if layout is None:
        return b.value(_put_one(b, b.at(x, None), b.at(source, None), dim, index % x.shape[dim]), None)
    if layout.dim != dim:
        inner = layout._replace(dim=layout.dim - (layout.dim > dim))
        node = aligned(b, source, inner, x.ndim - 1)
        return b.value(_put_one(b, b.at(x, layout), node, dim, index % x.shape[dim]), layout)
    if layout.outer > 1:
        return replicated(b, x, source, dim, index)
    row = index % x.shape[dim] - layout.start(b.place.rank)
    piece = b.at(source, None)
    if not 0 <= row < layout.sizes[b.place.rank]:
        node = b.emit(aten.narrow.default, b.emit(aten.unsqueeze.default, piece, dim), dim, 0, 0)
        return b.value(_put(b, b.at(x, layout), node, dim, 0, 0, 1), layout)
    return b.value(_put_one(b, b.at(x, layout), piece, dim, row), layout)


def _put_one(b: Builder, x: fx.Node, source: fx.Node, dim: int, row: int) -> fx.Node:
    return _put(b, x, b.emit(aten.unsqueeze.default, source, dim), dim, row, row + 1, 1)


def _put(b: Builder, x: fx.Node, source: fx.Node, dim: int, start: int, stop: int, step: int) -> fx.Node:
    """Rows in the place of others: what ``slice_scatter`` does, which has no gradient for complex tensors."""

    def put_rows(x: Tensor, source: Tensor) -> Tensor:
        out = x.clone()
        aten.slice.Tensor(out, dim, start, stop, step).copy_(source)
        return out

    return b.emit(named(put_rows, "put_rows"), x, source)
