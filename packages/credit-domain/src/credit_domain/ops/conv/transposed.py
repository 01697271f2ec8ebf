"""Transposed convolutions of a sharded tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, Placed, is_unbatched, per_dim, place, without_rows
from credit_domain.engine.footprint import Footprint, footprint_from
from credit_domain.engine.ranks import domain_of, normal_dim
from credit_domain.engine.row_op import row_op
from credit_domain.engine.skips import follow
from credit_domain.ops.conv.borders import Local, local_of_transposed
from credit_domain.ops.conv.overlap import Shape, overlapped
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

Ints = int | Sequence[int]
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@row_op
class TransposedConvolution(NamedTuple):
    """A kernel that spreads each row over several; ``rows``, if not -1, are the output rows that are asked for."""

    kernel: int
    stride: int = 1
    padding: int = 0
    output_padding: int = 0
    dilation: int = 1
    rows: int = -1

    @property
    def ratio(self) -> tuple[int, int]:
        """One row becomes ``stride``."""
        return 1, self.stride

    def least_rows(self, rows: int) -> int:
        """Output rows without output padding."""
        return (rows - 1) * self.stride - 2 * self.padding + self.dilation * (self.kernel - 1) + 1

    def output_padding_of(self, rows: int) -> int:
        """The output padding, given or asked for by a number of output rows."""
        return self.output_padding if self.rows < 0 else self.rows - self.least_rows(rows)

    def footprint(self, source: RowPartition) -> Footprint:
        """Output row ``i`` reads the rows ``j`` for which ``i = j * stride - padding + dilation * tap``.

        Its owner is that of input row ``i // stride``. There are zeros beyond the edges, where no row contributes.

        Raises:
            ValueError: If nothing would come out, or the output padding is none.
        """
        kernel, stride, padding, _, dilation, wanted = self
        least, more = self.least_rows(source.rows), self.output_padding_of(source.rows)
        if wanted >= 0 and not 0 <= more < stride:
            raise ValueError(
                f"output_size asks for {wanted} rows; with {source.rows} rows of input it can be {least} to "
                f"{least + stride - 1}"
            )
        if not 0 <= more < max(stride, dilation):
            raise ValueError(f"output_padding={more} must be smaller than stride={stride} or dilation={dilation}")
        rows = least + more
        if rows < 1:
            raise ValueError(
                f"a transposed convolution of {source.rows} rows with kernel {kernel}, stride {stride} and padding "
                f"{padding} has {rows} rows"
            )
        reach = dilation * (kernel - 1)

        def need(start: int, stop: int) -> range:
            last = (stop - 1 + padding) // stride
            # At least one row, so that there is something to convolve where no row contributes.
            return range(min(-(-(start + padding - reach) // stride), (start + padding) // stride, last), last + 1)

        return footprint_from(source, source.upsampled(stride, rows), need, EdgeRule())

    def local(self, rows: range, need: range, out: range) -> Local | None:
        """What a rank's own rows give while the halo travels; see :mod:`credit_domain.ops.conv.borders`."""
        return local_of_transposed(self.kernel, self.stride, self.dilation, self.padding, rows, need, out)


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
    how = (stride, padding, output_padding, groups, dilation)
    return conv_transpose(1, x, weight, bias, *how, Call(dim, partition, manager, label))


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

    Raises:
        ValueError: On all ranks alike, if nothing would come out, or ``dim`` is no spatial dim; and as
            :func:`credit_halo.exchange_rows`.

    Collectives:
        Those of :func:`conv2d`.
    """
    how = (stride, padding, output_padding, groups, dilation)
    return conv_transpose(2, x, weight, bias, *how, Call(dim, partition, manager, label))


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
    how = (stride, padding, output_padding, groups, dilation)
    return conv_transpose(3, x, weight, bias, *how, Call(dim, partition, manager, label))


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
    call: Call,
    output_rows: int | None = None,
    shares: bool = False,
) -> Tensor:
    """The transposed convolution of any number of spatial dims, also for layers.

    ``output_rows`` gives the global output rows in place of the output padding of the sharded dim; ``shares`` is that
    of :func:`credit_domain.ops.conv.convolution.conv`.
    """
    strides, dilations = per_dim(stride, nd), per_dim(dilation, nd)
    pads, extras = per_dim(padding, nd), per_dim(output_padding, nd)
    dim, domain = normal_dim(call.dim, x.ndim, nd, call.label), domain_of(call.manager)
    unbatched = is_unbatched(x.shape, nd, call.label)
    at = dim + nd
    along = (weight.shape[2 + at], strides[at], pads[at], extras[at], dilations[at])
    op = TransposedConvolution(*along, -1 if output_rows is None else output_rows)
    called, x = x, x.unsqueeze(0) if unbatched else x
    placed = place(op, x, call, dim, domain)
    if domain.size == 1:
        extra = (*extras[:at], op.output_padding_of(x.shape[dim]), *extras[at + 1 :])
        out: Tensor | None = _TRANSPOSED[nd - 1](x, weight, bias, strides, pads, extra, groups, dilations)
    else:
        follow(*placed.step.sizes, domain, call.label)
        shape = Shape(strides, pads, dilations, True, extras, groups)
        waits = partial(_waiting, placed, shape)
        out = overlapped(op, x, weight, bias, placed, shape, waits, called if shares else None)
        out = waits(x, weight, bias) if out is None else out
    assert out is not None
    return out.squeeze(0) if unbatched else out


def _waiting(placed: Placed, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Bring the rows, then convolve them."""
    dim, step, nd = placed.dim, placed.step, len(shape.stride)
    stride, dilation, padding = shape.stride[dim], shape.dilation[dim], shape.padding[dim]
    rows = placed.bring(x)

    def convolve(rows: Tensor, trim: int, more: int) -> Tensor:
        own = shape.along(dim, trim, more)
        how = (own.stride, own.padding, own.output_padding, own.groups, own.dilation)
        return _TRANSPOSED[nd - 1](rows, weight, bias, *how)

    if not step.out:
        return without_rows(lambda none: convolve(none, 0, 0), rows, dim, 1)
    # The front is trimmed by torch's padding, which trims the end too: what that took is put back.
    front = step.first - (step.start * stride - padding)
    whole = (step.rows - 1) * stride + dilation * (weight.shape[dim] - 1) + 1
    more = step.out - (whole - 2 * front)
    if 0 <= more < max(stride, dilation):
        return convolve(rows, front, more)
    out, missing = convolve(rows, 0, 0), max(0, front + step.out - whole)
    if missing:  # rows that no input row reaches hold the bias alone
        out = F.pad(out, [0, 0] * (-1 - dim) + [0, missing])
        if bias is not None:
            beyond = out.new_zeros([out.shape[dim], *[1] * (-1 - dim)])
            beyond[whole:] = 1
            out = out + beyond * bias.to(out.dtype).reshape(-1, *[1] * nd)
    return out.narrow(dim, front, step.out)
