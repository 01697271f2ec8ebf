"""One call from a model for one GPU to a mesh of ranks, and what a training loop needs after that."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from credit_domain import gather_tensor, shard_batch, shard_tensor
from credit_halo import all_mean, answer_roll_calls, as_timeout, naming_missing_ranks, set_timeouts
from credit_mesh import (
    DomainParallelManager,
    ParallelismConfig,
    RankLayout,
    RowPartition,
    build_device_mesh,
    initialize_domain_parallel,
    parse_parallelism_conf,
)
from credit_parallel.blocks import _apply_activation_checkpointing
from credit_parallel.buffers import sync_buffers, tell_replica_statistics
from credit_parallel.checkpoint import LoadedState, Save, load_checkpoint, save_checkpoint
from credit_parallel.collectives import clip_grad_norm_
from credit_parallel.contract import check_batch, check_finite
from credit_parallel.ddp import apply_ddp
from credit_parallel.domain import get_raw_model, is_partitioned, sync_domain_gradients
from credit_parallel.fsdp2 import apply_fsdp2
from credit_parallel.losses import domain_mean, domain_value
from credit_parallel.mesh import fold_domain, register_dp_group
from credit_parallel.reducer import reducer_of
from credit_parallel.rows_and_channels import divide
from credit_parallel.sampler import DataParallelSampler, data_parallel_sampler
from credit_parallel.seeds import RankSeeds, seed_ranks
from credit_parallel.tensor_parallel import sync_replicated_gradients
from credit_parallel.trainer_section import Trainer, flag, trainer_of

logger = logging.getLogger(__name__)


@dataclass
class ParallelContext:
    """A model on a mesh of ranks, and what a training loop does with it; made by :func:`parallelize`.

    On one rank, with or without torch.distributed, every method does what a loop for one GPU would.
    """

    model: nn.Module  #: the model, converted and wrapped
    config: ParallelismConfig  #: the parallelism block
    layout: RankLayout  #: sizes of the axes, and who is where
    mesh: DeviceMesh | None = None  #: the device mesh; None for a single rank
    manager: DomainParallelManager | None = None  #: the domain-parallel manager; None without torch.distributed
    check_batches: int = 3  #: how many more batches to compare between the ranks that must read the same
    #: How long ranks wait for each other after the first step; None leaves the timeouts of the groups.
    timeout: timedelta | None = None
    _told: bool = field(default=False, init=False, repr=False)
    _starting: bool = field(default=True, init=False, repr=False)

    # Data

    def sampler(self, dataset: Any, **options: Any) -> DataParallelSampler:
        """A sampler that deals samples over the data axis only; options of ``data_parallel_sampler``."""
        return data_parallel_sampler(dataset, self.layout, **options)

    def shard(self, batch: Any, **options: Any) -> Any:
        """This rank's rows of a batch that every tp and domain peer has read whole.

        Takes a tensor, or nested containers of tensors, with the options of
        :func:`credit_domain.sharding.shard_batch`.

        Raises:
            ValueError: On all ranks alike, if peers have read different batches, which the first few are checked for.

        Collectives: for the first ``check_batches`` batches a small all-gather.
        """
        if self.check_batches > 0:
            self.check_batches -= 1
            check_batch(batch, self.layout)
        if self.manager is None:
            return batch
        dim = self.manager.shard_dim
        if isinstance(batch, Tensor):
            return shard_tensor(batch, dim, self.manager)
        return shard_batch(batch, dim, dim, self.manager, **options)

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all domain ranks; see :func:`credit_domain.sharding.gather_tensor`."""
        return x if self.manager is None else gather_tensor(x, self.manager.shard_dim, self.manager)

    # The loss

    def mean(self, values: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """This rank's loss, in place of ``values.mean()``; see :func:`credit_parallel.losses.domain_mean`."""
        if self.manager is None:
            return domain_mean(values, weights=weights, mask=mask)
        dim, partition = self.manager.shard_dim, self.manager.partition
        if partition is not None and partition.sizes[self.manager.domain_rank] != values.shape[dim]:
            partition = None  # a loss on another grid than that of the input
        return domain_mean(values, self.manager, dim=dim, weights=weights, mask=mask, partition=partition)

    def value(self, loss: Tensor) -> float:
        """The loss over all rows and all replicas, for a log.

        Collectives: one sum over the domain ranks, one over the replicas.
        """
        value = domain_value(loss, self.manager)
        if self.manager is not None and self.layout.dp > 1:
            value = all_mean(value, self.manager.data_parallel_group)
        return float(value)

    # Gradients

    @contextmanager
    def accumulate(self, last: bool = True) -> Iterator[None]:
        """Around the forward and backward of each of several batches: no gradients are sent before the last.

        With one batch a step it is of use too: if a rank ends or stops in the forward or the backward, under DDP and
        FSDP2 as well, the error names it.

        .. code-block:: python

            for i, batch in enumerate(batches):
                with context.accumulate(last=i == len(batches) - 1):
                    (loss_of(batch) / len(batches)).backward()
            context.step(optimizer)
        """
        inner = self.model
        with naming_missing_ranks("forward and backward"):
            if isinstance(inner, DistributedDataParallel) and not last:
                with inner.no_sync():
                    yield
                return
            if isinstance(inner, FSDPModule):
                inner.set_requires_gradient_sync(last)
            reducer = None if isinstance(inner, DistributedDataParallel) else reducer_of(get_raw_model(inner))
            if reducer is not None:
                reducer.enabled = lambda: last
            yield

    def sync_gradients(self) -> None:
        """After the backward: average the gradients that the backward itself has not averaged."""
        with naming_missing_ranks("averaging gradients"):
            sync_domain_gradients(self.model, self.manager)
            if self.mesh is not None and self.layout.tp > 1:
                sync_replicated_gradients(self.model, self.mesh.get_group("tp"))

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the norm of all gradients of the whole model; returns what it was, the same on every rank.

        Collectives: a sum over each group of ranks that gradients are divided over.
        """
        with naming_missing_ranks("norm of the gradients"):
            return clip_grad_norm_(self.model.parameters(), max_norm, norm_type)

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None = None) -> Tensor:
        """Synchronise the gradients, clip them, take a step and clear them; returns the norm before they were clipped.

        ``max_norm`` is the largest norm that is left; None only measures it. One that is not finite is a ValueError on
        all ranks alike, and no step is taken.
        """
        if not self._told:
            self._told = True
            tell_replica_statistics(get_raw_model(self.model), self.layout.dp)
        with naming_missing_ranks("step"):
            self.sync_gradients()
            norm = self.clip_grad_norm_(float("inf") if max_norm is None else max_norm)
            check_finite(norm, what="the norm of the gradients", raises=True)
            optimizer.step()
        optimizer.zero_grad()
        self.end_startup()
        return norm

    def end_startup(self) -> None:
        """From now on ranks wait for each other no longer than ``timeout``; the first :meth:`step` calls it."""
        if self._starting and self.timeout is not None:
            set_timeouts(self.timeout)
        self._starting = False

    def check_finite(self, loss: Tensor) -> bool:
        """Whether a loss is finite on every rank; the same answer on each."""
        return check_finite(loss)

    def sync_buffers(self) -> None:
        """Give every replica the buffers of the first one; see ``credit_parallel.buffers.sync_buffers``.

        Call it before validation and forecasts. :meth:`save` does it by itself.

        Collectives: broadcasts over the replicas; none with one.
        """
        sync_buffers(self.model, self.manager)

    def seed(self, seed: int) -> RankSeeds:
        """Seed this rank: tp peers alike, domain and data peers apart; see :func:`credit_parallel.seeds.seed_ranks`.

        Domain peers are seeded alike where the model was partitioned operation by operation: each takes its part of
        the numbers that one rank would draw.
        """
        return seed_ranks(seed, self.layout, domain_alike=is_partitioned(self.model))

    # Checkpoints

    def save(
        self, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None, **options: Any
    ) -> Save:
        """Save the state of training; see :func:`credit_parallel.checkpoint.save_checkpoint`.

        Buffers are those of the first replica, on all of them, afterwards: training goes on as it would from the file.
        """
        self.sync_buffers()
        return save_checkpoint(folder, self, optimizer, **options)

    def load(
        self, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None, **options: Any
    ) -> LoadedState:
        """Go on where a checkpoint was saved; see :func:`credit_parallel.checkpoint.load_checkpoint`."""
        return load_checkpoint(folder, self, optimizer, **options)


def parallelize(
    model: nn.Module,
    conf: Mapping[str, Any] | Trainer | ParallelismConfig,
    *,
    device: str | None = None,
    shard_dim: int = -2,
    check_batches: int = 3,
    timeout: float | timedelta | None = None,
    startup_timeout: float | timedelta | None = None,
    rows: RowPartition | None = None,
    **convert: Any,
) -> ParallelContext:
    """Put a model for one GPU on a mesh of ranks: domain, tensor and data parallel, in the order that is right.

    Make the optimizer afterwards, of ``context.model.parameters()``.

    Args:
        model: The model, on its device; the same on every rank. All start with the weights of the first one.
        conf: A configuration with ``trainer.parallelism`` (and ``trainer.amp``, ``trainer.activation_checkpoint``, as
            :func:`credit_parallel.fsdp2.apply_fsdp2` reads them, and ``trainer.find_unused_parameters``); a ``trainer``
            section whose keys are attributes; or the parallelism block as a :class:`credit_mesh.ParallelismConfig`.
        device: ``"cuda"`` or ``"cpu"``; None takes that of the model's first parameter.
        shard_dim: The sharded dim; -2 is latitude.
        check_batches: How many batches to compare between ranks that must read the same.
        timeout: How long ranks wait for each other from the first :meth:`ParallelContext.step` on, in seconds or as a
            timedelta, in every group of this process; None takes ``trainer.timeout`` of the configuration, and without
            one leaves the timeouts of the groups as they are.
        startup_timeout: The same until then; None takes ``trainer.startup_timeout``, or 30 minutes. It is never less
            than ``timeout``.
        rows: Which rows of the model's input each domain rank holds, if that is decided already.
        **convert: Those of :func:`credit_domain.convert.convert_to_domain_parallel`: ``custom_converters``, ``local``,
            ``input_shape``, ``window_sizes``. ``method`` is ``trainer.parallelism.partition`` unless it is given.

    Raises:
        ValueError: If the block does not fit the number of ranks; if a timeout is no positive time; if modules of the
            model are refused by the converter, or tensor-parallel declarations do not fit; on all ranks alike.

    Collectives: creates process groups; broadcasts of the weights.
    """
    trainer = {"parallelism": conf} if isinstance(conf, ParallelismConfig) else trainer_of(conf)
    config = trainer.get("parallelism")
    if not isinstance(config, ParallelismConfig):
        config = ParallelismConfig(**parse_parallelism_conf(cast("Mapping[str, Any]", conf)))
    longest, first = _timeouts(trainer, timeout, startup_timeout)
    if not (dist.is_available() and dist.is_initialized()):
        if config.tensor * config.domain > 1:
            raise ValueError(
                f"{config} needs {config.tensor * config.domain} ranks or more: start the program with torchrun and "
                "call torch.distributed.init_process_group() first"
            )
        if flag(trainer, "activation_checkpoint"):
            _apply_activation_checkpointing(model, trainer)
        return ParallelContext(model, config, RankLayout(), check_batches=0, timeout=longest)
    world = dist.get_world_size()
    layout = config.layout(world)
    kind = device or next((p.device.type for p in model.parameters()), "cpu")
    answer_roll_calls()
    mesh, axes = build_device_mesh(config, device=kind)
    folded = fold_domain(mesh)
    manager = initialize_domain_parallel(world, config.domain, shard_dim, tensor_parallel_size=config.tensor, mesh=mesh)
    if first is not None:
        set_timeouts(first)
    if layout.dp > 1:
        register_dp_group(manager.data_parallel_group)
    if rows is not None:
        manager.declare(rows)
    # Layers first, since conversion replaces modules; then what divides their parameters; then what watches gradients.
    model = divide(model, manager, axes.get("tp"), shard_dim, **{"method": config.partition, **convert})
    if layout.tp > 1:  # whose ranks have the same samples, or other channels
        group = manager.data_parallel_group if folded is None else folded.get_group()
        for part in model.modules():
            if isinstance(norm := part.__dict__.get("_wrapped", part), nn.SyncBatchNorm) and norm.process_group is None:
                norm.process_group = group
    if config.data == "fsdp2" and folded is not None:
        model = apply_fsdp2(model, folded, trainer)
    else:
        if flag(trainer, "activation_checkpoint"):
            _apply_activation_checkpointing(model, trainer)
        if config.data == "ddp":
            model = apply_ddp(model, folded, trainer)
    if first is not None:
        set_timeouts(first)  # of the groups too that were made meanwhile
    logger.info("%s on %s: %s", type(model).__name__, kind, layout)
    return ParallelContext(model, config, layout, mesh, manager, check_batches, longest)


STARTUP = timedelta(minutes=30)


def _timeouts(
    trainer: Mapping[str, Any], timeout: float | timedelta | None, startup: float | timedelta | None
) -> tuple[timedelta | None, timedelta | None]:
    """The timeout of a running training and that of its start; None leaves them."""
    timeout = trainer.get("timeout") if timeout is None else timeout
    startup = trainer.get("startup_timeout") if startup is None else startup
    running = None if timeout is None else as_timeout(timeout)
    first = None if startup is None else as_timeout(startup, "startup_timeout")
    if running is not None:
        first = max(running, STARTUP if first is None else first)
    return running, first
