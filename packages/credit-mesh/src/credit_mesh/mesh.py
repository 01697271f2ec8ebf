"""DeviceMesh construction and the sampler contract."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch.distributed import ProcessGroup, device_mesh
from torch.distributed.device_mesh import DeviceMesh

import credit_mesh.torch_floor  # noqa: F401 - an old torch is refused before anything else is imported
from credit_mesh.layout import AXES
from credit_mesh.parallelism import ParallelismConf, ParallelismConfig, config_of

logger = logging.getLogger(__name__)


def build_device_mesh(
    parallelism_conf: ParallelismConf, device: str = "cuda"
) -> tuple[DeviceMesh | None, dict[str, DeviceMesh]]:
    """Build the DeviceMesh that a parallelism block asks for.

    Its axes are those of (dp, tp, domain) that have more than one rank, in this order: 8 ranks with
    ``tensor: 2, domain: 2`` make a (2, 2, 2) mesh named dp, tp, domain; with ``tensor: 2`` alone a (4, 2) mesh
    named dp, tp.

    Args:
        parallelism_conf: The parallelism block itself, as :func:`parse_parallelism_conf` returns it.
        device: Device type of the mesh, ``"cuda"`` or ``"cpu"``.

    Returns:
        ``(mesh, submeshes)``, where ``submeshes`` maps each axis of the mesh to its 1-D mesh; an axis of one rank is
        not in it. Without parallelism (``data: none`` with degrees of 1, or one rank) it is ``(None, {})``.

    Raises:
        ValueError: If the block is bad, torch.distributed is not initialised, or the world size is not divisible by
            ``tensor * domain``.

    Collectives:
        Creates one process group for each group of each axis; every rank of the world must call it.
    """
    config = ParallelismConfig.from_block(parallelism_conf)
    if not dist.is_initialized():
        if config == ParallelismConfig():
            return None, {}
        raise ValueError(
            f"{config} needs torch.distributed: call torch.distributed.init_process_group() before build_device_mesh()"
        )
    layout = config.layout(dist.get_world_size())
    if config.data == "none" and layout.dp > 1 and dist.get_rank() == 0:
        logger.warning(
            "parallelism.data is 'none' in a world of %d ranks with tensor=%d and domain=%d: the %d replicas train "
            "apart, nothing averages their gradients",
            *(layout.world_size, layout.tp, layout.domain, layout.dp),
        )
    if config == ParallelismConfig() or layout.world_size == 1:
        return None, {}
    sizes = {axis: layout.size(axis) for axis in AXES if layout.size(axis) > 1}
    mesh = device_mesh.init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    _axes.update({mesh.get_group(axis): (ref(mesh), axis) for axis in sizes})
    return mesh, {axis: mesh[axis] for axis in sizes}


# The whole mesh and the axis of a group. Weak, since a mesh keeps its groups, which are to end with their world.
_axes: WeakKeyDictionary[ProcessGroup, tuple[ref[DeviceMesh], str]] = WeakKeyDictionary()


def mesh_of(group: ProcessGroup) -> DeviceMesh | None:
    """The 1-D mesh of a group, where :func:`build_device_mesh` made it and the whole mesh still lives; None elsewhere.

    A group alone does not tell what mesh it is an axis of, and parameters that are sharded along two axes need that.
    """
    found = _axes.get(group)
    mesh = None if found is None else found[0]()
    return None if found is None or mesh is None else mesh[found[1]]


def data_parallel_coords(conf: Mapping[str, Any]) -> tuple[int, int]:
    """Return ``(dp_rank, dp_size)``, the two numbers that a sampler may be sharded by.

    Samples are dealt out over the data axis only. Ranks that differ in their tp or domain coordinate work on the same
    sample: tp peers add up partial results of one activation, and domain peers pass each other rows of one field. So
    build samplers as ``DistributedSampler(dataset, rank=dp_rank, num_replicas=dp_size)``, and never with the global
    rank where ``tensor`` or ``domain`` is above 1.

    Args:
        conf: The whole configuration, or its ``trainer`` section; see :func:`parse_parallelism_conf`.

    Returns:
        The data coordinate of this rank, ``rank // (tensor * domain)``, and the number of replicas. Where
        torch.distributed is not initialised, ``(0, 1)``.

    Raises:
        ValueError: If the block is missing or bad, or the world size is not divisible by ``tensor * domain``.
    """
    config = config_of(conf)
    if not dist.is_initialized():
        return 0, 1
    layout = config.layout(dist.get_world_size())
    return layout.coords(dist.get_rank()).dp, layout.dp
