"""Domain parallelism as a training program meets it: around a model that may be wrapped, or have no manager."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from credit_domain import manager as manager_module
from credit_domain.extend import domain_of, sizes_of
from credit_domain.sharding import gather_tensor, shard_tensor
from credit_halo import naming_missing_ranks, take_rows
from credit_halo.extend import agree
from credit_mesh import DomainParallelManager, RowPartition, initialize_domain_parallel
from credit_parallel._torch_private import compiled_of, root_of
from credit_parallel.collectives import allreduce_grads_avg, start_equal
from credit_parallel.contract import device_of
from credit_parallel.reducer import reducer_of, refuse_strangers


def apply_domain_parallel(
    model: nn.Module, domain_mesh_or_manager: DeviceMesh | Any, shard_dim: int | None = None, **options: Any
) -> nn.Module:
    """Convert a model, in place, so that it works on the rows of one domain rank with the numbers of one rank.

    Apply it first, before tensor parallelism and FSDP2 or DDP. Domain ranks start with the weights of the first one.
    The model has the manager as ``_domain_parallel_manager`` then.

    Args:
        domain_mesh_or_manager: The domain axis of the device mesh, the whole mesh, or a manager. From a mesh the
            manager of this process is made (:func:`credit_mesh.initialize_domain_parallel`), unless there is one of
            these ranks already.
        shard_dim: The sharded dim; None is that of the manager, or -2, latitude.
        **options: Those of :func:`credit_domain.convert.convert_to_domain_parallel`, as are errors.

    Raises:
        ValueError: If the mesh has no domain axis or the present manager is of other ranks.

    Collectives: broadcasts of the weights over the domain ranks.
    """
    from credit_domain.convert import convert_to_domain_parallel

    manager = domain_mesh_or_manager
    if isinstance(manager, DeviceMesh):
        manager = _manager_on(manager, -2 if shard_dim is None else shard_dim)
    dim = getattr(manager, "shard_dim", -2) if shard_dim is None else shard_dim
    model = convert_to_domain_parallel(model, manager, dim, **options)
    if manager.domain_parallel_size > 1 and isinstance(manager, DomainParallelManager):
        start_equal(model, [manager.domain_group])
    return model


def _manager_on(mesh: DeviceMesh, shard_dim: int) -> DomainParallelManager:
    """The manager of the world that a mesh, or its domain axis, belongs to."""
    root = root_of(mesh)
    names = root.mesh_dim_names or ()
    if "domain" not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"the mesh must have an axis named domain; got {mesh}")
    sizes = {name: root.size(axis) for axis, name in enumerate(names)}
    manager = manager_module.get_domain_parallel_manager()
    if manager is None:
        return initialize_domain_parallel(
            root.size(), sizes["domain"], shard_dim, tensor_parallel_size=sizes.get("tp", 1), mesh=root
        )
    present, wanted = manager.layout, (sizes.get("dp", 1), sizes.get("tp", 1), sizes["domain"])
    if (present.dp, present.tp, present.domain) != wanted or manager.shard_dim != shard_dim:
        raise ValueError(f"{manager} is not of the mesh {root} with shard_dim={shard_dim}: pass the manager itself")
    return manager


def get_raw_model(model: Any) -> Any:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif (inner := compiled_of(model)) is not None:
            model = inner
        else:
            return model


def get_domain_manager(model: Any) -> Any:
    """The manager that a model was converted with, also through wrappers; None without one."""
    return getattr(get_raw_model(model), "_domain_parallel_manager", None)


def is_partitioned(model: Any) -> bool:
    """Whether a model, also within wrappers, was partitioned operation by operation."""
    return getattr(get_raw_model(model), "_partition", None) is not None


def manager_of(model: nn.Module) -> Any:
    """The manager of a model, or else that of this process, or None."""
    return get_domain_manager(model) or manager_module.get_domain_parallel_manager()


# Rows


def shard_spatial(tensor: Tensor, manager: DomainParallelManager | None) -> Tensor:
    """This rank's rows of a tensor that every rank holds whole; see :func:`credit_domain.sharding.shard_tensor`.

    Without a manager, or with a domain of one rank, the tensor itself.
    """
    if manager is None or manager.domain_parallel_size == 1:
        return tensor
    return shard_tensor(tensor, manager.shard_dim, manager)


def gather_spatial(tensor: Tensor, manager: DomainParallelManager | None) -> Tensor:
    """The rows of all ranks, on every rank: undoes :func:`shard_spatial`; see ``gather_tensor``.

    Differentiable; between the steps of a rollout pass it a detached tensor.
    """
    if manager is None or manager.domain_parallel_size == 1:
        return tensor
    return gather_tensor(tensor, manager.shard_dim, manager)


def shard_lat_weights(weights: Tensor, target_h: int) -> Tensor:
    """The weights of this rank's latitudes, for a loss of sharded fields.

    Weights that have ``target_h`` rows, or a single one for all, are returned as they are.

    Args:
        weights: Weights of all latitudes: of shape (H,), or with rows along dim -2, such as (H, W) or (1, 1, H, 1).
        target_h: Rows of the target that they are for.

    Raises:
        ValueError: If the weights have another height than the target: where rows are divided, on all ranks alike, if
            any rank has a target of other rows than :func:`shard_spatial` gives it.

    Collectives: a small all-gather the first time that weights are sharded.
    """
    manager = manager_module.get_domain_parallel_manager()  # at each call: it may be made after the loss
    dim = max(-2, -weights.ndim)
    rows = weights.shape[dim] if weights.ndim else 1
    if rows in (1, target_h):
        return weights
    if manager is None or manager.domain_parallel_size == 1 or getattr(manager, "shard_dim", -2) == -1:
        raise ValueError(
            f"shard_lat_weights: the weights have {rows} rows (shape {tuple(weights.shape)}), and the target, whose "
            f"rows are not divided, has {target_h}: pass the weights of the target's grid"
        )
    partition, label = _partition_of(manager, rows), "shard_lat_weights"
    own = partition.interval(manager.domain_rank)
    problem = None
    if len(own) != target_h:
        problem = f"the target has {target_h} rows; of {rows} rows of weights this rank's are {len(own)} ({partition})"
    group, said = getattr(manager, "domain_group", None), f"weights of {rows} rows, {partition.key}"
    if group is not None:
        agree(group, (label, said, target_h), label, lambda: said, device_of(group), problem)
    elif problem is not None:
        raise ValueError(f"{label}: {problem}")
    return weights.narrow(dim, own.start, len(own))


def unpad_shard_interp(
    y_pred: Tensor, padding_opt: Any, manager: DomainParallelManager | None, image_h: int, image_w: int
) -> Tensor:
    """Cut off the padding of a prediction, and move its rows to where :func:`shard_spatial` puts those of the target.

    The boundary padding was put on the whole field, which was sharded then. Without its padded rows the shards are no
    longer those of the target; rows are moved, differentiably, and nothing is ever resized.

    Args:
        y_pred: Prediction (..., H, W) on the padded grid: this rank's rows of it, however they are divided.
        padding_opt: Has ``pad_NS`` (rows added in the north, in the south) and ``pad_WE`` (likewise west, east); None
            where nothing was padded.
        manager: The manager; None, or a domain of one rank, for a field that is whole.
        image_h: Rows of the target of all ranks.
        image_w: Its columns.

    Raises:
        ValueError: On all ranks alike, if the field without its padding is of another size than the target.

    Collectives: a message to each rank that some of its rows move to; a small all-gather the first time.
    """
    north_south = tuple(getattr(padding_opt, "pad_NS", (0, 0)))
    west_east = tuple(getattr(padding_opt, "pad_WE", (0, 0)))
    cuts, wanted = {-2: north_south, -1: west_east}, {-2: image_h, -1: image_w}
    label, dim, source = "unpad_shard_interp", 0, None
    whole = {d: y_pred.shape[d] for d in (-2, -1)}
    if manager is not None and manager.domain_parallel_size > 1:
        dim = manager.shard_dim if manager.shard_dim < 0 else manager.shard_dim - y_pred.ndim
        layer = (label, image_h, image_w, north_south, west_east)
        source = RowPartition(sizes_of(y_pred, dim, domain_of(manager), label, layer=layer), allow_empty=True)
        whole[dim] = source.rows
    left = tuple(whole[d] - sum(cuts[d]) for d in (-2, -1))
    if left != (image_h, image_w) or min(*north_south, *west_east) < 0:
        raise ValueError(
            f"{label}: the prediction is {whole[-2]} x {whole[-1]} with pad_NS={north_south}, "
            f"pad_WE={west_east}, which leaves {left[0]} x {left[1]}; the target is {image_h} x {image_w}. Nothing is "
            "resized here: a model that predicts on another grid must interpolate itself"
        )
    for d in (-2, -1):
        if d != dim:
            y_pred = y_pred.narrow(d, cuts[d][0], wanted[d])
    if manager is None or source is None or dim not in cuts:
        return y_pred
    first, target = cuts[dim][0], _partition_of(manager, wanted[dim])
    needs = [range(first + start, first + stop) for start, stop in pairwise(target.offsets)]
    return take_rows(y_pred, needs, partition=source, dim=dim, group=manager.domain_group, label=label)


def _partition_of(manager: Any, rows: int) -> RowPartition:
    """Who would hold which of so many rows, if :func:`shard_spatial` divided them now."""
    declared = getattr(manager, "partition", None)
    if isinstance(declared, RowPartition) and declared.rows == rows:
        return declared
    return RowPartition.even(rows, manager.domain_parallel_size, getattr(manager, "granularity", 1))


# Gradients


@torch.no_grad()
@naming_missing_ranks("averaging gradients over the domain ranks")
def sync_domain_gradients(model: nn.Module, manager: DomainParallelManager | None) -> None:
    """Average gradients over the domain ranks, in place, after the backward; together with FSDP2 and DDP, once.

    Call it before each step of the optimizer, without a domain axis too: it makes sure that every gradient is averaged.

    The loss of each rank must be its rows' share, scaled so that the mean over the ranks is the loss of one rank; see
    :func:`credit_parallel.losses.domain_mean`. Rows may be uneven then. Where FSDP2 or DDP average over the domain
    ranks already (:func:`credit_parallel.mesh.fold_domain`), nothing is done. A parameter that has a gradient on some
    ranks only gets one on all: no gradient counts as zeros.

    Raises:
        ValueError: On all ranks alike, if ranks have other parameters, or a gradient is sparse, or sharded over the
            domain ranks without :func:`credit_parallel.fsdp2.apply_fsdp2`; naming them, if parameters with a gradient
            joined the model after DDP or FSDP2 wrapped it, so that nothing averages it.

    Collectives: one sum of a number for each parameter, and those of
    :func:`credit_parallel.collectives.allreduce_grads_avg`. Under DDP, those of a backward, if the last backward
    averaged nothing.
    """
    raw: nn.Module = get_raw_model(model)
    reducer = reducer_of(raw)
    if isinstance(raw, FSDPModule):
        refuse_strangers(raw, lambda p: isinstance(p, DTensor) or (reducer is not None and reducer.covers(p)))
    if reducer is not None:
        reducer.settle()
    if manager is None or manager.domain_parallel_size == 1 or folds_domain(raw):
        return
    group = manager.domain_group
    parameters = list(raw.parameters())  # frozen ones too: a gradient may be left from before
    if not parameters:
        return
    shapes = tuple((p.dtype, p.shape) for p in parameters)
    agree(group, ("parameters", shapes), "sync_domain_gradients", lambda: str(shapes), device_of(group))
    have = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device_of(group))
    dist.all_reduce(have, group=group)
    for p, count in zip(parameters, have.tolist(), strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
    allreduce_grads_avg([p.grad for p in parameters], group)


def folds_domain(model: nn.Module) -> bool:
    """Whether FSDP2 or DDP average the gradients of a model over the domain ranks."""
    return any(getattr(model, name, False) for name in ("_fsdp2_folds_domain", "_ddp_folds_domain"))
