"""From a configuration to what a training or a forecast works with, checked before any rank starts."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from credit_domain import plan_domain_parallel
from credit_domain.casts import cast_module
from credit_mesh import RankLayout, RowPartition
from credit_parallel._torch_private import compiled
from credit_parallel.app.config import RunConfig
from credit_parallel.app.data.forcings import Forcings
from credit_parallel.app.data.opening import open_source
from credit_parallel.app.data.samples import Samples, lead_in_steps, sample_starts, times_between
from credit_parallel.app.data.source import Source
from credit_parallel.app.data.statistics import Statistics, compute_statistics
from credit_parallel.app.data.times import seconds_ahead
from credit_parallel.app.models import build_model
from credit_parallel.app.training.rollout import rollout
from credit_parallel.blocks import blocks_of
from credit_parallel.checkpoint.step_folders import write_file
from credit_parallel.checkpoint.together import together
from credit_parallel.context import ParallelContext, parallelize
from credit_parallel.losses import cos_latitude_weights, latitude_weights
from credit_parallel.state_dicts import from_first
from credit_parallel.trainer_section import Conf

logger = logging.getLogger(__name__)

STATISTICS = "statistics.json"


@dataclass(frozen=True)
class Checked:
    """What a configuration comes to, found without any other rank."""

    config: RunConfig  #: the configuration
    layout: RankLayout  #: how the ranks are arranged
    source: Source  #: the data
    lead_steps: int  #: times of the data from input to target
    train: tuple[int, ...]  #: the times to train on
    valid: tuple[int, ...]  #: the times to validate on
    partition: RowPartition  #: how the rows are divided
    model: nn.Module  #: plain, with its first weights
    notes: tuple[str, ...] = ()  #: what the user may want to know

    @property
    def in_channels(self) -> int:
        """Channels of the model's input."""
        return channels_in(self.config, self.source)


def channels_in(config: RunConfig, source: Source) -> int:
    """Channels of the model's input: the states that it sees, and the forcings."""
    forcings = Forcings(config.data.forcings, source.grid, range(0)).count
    return config.data.history * len(source.channels) + forcings


def check(
    config: RunConfig, world_size: int, *, training: bool = True, make: Callable[..., nn.Module] | None = None
) -> Checked:
    """Find what is wrong with a configuration, before a rank starts.

    Opens the data (and reads no fields), builds the model, and works out who gets which rows.

    Args:
        world_size: How many ranks there will be.
        training: Whether there must be samples to train on.
        make: What makes the model. None takes the configuration's word for it, which must be the user's then.

    Raises:
        ValueError: If the ranks do not divide, the batch does not divide over them, the data have not what is asked
            for, the model cannot be built or converted, or there are too few rows for the ranks.
    """
    trainer, data = config.trainer, config.data
    try:
        layout = trainer.parallelism.layout(world_size)
    except ValueError as error:
        raise ValueError(
            f"trainer.parallelism: {error} (--ranks N, or torchrun, says how many ranks there are)"
        ) from None
    if trainer.parallelism.data == "none" and layout.dp > 1:
        raise ValueError(
            f"trainer.parallelism.data: none keeps {layout.dp} replicas apart; say ddp or fsdp2, or start "
            f"{layout.tp * layout.domain} rank(s)"
        )
    if training and trainer.batch_size % (layout.dp * trainer.grad_accum_steps):
        raise ValueError(
            f"trainer.batch_size counts the samples of all replicas together: {trainer.batch_size} do not divide over "
            f"{layout.dp} replicas in {trainer.grad_accum_steps} micro-batch(es) each (trainer.grad_accum_steps)"
        )
    source = open_source(data)
    lead_steps = lead_in_steps(source, data.lead)
    train = tuple(times_between(source, data.train))
    valid = () if data.valid is None else tuple(times_between(source, data.valid))
    sampled = functools.partial(sample_starts, source, lead_steps=lead_steps, history=data.history)
    notes = []
    if training:
        count = len(sampled(times=train, steps=trainer.rollout))
        if count < trainer.batch_size:
            raise ValueError(
                f"data.train holds {count} sample(s) of {data.history} + {trainer.rollout} times, one lead apart, and "
                f"trainer.batch_size is {trainer.batch_size}: take more times, or a smaller batch"
            )
        if valid and not sampled(times=valid, steps=trainer.rollout):
            notes.append("data.valid holds no whole sample; nothing is validated")
            valid = ()
    grid = source.grid
    in_channels = channels_in(config, source)
    begin = None if source.seconds is None else source.seconds[0]
    Forcings(data.forcings, grid, range(0)).at(begin, seconds_ahead(source, 0, lead_steps))  # refuses what needs a time
    torch.manual_seed(trainer.seed)
    model = build_model(
        config.model,
        in_channels=in_channels,
        out_channels=len(source.channels),
        height=grid.height,
        width=grid.width,
        periodic=grid.periodic,
        make=make,
    )
    partition = RowPartition.even(grid.height, 1)
    if layout.domain > 1:
        shape = (1, in_channels, grid.height, grid.width)
        method: Any = trainer.parallelism.partition
        partition = plan_domain_parallel(model, shape, layout.domain, method=method).partition
    return Checked(config, layout, source, lead_steps, train, valid, partition, model, tuple(notes))


