"""Pooling of a sharded tensor by windows that slide over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Step, bring, constant, domain_of, normal_dim, sizes_of, step_of
from credit_domain.functional.conv import Ints, batched, per_dim
from credit_halo import EdgeRule
from credit_halo import constant as constant_edge
from credit_mesh import DomainParallelManager, RowPartition

_MAX: tuple[Callable[..., Any], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_LP: tuple[Callable[..., Tensor], ...] = (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d)
HALF = (torch.bfloat16, torch.float16)


def max_pool1d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "max_pool1d",
) -> Any:
    """Maxima of a sharded tensor (B, C, L) or (C, L); see :func:`max_pool2d`."""
    args = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return max_pool(1, x, *args, dim, partition, manager, label)


def max_pool2d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "max_pool2d",
) -> Any:
    """Maxima of a sharded tensor: :func:`torch.nn.functional.max_pool2d` of the whole, its choice among ties too.

    Output row ``j`` comes out on the owner of input row ``j * stride``: under ``partition.strided(stride, rows)``.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W).
        kernel_size: As in torch, like all that follow; of the whole tensor.
        stride: See ``kernel_size``.
        padding: See ``kernel_size``.
        dilation: See ``kernel_size``.
        ceil_mode: See ``kernel_size``.
        return_indices: Return a pair: the maxima, and where each is in the **whole** tensor, flat as in torch.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if the whole tensor is smaller than the window, the padding more than half of
            it, or ``dim`` is no spatial dim; and as :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    args = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return max_pool(2, x, *args, dim, partition, manager, label)


def max_pool3d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "max_pool3d",
) -> Any:
    """Maxima of a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`max_pool2d`."""
    args = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return max_pool(3, x, *args, dim, partition, manager, label)


def avg_pool1d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "avg_pool1d",
) -> Tensor:
    """Means over windows of a sharded tensor (B, C, L) or (C, L); see :func:`avg_pool2d`."""
    args = (kernel_size, stride, padding, ceil_mode, count_include_pad, None)
    return avg_pool(1, x, *args, dim, partition, manager, label)


def avg_pool2d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "avg_pool2d",
) -> Tensor:
    """Means over windows of a sharded tensor: :func:`torch.nn.functional.avg_pool2d` of the whole.

    Output row ``j`` comes out on the owner of input row ``j * stride``: under ``partition.strided(stride, rows)``.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W), of a floating-point dtype.
        kernel_size: As in torch, like all that follow; of the whole tensor.
        stride: See ``kernel_size``.
        padding: See ``kernel_size``.
        ceil_mode: See ``kernel_size``.
        count_include_pad: See ``kernel_size``.
        divisor_override: See ``kernel_size``.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: As :func:`max_pool2d`, or if the dtype is not floating-point.
        ExchangeError: As :func:`max_pool2d`.

    Collectives:
        Those of :func:`max_pool2d`.
    """
    args = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return avg_pool(2, x, *args, dim, partition, manager, label)


def avg_pool3d(
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "avg_pool3d",
) -> Tensor:
    """Means over windows of a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`avg_pool2d`."""
    args = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return avg_pool(3, x, *args, dim, partition, manager, label)


def lp_pool1d(
    x: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
    *,
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "lp_pool1d",
) -> Tensor:
    """Power means over windows of a sharded tensor (B, C, L) or (C, L); see :func:`lp_pool2d`."""
    return lp_pool(1, x, norm_type, kernel_size, stride, ceil_mode, dim, partition, manager, label)


def lp_pool2d(
    x: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "lp_pool2d",
) -> Tensor:
    """Norms over windows of a sharded tensor: :func:`torch.nn.functional.lp_pool2d` of the whole.

    Output row ``j`` comes out on the owner of input row ``j * stride``: under ``partition.strided(stride, rows)``.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W).
        norm_type: As in torch, like all that follow; of the whole tensor.
        kernel_size: See ``norm_type``.
        stride: See ``norm_type``.
        ceil_mode: See ``norm_type``.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: As :func:`max_pool2d`.
        ExchangeError: As :func:`max_pool2d`.

    Collectives:
        Those of :func:`max_pool2d`.
    """
    return lp_pool(2, x, norm_type, kernel_size, stride, ceil_mode, dim, partition, manager, label)


