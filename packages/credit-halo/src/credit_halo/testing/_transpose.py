"""Tests of a linear map and its adjoint."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def dot_test(fn: Callable[[Tensor], Tensor], x: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """The two sides of ``<F x, y> = <x, F' y>``, summed over the ranks of the world.

    With whole numbers in float64 both are exact, and must be equal with ``==``. Every rank must call it.

    Args:
        fn: A linear function of a tensor, which may talk to other ranks.
        x: This rank's input; holds whole numbers of a few digits.
        seed: Seed of ``y``, drawn alike for a rank whatever the others draw.

    Returns:
        Both sides; the same on every rank.

    Collectives:
        Those of ``fn``, forward and backward, and one sum over the world.
    """
    x = x.detach().clone().requires_grad_()
    out = fn(x)
    generator = torch.Generator().manual_seed(seed * 1000 + (dist.get_rank() if dist.is_initialized() else 0))
    y = torch.randint(-9, 10, tuple(out.shape), generator=generator).to(out)
    (grad,) = torch.autograd.grad(out, x, y)
    sides = torch.stack([(out.detach() * y).sum(), (x.detach() * grad).sum()]).double()
    if dist.is_initialized():
        dist.all_reduce(sides)
    return float(sides[0]), float(sides[1])


def matrix_of(fn: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear function of float64 tensors, column by column.

    Args:
        fn: A linear function; every rank must call it as often as every other.
        shape: Shape of its input.

    Returns:
        A matrix of as many columns as the input has entries.
    """
    size = torch.Size(shape).numel()
    columns = [fn(column.view(shape)).reshape(-1) for column in torch.eye(size, dtype=torch.float64)]
    return torch.stack(columns, dim=1)
