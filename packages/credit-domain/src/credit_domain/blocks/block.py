"""What the blocks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.engine.ranks import new_layer
from credit_mesh import DomainParallelManager


class Block(nn.Module):
    """A module that hands the functions here what they need to know: ``split_windows(x, 7, **self.sharding)``.

    Args:
        label: What errors and traces call this block, the same on every rank; None takes the name of the class.
    """

    def __init__(self, *, manager: DomainParallelManager | None = None, label: str | None = None) -> None:
        super().__init__()
        self.manager = manager
        self.label = type(self).__name__ if label is None else label
        self._layer = new_layer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layer = new_layer()  # a copy learns the partition for itself

    @property
    def sharding(self) -> dict[str, Any]:
        """The keyword arguments ``manager``, ``label`` and ``layer`` of the functions here."""
        return {"manager": self.manager, "label": self.label, "layer": self._layer}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Torch's scaled dot-product attention, also where this rank has nothing to attend to.

    Not every kernel takes an empty batch; written out, it keeps this rank and its parameters in the graph.
    """
    if query.numel():
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    scores = query @ key.mT
    return (scores if mask is None else scores + mask).softmax(-1) @ value


class _Pointwise(nn.Module):
    """A convolution of each point alone, also where this rank has none, which torch's refuses."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, ...)."""
        if x.numel():
            out: Tensor = super().forward(x)
            return out
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class Pointwise1d(_Pointwise, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with a kernel of one point, also of no points."""


class Pointwise2d(_Pointwise, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with a kernel of one point, also of no points."""


class Pointwise3d(_Pointwise, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with a kernel of one point, also of no points."""


POINTWISE = (Pointwise1d, Pointwise2d, Pointwise3d)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)
