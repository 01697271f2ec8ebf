"""Parameters divided over the tp ranks: DTensors under their own names, of the logical shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from credit_domain.extend import parameters_of
from credit_domain.layers import DomainParallelLayer
from credit_halo.extend import group_by_name
from credit_parallel.collectives import broadcast_tensors
from credit_parallel.tensor_parallel.region import copy_to_region

TP_AXIS = "tp"
tp_groups: WeakSet[ProcessGroup] = WeakSet()
"""The groups that models were made tensor-parallel over."""


def _is_tp_sharded_param(p: Tensor) -> bool:
    """Whether a parameter is divided over a tp axis, also where ``fully_shard`` divided it once more.

    An axis is a tp axis by its name, ``tp``, or because a model was made tensor-parallel over it.
    """
    if not isinstance(p, DTensor):
        return False
    mesh = p.device_mesh
    names = mesh.mesh_dim_names or [""] * mesh.ndim
    axes = [axis for axis, name in enumerate(names) if name == TP_AXIS or mesh.get_group(axis) in tp_groups]
    return any(not p.placements[axis].is_replicate() for axis in axes)


def divide(owner: nn.Module, name: str, mesh: DeviceMesh, dim: int) -> None:
    """Replace a parameter by this rank's slice of it, and have plain checkpoints load into that."""
    whole = parameters_of(owner)[name]
    assert whole is not None
    part = nn.Parameter(slice_of(whole.detach(), mesh, dim), requires_grad=whole.requires_grad)
    part.__dict__.update(whole.__dict__)
    parameters_of(owner)[name] = part
    if not hasattr(owner, "_tp_dims"):
        owner.__dict__["_tp_dims"] = {}
        owner.register_load_state_dict_pre_hook(_divide_loaded)  # type: ignore[no-untyped-call, unused-ignore]
    owner.__dict__["_tp_dims"][name] = dim


def slice_of(whole: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    """This rank's slice of a tensor that every rank has, on the device of the mesh."""
    size = whole.shape[dim] // mesh.size()
    own = whole.narrow(dim, mesh.get_local_rank() * size, size)
    return DTensor.from_local(own.clone(memory_format=torch.contiguous_format), mesh, [Shard(dim)])


def _divide_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where a checkpoint has a whole tensor for a divided parameter, take this rank's slice of it."""
    for name, dim in module.__dict__["_tp_dims"].items():
        value, own = state.get(prefix + name), parameters_of(module)[name]
        plain = isinstance(value, Tensor) and not isinstance(value, DTensor)
        # What does not fit is torch's to report; what fully_shard divided too has functions of its own to load with.
        if plain and isinstance(own, DTensor) and own.device_mesh.ndim == 1 and value.shape == own.shape:
            state[prefix + name] = slice_of(value.detach(), own.device_mesh, dim)


def broadcast_all(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give every tp rank the parameters and buffers of the first one, but for those that are divided already."""
    tensors = (*model.parameters(), *model.buffers())
    broadcast_tensors((tensor for tensor in tensors if not isinstance(tensor, DTensor)), mesh.get_group())


def present(owner: nn.Module, name: str, mesh: DeviceMesh, label: str) -> None:
    """Have a module's ``forward`` see this rank's slice of a divided parameter, or another with a summed gradient."""
    owner.__dict__.update(_tp_group_name=mesh.get_group().group_name, _tp_label=label)
    add_property(owner, name, _slice if name in owner.__dict__.get("_tp_dims", ()) else _copy)


def add_property(module: nn.Module, name: str, getter: Callable[[str], Callable[[Any], Any]]) -> None:
    """Give a module a read-only property."""
    kind: Any = type(module)
    module.__class__ = _with_property(kind, name, getter)


@cache
def _with_property(cls: Any, name: str, getter: Callable[[str], Callable[[Any], Any]]) -> type[nn.Module]:
    """A subclass of the same name: what chooses modules by class name goes on working."""
    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, name: property(getter(name))}
    return type(cls.__name__, (cls,), members)


def _slice(name: str) -> Callable[[Any], Tensor]:
    def get(module: Any) -> Tensor:
        parameter: Any = parameters_of(module)[name]
        if not isinstance(parameter, DTensor):
            return parameter  # type: ignore[no-any-return]  # in a trace: this rank's slice
        # While fully_shard has it in pieces, whoever reads it is fully_shard.
        return parameter.to_local() if parameter.device_mesh.ndim == 1 else parameter

    return get


def _copy(name: str) -> Callable[[Any], Tensor]:
    def get(module: Any) -> Tensor:
        parameter: Any = parameters_of(module)[name]
        if isinstance(parameter, DTensor):  # likewise
            return parameter
        return copy_to_region(parameter, module._tp_group_name, f"{module._tp_label}.{name}")

    return get


def group_property(name: str) -> Callable[[Any], Any]:
    """A getter of the tp group; a model that had the group itself could not be copied."""

    def get(module: Any) -> Any:
        return group_by_name(module._tp_group_name)

    return get


def divided_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that are divided over the tp ranks."""
    owners = map(unwrapped, model.modules())
    return {id(parameters_of(owner)[name]) for owner in owners for name in owner.__dict__.get("_tp_dims", ())}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, or the one behind a domain-parallel layer, which reads the attributes of that."""
    return module.wrapped if isinstance(module, DomainParallelLayer) else module