@dataclass(frozen=True)
class Experiment:
    """What a training or a forecast works with, on one rank."""

    checked: Checked  #: what the configuration came to
    context: ParallelContext  #: the model on the mesh
    device: torch.device  #: of this rank
    dtype: torch.dtype  #: of parameters and data
    rows: range  #: the rows of this rank
    statistics: Statistics  #: of the data

    @property
    def config(self) -> RunConfig:
        """The configuration."""
        return self.checked.config

    @property
    def increments(self) -> Tensor:
        """The typical change of each channel over a lead, in units of its standard deviation: float64 of shape (C,)."""
        return self.statistics.increment / self.statistics.std

    def weights(self) -> Tensor | None:
        """The weight of each row of the whole grid in losses and scores, of shape (H,); None for equal ones."""
        kind = self.config.trainer.latitude_weights
        latitudes = self.checked.source.grid.latitudes
        if kind is None:
            return None
        return cos_latitude_weights(latitudes) if kind == "cos" else latitude_weights(latitudes, kind)

    def samples(self, times: tuple[int, ...], steps: int) -> Samples:
        """The samples within some times, of this rank's rows, with ``steps`` states to come."""
        data = self.config.data
        return Samples(
            self.checked.source,
            self.rows,
            self.statistics,
            lead_steps=self.checked.lead_steps,
            history=data.history,
            steps=steps,
            forcings=data.forcings,
            times=times,
            dtype=self.dtype,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Bfloat16 where the configuration asks for it, and FSDP2 does not do it itself."""
        if self.config.trainer.amp and not isinstance(self.context.model, FSDPModule):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def predictions(self, fields: Tensor, forcings: Tensor) -> Iterator[Tensor]:
        """The states that follow the history, with which ``fields`` (B, times, C, H, W) begin, one for each forcing."""

        def model(x: Tensor) -> Tensor:
            with self.autocast():
                out: Tensor = self.context.model(x)
            return out

        return rollout(model, fields[:, : self.config.data.history], forcings, self.increments.to(self.device))


def prepare(checked: Checked, device: torch.device, statistics: Statistics | None = None) -> Experiment:
    """Put the model on the ranks, give each its rows, and find the statistics.

    Args:
        statistics: Of the data. None takes those in the folder of the run, or works them out and keeps them there.

    Raises:
        ValueError: On all ranks alike: as :func:`credit_parallel.context.parallelize`; statistics of other channels;
            values that are missing, where statistics are worked out.

    Collectives:
        Those of ``parallelize`` and, without ``statistics``, of
        :func:`credit_parallel.app.data.statistics.compute_statistics`; every rank must call it.
    """
    trainer = checked.config.trainer
    dtype = getattr(torch, trainer.dtype)
    grid = checked.source.grid
    shape = (1, checked.in_channels, grid.height, grid.width)
    model = cast_module(checked.model, dtype, device)
    context = parallelize(model, trainer, rows=checked.partition, input_shape=shape, check=trainer.trial)
    if trainer.compile:
        compile_blocks(context.model, trainer)
    rows = range(grid.height)
    if context.manager is not None:
        rows = context.manager.declare(checked.partition).interval(context.manager.domain_rank)
    if statistics is None:
        statistics = statistics_of(checked, context, rows)
    return Experiment(checked, context, device, dtype, rows, statistics)


def compile_blocks(model: nn.Module, conf: Conf) -> None:
    """Compile the outermost blocks of a model, each as one graph; the whole model where it has none.

    What FSDP2 does around a block, and its recomputation in the backward, stay outside of the compiled code.
    """
    blocks = blocks_of(model, conf)
    outer = [block for name, block in blocks.items() if not any(name.startswith(f"{other}.") for other in blocks)]
    versions = 8 * len(outer)
    for block in outer:
        forward: Callable[..., Any] = block.forward
        if isinstance(forward, functools.partial):  # recomputed in the backward
            block.forward = functools.partial(forward.func, compiled(forward.args[0], versions))
        else:
            block.forward = compiled(forward, versions)
    if not outer:
        model.compile()


def statistics_of(checked: Checked, context: ParallelContext, rows: range) -> Statistics:
    """The statistics of the training data: those in the folder of the run, or worked out now and kept there.

    Where they are worked out, all training and validation data are read once, and missing values refused. Collectives:
    a broadcast; where they are worked out, those of ``compute_statistics``.
    """
    path = Path(checked.config.folder) / STATISTICS
    of = _identity(checked)
    first = context.layout.world_size == 1 or torch.distributed.get_rank() == 0
    kept: dict[str, Any] | None = None
    with together(str(path)):
        if first and path.exists():
            kept = json.loads(path.read_text())
    kept = from_first(kept)
    labels = [channel.label for channel in checked.source.channels]
    if kept is not None and kept.get("of") == of:
        return Statistics.from_dict(kept["statistics"], labels)
    unseen = sorted({*checked.valid} - {*checked.train})
    found = compute_statistics(checked.source, checked.train, checked.lead_steps, rows, context.manager, others=unseen)
    with together(str(path)):
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"of": of, "statistics": found.to_dict(labels)}
            write_file(path, json.dumps(content, indent=2).encode())
    return found


def _identity(checked: Checked) -> dict[str, Any]:
    """What statistics depend on: the data, the times, the lead, and the file as it is."""
    data = checked.config.data
    stamp = [os.path.getsize(data.source), os.path.getmtime(data.source)] if os.path.isfile(data.source) else None
    of = {key: getattr(data, key) for key in ("source", "variables", "levels", "options")}
    times = [(each[0], each[-1], len(each)) if each else None for each in (checked.train, checked.valid)]
    identity: dict[str, Any] = json.loads(
        json.dumps({**of, "times": times, "lead": checked.lead_steps, "file": stamp})  # as it will be read
    )
    return identity
