"""Operators that take rows from elsewhere: slices, rolls, flips, padding, tables of indices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from credit_domain import functional as F
from credit_domain.engine.row_op import footprint_for
from credit_domain.ops.padding.padding import Padding
from credit_domain.ops.rearranging import Flip, Regroup, Roll
from credit_domain.partitioner import steps
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import even, evenly, kept
from credit_domain.partitioner.rules.pointwise import aligned
from credit_domain.partitioner.rules.products import sum_step
from credit_domain.partitioner.rules.table import local, replicated, rule, whole
from credit_domain.partitioner.steps import named, partition

aten = torch.ops.aten


@rule("slice.Tensor")
def slice_(b: Builder, x: Value, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    """Rows with steps: each goes to the owner of the row that it is, counted from the first that is taken."""
    dim, size = dim % x.ndim, x.shape[dim % x.ndim]
    rows = range(*slice(start, stop, step).indices(size))
    layout = x.layout
    if x.fill is not None:
        return Value(b.meta, None, None, fill=x.fill)
    if len(rows) == size:
        return local(b, layout, b.at(x, layout), dim, 0, None, 1) if layout is None or layout.dim != dim else x
    if layout is None or layout.dim != dim:
        return local(b, layout, b.at(x, layout), dim, start, stop, step)
    if layout.outer > 1 or not rows:
        return replicated(b, x, dim, start, stop, step)
    return taken(b, x, rows)


def taken(b: Builder, x: Value, rows: Sequence[int], like: Any = None) -> Value:
    """Any rows of the divided dim, in order, of which each rank gets a part."""
    layout = x.layout
    assert layout is not None
    if len(rows) == 1:  # which every rank will need, where it meets others
        every = (tuple(rows),) * b.place.ranks
        b.brings("take", x, Regroup(every).footprint(partition(layout.sizes)))
        return b.value(b.emit(steps.taken(layout, every, b.place, b.label, "take_row"), b.at(x, layout)), None, like)
    step = rows.step if isinstance(rows, range) and rows.step > 0 else 1
    few = len(rows) * 2 * step <= layout.units
    cuts = [-(-cut // step) for cut in accumulate(layout.sizes)]
    sizes = kept([b - a for a, b in zip([0, *cuts], cuts, strict=False)], len(rows))
    if few:
        sizes = even(len(rows), b.place.ranks)
    ends = [0, *accumulate(sizes)]
    needs = [rows[a:z] if isinstance(rows, range) else tuple(rows[a:z]) for a, z in pairwise(ends)]
    out = layout._replace(sizes=tuple(sizes))
    b.brings("take", x, Regroup(tuple(needs)).footprint(partition(layout.sizes)))
    return b.value(b.emit(steps.taken(layout, needs, b.place, b.label, "take_rows"), b.at(x, layout)), out, like)


@rule("select.int")
def select(b: Builder, x: Value, dim: int, index: int) -> Any:
    """One row goes to every rank."""
    dim, layout = dim % x.ndim, x.layout
    if layout is None or layout.dim != dim:
        if layout is not None and layout.dim > dim:
            layout = layout._replace(dim=layout.dim - 1)
        return local(b, layout, b.at(x, x.layout), dim, index)
    if layout.outer > 1:
        return replicated(b, x, dim, index)
    row = index % x.shape[dim]
    needs = (range(row, row + 1),) * b.place.ranks
    b.brings("take", x, Regroup(needs).footprint(partition(layout.sizes)))
    node = b.emit(steps.taken(layout, needs, b.place, b.label, "take_row"), b.at(x, layout))
    return b.value(b.emit(aten.squeeze.dims, node, [dim]), None)


@rule("split.Tensor", "split_with_sizes", "chunk", "unbind.int", "tensor_split.sections", "split.sizes")
def split(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Pieces along a dim."""
    named_dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    unbind = b.node.target is aten.unbind.int
    if unbind:
        named_dim = args[0] if args else kwargs.get("dim", 0)
    dim, layout = named_dim % x.ndim, x.layout
    if layout is None or layout.dim != dim or layout.outer > 1 or unbind:
        layout = b.free(x, [dim])
        node = b.at(x, layout)
        if unbind and layout is not None and layout.dim > dim:
            layout = layout._replace(dim=layout.dim - 1)
        return local(b, layout, node, *args, **kwargs)
    pieces, start = [], 0
    for piece in b.meta:
        pieces.append(taken(b, x, range(start, start + int(piece.shape[dim])), piece))
        start += int(piece.shape[dim])
    return tuple(pieces)


