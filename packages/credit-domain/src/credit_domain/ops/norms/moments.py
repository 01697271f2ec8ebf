"""Means and variances of what several ranks hold together, and normalising by them.

Each rank works out the mean and variance of its own part, and all of them are gathered in one message along with how
much each was taken of. They are combined as moments of parts are (Chan, Golub and LeVeque 1983): no squares of values
are subtracted from each other, so that a mean far from zero costs no digits. The ranks combine the same numbers in the
same order, and get the same result to the last bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo.extend import agree, break_group, debug, group_by_name, keep_order, prepare_inductor, refuse_broken


class Normalization(NamedTuple):
    """What is normalised by which statistics.

    Attributes:
        dims: The dims that statistics are taken over, one set of them for each entry of the others.
        eps: Added to the variance.
        group: Name of the group whose ranks hold the parts.
        label: What errors call this.
        refuse: Why a single value is not enough to take statistics of; empty if it is.
        centered: Subtract the mean; otherwise the variance is about zero, the mean square.
        gradient: Whether the input requires a gradient, on which the ranks must agree.
    """

    dims: tuple[int, ...]
    eps: float
    group: str
    label: str
    refuse: str = ""
    centered: bool = True
    gradient: bool = False


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: Normalization,
    track: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the statistics of all ranks' parts.

    The gradient goes through the statistics too. In half precision they are those of float32.

    Args:
        x: This rank's part; it may be empty.
        weight: A factor that broadcasts against ``x`` and has as many dims, or None.
        bias: Likewise, added; of the shape of ``weight``.
        how: What to normalise by.
        track: Called with the statistics before anything is kept for the backward. An activation checkpoint stops its
            recomputation where the last tensor is kept, and what comes after that is not run again.

    Returns:
        The result, in the dtype of ``x``, and, without gradient, how many values each set of statistics is of, their
        mean and their (biased) variance: a float64 tensor (3, ...) of the dims of ``x``, 1 where they are reduced.

    Raises:
        ValueError: If the dtype is not a floating-point one; on all ranks alike, if dtypes or the dims that are not
            reduced differ, or a set has one value and that is refused.

    Collectives:
        One all-gather forward, one sum backward.
    """
    if not x.is_floating_point():
        raise ValueError(f"{how.label}: expected a floating-point tensor; got {x.dtype}: convert it first")
    how = how._replace(gradient=x.requires_grad and torch.is_grad_enabled())
    if torch.compiler.is_compiling():  # which decides itself what to keep for the backward
        out, stats = _normalize(x, weight, bias, how)
        if track is not None:
            track(stats)
        return out, stats
    out, stats = _Normalize.apply(x, weight, bias, how, track)  # type: ignore[no-untyped-call]
    return out, stats


def _normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, how: Normalization) -> tuple[Tensor, Tensor]:
    """Normalise by operations that torch can differentiate, any number of times."""
    wide, count = x.to(_wide(x.dtype)), _count(x, how)
    if 0 in x.shape:
        mean = var = wide.sum(how.dims, keepdim=True)
    elif how.centered:
        var, mean = torch.var_mean(wide, how.dims, correction=0, keepdim=True)
    else:
        var = wide.square().mean(how.dims, keepdim=True)
        mean = torch.zeros_like(var)
    stats = _combined(mean.double(), var.double(), count, x.dtype, how)
    mean, rstd = stats[1].to(wide.dtype), _rstd(stats, how.eps).to(wide.dtype)
    out = (wide - mean) * (rstd if weight is None else rstd * weight.to(rstd.dtype))
    if bias is not None:
        out = out + bias.to(rstd.dtype)
    return out.to(x.dtype), stats.detach()


def _count(x: Tensor, how: Normalization) -> int:
    """How many values each set of statistics is of on this rank."""
    count = 1
    for dim in how.dims:
        count *= x.shape[dim]
    return count


def _combined(mean: Tensor, var: Tensor, count: int, dtype: torch.dtype, how: Normalization) -> Tensor:
    kind = f"{str(dtype).removeprefix('torch.')} with{'' if how.gradient else 'out'} gradient"
    # In float64, since counts would not all be whole numbers in float32.
    run = combine if torch.is_grad_enabled() or torch.compiler.is_compiling() else combine_now
    stats: Tensor = run(torch.stack([mean, var]), count, how.group, how.label, kind, how.refuse)
    return stats


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _rstd(stats: Tensor, eps: float) -> Tensor:
    return (stats[2] + eps).rsqrt()


