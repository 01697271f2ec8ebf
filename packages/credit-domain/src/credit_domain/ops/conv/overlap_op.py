"""The convolution that computes while its halo travels, in eager code and as an operator that compiled code calls.

torch.compile carries numbers and strings, not what :class:`credit_domain.ops.conv.overlap.Overlapped` holds. So that
is kept here under a name, which is worked out while the code is traced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from credit_domain.engine.driver import Placed
from credit_domain.engine.ranks import Domain, constant
from credit_domain.engine.row_op import ROW_OPS, footprint_for
from credit_domain.ops.conv import overlap
from credit_domain.ops.conv.borders import Borders, Overlapping, borders_of
from credit_domain.ops.conv.overlap import Overlapped, Plain, Shape, backward, forward
from credit_halo.extend import keep_order, misfit, ops, plans, prepare_inductor

_named: dict[str, Overlapped] = {}


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
    """Convolve while the halo travels; None where that cannot be done.

    Args are those of :func:`credit_domain.ops.conv.overlap.convolve`, and what the convolution does along the sharded
    dim.
    """
    if placed.step.local or not overlap.overlaps(x, weight):
        return None
    x, weight, bias = overlap.as_autocast_does(x, weight, bias)
    kind, numbers = type(op).__name__, tuple(op)
    if torch.compiler.is_compiling():
        name = _name(kind, numbers, placed.sizes, placed.dim, tuple(placed.domain), placed.call.label, tuple(shape))
        return convolve(x, weight, bias, name)[0] if name else None
    borders = _borders(kind, numbers, placed.sizes, placed.domain.rank)
    return None if borders is None else overlap.convolve(x, weight, bias, borders, placed, shape, plain, read)


@lru_cache(maxsize=4096)
def _borders(kind: str, numbers: tuple[Any, ...], sizes: tuple[int, ...], rank: int) -> Borders | None:
    op: Any = ROW_OPS[kind](*numbers)
    return borders_of(op, footprint_for(kind, numbers, sizes), rank)


@constant
def _name(
    kind: str,
    numbers: tuple[Any, ...],
    sizes: tuple[int, ...],
    dim: int,
    domain: tuple[Any, ...],
    label: str,
    shape: tuple[Any, ...],
) -> str:
    where = Domain(*domain)
    borders = _borders(kind, numbers, sizes, where.rank)
    return "" if borders is None else name_of(borders, dim, where, label, Shape(*shape))


def name_of(borders: Borders, dim: int, domain: Domain, label: str, shape: Shape) -> str:
    """The name of a convolution that overlaps, for :func:`convolve`; the same in every process that means the same."""
    own, bare = shape.along(dim, borders.padding, borders.extra), shape.along(dim, 0, 0)
    name = hashlib.sha1(repr((borders, dim, domain, label, shape)).encode(), usedforsecurity=False).hexdigest()
    _named[name] = Overlapped(borders, dim, domain, label, own, bare, None, None)
    return name


@torch.library.custom_op("credit_domain::convolve", mutates_args=())
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Convolve this rank's rows; returns the output and the halo, which the backward needs."""
    how = _named[name]
    plan, group = plans[how.plan], how.domain.process_group
    assert group is not None
    ops.agree_on(x, how.dim % x.ndim, plan, group, how.label, misfit(x, plan, how.dim))
    return forward(x, weight, bias, None, how)[:2]


@convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    prepare_inductor()
    how = _named[name]
    return torch.convolution(x, weight, bias, *how.own), ops.empty_halo(x, how.dim % x.ndim, how.plan)


@torch.library.custom_op("credit_domain::convolve_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, halo: Tensor, bias: Sequence[int] | None, name: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor for each that is not needed."""
    sizes = None if bias is None else list(bias)
    found = backward(grad, None, x, weight, sizes, halo, _named[name], (*needs, False))[:3]
    d_x, d_weight, d_bias = (grad.new_empty(0) if d is None else d for d in found)
    return d_x, d_weight, d_bias


@convolve_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, halo: Tensor, bias: Sequence[int] | None, name: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    prepare_inductor()
    sizes = None if bias is None else list(bias)
    found = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *_named[name].own, list(needs))
    d_x, d_weight, d_bias = (grad.new_empty(0) if d is None else d for d in found)
    return d_x, d_weight, d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.name = inputs
    ctx.bias = None if bias is None else list(bias.shape)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: Tensor, d_halo: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, halo = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = convolve_backward(grad, x, weight, halo, ctx.bias, ctx.name, needs)
    return *(d if needed else None for d, needed in zip(found, needs, strict=True)), None


convolve.register_autograd(_backward, setup_context=_setup)

for _op in (convolve, convolve_backward):
    keep_order(_op)
