"""Column- and row-parallel layers: torch's own, changed in place to work on this rank's slice of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from credit_domain.extend import each_entry, parameters_of
from credit_halo import exchange_rows, plan_rows
from credit_halo.extend import group_by_name, ops, plans
from credit_mesh import RowPartition
from credit_parallel.tensor_parallel.parameters import divide
from credit_parallel.tensor_parallel.region import Region, sum_from_region


@dataclass(frozen=True)
class Division:
    """How a layer is divided."""

    label: str  #: what errors call the layer
    group: str  #: name of the tp group
    size: int  #: the tensor-parallel degree
    exchange_plan: str  #: key of what brings a rank its rows of each part; empty where its slice is what it needs


class _Divided(nn.Module):
    """What the four layers share. They have no constructor: :func:`divide_layer` makes them of torch's layers."""

    tp_division: Division
    tp_region: Region
    _operator: ClassVar[Any]
    _channel_dim: ClassVar[int]
    _dim: ClassVar[int]

    def _own(self, parameter: Any) -> Tensor:
        """What this rank works with of a parameter."""
        local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # in a trace
        how = self.tp_division
        if not how.exchange_plan:
            return local
        return own_parts(local, self._dim, how.exchange_plan, how.group, how.label)


def own_parts(local: Tensor, dim: int, plan: str, group: str, label: str) -> Tensor:
    """This rank's channels of each part, from its slice of the whole."""
    if torch.compiler.is_exporting():
        return _TracedParts.apply(local, dim, plan, group, label)  # type: ignore[no-any-return, no-untyped-call]
    if torch.compiler.is_compiling():
        rows: Tensor = ops.exchange(local, dim, plan, group, label, False, True)
        return rows
    return exchange_rows(local, plans[plan], dim=dim, group=group_by_name(group), label=label)


class _TracedParts(torch.autograd.Function):
    """:func:`own_parts` in the trace of a model that is partitioned: no operator whose order is kept."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, *how: Any) -> Tensor:
        return torch.empty_like(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("a trace has no backward")  # a program calls own_parts


each_entry(_TracedParts, own_parts)


class _Column(_Divided):
    _dim = 0

    def forward(self, x: Tensor) -> Tensor:
        """This rank's output channels, from all input channels, which are the same on every tp rank."""
        x = self.tp_region.enter(x, self.tp_division.group, self.tp_division.label)
        weight, bias = self._own(parameters_of(self)["weight"]), parameters_of(self)["bias"]
        out: Tensor = type(self)._operator(x, weight, None if bias is None else self._own(bias))
        return out


class _Row(_Divided):
    _dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """All output channels, the same on every tp rank, from this rank's input channels."""
        how, weight, bias = self.tp_division, self._own(parameters_of(self)["weight"]), parameters_of(self)["bias"]
        if x.shape[self._channel_dim] != weight.shape[1]:
            raise ValueError(
                f"{how.label}: expected this rank's {weight.shape[1]} of {weight.shape[1] * how.size} input channels; "
                f"got {x.shape[self._channel_dim]} in a tensor of shape {tuple(x.shape)}. Between the column- and the "
                "row-parallel layers a block works on the channels of its rank"
            )
        out = sum_from_region(type(self)._operator(x, weight, None), how.group, how.label)
        if bias is None:
            return out
        # In the dtype of the operator, which under autocast is not that of the bias.
        return out + bias.to(out.dtype).view(-1, *[1] * (-1 - self._channel_dim))


class _Linear(_Divided):
    _channel_dim = -1
    _operator = staticmethod(F.linear)


class _Conv2d(_Divided):
    _channel_dim = -3
    _operator = staticmethod(F.conv2d)


class ColumnParallelLinear(_Column, _Linear, nn.Linear):
    """A linear layer whose output features are divided."""


class RowParallelLinear(_Row, _Linear, nn.Linear):
    """A linear layer whose input features are divided."""


class ColumnParallelConv2d(_Column, _Conv2d, nn.Conv2d):
    """A 1x1 convolution whose output channels are divided."""


class RowParallelConv2d(_Row, _Conv2d, nn.Conv2d):
    """A 1x1 convolution whose input channels are divided."""


_CLASSES: dict[tuple[str, type[nn.Module]], type[_Divided]] = {
    ("column", nn.Linear): ColumnParallelLinear,
    ("row", nn.Linear): RowParallelLinear,
    ("column", nn.Conv2d): ColumnParallelConv2d,
    ("row", nn.Conv2d): RowParallelConv2d,
}


def divide_layer(
    layer: nn.Module, role: str, parts: Sequence[int], mesh: DeviceMesh, region: Region, label: str
) -> None:
    """Make a Linear or a 1x1 Conv2d column- or row-parallel, in place; parts are the sizes of its divided channels."""
    dim = 0 if role == "column" else 1
    exchange_plan = _exchange_plan(tuple(parts), mesh.size(), mesh.get_local_rank())
    divide(layer, "weight", mesh, dim)
    if role == "column" and layer.bias is not None:
        divide(layer, "bias", mesh, 0)
    layer.__class__ = _CLASSES[role, type(layer)]
    layer.__dict__["tp_division"] = Division(label, mesh.get_group().group_name, mesh.size(), exchange_plan)
    layer.__dict__["tp_region"] = region


def _exchange_plan(parts: tuple[int, ...], size: int, rank: int) -> str:
    """Key of the exchange from contiguous slices of the whole to slices of each part."""
    if len(parts) == 1:
        return ""
    starts = list(accumulate(parts, initial=0))
    needs = [
        tuple(
            chain.from_iterable(
                range(start + part * r // size, start + part * (r + 1) // size)
                for start, part in zip(starts, parts, strict=False)
            )
        )
        for r in range(size)
    ]
    return plan_rows(RowPartition.even(sum(parts), size), needs, rank=rank).key
