"""The training loop: the same steps on every layout of ranks."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from credit_halo import naming_missing_ranks
from credit_parallel._version import __version__
from credit_parallel.app.data.samples import Samples
from credit_parallel.app.training.experiment import Checked, Experiment, prepare
from credit_parallel.app.training.log import MetricsLog
from credit_parallel.app.training.resuming import changes, follow
from credit_parallel.app.training.schedule import make_optimizer, make_scheduler
from credit_parallel.app.training.scores import LeadScores
from credit_parallel.app.training.stopping import StopOnSignal
from credit_parallel.checkpoint import latest
from credit_parallel.checkpoint.together import owning, together
from credit_parallel.sampler import DataParallelSampler
from credit_parallel.state_dicts import from_first

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


class Reporter:
    """What shows the progress of a training, on the first rank; this one shows nothing."""

    def started(self, summary: str, step: int, steps: int) -> None:
        """Training begins, or goes on, at a step; ``summary`` says what runs where."""

    def stepped(self, record: dict[str, Any]) -> None:
        """Steps were taken; the record is the line of the log."""

    def validated(self, record: dict[str, Any]) -> None:
        """A validation was made; the record is the line of the log."""

    def ended(self, message: str) -> None:
        """Training ended."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    step: int  #: steps that were taken in all
    finished: bool  #: whether those are all that were wanted; if not, the same command goes on
    checkpoint: Path | None  #: the last one


def train(checked: Checked, device: torch.device, reporter: Reporter | None = None) -> Outcome:
    """Train a model as a configuration says, or go on where the last checkpoint in its folder was saved.

    On SIGTERM or Ctrl-C of any rank all ranks finish their step, save, and return.

    Args:
        reporter: What shows the progress; called on the first rank alone.

    Raises:
        ValueError: On all ranks alike: another run that saves into the folder; values of the data that are no
            numbers; a checkpoint of another model; gradients that are not finite, after which the last checkpoint
            stands.

    Collectives:
        Those of the parts; one small reduction at each step agrees on whether to stop.
    """
    folder = Path(checked.config.folder)
    with owning(folder / CHECKPOINTS):
        return _Training(prepare(checked, device), folder, reporter or Reporter()).run()


def summary(experiment: Experiment) -> str:
    """One line that says what runs where."""
    checked, context = experiment.checked, experiment.context
    layout, trainer, source = context.layout, experiment.config.trainer, checked.source
    axes = " x ".join(f"{axis} {layout.size(axis)}" for axis in ("dp", "tp", "domain") if layout.size(axis) > 1)
    backend = f", {dist.get_backend(context.manager.domain_group)}" if context.manager is not None else ""
    sizes = checked.partition.sizes
    rows = ", ".join(map(str, sizes)) if len(sizes) <= 8 else f"{min(sizes)} to {max(sizes)}"
    number = sum(math.prod(p.shape) for p in checked.model.parameters()) / 1e6
    return (
        f"{layout.world_size} rank(s){f' = {axes}' if axes else ''} ({trainer.parallelism.data}) on "
        f"{experiment.device.type}{backend}; {source.name}: {len(source.channels)} fields, {source.grid.height} x "
        f"{source.grid.width}, rows per rank {rows}; {checked.config.model.name}: {number:.2f} M parameters"
        f"{', bfloat16' if trainer.amp else ''}; torch {torch.__version__}, credit-parallel {__version__}"
    )


