"""Convolutions of a sharded tensor; transposed ones are in ``transposed.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, Placed, is_unbatched, per_dim, place, without_rows
from credit_domain.engine.footprint import Footprint, check_reach, window_rows, windows
from credit_domain.engine.ranks import domain_of, normal_dim
from credit_domain.engine.row_op import row_op
from credit_domain.engine.skips import follow
from credit_domain.ops.conv.borders import Local, local_of_conv
from credit_domain.ops.conv.overlap import Shape, overlapped
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

Ints = int | Sequence[int]
_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


@row_op
class Convolution(NamedTuple):
    """A kernel that slides over the rows, with padding before the first and after the last."""

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    mode: str = "zeros"

    @property
    def ratio(self) -> tuple[int, int]:
        """``stride`` rows become one."""
        return self.stride, 1

    @property
    def span(self) -> int:
        """The rows from the first to the last that the kernel reads."""
        return self.dilation * (self.kernel - 1) + 1

    def footprint(self, source: RowPartition) -> Footprint:
        """Output row ``j`` reads row ``j * stride - before`` and on; its owner is that of row ``j * stride``.

        Raises:
            ValueError: If the padded rows are fewer than the kernel spans, or fewer than the edge rule reflects or
                wraps.
        """
        kernel, stride, before, after, dilation, mode = self
        if source.rows + before + after < self.span:
            raise ValueError(
                f"the kernel spans {self.span} rows, and {source.rows} rows with padding {before} and {after} are only "
                f"{source.rows + before + after}"
            )
        edge = EdgeRule(mode)
        check_reach(source.rows, (before, after), edge)
        rows = window_rows(source.rows, kernel, stride, before, after, dilation)
        return windows(source, source.strided(stride, rows), self.span, stride, before, edge)

    def local(self, rows: range, need: range, out: range) -> Local | None:
        """What a rank's own rows give while the halo travels; see :mod:`credit_domain.ops.conv.borders`."""
        return local_of_conv(self.kernel, self.stride, self.dilation, rows, need, out)


class Geometry(NamedTuple):
    """The numbers of a convolution, one for each spatial dim.

    Attributes:
        kernel: Size of the kernel.
        stride: As in torch.
        padding: Before and after.
        dilation: As in torch.
        groups: As in torch.
        modes: What lies beyond the edges.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    modes: tuple[str, ...]

    @property
    def torchs_padding(self) -> tuple[int, ...] | None:
        """The padding as torch's convolutions take it; None if they do not do it."""
        if any(before != after for before, after in self.padding):
            return None
        if any(pads[0] and mode != "zeros" for pads, mode in zip(self.padding, self.modes, strict=True)):
            return None
        return tuple(before for before, _ in self.padding)

    def along(self, at: int) -> Convolution:
        """What it does along one dim."""
        return Convolution(self.kernel[at], self.stride[at], *self.padding[at], self.dilation[at], self.modes[at])


