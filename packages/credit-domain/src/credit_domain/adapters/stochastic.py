"""Stochastic depth: paths that are dropped for whole samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from credit_domain.adapters.registry import register
from credit_domain.engine.layer import DomainParallelLayer
from credit_domain.engine.ranks import domain_of


class DomainParallelDropPath(DomainParallelLayer):
    """A module that drops whole samples, the same ones on every rank: those that the first rank draws.

    The module makes the factor of each sample of a tensor of ones, (B, 1, ...).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples of (B, ...).

        Collectives:
            One broadcast of the factor of each sample, forward; none where nothing is dropped.
        """
        m: Any = self.wrapped
        domain = domain_of(self.manager)
        if domain.size == 1 or not m.training or not (getattr(m, "drop_prob", 0.0) or getattr(m, "p", 0.0)):
            out: Tensor = m.forward(x)
            return out
        drawn: Tensor = m.forward(x.new_ones([x.shape[0]] + [1] * (x.ndim - 1)))
        factors: Tensor = torch.ops.credit_halo.broadcast(drawn, 0, domain.group, True)
        return x * factors


def is_drop_path(module: nn.Module) -> bool:
    """Whether a module is called DropPath or StochasticDepth, and holds nothing but a probability."""
    if type(module).__name__ not in ("DropPath", "StochasticDepth") or [*module.parameters(), *module.children()]:
        return False  # what is converted has another name
    return hasattr(module, "drop_prob") or hasattr(module, "p")


register(
    is_drop_path,
    DomainParallelDropPath,
    name="Stochastic depth",
    matches="the class names `DropPath` and `StochasticDepth`, with `drop_prob` or `p`",
    notes="samples that are dropped are the same on every rank",
)
