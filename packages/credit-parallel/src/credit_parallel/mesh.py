"""The device mesh: what :mod:`credit_mesh` offers, folding two axes into one, and the data-parallel group."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from credit_mesh import (
    build_device_mesh,
    data_parallel_coords,
    dp_world_size,
    get_domain_parallel_manager,
    parse_parallelism_conf,
)
from credit_mesh.extend import logger
from credit_parallel._torch_private import flatten

__all__ = [
    "build_device_mesh",
    "covers_domain",
    "data_parallel_coords",
    "dp_world_size",
    "fold_domain",
    "get_dp_group",
    "logger",
    "parse_parallelism_conf",
    "register_dp_group",
]


def fold_domain(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The dp and domain axes as one axis, for parameters that are sharded over both.

    Returns a 1-D mesh, named ``dp_domain``, of the ranks that share this rank's tp coordinate, in the order (dp,
    domain); ``mesh["dp"]`` or ``mesh["domain"]`` where the whole mesh has one of the two; None where it has neither.

    Collectives: creates process groups the first time; every rank of the mesh must call it.
    """
    names = () if mesh is None else mesh.mesh_dim_names or ()
    axes = tuple(axis for axis in ("dp", "domain") if axis in names)
    if mesh is None or not axes:
        return None
    return flatten(mesh[axes], "dp_domain") if len(axes) == 2 else mesh[axes[0]]


def covers_domain(mesh: DeviceMesh, manager: Any) -> bool:
    """Whether a mesh spans the domain ranks of this rank, so that averages over it are averages over them too."""
    if manager is None or manager.domain_parallel_size == 1 or not hasattr(manager, "domain_group"):
        return False
    peers = set(dist.get_process_group_ranks(manager.domain_group))
    spanned = peers & set(mesh.mesh.flatten().tolist())
    if 1 < len(spanned) < len(peers):
        raise ValueError(
            f"{mesh} spans {len(spanned)} of the {len(peers)} domain ranks {sorted(peers)}: pass the dp axis alone, or "
            "fold_domain(mesh) for all of them"
        )
    return len(spanned) == len(peers)


# The group of each world, by the group of the world: see credit_mesh.manager.
_dp_groups: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()


def register_dp_group(group: ProcessGroup | None) -> None:
    """Say which ranks hold other samples and the same tp and domain coordinates; None forgets it."""
    if not dist.is_initialized():
        if group is None:
            return  # a program on one process says so too, and there is nothing to forget
        raise ValueError("register_dp_group needs torch.distributed: call init_process_group() first")
    world = dist.group.WORLD
    assert world is not None
    if group is None:
        _dp_groups.pop(world, None)
    else:
        _dp_groups[world] = group


def get_dp_group() -> ProcessGroup | None:
    """The group that was registered, or that of the present manager; None, which is the whole world, without one."""
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    manager = get_domain_parallel_manager()
    return _dp_groups.get(world, None if manager is None else manager.data_parallel_group)