class _Training:
    def __init__(self, experiment: Experiment, folder: Path, reporter: Reporter) -> None:
        self.experiment, self.folder = experiment, folder
        self.context, self.config = experiment.context, experiment.config.trainer
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        self.reporter = reporter if self.first else Reporter()
        checked, layout = experiment.checked, experiment.context.layout
        self.samples = experiment.samples(checked.train, self.config.rollout)
        self.sampler = self.context.sampler(self.samples, seed=self.config.seed, drop_last=True)
        self.batch = self.config.batch_size // layout.dp  # of this replica
        self.per_epoch = len(self.samples) // self.config.batch_size
        self.steps = self.config.steps or self.per_epoch * (self.config.epochs or 0)
        self.optimizer = make_optimizer(self.context.model, self.config)
        self.scheduler = make_scheduler(self.optimizer, self.config, self.steps)
        weights = experiment.weights()
        self.weights = None if weights is None else weights.to(experiment.device)
        self.increments = experiment.increments.to(experiment.device, experiment.dtype).view(-1, 1, 1)
        self.step = 0
        self.saved: Path | None = None
        self.saved_at = self.validated_at = -1

    def run(self) -> Outcome:
        self.resume()
        began = self.step
        self.log = MetricsLog(self.folder, self.first, self.step, self.config.tensorboard)
        try:
            count = len(self.samples)
            some = range(0, count, max(1, count // 64))
            cost = self.samples.cost(some)
            needed, read = cost.needed // len(some), cost.read // len(some)
            reading = f"{needed / 2**20:.2f} MiB a sample and rank, {read / 2**20:.2f} MiB read for it"
            text = f"{summary(self.experiment)}; {reading}"
            self.reporter.started(text, self.step, self.steps)
            self.log.write("start", step=self.step, summary=text, bytes_needed=needed, bytes_read=read)
            with StopOnSignal() as signals:
                self.loop(signals)
            if self.saved_at != self.step:
                self.save()
            finished = self.step >= self.steps
            if finished and began < self.step and self.validated_at != self.step:
                self.validate()
            self.log.write("end" if finished else "stop", step=self.step)
            text = "finished" if finished else "stopped; the same command goes on from here"
            self.reporter.ended(f"step {self.step} of {self.steps}: {text}")
        finally:
            self.log.close()
        return Outcome(self.step, finished, self.saved)

    def resume(self) -> None:
        """Go on where the last checkpoint was saved, if there is one."""
        folder = self.folder / CHECKPOINTS
        there = False
        with together(str(folder)):  # of a later format, for one
            there = self.first and latest(folder) is not None
        if not from_first(there):
            self.context.seed(self.config.seed)
            return
        state = self.context.load(
            folder, self.optimizer, scheduler=self.scheduler, sampler=self.sampler, settings="optimizer"
        )
        follow(self.optimizer, self.scheduler)
        changed = changes(state.extra.get("config", {}), self.experiment.config.to_dict())
        if changed and self.first:
            logger.warning(
                "going on from step %d with the new values, since the configuration has changed: %s",
                *(state.step, "; ".join(changed)),
            )
        self.step, self.saved, self.saved_at = state.step, state.folder, state.step

    def loop(self, signals: StopOnSignal) -> None:
        """Take steps until there are enough, or a rank was asked to stop."""
        before = time.perf_counter()
        for fields, forcings in self.batches():
            loss, norm = self.take_step(fields, forcings)
            self.step += 1
            stop, memory = self.agreed(signals.asked)
            if self.step % self.config.log_every == 0 or self.step == self.steps:
                now = time.perf_counter()
                seconds, before = now - before, now
                record = {
                    "step": self.step,
                    "epoch": self.sampler.epoch,
                    "loss": self.context.value(loss),
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "grad_norm": float(norm),
                    "samples_per_second": self.config.batch_size * self.config.log_every / seconds,
                    "memory_mib": memory,
                }
                self.log.write("train", **record)
                self.reporter.stepped(record)
            self.scheduler.step()
            if self.config.valid_every and self.step % self.config.valid_every == 0:
                self.validate()
                before = time.perf_counter()
            if stop or self.step >= self.steps:
                break
            if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                self.save()
                before = time.perf_counter()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of this replica, epoch after epoch; after a load, those that are left of its epoch first."""
        while self.step < self.steps:
            self.sampler.set_epoch(self.step // self.per_epoch)
            yield from self.loader(self.samples, self.sampler, drop_last=True)

    def loader(
        self, samples: Samples, sampler: DataParallelSampler, drop_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device, workers = self.experiment.device, self.experiment.config.data.workers
        loader = DataLoader(
            samples,
            self.batch,
            sampler=sampler,
            num_workers=workers,
            drop_last=drop_last,
            generator=torch.Generator(),  # what it draws must not depend on how often training was interrupted
            pin_memory=device.type == "cuda",
            # Threads of torch.distributed do not survive a fork.
            multiprocessing_context="forkserver" if workers else None,
        )
        for fields, forcings in loader:
            yield fields.to(device, non_blocking=True), forcings.to(device, non_blocking=True)

    def take_step(self, fields: Tensor, forcings: Tensor) -> tuple[Tensor, Tensor]:
        count = self.config.grad_accum_steps
        parts = list(zip(fields.chunk(count), forcings.chunk(count), strict=True))
        total = fields.new_zeros(())
        for i, (part, known) in enumerate(parts):
            with self.context.accumulate(last=i == len(parts) - 1):
                loss = self.loss(part, known) / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        try:
            norm = self.context.step(self.optimizer, self.config.max_grad_norm)
        except ValueError as error:
            raise ValueError(
                f"step {self.step + 1}: {error}; lower trainer.lr, or look at the data. The last checkpoint is "
                f"{self.saved or 'none'}"
            ) from None
        return total, norm

    def loss(self, fields: Tensor, forcings: Tensor) -> Tensor:
        """Mean square error of the states to come, in units of their typical change: persistence has about 1."""
        predictions = list(self.experiment.predictions(fields, forcings))
        truths = fields[:, -len(predictions) :].unbind(1)
        errors = [
            self.context.mean(((prediction - truth) / self.increments) ** 2, weights=self.weights)
            for prediction, truth in zip(predictions, truths, strict=True)
        ]
        return torch.stack(errors).mean()

    @naming_missing_ranks("validation")
    @torch.no_grad()
    def validate(self) -> None:
        """Score the model on the validation times."""
        times = self.experiment.checked.valid
        if not times:
            return
        samples = self.experiment.samples(times, self.config.rollout)
        sampler = self.context.sampler(samples, shuffle=False)
        channels, statistics = self.experiment.checked.source.channels, self.experiment.statistics
        scores = LeadScores(channels, statistics, self.weights, self.config.rollout)
        model = self.context.model
        self.context.sync_buffers()
        model.eval()
        seen, own = 0, len(list(sampler)) - sampler.repeated
        for fields, forcings in self.loader(samples, sampler, drop_last=False):
            predictions = list(self.experiment.predictions(fields, forcings))
            count = min(len(fields), own - seen)  # without those that another replica has too
            seen += len(fields)
            if count > 0:
                start, *truths = fields[:count, self.experiment.config.data.history - 1 :].unbind(1)
                for lead, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
                    scores.update(lead, prediction[:count], truth, start)
        model.train()
        self.validated_at = self.step
        record = {"step": self.step, **scores.compute([True] * self.config.rollout)}
        self.log.write("valid", **record)
        self.reporter.validated(record)

    def save(self) -> None:
        used = (self.step - self.sampler.epoch * self.per_epoch) * self.batch
        saved = self.context.save(
            self.folder / CHECKPOINTS,
            self.optimizer,
            step=self.step,
            scheduler=self.scheduler,
            sampler=self.sampler.state_dict(used),
            extra={
                "config": self.experiment.config.to_dict(),
                "statistics": self.experiment.statistics.to_dict(self.labels()),
            },
            keep=self.config.keep,
        )
        self.saved, self.saved_at = saved.folder, self.step

    def labels(self) -> list[str]:
        return [channel.label for channel in self.experiment.checked.source.channels]

    @naming_missing_ranks("ending a step")
    def agreed(self, asked: bool) -> tuple[bool, float]:
        """Whether any rank was asked to stop, and the most memory that a rank has taken so far, in MiB."""
        mine = torch.tensor([float(asked), memory_mib(self.experiment.device)], dtype=torch.float64)
        if dist.is_initialized():
            mine = mine.to(self.experiment.device)
            dist.all_reduce(mine, dist.ReduceOp.MAX)
        stop, memory = mine.tolist()
        return bool(stop), memory


def memory_mib(device: torch.device) -> float:
    """The most memory that this rank has taken so far, in MiB: on its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
