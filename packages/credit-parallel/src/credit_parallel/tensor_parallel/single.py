"""Column- and row-parallel layers one by one, for blocks that put them in place themselves.

A column layer takes all channels and gives this rank's; a row layer takes this rank's and gives all. Together they are
the two layers of one rank, with whatever treats channels apart between them. Blocks that declare their layers
(:func:`credit_parallel.tensor_parallel.apply_tensor_parallel`) are checked for the rest; these layers are not.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from credit_domain.extend import children_of, parameters_of
from credit_halo.extend import agree, group_by_name
from credit_mesh.extend import mesh_of
from credit_parallel.contract import device_of
from credit_parallel.tensor_parallel.declaration import DividedLayer, unfit
from credit_parallel.tensor_parallel.layers import divide_layer
from credit_parallel.tensor_parallel.parameters import broadcast_all, tp_groups
from credit_parallel.tensor_parallel.region import Region


class _Single(nn.Module):
    """What the four layers share."""

    _kind: ClassVar[type[nn.Module]]
    _role: ClassVar[str]
    _child: ClassVar[str]

    def __init__(self, layer: nn.Module, tp_group: ProcessGroup | DeviceMesh | None) -> None:
        super().__init__()
        label = type(self).__name__
        if not dist.is_initialized():
            raise ValueError(f"{label} needs torch.distributed: call torch.distributed.init_process_group() first")
        mesh = _mesh(tp_group, label)
        group = mesh.get_group()
        problem = self._problem(layer, mesh.size())
        agree(group, None, label, lambda: f"{label} of {layer}", device_of(group), problem)
        self.__dict__["_tp_group_name"] = group.group_name
        own = copy.deepcopy(layer)
        broadcast_all(own, mesh)
        bias = parameters_of(own)["bias"]
        if self._role == "row":  # it is added after the sum, once, and is a parameter of this module
            own.register_parameter("bias", None)
            self.register_parameter("bias", bias)
        divide_layer(own, self._role, (DividedLayer("", own, self._role).channels,), mesh, Region(), label)
        self.add_module(self._child, own)
        tp_groups.add(group)

    @property
    def tp_group(self) -> ProcessGroup:
        """The tp group; a layer that had the group itself could not be copied."""
        return group_by_name(self.__dict__["_tp_group_name"])

    def _problem(self, layer: nn.Module, size: int) -> str | None:
        what = f"{type(self).__name__} of {type(layer).__name__}"
        if not isinstance(layer, self._kind):
            return f"{what}: expected a torch.nn.{self._kind.__name__}"
        problem = unfit(layer, native=False)
        if problem is not None:
            return f"{what}: it {problem}"
        divided = DividedLayer("", layer, self._role)
        if divided.channels % size:
            return (
                f"{what}: {divided.argument}={divided.channels} is not divisible by the tensor-parallel degree {size}"
            )
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Column: this rank's output channels, from all of the input. Row: all output channels, from this rank's input.

        What every rank has whole is the same on each; its shape, dtype and need for a gradient are compared once.

        Collectives: of a row layer one sum in the forward; of a column layer one, of the gradient, in the backward.
        """
        out: Tensor = children_of(self)[self._child](x)  # type: ignore[misc]
        bias = parameters_of(self).get("bias")
        if bias is None:
            return out
        # In the dtype of the operator, which under autocast is not that of the bias.
        return out + bias.to(out.dtype).view(-1, *[1] * (2 if self._child == "conv" else 0))


class _SingleConv2d(_Single):
    _kind, _child = nn.Conv2d, "conv"
    conv: nn.Conv2d

    def __init__(self, conv: nn.Conv2d, tp_group: ProcessGroup | DeviceMesh | None) -> None:
        super().__init__(conv, tp_group)


class _SingleLinear(_Single):
    _kind, _child = nn.Linear, "linear"
    linear: nn.Linear

    def __init__(self, linear: nn.Linear, tp_group: ProcessGroup | DeviceMesh | None) -> None:
        super().__init__(linear, tp_group)


class TpColConv2d(_SingleConv2d):
    """A 1x1 convolution whose output channels are divided over tp ranks.

    The weight is a DTensor of the whole shape, of which each rank has a slice. Keys of the state_dict are
    ``conv.weight`` and ``conv.bias``.

    Args:
        conv: The layer, plain and 1x1, which is not changed. Where ranks hold other values, those of the first one
            count.
        tp_group: The tp group, or its 1-D mesh; None is the whole world. FSDP2 needs the mesh, which is found for a
            group that comes from :func:`credit_mesh.build_device_mesh`.

    Raises:
        ValueError: On all ranks alike, if the layer is of another kind, or its channels do not divide.

    Collectives: small all-gathers, then broadcasts of the parameters.
    """

    _role = "column"


class TpRowConv2d(_SingleConv2d):
    """As :class:`TpColConv2d`, of the input channels; keys of the state_dict are ``conv.weight`` and ``bias``."""

    _role = "row"


class TpColLinear(_SingleLinear):
    """As :class:`TpColConv2d`, of the output features of a linear layer; keys: ``linear.weight``, ``linear.bias``."""

    _role = "column"


class TpRowLinear(_SingleLinear):
    """As :class:`TpColConv2d`, of the input features of a linear layer; keys: ``linear.weight`` and ``bias``."""

    _role = "row"


def _mesh(group: ProcessGroup | DeviceMesh | None, label: str) -> DeviceMesh:
    """The 1-D mesh of a group."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{label}: tp_group must be one group, or the 1-D mesh of the tp axis; got {group}")
        return group
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"{label}: tp_group must be a group that this rank is in, or a mesh; got {group!r}")
    known = mesh_of(group)
    kind: Any = device_of(group).type
    return known if known is not None else DeviceMesh.from_group(group, kind, mesh_dim_names=("tp",))
