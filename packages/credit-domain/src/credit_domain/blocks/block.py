"""What the blocks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.engine.driver import Step, step_of
from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import constant, new_layer
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

_F = TypeVar("_F", bound=Callable[..., Any])


class Block(nn.Module):
    """A module that hands the functions here what they need to know: ``split_windows(x, 7, **self.sharding)``.

    ``label`` is what errors and traces call it, the same on every rank; None takes the name of the class.
    """

    def __init__(
        self, dim: int = -2, *, manager: DomainParallelManager | None = None, label: str | None = None
    ) -> None:
        super().__init__()
        self.dim, self.manager = dim, manager
        self.label = type(self).__name__ if label is None else label
        self._layer = new_layer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layer = new_layer()  # a copy learns the partition for itself

    @property
    def sharding(self) -> dict[str, Any]:
        """The keyword arguments ``manager``, ``label`` and ``layer`` of the functions here."""
        return {"manager": self.manager, "label": self.label, "layer": self._layer}


def worked_out(fn: _F) -> _F:
    """A function of integers and strings that is worked out once for the same, and while compiled code is traced."""
    cached = lru_cache(maxsize=4096)(fn)

    @wraps(fn)
    def found(*args: Any) -> Any:
        return cached(*args)

    marked: Any = constant(found)
    return marked  # type: ignore[no-any-return]


def step_between(source: RowPartition, target: RowPartition, needs: Sequence[tuple[int, ...]], rank: int) -> Step:
    """Bring each rank the rows of ``source`` in ``needs``, which are its own rows of ``target`` from then on."""
    # Slots of windows are no rows of a level of the model, which skip connections would meet.
    return step_of(Footprint(source, target, tuple(needs), EdgeRule()), rank)._replace(sizes=((), ()))


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
