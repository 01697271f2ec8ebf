"""The convolution that computes while its halo travels, as an operator that compiled code calls.

torch.compile carries numbers and strings, not what :class:`credit_domain.ops.conv.overlap.Overlapped` holds. So the
operator takes a name that says all of it; see :func:`credit_domain.ops.conv.overlap.name_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from credit_domain.ops.conv.overlap import Overlapped, backward, forward, named
from credit_halo.extend import keep_order, ops, prepare_inductor


def _how(name: str) -> Overlapped:
    how = named(name)
    assert how is not None
    return how


@torch.library.custom_op("credit_domain::convolve", mutates_args=())
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Convolve this rank's rows; returns the output and the halo, which the backward needs."""
    return forward(x, weight, bias, None, _how(name))[:2]


@convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    prepare_inductor()
    how = _how(name)
    return torch.convolution(x, weight, bias, *how.own), ops.empty_halo(x, how.dim % x.ndim, how.plan)


@torch.library.custom_op("credit_domain::convolve_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, halo: Tensor, bias: Sequence[int] | None, name: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor for each that is not needed."""
    sizes = None if bias is None else list(bias)
    found = backward(grad, None, x, weight, sizes, halo, _how(name), (*needs, False))[:3]
    d_x, d_weight, d_bias = (grad.new_empty(0) if d is None else d for d in found)
    return d_x, d_weight, d_bias


@convolve_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, halo: Tensor, bias: Sequence[int] | None, name: str, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    prepare_inductor()
    sizes = None if bias is None else list(bias)
    found = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *_how(name).own, list(needs))
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
