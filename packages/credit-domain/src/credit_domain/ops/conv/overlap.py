"""Convolutions that compute while their halo travels.

Forward, a rank sends the rows that others need, convolves its own, and then computes the few output rows that the halo
reaches. Backward, it computes and sends the gradient of the halo, works out the large gradients, and adds what arrived.
So a rank waits only for a neighbour that is late by more than a convolution, and what is kept for the backward is the
unpadded input, which is kept anyway, and the halo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.engine.driver import Placed
from credit_domain.engine.ranks import Domain, constant
from credit_domain.engine.row_op import ROW_OPS, footprint_for
from credit_domain.engine.text import as_text, from_text
from credit_domain.ops.conv.borders import Border, Borders, Overlapping, borders_of
from credit_domain.ops.conv.sharing import Reader, Shared, share, within
from credit_halo.extend import debug, memory_format, ops, plans

Plain = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""The same convolution, of operations that torch differentiates any number of times."""


class Shape(NamedTuple):
    """The last arguments of torch's convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @lru_cache(maxsize=4096)  # noqa: B019 - a tuple, which is what is remembered
    def along(self, dim: int, padding: int, output_padding: int) -> Shape:
        """With another padding along a dim."""
        at = len(self.stride) + dim
        pads = (*self.padding[:at], padding, *self.padding[at + 1 :])
        extra = (*self.output_padding[:at], output_padding, *self.output_padding[at + 1 :])
        return self._replace(padding=pads, output_padding=extra)


class Overlapped(NamedTuple):
    """A convolution of a sharded tensor.

    Attributes:
        borders: What the halo reaches.
        dim: The sharded dim, negative.
        domain: Whose ranks take part.
        label: What errors call this.
        own: How a rank's own rows are convolved.
        bare: How the rows of a border are: without padding along the sharded dim.
        plain: What to differentiate where the gradient is to be differentiated again; None in compiled code, where it
            is not.
        shared: What to bring for other layers too, if that is to be done.
        gradient: Whether a gradient of the input will be needed; None in compiled code, where the tensor says so.
    """

    borders: Borders
    dim: int
    domain: Domain
    label: str
    own: Shape
    bare: Shape
    plain: Plain | None
    shared: Shared | None
    gradient: bool | None = None

    @property
    def plan(self) -> str:
        """Key of the plan of what travels."""
        return self.borders.plan if self.shared is None else self.shared.plan

    def part(self) -> tuple[int, int]:
        """Where in what is brought for all the halo of this convolution is: the first row, and how many."""
        assert self.shared is not None
        rank = self.domain.rank
        return within(self.shared.reach[rank], self.borders.reach[rank])


def overlapped(
    op: Overlapping,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    placed: Placed,
    shape: Shape,
    plain: Plain,
    read: Tensor | None,
) -> Tensor | None:
    """Convolve this rank's part of a sharded tensor while its halo travels; None where that cannot be done.

    Args:
        op: What the convolution does along the sharded dim.
        x: This rank's rows (B, C, ...), with the padding of other dims that torch's convolution does not do.
        weight: The whole kernel, the same on every rank; likewise ``bias``.
        bias: Bias, or None.
        placed: The convolution on this rank.
        shape: How one rank would convolve.
        plain: The same convolution, to differentiate where a gradient is to be differentiated again.
        read: The tensor that the layer was called with, where ``x`` holds the same values in the same places and other
            layers that read it may share the exchange.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where another layer has brought the
        halo.
    """
    usual = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)  # subclasses have rules of their own
    if placed.step.local or not usual or not x.is_floating_point() or 0 in x.shape:
        return None
    if torch.is_autocast_enabled(x.device.type):  # what travels and what is kept is converted too
        x, weight, bias = _lower(x), _lower(weight), None if bias is None else _lower(bias)
    kind, numbers, (dim, domain, label) = type(op).__name__, tuple(op), (placed.dim, placed.domain, placed.call.label)
    if torch.compiler.is_compiling():
        name = name_of(kind, numbers, placed.sizes, dim, tuple(domain), label, tuple(shape))
        return torch.ops.credit_domain.convolve(x, weight, bias, name)[0] if name else None
    borders = _borders(kind, numbers, placed.sizes, domain.rank)
    if borders is None:
        return None
    gradient = x.requires_grad and torch.is_grad_enabled()
    found: Shared | Tensor | None = None
    if read is not None and isinstance(placed.call.layer, int):
        group = domain.process_group
        assert group is not None
        reader = Reader(placed.call.layer, borders.source, borders.edge, dim, x.dtype, gradient)
        found = share(read, reader, borders, group, domain.rank)
    given, shared = (found, None) if isinstance(found, Tensor) else (None, found)
    own, bare = shape.along(dim, borders.padding, borders.extra), shape.along(dim, 0, 0)
    how = Overlapped(borders, dim, domain, label, own, bare, plain, shared, gradient)
    out = _Convolve.apply(x, weight, bias, given, how)  # type: ignore[no-untyped-call]
    if shared is not None:
        out, shared.halo = out
    result: Tensor = out
    return result


def _lower(x: Tensor) -> Tensor:
    wide = x.dtype == torch.float64 or not x.is_floating_point()
    return x if wide else x.to(torch.get_autocast_dtype(x.device.type))


@lru_cache(maxsize=4096)
def _borders(kind: str, numbers: tuple[Any, ...], sizes: tuple[int, ...], rank: int) -> Borders | None:
    op: Overlapping = ROW_OPS[kind](*numbers)
    return borders_of(op, footprint_for(type(op), numbers, sizes), rank)


@constant
def name_of(*what: Any) -> str:
    """The name of a convolution that compiled code calls, from which :func:`named` makes it; empty if it must wait.

    Args:
        what: The kind and the numbers of the operation, the rows of each rank, the sharded dim, the domain, the label,
            and how one rank would convolve: all as tuples of numbers and text.
    """
    name = as_text(what)
    return "" if named(name) is None else name


@lru_cache(maxsize=4096)
def named(name: str) -> Overlapped | None:
    """The convolution of a name."""
    kind, numbers, sizes, dim, domain, label, shape = from_text(name)
    where, how = Domain(*domain), Shape(*shape)
    borders = _borders(kind, numbers, sizes, where.rank)
    if borders is None:
        return None
    own, bare = how.along(dim, borders.padding, borders.extra), how.along(dim, 0, 0)
    return Overlapped(borders, dim, where, label, own, bare, None, None)


class _Convolve(torch.autograd.Function):
    """The convolution, with a halo that another has brought, or one that it brings, for others too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, given: Tensor | None, how: Overlapped
    ) -> Tensor | tuple[Tensor, Tensor]:
        out, halo, brought = forward(x, weight, bias, given, how)
        ctx.save_for_backward(x, weight, bias, halo)
        ctx.how, ctx.said = how, debug.said()
        if how.shared is None:
            return out
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(brought)
        return out, brought

    @staticmethod
    def backward(ctx: Any, grad: Tensor, d_brought: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, bias, halo = ctx.saved_tensors
        if ctx.how.shared is not None:
            ctx.how.shared.halo = None  # it belongs to a graph that ends here
        if torch.is_grad_enabled():  # this is to be differentiated again
            return _differentiable_backward(ctx.how.plain, (x, weight, bias), ctx.needs_input_grad, grad)
        sizes = None if bias is None else list(bias.shape)
        with debug.backward_of(ctx.said):
            return *backward(grad, d_brought, x, weight, sizes, halo, ctx.how, ctx.needs_input_grad), None


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, given: Tensor | None, how: Overlapped
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve while the halo travels, unless it is given.

    Returns:
        The output, the halo, and all that was brought.
    """
    dim = how.dim % x.ndim
    gradient = x.requires_grad and torch.is_grad_enabled() if how.gradient is None else how.gradient
    group, flight = how.domain.group, None
    if given is None:
        flight = ops.begin(x, dim, how.plan, group, how.label, gradient=gradient)
    brought = given
    try:
        out = torch.convolution(x, weight, bias, *how.own)
    finally:  # rows under way must not be taken for those of another exchange
        if flight is not None:
            brought = ops.arrived(flight, x, dim)
    assert brought is not None
    # A copy, since a view of an output that its own node keeps would keep both alive for ever.
    halo = brought if how.shared is None else brought.narrow(dim, *how.part()).clone()
    for border in how.borders.borders:
        start, stop = border.out
        _compute_border(x, weight, bias, halo, out.narrow(dim, start, stop - start), border, how)
    return out, halo, brought


def backward(
    grad: Tensor,
    d_brought: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: list[int] | None,
    halo: Tensor,
    how: Overlapped,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias (its shape is what is given) and of a given halo: those that are needed.

    ``d_brought`` is the gradient of what was brought for other layers.
    """
    dim = how.dim % x.ndim
    borders = []
    for border in how.borders.borders if needs[0] or needs[1] else ():
        start, stop = border.out
        borders.append(_border_backward(weight, halo, grad.narrow(dim, start, stop - start), border, how, needs))
    d_halo, flight = None, None
    if needs[0]:
        d_halo = torch.cat([d_rows for d_rows, _ in borders], dim) if borders else torch.empty_like(halo)
        if how.shared is not None and d_brought is not None:
            d_own, d_halo = d_halo, d_brought.clone()
            d_halo.narrow(dim, *how.part()).add_(d_own)
        if not needs[3]:
            linear = plans[how.plan].linear.key
            flight = ops.begin(d_halo, dim, linear, how.domain.group, how.label, adjoint=True)
    try:
        d_x, d_weight, d_bias = _gradients(grad, x, weight, bias, *how.own, list(needs[:3]))
    except BaseException:
        if flight is not None:
            flight.wait()
        raise
    if d_halo is not None and flight is not None:
        ops.add_arrived(flight, d_halo, d_x, dim)
    if needs[1]:
        for border, (_, d_taps) in zip(how.borders.borders, borders, strict=True):
            d_weight.narrow(dim, border.taps[0], border.taps[1] - border.taps[0]).add_(d_taps)
    return d_x, d_weight, d_bias, d_halo if needs[3] else None


_gradients = torch.ops.aten.convolution_backward


def _compute_border(
    x: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor, rows: Tensor, border: Border, how: Overlapped
) -> None:
    """Put right the output rows that the halo reaches, in place."""
    dim = how.dim % x.ndim
    if x.dtype.itemsize >= 4:
        part, taps, cut = _reached(halo, weight, border, how)
        rows += torch.convolution(part, taps, None, *how.bare).narrow(dim, cut, rows.shape[dim])
    else:  # in half precision a sum of two results would be rounded three times, where one rank rounds once
        start, stop = border.halo
        parts = [halo.narrow(dim, start, stop - start), x.narrow(dim, border.own[0], border.own[1] - border.own[0])]
        # Torch convolves channels_last by other kernels, which round elsewhere: the part must lie as x does.
        part = torch.cat(parts if border.above else parts[::-1], dim).contiguous(memory_format=memory_format(x))
        rows.copy_(torch.convolution(part, weight, bias, *how.bare).narrow(dim, border.cut, rows.shape[dim]))


def _reached(halo: Tensor, weight: Tensor, border: Border, how: Overlapped) -> tuple[Tensor, Tensor, int]:
    """What the halo adds to a border is a convolution of its rows, with zeros for own rows, by a part of the kernel.

    Returns:
        The rows and the part of the kernel, and how many rows come out before those of the border.
    """
    dim, (start, stop), (first, last) = how.dim % halo.ndim, border.halo, border.taps
    part = halo.narrow(dim, start, stop - start)
    if border.fill:
        part = F.pad(part, [0, 0] * (-1 - how.dim) + ([0, border.fill] if border.above else [border.fill, 0]))
    own = 0 if border.above else border.own[1] - border.own[0]
    cut = border.cut - own * how.own.stride[how.dim] if how.own.transposed else 0
    return part, weight.narrow(dim, first, last - first), cut


def _border_backward(
    weight: Tensor, halo: Tensor, rows: Tensor, border: Border, how: Overlapped, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """From the gradient of a border that of the halo's rows, and what it adds to that of a part of the kernel."""
    dim = how.dim % halo.ndim
    part, taps, cut = _reached(halo, weight, border, how)
    if how.own.transposed:
        whole = (part.shape[dim] - 1) * how.own.stride[how.dim] + how.own.dilation[how.dim] * (taps.shape[dim] - 1) + 1
        rows = F.pad(rows, [0, 0] * (-1 - how.dim) + [cut, whole - cut - rows.shape[dim]])
    mask = (needs[0], needs[1], False)
    d_part, d_taps, _ = _gradients(rows.contiguous(), part, taps, None, *how.bare, mask)
    if border.fill and d_part is not None:
        d_part = d_part.narrow(dim, 0 if border.above else border.fill, border.halo[1] - border.halo[0])
    return d_part, d_taps


def _differentiable_backward(
    plain: Plain | None, inputs: tuple[Tensor, Tensor, Tensor | None], needs: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    assert plain is not None
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=False) if needed and tensor is not None]
    grads = iter(torch.autograd.grad(plain(*inputs), wanted, grad, create_graph=True))
    return *(next(grads) if needed else None for needed in needs[:3]), None, None