@rule("roll")
def roll(b: Builder, x: Value, shifts: Any, dims: Any = ()) -> Any:
    """Rows around the ends; ranks keep as many as they have."""
    along = [d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    layout = x.layout
    if layout is None or not along or (layout.dim in along and layout.outer > 1):
        return replicated(b, x, shifts, dims) if layout is not None else local(b, None, b.at(x, None), shifts, dims)
    if layout.dim not in along:
        return local(b, layout, b.at(x, layout), shifts, dims)
    amounts = [shifts] if isinstance(shifts, int) else list(shifts)
    where = {"dim": layout.dim, "partition": partition(layout.sizes), "manager": b.place.manager, "label": b.label}
    step = named(lambda x: F.roll(x, amounts, along, **where), "roll")
    shift = sum(amount for amount, d in zip(amounts, along, strict=True) if d == layout.dim)
    b.brings("take", x, Roll(shift).footprint(partition(layout.sizes)))
    return b.value(b.emit(step, b.at(x, layout)), layout)


@rule("flip")
def flip(b: Builder, x: Value, dims: Sequence[int]) -> Any:
    """Rows in the opposite order; ranks keep as many as they have."""
    along, layout = [d % x.ndim for d in dims], x.layout
    if layout is None or layout.dim not in along:
        return local(b, layout, b.at(x, layout), along)
    if layout.outer > 1:
        return replicated(b, x, dims)
    where = {"dim": layout.dim, "partition": partition(layout.sizes), "manager": b.place.manager, "label": b.label}
    b.brings("take", x, Flip().footprint(partition(layout.sizes)))
    return b.value(b.emit(named(lambda x: F.flip(x, along, **where), "flip"), b.at(x, layout)), layout)


@rule("pad")
def pad(b: Builder, x: Value, amounts: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Rows before the first and after the last; boundaries keep their numbers."""
    layout, amounts = x.layout, [int(amount) for amount in amounts]
    at = None if layout is None else 2 * (x.ndim - 1 - layout.dim)
    if layout is None or at is None or not any(amounts[at : at + 2]):
        return b.value(b.emit(aten.pad.default, b.at(x, layout), amounts, mode, value), layout)
    if layout.outer > 1:
        layout = b.free(x, [layout.dim])
        return b.value(b.emit(aten.pad.default, b.at(x, layout), amounts, mode, value), layout)
    dim = layout.dim - x.ndim
    fill = None if value is None else float(value).hex()
    numbers = (*amounts[at : at + 2], mode, fill, dim, x.ndim, len(amounts))
    footprint = footprint_for(Padding, numbers, layout.sizes)
    out = footprint.target
    where = {"dim": dim, "partition": partition(layout.sizes), "manager": b.place.manager, "label": b.label}
    b.brings("halo", x, footprint)
    step = named(lambda x: F.pad(x, amounts, mode, value, **where), "pad")
    return b.value(b.emit(step, b.at(x, layout)), layout._replace(sizes=out.sizes))


@rule("constant_pad_nd")
def constant_pad(b: Builder, x: Value, amounts: Sequence[int], value: float = 0) -> Any:
    """See :func:`pad`."""
    return pad(b, x, amounts, "constant", value)


@rule("index.Tensor", "index_select")
def index(b: Builder, x: Value, *args: Any) -> Any:
    """Rows by a table: each rank gets a part of the table's rows, where the table is a constant."""
    layout = x.layout
    if b.node.target is aten.index_select.default:
        tables: list[Any] = [None] * x.ndim
        tables[args[0] % x.ndim] = args[1]
        nodes: list[Any] = [None] * x.ndim
        nodes[args[0] % x.ndim] = b.node.args[2]
    else:
        tables, nodes = list(args[0]), list(b.node.args[1])
    used = [d for d, table in enumerate(tables) if table is not None]
    if layout is None or len(used) != 1:
        return _index_elsewhere(b, x, tables, args)
    dim = used[0]
    table = tables[dim]
    if table.dtype is torch.bool or table.dtype is torch.uint8:
        return replicated(b, x, *args)
    if layout.dim != dim:
        out = layout._replace(dim=layout.dim + (table.ndim - 1 if layout.dim > dim else 0))
        return local(b, out, b.at(x, layout), *whole(b, args))
    known = b.constant_of(nodes[dim])
    if known is None or table.ndim != 1 or layout.outer > 1 or not known.numel():
        return replicated(b, x, *args)
    return taken(b, x, tuple(int(row) % x.shape[dim] for row in known))


def _index_elsewhere(b: Builder, x: Value, tables: list[Any], args: Any) -> Any:
    """Several tables, or a table that is divided itself."""
    used = [d for d, table in enumerate(tables) if table is not None]
    layout = x.layout
    together = used == list(range(used[0], used[-1] + 1)) if used else True
    if layout is None and len(used) >= 1 and together:
        ndim = max(tables[d].ndim for d in used)
        divided = [tables[d] for d in used if tables[d].layout is not None and tables[d].ndim == ndim]
        if divided and tables[used[0]].dtype not in (torch.bool, torch.uint8):
            rows = divided[0].layout
            made = [None if t is None else aligned(b, t, rows, ndim) for t in tables]
            first = b.at(x, None)
            if b.node.target is aten.index_select.default:
                return local(b, rows._replace(dim=used[0]), first, used[0], made[used[0]])
            return local(b, rows._replace(dim=rows.dim + used[0]), first, made)
    masks = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in tables)
    if layout is not None and together and layout.dim not in used and not masks:
        ndim = max(tables[d].ndim for d in used)
        out = layout._replace(dim=layout.dim + (ndim - len(used) if layout.dim > used[-1] else 0))
        return local(b, out, b.at(x, layout), *whole(b, args))
    return replicated(b, x, *args)


@rule("index_add", "scatter_add", "index_put", "scatter_reduce.two")
def add_at(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Sums of rows by a table: each rank adds its part of the rows, and the ranks' sums are added."""
    if b.node.target is not aten.index_add.default or kwargs.get("alpha", 1) != 1 or len(args) > 3:
        return replicated(b, x, *args, **kwargs)
    dim, table, source = args[0] % x.ndim, args[1], args[2]
    layout = source.layout if source.fill is None else None
    if layout is None:
        return replicated(b, x, *args, **kwargs)
    if layout.dim != dim:
        return local(b, layout, b.at(x, layout), dim, b.at(table, None), b.at(source, layout))
    shape = list(x.shape)

    def sums_of(source: Tensor, table: Tensor) -> Tensor:
        return source.new_zeros(shape).index_add(dim, table, source)

    b.sums(2 * x.bytes)
    node = b.emit(named(sums_of, "sums_of"), b.at(source, layout), b.at(table, layout._replace(dim=0)))
    total = b.value(b.emit(sum_step(b), node), None)
    if shape[dim] < b.place.ranks:
        return b.value(b.emit(aten.add.Tensor, b.at(x, None), b.at(total, None)), None)
    rows = x.layout if x.layout is not None and x.fill is None else evenly(dim, shape[dim], b.place.ranks)
    return b.value(b.emit(aten.add.Tensor, b.at(x, rows), b.at(total, rows)), rows)
