"""Data parallelism with whole parameters on every rank: DistributedDataParallel, beside tp and domain."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_parallel._torch_private import leave_to_others
from credit_parallel.blocks import is_sharded
from credit_parallel.buffers import broadcast_buffers
from credit_parallel.collectives import local_of, start_equal
from credit_parallel.domain import manager_of
from credit_parallel.mesh import covers_domain
from credit_parallel.reducer import BUCKET_BYTES, GradientReducer
from credit_parallel.trainer_section import Conf, flag, trainer_of

logger = logging.getLogger(__name__)

# What torch calls the option has changed.
_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers"
# Options that change how torch's own reducer works, and no number; this one needs none of them.
_NEEDLESS = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view")


class AveragedDataParallel(DistributedDataParallel):
    """DistributedDataParallel whose gradients ``credit_parallel.reducer.GradientReducer`` averages over ``group``.

    ``no_sync``, ``module`` and the names in its state dict are those of torch's class. Torch's own reducer gets a
    single parameter, since it cannot be left without one, and is never started. Buffers are those of the first rank, as
    torch's options ask; where a group is given for ``buffers``, those of its first rank.
    """

    def __init__(
        self, module: nn.Module, group: ProcessGroup, buffers: ProcessGroup | None, bucket_bytes: int, **options: Any
    ) -> None:
        names: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        plain = {name: p for name, p in names.items() if p.requires_grad and not isinstance(p, DTensor)}
        smallest = min(plain, key=lambda name: plain[name].numel())
        others = [name for name, p in names.items() if p is not plain[smallest]]
        leave_to_others(module, [*others, *(f".{name}" for name in others if "." not in name)])
        super().__init__(module, process_group=group, init_sync=False, **options)
        self._buffer_group = buffers
        GradientReducer(module, _reducible(module), group, bucket_bytes).follow(self)

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call, unused-ignore]
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The module's forward, after the broadcast of buffers where that is wanted."""
        apart = self._buffer_group is not None and self.require_forward_param_sync
        if apart or self.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            broadcast_buffers(self.module, self._buffer_group or self.process_group)
        out = self.module(*inputs, **kwargs)
        # As in torch's class, a forward without a reduction after it leaves the buffers as they are.
        self.require_forward_param_sync = torch.is_grad_enabled() and bool(self.require_backward_grad_sync)
        return out

    def register_comm_hook(self, state: object, hook: Any) -> None:
        """Refused: gradients do not go through torch's reducer."""
        raise ValueError(
            "register_comm_hook: gradients are averaged as they are; wrap with torch's own class for hooks"
        )

    def join(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: ranks that share rows must take the same number of steps."""
        raise ValueError("join: every rank must take the same number of steps; see data_parallel_sampler(drop_last=)")


def _reducible(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters that may be trained, now or later."""
    found = {name: p for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()}
    return {name: p for name, p in found.items() if not local_of(p).is_meta}


def apply_ddp(model: nn.Module, dp_mesh: DeviceMesh | None, conf: Conf = None, **options: Any) -> nn.Module:
    """Average the gradients of a model over data-parallel ranks while the backward runs, on CPU and GPU.

    Apply it after domain and tensor parallelism. All ranks start with the weights of the first one. Each backward
    averages every gradient, also of parameters that are unfrozen later, that are divided over tp ranks (DTensors), and
    that only some ranks or some steps use. A parameter without a gradient on any rank keeps none, as on one rank.

    Buffers: each forward starts with the buffers of the first replica, as by torch's default. Replicas see other
    samples, so the running statistics of BatchNorm are those of the first replica, on all of them. Where the domain
    axis is folded in, each rank takes them from the rank of the first replica with its own domain coordinate, because
    domain ranks may have buffers of their own rows.

    Returns a DistributedDataParallel; the model itself where no parameter is trained, or all that are trained are
    DTensors, whose gradients are averaged all the same.

    Args:
        dp_mesh: The dp axis; or dp x domain as one axis (:func:`credit_parallel.mesh.fold_domain`), whose gradients are
            averaged over the domain ranks too. None, an axis of one rank, leaves the model as it is.
        **options: Of DistributedDataParallel ``broadcast_buffers`` (``forward_sync_buffers`` in newer versions of
            torch) and ``bucket_cap_mb``. ``find_unused_parameters``, ``static_graph`` and ``gradient_as_bucket_view``
            are taken, here or in the configuration, and not needed.

    Raises:
        ValueError: If the model is sharded by FSDP2 or wrapped already, has sparse gradients, or the mesh has several
            axes or spans a part of the domain ranks; for another option.

    Collectives: broadcasts of the weights over the mesh; in each backward, sums of buckets. Every rank's backward must
    reach a parameter of the model, or the rank must call :func:`credit_parallel.domain.sync_domain_gradients`.
    """
    if dp_mesh is None or dp_mesh.size() == 1:
        return model
    if is_sharded(model) or isinstance(model, DistributedDataParallel):
        raise ValueError(f"apply_ddp: {type(model).__name__} is sharded by FSDP2, or wrapped by DDP, already")
    if dp_mesh.ndim != 1:
        raise ValueError(f"apply_ddp takes the dp axis, or fold_domain(mesh); got {dp_mesh}")
    flag(trainer_of(conf), "find_unused_parameters")
    _refuse_sparse(model)
    manager = manager_of(model)
    folds, group = covers_domain(dp_mesh, manager), dp_mesh.get_group()
    buffers, bucket_bytes = _known(options)
    start_equal(model, [group], [manager.data_parallel_group] if folds else None)
    parameters = _reducible(model)
    trained = [p for p in parameters.values() if p.requires_grad]
    wrapped = model
    if any(not isinstance(p, DTensor) for p in trained):
        apart = manager.data_parallel_group if folds and all(buffers.values()) else None
        buffers = {_SYNC_BUFFERS: False} if folds else buffers
        wrapped = AveragedDataParallel(model, group, apart, bucket_bytes, **buffers)
    elif parameters:
        GradientReducer(model, parameters, group, bucket_bytes)
    if not trained:
        logger.info("no parameter of %s is trained: nothing to average", type(model).__name__)
    model._ddp_folds_domain = folds  # type: ignore[assignment]
    return wrapped


def _known(options: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The option about buffers, if it is there, and the size of buckets."""
    known = ("broadcast_buffers", _SYNC_BUFFERS, "bucket_cap_mb", *_NEEDLESS)
    if strange := sorted(set(options) - set(known)):
        raise ValueError(f"apply_ddp takes of DistributedDataParallel's options {', '.join(known)}; got {strange}")
    size = options.get("bucket_cap_mb")
    if size is not None and not size > 0:
        raise ValueError(f"apply_ddp: bucket_cap_mb must be a positive number; got {size!r}")
    buffers = {name: options[name] for name in ("broadcast_buffers", _SYNC_BUFFERS) if name in options}
    return buffers, BUCKET_BYTES if size is None else int(size * 2**20)


def _refuse_sparse(model: nn.Module) -> None:
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        raise ValueError(f"apply_ddp: {', '.join(sparse)} has sparse gradients, which are not averaged: sparse=False")
