"""Data parallelism with whole parameters on every rank: torch's DistributedDataParallel, beside tp and domain."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_parallel._torch_private import after_backward, leave_to_others
from credit_parallel.blocks import flag, is_sharded, trainer_of
from credit_parallel.buffers import sync_before_forward
from credit_parallel.collectives import allreduce_grads_avg, start_equal
from credit_parallel.domain import manager_of
from credit_parallel.mesh import covers_domain

logger = logging.getLogger(__name__)

# What torch calls the option has changed.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"


def apply_ddp(
    model: nn.Module, dp_mesh: DeviceMesh | None, conf: Mapping[str, Any] | None = None, **options: Any
) -> nn.Module:
    """Average the gradients of a model over data-parallel ranks while the backward runs, on CPU and GPU.

    Apply it after domain and tensor parallelism. All ranks start with the weights of the first one. Parameters that are
    divided over tp ranks (DTensors, which torch's class does not take) are averaged at the end of the backward.

    Buffers: each forward starts with the buffers of the first replica, as by torch's default. Replicas see other
    samples, so the running statistics of BatchNorm are those of the first replica, on all of them. Where the domain
    axis is folded in, each rank takes them from the rank of the first replica with its own domain coordinate, because
    domain ranks may have buffers of their own rows.

    Args:
        model: The model, on its device.
        dp_mesh: The dp axis; or dp x domain as one axis (:func:`credit_parallel.mesh.fold_domain`), whose gradients are
            averaged over the domain ranks too. None, an axis of one rank, leaves the model as it is.
        conf: ``trainer.find_unused_parameters``: True where some parameters get no gradient in some steps.
        **options: Others of DistributedDataParallel.

    Returns:
        The wrapped model; the model itself where there is nothing to average.

    Raises:
        ValueError: If the model is sharded by FSDP2 or wrapped already, or the mesh has several axes or spans a part of
            the domain ranks.

    Collectives:
        Broadcasts of the weights over the mesh; in each backward, sums of buckets.
    """
    if dp_mesh is None or dp_mesh.size() == 1:
        return model
    if is_sharded(model) or isinstance(model, DistributedDataParallel):
        raise ValueError(f"apply_ddp: {type(model).__name__} is sharded by FSDP2, or wrapped by DDP, already")
    if dp_mesh.ndim != 1:
        raise ValueError(f"apply_ddp takes the dp axis, or fold_domain(mesh); got {dp_mesh}")
    manager = manager_of(model)
    folds, group = covers_domain(dp_mesh, manager), dp_mesh.get_group()
    own_sync = folds and options.get("broadcast_buffers", True) and options.get(_SYNC_BUFFERS, True)
    if folds:
        options.pop("broadcast_buffers", None)
        options[_SYNC_BUFFERS] = False
    options.setdefault("find_unused_parameters", flag(trainer_of(conf), "find_unused_parameters"))
    start_equal(model, [group], [manager.data_parallel_group] if folds else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        logger.info("no parameter of %s is trained: nothing to average", type(model).__name__)
        return model
    divided = [p for p in trained if isinstance(p, DTensor)]
    wrapped = model
    if divided:
        names = [name for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, DTensor)]
        leave_to_others(model, [*names, *(f".{name}" for name in names if "." not in name)])
    if len(divided) < len(trained):
        wrapped = DistributedDataParallel(model, process_group=group, init_sync=False, **options)
        if own_sync and manager.dp_world_size > 1:
            sync_before_forward(wrapped, manager)
    _average_after_backward(divided, wrapped, group)
    model._ddp_folds_domain = folds  # type: ignore[assignment]
    return wrapped


def _average_after_backward(parameters: Sequence[Tensor], wrapped: nn.Module, group: Any) -> None:
    """Average gradients once the backward that made any of them has ended, unless it is one of ``no_sync``."""
    waiting = False

    def average() -> None:
        nonlocal waiting
        waiting = False
        if getattr(wrapped, "require_backward_grad_sync", True):
            allreduce_grads_avg([p.grad for p in parameters], group)

    def arrived(p: Tensor) -> None:
        nonlocal waiting
        if not waiting:
            waiting = True
            after_backward(average)

    for p in parameters:
        p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
