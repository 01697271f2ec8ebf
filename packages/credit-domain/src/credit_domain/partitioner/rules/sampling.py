"""Patches, and values at any place: ``unfold``, ``fold`` and ``grid_sample``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, place
from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import domain_of
from credit_domain.engine.row_op import footprint_for
from credit_domain.ops.conv.convolution import Convolution
from credit_domain.ops.conv.transposed import TransposedConvolution
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import plain, scaled
from credit_domain.partitioner.rules.pointwise import aligned
from credit_domain.partitioner.rules.table import local, rule
from credit_domain.partitioner.steps import named, partition

aten = torch.ops.aten
Pair = Sequence[int]


@rule("im2col")
def unfold(b: Builder, x: Value, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Any:
    """Patches of the rows that a rank owns, with rows from the neighbours."""
    layout = b.free(x, [x.ndim - 1, x.ndim - 3], prefer=[x.ndim - 2])
    if layout is None or layout.dim != x.ndim - 2 or layout.outer > 1:
        return local(b, layout, b.at(x, layout), kernel, dilation, padding, stride)
    op = Convolution(kernel[0], stride[0], padding[0], padding[0], dilation[0])
    footprint = op.footprint(partition(layout.sizes))
    target = footprint.target
    columns = int(b.meta.shape[-1]) // target.rows
    call = Call(-2, partition(layout.sizes), b.place.manager, b.label)
    how = tuple(kernel), tuple(dilation), (0, padding[1]), tuple(stride)

    def unfold_rows(x: Tensor) -> Tensor:
        placed = place(op, x, call, -2, domain_of(call.manager))
        rows = placed.bring(x)
        if placed.step.out:
            return F.unfold(rows, *how)
        return rows.flatten(-2).repeat_interleave(kernel[0] * kernel[1], -2)  # no patch of as many entries

    b.brings("halo", x, footprint)
    sizes = tuple(size * columns for size in target.sizes)
    return b.value(
        b.emit(named(unfold_rows, "unfold"), b.at(x, layout)), layout._replace(dim=b.meta.ndim - 1, sizes=sizes)
    )


@rule("col2im")
def fold(b: Builder, x: Value, size: Pair, kernel: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Any:
    """Sums of patches: each rank brings those that reach its rows."""
    ndim, layout = x.ndim, x.layout
    down = (size[0] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    across = x.shape[-1] // down
    if layout is None or layout.dim != ndim - 1 or layout.outer > 1 or any(n % across for n in layout.sizes):
        layout = b.free(x, [ndim - 1, ndim - 2])
        return local(b, layout, b.at(x, layout), size, kernel, dilation, padding, stride)
    rows = tuple(n // across for n in layout.sizes)
    op = TransposedConvolution(kernel[0], stride[0], padding[0], 0, dilation[0], size[0])
    if not 0 <= op.output_padding_of(down) < stride[0]:
        layout = b.free(x, [ndim - 1, ndim - 2])
        return local(b, layout, b.at(x, layout), size, kernel, dilation, padding, stride)
    footprint: Footprint = footprint_for(TransposedConvolution, tuple(op), rows)
    call = Call(-2, partition(rows), b.place.manager, b.label)
    span = dilation[0] * (kernel[0] - 1) + 1

    how = tuple(kernel), tuple(dilation), (0, padding[1]), tuple(stride)

    def fold_rows(x: Tensor) -> Tensor:
        units = x.reshape(*x.shape[:-1], x.shape[-1] // across, across)
        placed = place(op, units, call, -2, domain_of(call.manager))
        brought = placed.bring(units)
        step = placed.step
        if not step.out:  # no row, of the sums of no patches
            channels = brought.shape[-3] // (kernel[0] * kernel[1])
            none: Tensor = brought.flatten(-3)[..., :0].reshape(*brought.shape[:-3], channels, 0, size[1])
            return none
        tall = (step.rows - 1) * stride[0] + span
        made = F.fold(brought.flatten(-2), (tall, size[1]), *how)
        return made.narrow(-2, step.first - (step.start * stride[0] - padding[0]), step.out)

    b.brings("halo", x, footprint)
    node = b.emit(named(fold_rows, "fold"), b.at(x, layout))
    return b.value(node, layout._replace(dim=b.meta.ndim - 2, sizes=footprint.target.sizes))


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sample(b: Builder, x: Value, grid: Value, *how: Any) -> Any:
    """Values at any place: every rank needs all rows, and samples at its own places."""
    ranks = b.place.ranks
    if x.layout is not None and x.layout.dim == 0 and grid.layout is None:
        return local(b, x.layout, b.at(x, x.layout), b.at(grid, x.layout), *how)
    rows = grid.layout
    if rows is None or rows.dim in (0, grid.ndim - 1):
        tall = grid.shape[-3]
        rows = plain(grid.ndim - 3, scaled(b.declared, tall)) if tall >= ranks and x.layout is not None else None
    if rows is None:
        return local(b, None, b.at(x, None), b.at(grid, None), *how)
    return local(b, rows._replace(dim=rows.dim + 1), b.at(x, None), aligned(b, grid, rows, grid.ndim), *how)