def geometry_of(
    kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int, modes: str | Sequence[str]
) -> Geometry:
    """The numbers of a convolution as torch takes them; ``padding`` may also be a pair for each dim.

    Raises:
        ValueError: As :func:`padding_pairs`.
    """
    kernel = tuple(kernel)
    nd = len(kernel)
    strides, dilations = per_dim(stride, nd), per_dim(dilation, nd)
    pads = padding_pairs(padding, kernel, strides, dilations, nd)
    return Geometry(kernel, strides, pads, dilations, groups, per_dim(modes, nd))


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "conv1d",
) -> Tensor:
    """Convolve a sharded tensor (B, C, L) or (C, L); see :func:`conv2d`."""
    geometry = geometry_of(weight.shape[2:], stride, padding, dilation, groups, padding_mode)
    return conv(x, weight, bias, geometry, Call(dim, partition, manager, label))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "conv2d",
) -> Tensor:
    """Convolve a sharded tensor: :func:`torch.nn.functional.conv2d` of the whole.

    Output row ``j`` comes out on the owner of input row ``j * stride``: under ``partition.strided(stride, rows)``.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W).
        weight: The whole kernel, the same on every rank; likewise ``bias``.
        bias: Bias, or None.
        stride: As in torch.
        padding: As in torch: of the whole tensor, ``"same"`` and ``"valid"`` too.
        dilation: As in torch.
        groups: As in torch.
        padding_mode: What lies beyond the edges of all padded dims: ``zeros``, ``reflect``, ``replicate`` or
            ``circular``, as :class:`torch.nn.Conv2d` takes it.

    Raises:
        ValueError: On all ranks alike, if the whole tensor is smaller than the kernel or than the padding mode needs,
            or ``dim`` is no spatial dim; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    geometry = geometry_of(weight.shape[2:], stride, padding, dilation, groups, padding_mode)
    return conv(x, weight, bias, geometry, Call(dim, partition, manager, label))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "conv3d",
) -> Tensor:
    """Convolve a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`conv2d`."""
    geometry = geometry_of(weight.shape[2:], stride, padding, dilation, groups, padding_mode)
    return conv(x, weight, bias, geometry, Call(dim, partition, manager, label))


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, call: Call, shares: bool = False
) -> Tensor:
    """The convolution of any number of spatial dims, also for layers.

    Args:
        x: This rank's rows.
        weight: The whole kernel.
        bias: Bias, or None.
        geometry: Its numbers.
        call: What it was told.
        shares: Whether another layer may read the same tensor, so that one exchange may serve both.
    """
    nd, label = len(geometry.kernel), call.label
    dim, domain = normal_dim(call.dim, x.ndim, nd, label), domain_of(call.manager)
    unbatched = is_unbatched(x.shape, nd, label)
    if domain.size == 1:
        return _padded_conv(x, weight, bias, geometry)
    called, x = x, x.unsqueeze(0) if unbatched else x
    rows = x
    op, at = geometry.along(dim), dim + nd
    placed = place(op, x, call, dim, domain)
    follow(*placed.step.sizes, domain, label)
    rest = geometry._replace(padding=(*geometry.padding[:at], (0, 0), *geometry.padding[at + 1 :]))
    inside = rest.torchs_padding
    if inside is None and not placed.step.local and 0 not in placed.sizes:  # torch pads no rows; such ranks wait
        x, inside = _padded(x, rest)
    out = None
    if inside is not None:
        shape = Shape(rest.stride, inside, rest.dilation, False, (0,) * nd, rest.groups)
        plain = partial(_waiting, placed, rest._replace(padding=tuple((pad, pad) for pad in inside)))
        out = overlapped(op, x, weight, bias, placed, shape, plain, called if shares and x is rows else None)
    if out is None:
        out = _waiting(placed, rest, rows, weight, bias)
    return out.squeeze(0) if unbatched else out


def _waiting(placed: Placed, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bring the rows, then convolve them."""
    rows = placed.bring(x)
    if placed.step.out:
        return _padded_conv(rows, weight, bias, geometry)
    span = geometry.along(placed.dim).span
    return without_rows(lambda none: _padded_conv(none, weight, bias, geometry), rows, placed.dim, span)


def _padded_conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve what needs no rows of others; torch's own zero padding wherever it can be used."""
    unbatched = x.ndim == weight.ndim - 1
    x, inside = _padded(x.unsqueeze(0) if unbatched else x, geometry)
    out = _CONV[len(inside) - 1](x, weight, bias, geometry.stride, inside, geometry.dilation, geometry.groups)
    return out.squeeze(0) if unbatched else out


def _padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` with the padding that torch's convolutions do not do, and what is left to them."""
    nd, inside = len(geometry.kernel), []
    for axis, ((before, after), mode) in enumerate(zip(geometry.padding, geometry.modes, strict=True)):
        if before == after and (mode == "zeros" or not before):
            inside.append(before)
            continue
        inside.append(0)
        amounts = [0, 0] * nd
        amounts[2 * (nd - 1 - axis) : 2 * (nd - axis)] = before, after
        x = F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)
    return x, tuple(inside)


def padding_pairs(
    padding: Any, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], nd: int
) -> tuple[tuple[int, int], ...]:
    """Padding before and after each spatial dim.

    Raises:
        ValueError: For a name other than ``same`` and ``valid``, or ``same`` with a stride.
    """
    if padding == "valid":
        return ((0, 0),) * nd
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError("padding='same' is not supported for strided convolutions")
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or numbers; got {padding!r}")
    return tuple(pad if isinstance(pad, tuple) else (pad, pad) for pad in per_dim(padding, nd))
