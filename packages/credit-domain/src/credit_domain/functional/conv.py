"""Convolutions and transposed convolutions of a sharded tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Domain, Step, bring, constant, domain_of, follow, normal_dim, sizes_of, step_of
from credit_domain.functional.borders import Borders, borders_of_conv, borders_of_transposed
from credit_domain.functional.overlap import Plain, Shape, as_autocast_does, convolve, overlaps
from credit_domain.functional.overlap_op import convolve as compiled
from credit_domain.functional.overlap_op import name_of
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

Ints = int | Sequence[int]
_CONV: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


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
    return conv(1, x, weight, bias, stride, padding, dilation, groups, padding_mode, dim, partition, manager, label)


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
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if the whole tensor is smaller than the kernel or than the padding mode needs,
            or ``dim`` is no spatial dim; and as :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    return conv(2, x, weight, bias, stride, padding, dilation, groups, padding_mode, dim, partition, manager, label)


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
    return conv(3, x, weight, bias, stride, padding, dilation, groups, padding_mode, dim, partition, manager, label)


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "conv_transpose1d",
) -> Tensor:
    """Transposed convolution of a sharded tensor (B, C, L) or (C, L); see :func:`conv_transpose2d`."""
    more = (output_padding, groups, dilation)
    return conv_transpose(1, x, weight, bias, stride, padding, *more, dim, partition, manager, label)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "conv_transpose2d",
) -> Tensor:
    """Transposed convolution of a sharded tensor: :func:`torch.nn.functional.conv_transpose2d` of the whole.

    Output row ``i`` comes out on the owner of input row ``i // stride``: under ``partition.upsampled(stride, rows)``.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W).
        weight: The whole kernel, the same on every rank; likewise ``bias``.
        bias: Bias, or None.
        stride: As in torch, like ``padding``, ``output_padding``, ``groups`` and ``dilation``; of the whole tensor.
        padding: See ``stride``.
        output_padding: See ``stride``.
        groups: See ``stride``.
        dilation: See ``stride``.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if nothing would come out, or ``dim`` is no spatial dim; and as
            :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        Those of :func:`conv2d`.
    """
    more = (output_padding, groups, dilation)
    return conv_transpose(2, x, weight, bias, stride, padding, *more, dim, partition, manager, label)


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "conv_transpose3d",
) -> Tensor:
    """Transposed convolution of a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`conv_transpose2d`."""
    more = (output_padding, groups, dilation)
    return conv_transpose(3, x, weight, bias, stride, padding, *more, dim, partition, manager, label)


# For any number of spatial dims


def conv(
    nd: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str | Sequence[tuple[int, int]],
    dilation: Ints,
    groups: int,
    padding_mode: str,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: int | None = None,
    padding_modes: Sequence[str] | None = None,
) -> Tensor:
    """The convolution of any number of spatial dims.

    Args are those of :func:`conv2d`; ``padding`` may also give a pair (before, after) for each dim, ``padding_modes`` a
    mode for each dim, and ``layer`` the number that a layer remembers its partition by.
    """
    strides, dilations = per_dim(stride, nd), per_dim(dilation, nd)
    kernel = tuple(weight.shape[2:])
    pads = padding_pairs(padding, kernel, strides, dilations, nd)
    modes = per_dim(padding_mode, nd) if padding_modes is None else tuple(padding_modes)
    dim = normal_dim(dim, x.ndim, nd, label)
    domain = domain_of(manager)
    read = x
    x, unbatched = batched(x, nd, label)
    if domain.size == 1:
        out = _padded_conv(nd, x, weight, bias, strides, pads, dilations, groups, modes)
        return out.squeeze(0) if unbatched else out
    at = dim + nd
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    span = dilations[at] * (kernel[at] - 1) + 1
    along = pads[at]
    step = _conv_step(sizes, domain.rank, kernel[at], strides[at], *along, dilations[at], modes[at], label)
    pads = (*pads[:at], (0, 0), *pads[at + 1 :])
    follow(*step.sizes, domain, label)

    def waiting(x: Tensor, weight: Tensor, bias: Tensor | None, pads: tuple[tuple[int, int], ...] = pads) -> Tensor:
        x = bring(x, dim, step, domain, label)
        if step.out:
            return _padded_conv(nd, x, weight, bias, strides, pads, dilations, groups, modes)
        # torch convolves no rows by no batch, which keeps this rank in the graph
        none = x.reshape(0, *x.shape[1 : at + 2], span, *x.shape[at + 3 :])
        out = _padded_conv(nd, none, weight, bias, strides, pads, dilations, groups, modes)
        return out.reshape(x.shape[0], *out.shape[1 : at + 2], 0, *out.shape[at + 3 :])

    if step.local or not overlaps(x, weight):
        out = waiting(x, weight, bias)
    else:
        padded, inside = _padded(nd, x, pads, modes)
        rows = (sizes, domain.rank, kernel[at], strides[at], *along, dilations[at], modes[at])
        shape = Shape(strides, inside, dilations, False, (0,) * nd, groups)
        plain = partial(waiting, pads=tuple((pad, pad) for pad in inside))
        source = read if padded is x else None
        found = _overlapped("conv", rows, padded, weight, bias, dim, domain, label, shape, plain, source, layer)
        out = waiting(x, weight, bias) if found is None else found
    return out.squeeze(0) if unbatched else out


def _overlapped(
    kind: str,
    rows: tuple[Any, ...],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dim: int,
    domain: Domain,
    label: str,
    shape: Shape,
    plain: Plain,
    read: Tensor | None,
    layer: int | None,
) -> Tensor | None:
    """Convolve while the halo travels; None where that cannot be done.

    Args are those of :func:`credit_domain.functional.overlap.convolve`, and what the borders follow from: the kind of
    convolution and the arguments of the function of that kind in ``_BORDERS``.
    """
    x, weight, bias = as_autocast_does(x, weight, bias)
    if torch.compiler.is_compiling():
        name = _compiled_name(kind, rows, dim, tuple(domain), label, tuple(shape))
        return compiled(x, weight, bias, name)[0] if name else None
    borders = _BORDERS[kind](*rows)
    if borders is None:
        return None
    return convolve(x, weight, bias, borders, dim, domain, label, shape, plain, read, layer)


@constant
def _compiled_name(
    kind: str, rows: tuple[Any, ...], dim: int, domain: tuple[Any, ...], label: str, shape: tuple[Any, ...]
) -> str:
    borders = _BORDERS[kind](*rows)
    return "" if borders is None else name_of(borders, dim, Domain(*domain), label, Shape(*shape))


@lru_cache(maxsize=4096)
def _conv_borders(
    sizes: tuple[int, ...], rank: int, kernel: int, stride: int, before: int, after: int, dilation: int, mode: str
) -> Borders | None:
    source = RowPartition(sizes, allow_empty=True)
    plan = footprint.convolution(source, kernel, stride, (before, after), dilation, EdgeRule(mode))
    return borders_of_conv(plan, rank, kernel, stride, dilation)


@constant
def _conv_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    before: int,
    after: int,
    dilation: int,
    mode: str,
    label: str,
) -> Step:
    return _cached_conv_step(sizes, rank, kernel, stride, before, after, dilation, mode, label)


@lru_cache(maxsize=4096)
def _cached_conv_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    before: int,
    after: int,
    dilation: int,
    mode: str,
    label: str,
) -> Step:
    source = RowPartition(sizes, allow_empty=True)
    try:
        plan = footprint.convolution(source, kernel, stride, (before, after), dilation, EdgeRule(mode))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    return step_of(plan, rank)


def _padded_conv(
    nd: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
    modes: tuple[str, ...],
) -> Tensor:
    """Convolve what needs no rows of others; torch's own zero padding wherever it can be used."""
    x, inside = _padded(nd, x, pads, modes)
    return _CONV[nd - 1](x, weight, bias, stride, inside, dilation, groups)