def lp_pool3d(
    x: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None = None,
    ceil_mode: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "lp_pool3d",
) -> Tensor:
    """Norms over windows of a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`lp_pool2d`."""
    return lp_pool(3, x, norm_type, kernel_size, stride, ceil_mode, dim, partition, manager, label)


# For any number of spatial dims


def max_pool(
    nd: int,
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    return_indices: bool,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Any:
    """The maxima of any number of spatial dims.

    Args are those of :func:`max_pool2d`; ``layer`` is the number that a layer remembers its partition by.
    """
    dim = normal_dim(dim, x.ndim, nd, label)
    domain = domain_of(manager)
    if domain.size == 1:
        return _MAX[nd - 1](x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    kernel, pads, dilations = per_dim(kernel_size, nd), per_dim(padding, nd), per_dim(dilation, nd)
    strides = kernel if stride is None else per_dim(stride, nd)
    x, unbatched = batched(x, nd, label)
    at = dim + nd
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    along = (kernel[at], strides[at], pads[at], dilations[at], ceil_mode)
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    step, front = _max_step(sizes, domain.rank, *along, least, label)
    rows = bring(x, dim, step, domain, label)
    inside = (*pads[:at], front, *pads[at + 1 :])
    # torch has maxima of integers in one dim only together with their indices.
    indexed = return_indices or not x.is_floating_point()

    def pool(part: Tensor) -> tuple[Tensor, ...]:
        out = _MAX[nd - 1](part, kernel, strides, inside, dilations, ceil_mode, indexed)
        return out if indexed else (out,)

    span = dilations[at] * (kernel[at] - 1) + 1
    # Padding at the end, which torch adds as well, or ceil_mode may give rows that are another's.
    outs = tuple(out.narrow(dim, 0, step.out) for out in on_rows(pool, rows, dim, span, step.out))
    if return_indices and step.out:
        index = global_index(outs[1], rows, nd, dim, step.start, sum(sizes))
        outs = (outs[0], index)
    if unbatched:
        outs = tuple(out.squeeze(0) for out in outs)
    return outs if return_indices else outs[0]


@constant
def _max_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    ceil_mode: bool,
    least: float,
    label: str,
) -> tuple[Step, int]:
    """The rows to bring, and by how many torch is to pad them at the front."""
    return _cached_max_step(sizes, rank, kernel, stride, padding, dilation, ceil_mode, least, label)


@lru_cache(maxsize=4096)
def _cached_max_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    ceil_mode: bool,
    least: float,
    label: str,
) -> tuple[Step, int]:
    plan = _windows(sizes, kernel, stride, padding, dilation, ceil_mode, constant_edge(least), label)
    missing = max(0, -plan.needs[rank].start)
    # Rows before the first are left to torch, and come as the least number beyond the last. So where all is -inf, the
    # first row that there is gets the index and the gradient, as in torch.
    plan = replace(plan, needs=tuple(range(max(0, need.start), need.stop) for need in plan.needs))
    return step_of(plan, rank), missing


def _windows(
    sizes: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    ceil_mode: bool,
    edge: EdgeRule,
    label: str,
) -> footprint.Footprint:
    source = RowPartition(sizes, allow_empty=True)
    try:
        return footprint.pooling(source, kernel, stride, padding, dilation, ceil_mode, edge)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def avg_pool(
    nd: int,
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Tensor:
    """The means of any number of spatial dims.

    Args are those of :func:`avg_pool2d`; ``layer`` is the number that a layer remembers its partition by.
    """
    dim = normal_dim(dim, x.ndim, nd, label)
    domain = domain_of(manager)
    divisor = () if nd == 1 else (divisor_override,)
    if domain.size == 1:
        return _AVG[nd - 1](x, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)
    check_floating(x, label)
    kernel, pads = per_dim(kernel_size, nd), per_dim(padding, nd)
    strides = kernel if stride is None else per_dim(stride, nd)
    x, unbatched = batched(x, nd, label)
    at = dim + nd
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    along = (kernel[at], strides[at], pads[at], ceil_mode, count_include_pad)
    step, clipped = _avg_step(sizes, domain.rank, *along, label)
    rows = bring(x, dim, step, domain, label)
    inside = (*pads[:at], 0, *pads[at + 1 :])

    def pool(part: Tensor) -> tuple[Tensor, ...]:
        return (_AVG[nd - 1](part, kernel, strides, inside, ceil_mode, count_include_pad, *divisor),)

    correct = clipped and divisor_override is None
    dtype = dtype_of(pool, x, dim, kernel[at]) if correct else x.dtype
    if correct and x.dtype in HALF:
        rows = rows.float()  # rounded once, as in torch
    (out,) = on_rows(pool, rows, dim, kernel[at], step.out)
    if correct:  # rows that do not count were summed as zeros, and counted
        low, high = (-pads[at], sum(sizes) + pads[at]) if count_include_pad else (0, sum(sizes))
        start = torch.arange(step.first, step.first + step.out, device=x.device) * strides[at] - pads[at]
        count = (start + kernel[at]).clamp(max=high) - start.clamp(min=low)
        out = (out * (kernel[at] / count.to(out.dtype)).reshape(-1, *[1] * (-1 - dim))).to(dtype)
    return out.squeeze(0) if unbatched else out


@constant
def _avg_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    padding: int,
    ceil_mode: bool,
    count_include_pad: bool,
    label: str,
) -> tuple[Step, bool]:
    """The rows to bring, and whether there are among them such as do not count."""
    return _cached_avg_step(sizes, rank, kernel, stride, padding, ceil_mode, count_include_pad, label)


