"""Operators that look at the same entries in another shape."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import evenly, in_blocks, viewed
from credit_domain.partitioner.rules.table import local, replicated, rule

aten = torch.ops.aten


@rule("view", "_unsafe_view", "reshape", "flatten.using_ints", "unflatten.int")
def view(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """The rows follow the view; where it tears them apart, another dim is divided."""
    new = tuple(int(size) for size in b.meta.shape)
    rows = x.layout
    if rows is None or x.fill is not None:
        return b.value(b.emit(aten.reshape.default, b.at(x, None), list(new)), None)
    found = viewed(x.shape, rows, new)
    if found is None:
        for dim in sorted(range(x.ndim), key=lambda d: -x.shape[d]):
            if dim == rows.dim or x.shape[dim] < b.place.ranks:
                continue
            rows = evenly(dim, x.shape[dim], b.place.ranks)
            found = viewed(x.shape, rows, new)
            if found is not None:
                break
    if found is None:
        return b.value(b.emit(aten.reshape.default, b.at(x, None), list(new)), None)
    if any(size % found.block for size in rows.sizes):
        block = Fraction(found.block * sum(b.declared), rows.units)
        b.blocks.add(block.numerator)
        rows = rows._replace(sizes=in_blocks(rows.sizes, found.block))
    out = found.of(rows.sizes, rows.own)
    node = b.emit(aten.reshape.default, b.at(x, rows), list(out.shape(new, b.place.rank)))
    return b.value(node, out)


@rule("view.dtype", "view_as_real", "view_as_complex", "real", "imag", "conj", "resolve_conj", "conj_physical")
def reinterpret(b: Builder, x: Value, *args: Any) -> Any:
    """Entries in other terms; the last dim may come or go."""
    layout = x.layout
    if layout is not None and layout.dim == x.ndim - 1 and b.meta.shape[-1:] != x.shape[-1:] and b.meta.ndim <= x.ndim:
        return replicated(b, x, *args)
    return local(b, layout, b.at(x, layout), *args)


@rule("permute", "transpose.int", "t", "movedim.intlist", "numpy_T", "mT", "matrix_H", "swapaxes")
def permute(b: Builder, x: Value, *args: Any) -> Any:
    """Dims in another order."""
    layout = x.layout
    if layout is None:
        return local(b, None, b.at(x, None), *args)
    marked = torch.empty([2 if d == layout.dim else 1 for d in range(x.ndim)], device="meta")
    out = b.node.target(marked, *args)
    return local(b, layout._replace(dim=list(out.shape).index(2)), b.at(x, layout), *args)


@rule("unsqueeze")
def unsqueeze(b: Builder, x: Value, dim: int) -> Any:
    """A dim more."""
    layout, dim = x.layout, dim % (x.ndim + 1)
    if layout is not None and layout.dim >= dim:
        layout = layout._replace(dim=layout.dim + 1)
    return local(b, layout, b.at(x, x.layout), dim)


@rule("squeeze.dim", "squeeze.dims", "squeeze")
def squeeze(b: Builder, x: Value, dims: int | Sequence[int] | None = None) -> Any:
    """Dims of one entry less; a rank may have one row of a dim that has more."""
    named = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = sorted({d % x.ndim for d in named if x.shape[d] == 1})
    layout = x.layout
    if layout is not None and layout.dim in gone:
        layout = None
    node = b.at(x, layout)
    if layout is not None:
        layout = layout._replace(dim=layout.dim - sum(d < layout.dim for d in gone))
    return b.value(b.emit(aten.squeeze.dims, node, gone), layout)


@rule("expand", "broadcast_to", "expand_as")
def expand(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """One entry many times; divided rows are more than one."""
    new = [int(size) for size in b.meta.shape]
    layout, more = x.layout, len(new) - x.ndim
    if x.fill is not None:
        return Value(b.meta, None, None, fill=x.fill)
    if layout is not None and new[layout.dim + more] != x.shape[layout.dim]:
        layout = None
    node = b.at(x, layout)
    if layout is not None:
        layout = layout._replace(dim=layout.dim + more)
        new[layout.dim] = layout.size(b.place.rank)
    return b.value(b.emit(aten.expand.default, node, new), layout)


@rule("repeat")
def repeat(b: Builder, x: Value, times: Sequence[int]) -> Any:
    """Everything many times: rows that are repeated stand there so many times."""
    layout, more = x.layout, len(times) - x.ndim
    if layout is None:
        return replicated(b, x, times)
    out = layout._replace(dim=layout.dim + more, outer=layout.outer * times[layout.dim + more])
    return local(b, out, b.at(x, layout), list(times))


@rule("unfold")
def unfold(b: Builder, x: Value, dim: int, size: int, step: int) -> Any:
    """Windows along a dim, as a last dim."""
    layout = b.free(x, [dim])
    return local(b, layout, b.at(x, layout), dim, size, step)


@rule("diagonal", "as_strided")
def entries(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Entries from everywhere."""
    return replicated(b, x, *args, **kwargs)