class _Normalize(torch.autograd.Function):
    """Keeps for the backward only the input and the statistics; makes only the result beside them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        how: Normalization,
        track: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor]:
        count = _count(x, how)
        some = max(1, count)
        near = x.sum(how.dims, keepdim=True, dtype=_wide(x.dtype)) / some
        if not how.centered:
            near.zero_()
        out = x - near
        # The rest of the mean, which is small, has the digits that the sum of large values lost.
        sums, squares = (each.double() for each in _sums(out, out, how.dims))
        rest = sums / some if how.centered else near.double()
        var = (squares / some - rest.square()).clamp(min=0)
        stats = _combined(near.double() + rest, var, count, x.dtype, how)
        scale = _rstd(stats, how.eps).to(out.dtype)
        if weight is not None:
            scale = scale * weight.to(scale.dtype)
        shift = (near - stats[1]).to(scale.dtype) * scale
        if bias is not None:
            shift = shift + bias.to(scale.dtype)
        if track is not None:
            track(stats)
        out.mul_(scale).add_(shift)  # several times faster on the CPU than addcmul, which broadcasts both
        ctx.said = debug.said()
        ctx.how, ctx.bias = how, None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(x, weight, stats)
        ctx.mark_non_differentiable(stats)
        return out.to(x.dtype), stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, stats = ctx.saved_tensors
        how, needs = ctx.how, ctx.needs_input_grad
        if torch.is_grad_enabled():  # this is to be differentiated again
            return _differentiable_backward(ctx, grad, x, weight)
        rstd = _rstd(stats, how.eps).to(_wide(x.dtype))
        near = stats[1].to(rstd.dtype)
        rest = (near - stats[1]).to(rstd.dtype)
        shape = weight.shape if weight is not None else ctx.bias[0] if ctx.bias else [1] * x.ndim
        # Both sums are taken where the weight does not vary before they are weighted, and give its gradient too.
        inner = tuple(dim for dim in how.dims if shape[dim] == 1)
        outer = tuple(dim for dim in how.dims if shape[dim] != 1)
        out = x - near
        plain, normal = _sums(grad.to(rstd.dtype), out, inner)
        normal = (normal + rest * plain) * rstd
        d_weight = normal.sum_to_size(shape).to(weight.dtype) if needs[1] else None
        d_bias = plain.sum_to_size(shape).to(ctx.bias[1]) if needs[2] else None
        if not needs[0]:
            return None, d_weight, d_bias, None, None
        factor = None if weight is None else weight.to(rstd.dtype)
        sums = [_sum(each if factor is None else each * factor, outer) for each in (plain, normal)]
        with debug.backward_of(ctx.said):
            total = torch.ops.credit_halo.sum(torch.stack(sums), how.group, False)
        shift, slope = (total * (-rstd / stats[0].clamp(min=1)).to(rstd.dtype)).unbind()
        slope = slope * rstd
        shift = shift + rest * slope if how.centered else torch.zeros_like(slope)
        out.mul_(slope).add_(shift).addcmul_(grad.to(rstd.dtype), rstd if factor is None else rstd * factor)
        return out.to(x.dtype), d_weight, d_bias, None, None


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims, keepdim=True) if dims else x  # torch sums over all dims where it is given none


def _sums(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sums of ``a`` and of ``a * b`` over dims, which are kept.

    The last dim is summed by itself first, since very many values at once lose digits in float32.
    """
    last = a.ndim - 1
    if last in dims and a.is_contiguous() and b.is_contiguous() and a.numel():
        # One pass for both: torch's backward of group normalisation begins with them, for each group; a group is a row.
        rows, width = a.numel() // a.shape[-1], a.shape[-1]
        zero, one = a.new_zeros([1, rows]), a.new_ones([1, rows])
        flat = a.reshape(1, rows, width), b.reshape(1, rows, width)
        wanted = (False, True, True)
        _, products, plain = _row_sums(*flat, zero, one, one[0], 1, rows, width, rows, wanted)
        shape, more = (*a.shape[:-1], 1), tuple(dim for dim in dims if dim != last)
        return _sum(plain.reshape(shape), more), _sum(products.reshape(shape), more)
    if a is b and dims:  # channels_last, where this makes no product first
        squares = torch.linalg.vector_norm(a, dim=dims[-1], keepdim=True).square()
        return _sum(a, dims), _sum(squares, dims[:-1])
    return _sum(a, dims), _sum(a * b, dims)


