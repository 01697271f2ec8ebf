"""Buffers of replicas: what each updates by its own samples is made the same before anybody looks at it."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from credit_mesh import DomainParallelManager
from credit_parallel.collectives import broadcast_tensors
from credit_parallel.domain import manager_of

logger = logging.getLogger(__name__)


def sync_buffers(model: nn.Module, manager: DomainParallelManager | None = None) -> None:
    """Give every replica the buffers of the first one, as DistributedDataParallel does; no weights are touched.

    Each rank takes them from the rank of the first replica with its own tp and domain coordinates. So buffers that hold
    a rank's own rows keep them, and what domain ranks have alike stays alike. The numbers are those of the first
    replica whatever the number of domain ranks, and with DDP and FSDP2. Without a manager, that of the model takes
    part.

    Collectives: broadcasts over the data-parallel group; none with one replica.
    """
    manager = manager_of(model) if manager is None else manager
    if manager is not None and manager.dp_world_size > 1:
        broadcast_buffers(model, manager.data_parallel_group)


@torch.compiler.disable  # type: ignore[untyped-decorator, no-untyped-call, unused-ignore]
def broadcast_buffers(model: nn.Module, group: ProcessGroup) -> None:
    """Give every rank of a group the buffers of its first one."""
    # Of the data alone, as torch's class does it: a forward before this one may have kept a buffer for its backward.
    broadcast_tensors([buffer.data for buffer in model.buffers()], group)


def tell_replica_statistics(model: nn.Module, replicas: int) -> list[str]:
    """Say in the log, on the first rank, which layers take statistics of their own replica's samples; name them."""
    names = [
        name
        for name, part in model.named_modules()
        if isinstance(_wrapped(part), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and part.training
    ]
    if replicas > 1 and names and dist.get_rank() == 0:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.warning(
            "%s%s: BatchNorm normalises by the samples of its own replica, so numbers depend on how many replicas "
            "there are (%d), and validation uses the running statistics of the first one. Convert the model with "
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm for those of all samples",
            *(", ".join(names[:3]), more, replicas),
        )
    return names if replicas > 1 else []


def _wrapped(module: nn.Module) -> nn.Module:
    """What a converted layer wraps; the module itself otherwise."""
    inner = module.__dict__.get("_wrapped", module)
    assert isinstance(inner, nn.Module)
    return inner
