"""Pooling of a sharded tensor by windows that slide over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, Placed, is_unbatched, per_dim, resized, run
from credit_domain.engine.footprint import Footprint, window_rows, windows
from credit_domain.engine.ranks import domain_of, normal_dim
from credit_domain.engine.row_op import row_op
from credit_halo import EdgeRule
from credit_halo import constant as constant_edge
from credit_mesh import DomainParallelManager, RowPartition

Ints = int | Sequence[int]
_MAX: tuple[Callable[..., Any], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG: tuple[Callable[..., Tensor], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_LP: tuple[Callable[..., Tensor], ...] = (F.lp_pool1d, F.lp_pool2d, F.lp_pool3d)
HALF = (torch.bfloat16, torch.float16)


@row_op
class Windows(NamedTuple):
    """Windows that slide over the rows. With ``ceil_mode`` the last may reach beyond the padding, as in torch."""

    kernel: int
    stride: int
    padding: int = 0
    dilation: int = 1
    ceil_mode: bool = False

    @property
    def ratio(self) -> tuple[int, int]:
        """``stride`` rows become one."""
        return self.stride, 1

    @property
    def span(self) -> int:
        """The rows from the first to the last of a window."""
        return self.dilation * (self.kernel - 1) + 1

    def footprint(self, source: RowPartition, edge: EdgeRule | None = None) -> Footprint:
        """Output row ``j`` reads row ``j * stride - padding`` and on; its owner is that of row ``j * stride``.

        Raises:
            ValueError: If a window would not fit once, the padding is more than half of it, or a number is out of
                range.
        """
        kernel, stride, padding, dilation, ceil_mode = self
        span = self.span
        if min(kernel, stride, dilation) < 1 or not 0 <= padding <= span // 2:
            raise ValueError(
                "kernel, stride and dilation of pooling must be at least 1, and padding from 0 to half of what the "
                f"kernel spans; got kernel {kernel}, stride {stride}, dilation {dilation} and padding {padding}"
            )
        rows = window_rows(source.rows, kernel, stride, padding, padding, dilation, ceil_mode)
        if rows < 1:
            raise ValueError(f"the window spans {span} rows, more than {source.rows} rows with padding {padding} have")
        return windows(source, source.strided(stride, rows), span, stride, padding, edge or EdgeRule())


@row_op
class MaxWindows(NamedTuple):
    """Windows of which the largest row counts; ``lowest`` is the least number of the dtype, beyond the last row.

    Rows before the first are left to torch. So where all is -inf, the first row that there is gets the index and the
    gradient, as in torch.
    """

    windows: Windows
    lowest: float

    @property
    def ratio(self) -> tuple[int, int]:
        """See :class:`Windows`."""
        return self.windows.ratio

    def footprint(self, source: RowPartition) -> Footprint:
        """See :class:`Windows`."""
        whole = Windows(*self.windows).footprint(source, constant_edge(self.lowest))
        ranges = (need for need in whole.needs if isinstance(need, range))
        return replace(whole, needs=tuple(range(max(0, need.start), need.stop) for need in ranges))


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
    return max_pool(1, x, *args, Call(dim, partition, manager, label))


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
        return_indices: Return a pair: the maxima, and where each is in the **whole** tensor, flat as in torch.

    Raises:
        ValueError: On all ranks alike, if the whole tensor is smaller than the window, the padding more than half of
            it, or ``dim`` is no spatial dim; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    args = (kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return max_pool(2, x, *args, Call(dim, partition, manager, label))


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
    return max_pool(3, x, *args, Call(dim, partition, manager, label))


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
    return avg_pool(1, x, *args, Call(dim, partition, manager, label))


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

    Raises:
        ValueError: As :func:`max_pool2d`, or if the dtype is not floating-point.

    Collectives:
        Those of :func:`max_pool2d`.
    """
    args = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return avg_pool(2, x, *args, Call(dim, partition, manager, label))


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
    return avg_pool(3, x, *args, Call(dim, partition, manager, label))


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
    return lp_pool(1, x, norm_type, kernel_size, stride, ceil_mode, Call(dim, partition, manager, label))


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

    Raises:
        ValueError: As :func:`max_pool2d`.

    Collectives:
        Those of :func:`max_pool2d`.
    """
    return lp_pool(2, x, norm_type, kernel_size, stride, ceil_mode, Call(dim, partition, manager, label))


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
    return lp_pool(3, x, norm_type, kernel_size, stride, ceil_mode, Call(dim, partition, manager, label))


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
    call: Call,
) -> Any:
    """The maxima of any number of spatial dims; args are those of :func:`max_pool2d`."""
    # Torch has maxima of integers in one dim only together with their indices.
    indexed = return_indices or not x.is_floating_point()
    kernel, pads, dilations = per_dim(kernel_size, nd), per_dim(padding, nd), per_dim(dilation, nd)
    strides = kernel if stride is None else per_dim(stride, nd)
    at = normal_dim(call.dim, x.ndim, nd, call.label) + nd
    span = dilations[at] * (kernel[at] - 1) + 1
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min

    def whole(x: Tensor) -> tuple[Tensor, ...]:
        out = _MAX[nd - 1](x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return out if return_indices else (out,)

    def part(rows: Tensor, placed: Placed) -> tuple[Tensor, ...]:
        step, dim = placed.step, placed.dim
        missing = max(0, pads[at] - step.first * strides[at]) if step.out else 0
        inside = (*pads[:at], missing, *pads[at + 1 :])
        out = _MAX[nd - 1](rows, kernel, strides, inside, dilations, ceil_mode, indexed)
        # Padding at the end, which torch adds as well, or ceil_mode may give rows that are another's.
        outs = tuple(each.narrow(dim, 0, step.out) for each in (out if indexed else (out,)))
        if return_indices and step.out:
            return outs[0], global_index(outs[1], rows, nd, dim, step.start, sum(placed.sizes))
        return outs

    is_unbatched(x.shape, nd, call.label)
    windows = Windows(kernel[at], strides[at], pads[at], dilations[at], ceil_mode)
    outs = run(MaxWindows(windows, lowest), x, call, nd, whole, part, span)
    return outs if return_indices else outs[0]


def avg_pool(
    nd: int,
    x: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    call: Call,
) -> Tensor:
    """The means of any number of spatial dims; args are those of :func:`avg_pool2d`."""
    kernel, pads = per_dim(kernel_size, nd), per_dim(padding, nd)
    strides = kernel if stride is None else per_dim(stride, nd)
    at = normal_dim(call.dim, x.ndim, nd, call.label) + nd
    divisor = () if nd == 1 else (divisor_override,)

    def whole(x: Tensor) -> Tensor:
        return _AVG[nd - 1](x, kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor)

    def pool(rows: Tensor) -> Tensor:
        inside = (*pads[:at], 0, *pads[at + 1 :])
        return _AVG[nd - 1](rows, kernel, strides, inside, ceil_mode, count_include_pad, *divisor)

    def part(rows: Tensor, placed: Placed) -> Tensor:
        step, dim, total = placed.step, placed.dim, sum(placed.sizes)
        low, high = (-pads[at], total + pads[at]) if count_include_pad else (0, total)
        clipped = step.start < low or step.start + step.rows > high
        if not step.out or not clipped or divisor_override is not None:
            return pool(rows)
        dtype = dtype_of(pool, rows, dim, kernel[at])
        out = pool(rows.float() if rows.dtype in HALF else rows)  # rounded once, as in torch
        # Rows that do not count were summed as zeros, and counted.
        start = torch.arange(step.first, step.first + step.out, device=x.device) * strides[at] - pads[at]
        count = (start + kernel[at]).clamp(max=high) - start.clamp(min=low)
        scale: Tensor = (kernel[at] / count.to(out.dtype)).reshape(-1, *[1] * (-1 - dim))
        return (out * scale).to(dtype)

    check_floating(x, call)
    is_unbatched(x.shape, nd, call.label)
    return run(Windows(kernel[at], strides[at], pads[at], 1, ceil_mode), x, call, nd, whole, part, kernel[at])


def lp_pool(
    nd: int, x: Tensor, norm_type: float, kernel_size: Ints, stride: Ints | None, ceil_mode: bool, call: Call
) -> Tensor:
    """The norms of any number of spatial dims; args are those of :func:`lp_pool2d`."""
    if domain_of(call.manager).size == 1:
        normal_dim(call.dim, x.ndim, nd, call.label)
        return _LP[nd - 1](x, norm_type, kernel_size, stride, ceil_mode)
    out = avg_pool(nd, x.pow(norm_type), kernel_size, stride, 0, ceil_mode, True, None, call)
    # As torch has it: the mean times the size of a whole window, also where ceil_mode clips one.
    total = (torch.sign(out) * F.relu(torch.abs(out))).mul(math.prod(per_dim(kernel_size, nd)))
    return total.pow(1.0 / norm_type)


# What all pooling shares


def dtype_of(pool: Callable[[Tensor], Tensor], x: Tensor, dim: int, least: int) -> torch.dtype:
    """The dtype that torch pools to, which autocast may choose."""
    return pool(resized(x[:0], dim, 0, least)).dtype if x.dtype in HALF else x.dtype


def global_index(index: Tensor, rows: Tensor, nd: int, dim: int, start: int, total: int) -> Tensor:
    """Flat indices into rows that begin at ``start``, as flat indices into all ``total`` rows."""
    inner = math.prod(rows.shape[rows.ndim + dim + 1 :])
    moved = index + start * inner
    if dim == -nd:
        return moved
    return moved + index.div(rows.shape[dim] * inner, rounding_mode="floor") * ((total - rows.shape[dim]) * inner)


def check_floating(x: Tensor, call: Call) -> None:
    """Refuse integers, which torch pools in some cases only, or cuts off.

    Raises:
        ValueError: If they would be pooled over the rows of several ranks.
    """
    if not x.is_floating_point() and domain_of(call.manager).size > 1:
        raise ValueError(f"{call.label}: a floating-point tensor is needed; got {x.dtype}: convert it first")