_row_sums = torch.ops.aten.native_group_norm_backward


def _differentiable_backward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    wanted = [tensor for tensor, needed in zip((x, weight), needs, strict=False) if needed and tensor is not None]
    d_bias = grad.to(_wide(x.dtype)).sum_to_size(ctx.bias[0]).to(ctx.bias[1]) if needs[2] else None
    if not wanted:
        return None, None, d_bias, None, None
    out, _ = _normalize(x, weight, None, ctx.how)
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return next(grads) if needs[0] else None, next(grads) if needs[1] else None, d_bias, None, None


# The operator


def combine_now(local: Tensor, count: int, group: str, label: str, kind: str, refuse: str) -> Tensor:
    """Combine the means and variances of parts to those of the whole.

    Args:
        local: Mean and variance of this rank's part, float64 (2, ...).
        count: Number of values that they are of.
        group: Name of the group.
        label: What errors call this.
        kind: What must be the same on every rank, beside the shape.
        refuse: Why one value is not enough; empty if it is.

    Returns:
        Number of values, mean and variance of the whole, float64 (3, ...).
    """
    pg, shape = group_by_name(group), list(local.shape[1:])
    said = f"{label}: statistics of {kind}, of shape {tuple(shape)}"
    agree(pg, said, label, lambda: said, local.device)
    refuse_broken(pg, label)
    if not local.numel():
        return local.new_zeros([3, *shape])
    debug.compare(pg, lambda: said, local.device)
    # Which layer this is travels with its numbers. Whoever looks at it waits for the device, and so it is not done on a
    # GPU.
    mark = zlib.crc32(said.encode())
    own = torch.cat([local.new_full([1], mark), local.new_full([1], count), local.flatten()])
    every = own.new_empty([dist.get_world_size(pg), own.numel()])
    try:
        dist.all_gather(list(every.unbind()), own, group=pg)
    except RuntimeError as error:
        message = f"{label} failed on rank {dist.get_rank(pg)} of {len(every)} while statistics were gathered: {error}"
        raise break_group(pg, message) from error
    marks = every[:, 0].tolist() if local.device.type == "cpu" else []
    if any(theirs != mark for theirs in marks):
        raise ValueError(_mixed(pg, label, said, marks))
    counts, means, variances = every[:, 1:2], *every[:, 2:].chunk(2, 1)
    total = counts.sum()
    # Nobody looks, and waits for the device, who has several values; where there is one in all, nobody has.
    if refuse and count <= 1 and total.item() == 1:
        raise ValueError(f"{label}: {refuse}, got one on all ranks together")
    parts = counts / total.clamp(min=1)
    mean = (means * parts).sum(0)
    var = ((variances + (means - mean).square()) * parts).sum(0)
    return torch.stack([total.expand_as(mean), mean, var]).reshape([3, *shape])


def _mixed(group: ProcessGroup, label: str, said: str, marks: list[float]) -> str:
    """One message for all ranks, which have taken the statistics of different layers at the same time."""
    texts: list[str] = [""] * len(marks)
    try:
        dist.all_gather_object(texts, said, group=group)
    except RuntimeError as error:
        raise break_group(group, f"{label}: ranks take the statistics of different layers: {error}") from error
    return debug.differing("the ranks take the statistics of different layers at the same time", marks, texts)


@torch.library.custom_op("credit_domain::combine", mutates_args=())
def combine(local: Tensor, count: int, group: str, label: str, kind: str, refuse: str) -> Tensor:
    """:func:`combine_now` as an operator."""
    return combine_now(local, count, group, label, kind, refuse)


@combine.register_fake
def _(local: Tensor, count: int, group: str, label: str, kind: str, refuse: str) -> Tensor:
    prepare_inductor()
    return local.new_empty([3, *local.shape[1:]])


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    local, ctx.count, ctx.group = inputs[:3]
    ctx.said = debug.said()
    ctx.save_for_backward(local, output)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    local, stats = ctx.saved_tensors
    with debug.backward_of(ctx.said):
        d_mean, d_var = torch.ops.credit_halo.sum(grad[1:].contiguous(), ctx.group, False).unbind()
    part = ctx.count / stats[0].clamp(min=1)
    d_local = torch.stack([(d_mean + 2 * (local[0] - stats[1]) * d_var) * part, d_var * part])
    return d_local, *[None] * 5


combine.register_autograd(_combine_backward, setup_context=_combine_setup)
keep_order(combine)
