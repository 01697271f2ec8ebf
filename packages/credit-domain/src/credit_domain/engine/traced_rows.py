"""Rows that a rank with all rows reads, as one operator of a traced program.

While :func:`torch.export.export` traces a model on one rank, layers of this package call this operator. The operator of
an exchange has a fixed order among others, and torch would add tokens to the graph that keep the order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from credit_halo.extend import empty_rows, ops, plans


@torch.library.custom_op("credit_domain::rows", mutates_args=())
def rows(x: Tensor, dim: int, plan: str) -> Tensor:
    """Rows of a tensor that holds all of them, and what lies beyond its edges, as a plan for one rank lists them."""
    brought: Tensor = ops.exchange(x, dim, plan, "", "rows", False, True)
    return brought


@rows.register_fake
def _(x: Tensor, dim: int, plan: str) -> Tensor:
    return empty_rows(x, dim, plans[plan].out_rows)


def _setup(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    _, ctx.dim, ctx.plan = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    linear = plans[ctx.plan].linear.key
    return ops.exchange(grad, ctx.dim, linear, "", "rows", True, False), None, None


rows.register_autograd(_backward, setup_context=_setup)