@lru_cache(maxsize=4096)
def _cached_avg_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    padding: int,
    ceil_mode: bool,
    count_include_pad: bool,
    label: str,
) -> tuple[Step, bool]:
    plan = _windows(sizes, kernel, stride, padding, 1, ceil_mode, EdgeRule(), label)
    need, counted = plan.needs[rank], padding if count_include_pad else 0
    return step_of(plan, rank), need.start < -counted or need.stop > sum(sizes) + counted


def lp_pool(
    nd: int,
    x: Tensor,
    norm_type: float,
    kernel_size: Ints,
    stride: Ints | None,
    ceil_mode: bool,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Tensor:
    """The norms of any number of spatial dims.

    Args are those of :func:`lp_pool2d`; ``layer`` is the number that a layer remembers its partition by.
    """
    if domain_of(manager).size == 1:
        normal_dim(dim, x.ndim, nd, label)
        return _LP[nd - 1](x, norm_type, kernel_size, stride, ceil_mode)
    powers = x.pow(norm_type)
    out = avg_pool(
        nd, powers, kernel_size, stride, 0, ceil_mode, True, None, dim, partition, manager, label, layer=layer
    )
    # As torch has it: the mean times the size of a whole window, also where ceil_mode clips one.
    total = (torch.sign(out) * F.relu(torch.abs(out))).mul(math.prod(per_dim(kernel_size, nd)))
    return total.pow(1.0 / norm_type)


# What all pooling shares


def on_rows(
    pool: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor, dim: int, least: int, out: int
) -> tuple[Tensor, ...]:
    """Pool the rows of a rank; without output rows, pool no batch of ``least`` rows to stay in the graph."""
    if out:
        return pool(rows)
    return tuple(_resized(part, dim, rows.shape[0], 0) for part in pool(_resized(rows, dim, 0, least)))


def _resized(none: Tensor, dim: int, batch: int, rows: int) -> Tensor:
    """A tensor without elements in another shape without elements."""
    return none.reshape(batch, *none.shape[1:dim], rows, *none.shape[none.ndim + dim + 1 :])


def dtype_of(pool: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, dim: int, least: int) -> torch.dtype:
    """The dtype that torch pools to, which autocast may choose."""
    return pool(_resized(x[:0], dim, 0, least))[0].dtype if x.dtype in HALF else x.dtype


def global_index(index: Tensor, rows: Tensor, nd: int, dim: int, start: int, total: int) -> Tensor:
    """Flat indices into rows that begin at ``start``, as flat indices into all ``total`` rows."""
    inner = math.prod(rows.shape[rows.ndim + dim + 1 :])
    moved = index + start * inner
    if dim == -nd:
        return moved
    return moved + index.div(rows.shape[dim] * inner, rounding_mode="floor") * ((total - rows.shape[dim]) * inner)


def check_floating(x: Tensor, label: str) -> None:
    """Refuse integers, which torch pools in some cases only, or cuts off."""
    if not x.is_floating_point():
        raise ValueError(f"{label}: a floating-point tensor is needed; got {x.dtype}: convert it first")
