"""What the converted layers share, and the table of them: each answers for the torch module that it wraps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from credit_domain._torch_private import share
from credit_domain.engine.driver import Call
from credit_domain.engine.ranks import new_layer
from credit_domain.engine.row_op import RowOp
from credit_mesh import DomainParallelManager, RowPartition

_Self = TypeVar("_Self", bound="DomainParallelLayer")
_Layer = TypeVar("_Layer", bound="type[DomainParallelLayer]")

Fate = Literal["converted", "local", "refused", "own code"]


@dataclass(frozen=True)
class Decision:
    """What becomes of a module.

    Attributes:
        fate: ``converted``; ``local``, since it mixes no rows; ``refused``; or ``own code``: no module of torch.nn, so
            that its children decide.
        reason: Why.
        wrap: For ``converted``: makes the converted module, as ``wrap(module, shard_dim, label=...)``.
    """

    fate: Fate
    reason: str
    wrap: Callable[..., nn.Module] | None = None


class Seen(NamedTuple):
    """A call of a plain module, as it was run for its shapes.

    Attributes:
        input: Global shape of its input.
        output: Global shape of its output.
        declared: Partition of the model's input.
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    declared: RowPartition | None = None


class DomainParallelLayer(nn.Module):
    """A torch module that works on sharded rows.

    It *is* the wrapped module to everything around it: the same parameter objects under the same names, the same
    buffers, children, hooks and state_dict keys, so that checkpoints of the plain model load into the converted one and
    back, and spectral_norm, weight_norm and parametrisations go on working. Attributes that it does not have itself are
    those of the wrapped module.

    Args:
        module: The torch module; it must not be used beside the wrapper.

    Attributes:
        wraps: The modules that it stands for.
        spatial: How many of the last dims it acts on, one of which is sharded; None where it may be any.
        reason: Why it is converted, as reports say it.

    Raises:
        ValueError: If the module is of another type than this layer wraps, or lazy and not yet initialised; or if
            ``shard_dim`` is none of its spatial dims.
    """

    wraps: tuple[type[nn.Module], ...] = (nn.Module,)
    spatial: int | None = None
    reason: str = "needs rows of other ranks"

    @classmethod
    def fate(cls, module: nn.Module, shard_dim: int) -> Decision:
        """What the converter does with a module of ``wraps`` whose input is sharded along ``shard_dim`` (negative)."""
        if cls.spatial is not None and shard_dim < -cls.spatial:
            return Decision("refused", f"a {cls.spatial}-D layer does not have the sharded dim {shard_dim}")
        return Decision("converted", cls.reason, cls)

    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp | None:
        """What a module of ``wraps`` does along the sharded dim, which planner and granularity ask.

        Args:
            module: The plain module.
            dim: The sharded dim, negative.
            seen: A call of it, for operations that depend on shapes; None where none is known.

        Returns:
            None for what reads no rows of others, reduces over all of them, or cannot be told without a call.
        """
        return None

    def __init__(
        self,
        module: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(module, self.wraps):
            expected = " or ".join(f"torch.nn.{kind.__name__}" for kind in self.wraps)
            raise ValueError(f"{name} wraps {expected}; got {type(module).__name__}")
        if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
            raise ValueError(
                f"{name}: {type(module).__name__} has no parameters yet; run it once on data of the right shape first"
            )
        share(self, module)
        self.__dict__["_wrapped"] = module
        self.__dict__["shard_dim"] = shard_dim
        # Kept negative: a dim counted from the first would be another one where the batch dim is missing.
        spatial = type(self).spatial
        self.__dict__["_dim"] = shard_dim if spatial is None else spatial_dim(module, shard_dim, spatial) - spatial
        self.__dict__["manager"] = manager
        self.__dict__["label"] = name if label is None else label
        self.__dict__["_layer"] = new_layer()

    @property
    def wrapped(self) -> Any:
        """The torch module whose parameters this layer has."""
        return self.__dict__["_wrapped"]

    @property
    def call(self) -> Call:
        """What each operation of this layer is told."""
        own = self.__dict__
        return Call(own["_dim"], None, own["manager"], own["label"], own["_layer"])

    def __getattr__(self, name: str) -> Any:
        """Answer for the wrapped module where the layer itself has no such attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_wrapped" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.__dict__["_wrapped"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what the wrapped module has, such as ``eps``, on that, since ``forward`` reads it there.

        Raises:
            ValueError: If the name is one of the wrapped module itself, such as ``conv``: the layer is made of it.
        """
        own = getattr(type(self), name, None)
        if isinstance(value, nn.Module) and isinstance(own, property) and own.fset is None:
            raise ValueError(
                f"{self.label}: {name} cannot be replaced, because the layer is made of it. Set its parameters, or "
                "make a new layer of another module"
            )
        wrapped = self.__dict__.get("_wrapped")
        if wrapped is not None and own is None and name not in self.__dict__ and name in wrapped.__dict__:
            setattr(wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__["_layer"] = new_layer()  # a copy learns for itself

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set the mode of the layer and of the module that it wraps."""
        super().train(mode)
        self.__dict__["_wrapped"].training = mode
        return self

    def extra_repr(self) -> str:
        """The arguments of the wrapped module."""
        inner = self.wrapped.extra_repr()
        return f"{inner}{', ' if inner else ''}shard_dim={self.shard_dim}"


class WeightedLayer(DomainParallelLayer):
    """A layer whose ``weight`` and ``bias`` are those of the wrapped module, also where hooks make them."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the wrapped module."""
        weight: torch.Tensor = self.wrapped.weight
        return weight

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        self.wrapped.weight = value

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the wrapped module; None if it has none."""
        bias: torch.Tensor | None = self.wrapped.bias
        return bias

    @bias.setter
    def bias(self, value: torch.Tensor | None) -> None:
        self.wrapped.bias = value


LAYERS: dict[type[nn.Module], type[DomainParallelLayer]] = {}
"""The layer that stands for each type of module: all that converter, planner and granularity know of operations."""


def known_layer(layer: _Layer) -> _Layer:
    """Make a layer known: modules of its ``wraps`` are converted to it, planned, and counted for the granularity."""
    LAYERS.update(dict.fromkeys(layer.wraps, layer))
    return layer


def layer_for(module: nn.Module) -> type[DomainParallelLayer] | None:
    """The layer that stands for a module, or for the class of torch that it derives from; None if there is none."""
    kind = parametrize.type_before_parametrizations(module)
    return next((LAYERS[base] for base in kind.__mro__ if base in LAYERS), None)


def record_of(module: nn.Module, shard_dim: int, seen: Seen | None = None) -> RowOp | None:
    """What a module does along the sharded dim; None where its layer says nothing, or there is none."""
    layer = layer_for(module)
    if layer is None or (layer.spatial is not None and shard_dim < -layer.spatial):
        return None
    return layer.record(module, shard_dim, seen)


def spatial_dim(module: nn.Module, shard_dim: int, spatial: int) -> int:
    """The sharded dim of a layer as an index of its kernel, so that mistakes show when a model is converted.

    A dim counted from the first is that of batched tensors.

    Raises:
        ValueError: If the dim is no spatial one.
    """
    at = shard_dim - 2 if shard_dim >= 0 else shard_dim + spatial
    if not 0 <= at < spatial:
        dims = ", ".join(str(dim) for dim in range(-spatial, 0))
        raise ValueError(
            f"shard_dim={shard_dim} is no spatial dim of {type(module).__name__}: expected one of {dims}, or of "
            f"{', '.join(str(dim) for dim in range(2, 2 + spatial))} for batched tensors"
        )
    return at


def halo_of(before: int, after: int) -> int:
    """The wider side of a halo; 0 where a layer reads less than its own rows."""
    return max(0, before, after)