def _padded(
    nd: int, x: Tensor, pads: tuple[tuple[int, int], ...], modes: tuple[str, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` with the padding that torch's convolutions do not do, and what is left to them."""
    inside = []
    for axis, ((before, after), mode) in enumerate(zip(pads, modes, strict=True)):
        if before == after and (mode == "zeros" or not before):
            inside.append(before)
            continue
        inside.append(0)
        amounts = [0, 0] * nd
        amounts[2 * (nd - 1 - axis) : 2 * (nd - axis)] = before, after
        x = F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)
    return x, tuple(inside)


def conv_transpose(
    nd: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: int | None = None,
    output_rows: int | None = None,
) -> Tensor:
    """The transposed convolution of any number of spatial dims.

    Args are those of :func:`conv_transpose2d`; ``output_rows`` gives the global output rows in place of the output
    padding of the sharded dim, and ``layer`` is the number that a layer remembers its partition by.
    """
    strides, dilations = per_dim(stride, nd), per_dim(dilation, nd)
    pads, extras = per_dim(padding, nd), per_dim(output_padding, nd)
    kernel = tuple(weight.shape[2:])
    dim = normal_dim(dim, x.ndim, nd, label)
    at = dim + nd
    domain = domain_of(manager)
    read = x
    x, unbatched = batched(x, nd, label)
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    along = (kernel[at], strides[at], pads[at], extras[at], dilations[at])
    step, front, back = _transposed_step(sizes, domain.rank, *along, -1 if output_rows is None else output_rows, label)
    if domain.size == 1:
        extra = (*extras[:at], back, *extras[at + 1 :])
        out = _TRANSPOSED[nd - 1](x, weight, bias, strides, pads, extra, groups, dilations)
        return out.squeeze(0) if unbatched else out
    follow(*step.sizes, domain, label)

    def waiting(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = bring(x, dim, step, domain, label)
        if step.out:
            # The front is trimmed by torch's padding, which trims the end too: what that took is put back.
            whole = (step.rows - 1) * strides[at] + dilations[at] * (kernel[at] - 1) + 1
            extra_rows = step.out - (whole - 2 * front)
            by_torch = 0 <= extra_rows < max(strides[at], dilations[at])
            trim, more = (front, extra_rows) if by_torch else (0, 0)
            inside = (*pads[:at], trim, *pads[at + 1 :])
            extra = (*extras[:at], more, *extras[at + 1 :])
            out = _TRANSPOSED[nd - 1](x, weight, bias, strides, inside, extra, groups, dilations)
            if not by_torch:
                missing = max(0, front + step.out - whole)
                if missing:  # rows that no input row reaches hold the bias alone
                    amounts = [0, 0] * (-1 - dim) + [0, missing]
                    out = F.pad(out, amounts)
                    if bias is not None:
                        rows = out.new_zeros([out.shape[dim], *[1] * (-1 - dim)])
                        rows[whole:] = 1
                        out = out + rows * bias.to(out.dtype).reshape(-1, *[1] * nd)
                out = out.narrow(dim, front, step.out)
        else:
            none = x.reshape(0, *x.shape[1 : at + 2], 1, *x.shape[at + 3 :])
            inside = (*pads[:at], 0, *pads[at + 1 :])
            extra = (*extras[:at], 0, *extras[at + 1 :])
            out = _TRANSPOSED[nd - 1](none, weight, bias, strides, inside, extra, groups, dilations)
            out = out.reshape(x.shape[0], *out.shape[1 : at + 2], 0, *out.shape[at + 3 :])
        return out

    found = None
    if overlaps(x, weight) and not step.local:
        rows = (sizes, domain.rank, *along[:3], back, dilations[at])
        shape = Shape(strides, pads, dilations, True, extras, groups)
        found = _overlapped("transposed", rows, x, weight, bias, dim, domain, label, shape, waiting, read, layer)
    out = waiting(x, weight, bias) if found is None else found
    return out.squeeze(0) if unbatched else out


@lru_cache(maxsize=4096)
def _transposed_borders(
    sizes: tuple[int, ...], rank: int, kernel: int, stride: int, padding: int, output_padding: int, dilation: int
) -> Borders | None:
    source = RowPartition(sizes, allow_empty=True)
    plan = footprint.transposed_convolution(source, kernel, stride, padding, output_padding, dilation)
    return borders_of_transposed(plan, rank, kernel, stride, dilation, padding)


_BORDERS: dict[str, Callable[..., Borders | None]] = {"conv": _conv_borders, "transposed": _transposed_borders}


@constant
def _transposed_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    padding: int,
    output_padding: int,
    dilation: int,
    rows: int,
    label: str,
) -> tuple[Step, int, int]:
    """The rows to bring, how many come out before the first that this rank owns, and the output padding."""
    return _cached_transposed_step(sizes, rank, kernel, stride, padding, output_padding, dilation, rows, label)


@lru_cache(maxsize=4096)
def _cached_transposed_step(
    sizes: tuple[int, ...],
    rank: int,
    kernel: int,
    stride: int,
    padding: int,
    output_padding: int,
    dilation: int,
    rows: int,
    label: str,
) -> tuple[Step, int, int]:
    source = RowPartition(sizes, allow_empty=True)
    try:
        if rows >= 0:
            least = footprint.transposed_rows(source.rows, kernel, stride, padding, 0, dilation)
            output_padding = rows - least
            if not 0 <= output_padding < stride:
                raise ValueError(
                    f"output_size asks for {rows} rows; with {source.rows} rows of input it can be "
                    f"{least} to {least + stride - 1}"
                )
        if not 0 <= output_padding < max(stride, dilation):
            raise ValueError(
                f"output_padding={output_padding} must be smaller than stride={stride} or dilation={dilation}"
            )
        plan = footprint.transposed_convolution(source, kernel, stride, padding, output_padding, dilation)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    step = step_of(plan, rank)
    return step, step.first - (step.start * stride - padding), output_padding


# Arguments


def per_dim(value: Any, nd: int) -> tuple[Any, ...]:
    """One entry for each spatial dim, as torch's layers take either."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * nd if len(value) == 1 else tuple(value)
    return (value,) * nd


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


def batched(x: Tensor, nd: int, label: str) -> tuple[Tensor, bool]:
    """``x`` with a batch dim, and whether it had none.

    Raises:
        ValueError: If it has neither ``nd + 1`` nor ``nd + 2`` dims.
    """
    if x.ndim not in (nd + 1, nd + 2):
        raise ValueError(f"{label}: expected {nd + 1} or {nd + 2} dims; got a tensor of shape {tuple(x.shape)}")
    return (x.unsqueeze(0), True) if x.ndim == nd + 1 else (x, False)
