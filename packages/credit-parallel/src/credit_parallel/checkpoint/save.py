"""Saving a checkpoint: every rank writes its own parts, and the first one makes them a checkpoint."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from credit_halo import naming_missing_ranks
from credit_parallel.checkpoint import step_folders
from credit_parallel.checkpoint.folder_owner import claim
from credit_parallel.checkpoint.json_values import pack
from credit_parallel.checkpoint.named_state import MODEL, RNG, model_entries, optimizer_entries
from credit_parallel.checkpoint.random_states import rng_state
from credit_parallel.checkpoint.rank_writer import RankWriter
from credit_parallel.checkpoint.saved_tensors import dtype_of, name_of, stock_to_json
from credit_parallel.checkpoint.strict_reader import CheckpointError
from credit_parallel.checkpoint.tensor_files import SUFFIX
from credit_parallel.checkpoint.together import Context, is_distributed, rank_and_size, resolve, together, torch_errors
from credit_parallel.contract import gather_numbers
from credit_parallel.state_dicts import from_first

logger = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds without any progress of the others after which the first rank gives a save up."""

_unfinished: dict[int, Save] = {}  # by rank, since ranks may be threads


@naming_missing_ranks("saving a checkpoint")
def save_checkpoint(
    folder: str | os.PathLike[str],
    target: Context | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    step: int,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    extra: Any = None,
    keep: int | None = 3,
    asynchronous: bool = False,
) -> Save:
    """Save the state of training as ``folder/step-N``, which any layout of ranks can load; every rank calls it.

    Each rank writes the parameters and optimizer states that it alone has, and its share of those that several have. A
    process that is killed at any moment leaves the checkpoints before this one as they were.

    Args:
        folder: The folder of the checkpoints of this training, on a file system that all ranks share. It is this
            program's from the first save until the program ends, or calls :func:`credit_parallel.checkpoint.release`.
        optimizer: Of the model's parameters.
        step: How many steps were taken; the name of the checkpoint.
        scheduler: The learning-rate scheduler, or anything else with ``state_dict``; its state is that of the first
            rank, as for the next three.
        sampler: The sampler, or its state dict: where workers of a loader read ahead, ``sampler.state_dict(used)``.
        extra: More small state: numbers, text, tensors, and dicts, lists and tuples of them.
        keep: How many checkpoints to keep, this one included; None keeps all.
        asynchronous: Copy everything to memory, and write it while training goes on. The next save waits for it, and so
            does the end of the program. :meth:`Save.wait` makes sure that it is on the disk.

    Raises:
        ValueError: On all ranks alike, if something cannot be saved, ranks differ in what they save, or another program
            saves into the folder.
        CheckpointError: On all ranks alike, if it cannot be written, or the asynchronous save before this one was not.

    Collectives: those of ``torch.distributed.checkpoint.save`` and some small ones.
    """
    what = f"save_checkpoint at step {step}"
    rank, size = rank_and_size()
    with together(what):
        if rank in _unfinished:
            _unfinished[rank].join()
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be a number of steps; got {step!r}")
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be 1 or more, or None; got {keep!r}")
        model, layout = resolve(target)
        tensors, values = _collect(model, optimizer, rank)
        small = {"scheduler": scheduler, "scaler": scaler, "sampler": sampler, "extra": extra}
        _add_small(small, values, tensors, rank)
        strange = [f"{name} ({name_of(t.dtype)})" for name, t in tensors.items() if dtype_of(name_of(t.dtype)) is None]
        if strange:
            raise ValueError(f"a checkpoint holds no tensors of such dtypes: {', '.join(strange[:8])}")
    _agree(what, step, values)
    values.update(
        step=step, seed=torch.initial_seed() % (1 << 63), layout=[layout.dp, layout.tp, layout.domain], ranks=size
    )
    partial = Path()
    with together(what):
        if rank == 0:
            claim(Path(folder).absolute())
            partial = step_folders.start(Path(folder).absolute(), step)
    partial = Path(from_first(str(partial)))
    with together(what):
        if not partial.is_dir():
            raise CheckpointError(f"{partial}, which the first rank made, is not there: is the file system shared?")
    writer = RankWriter(partial / f"rank-{rank:05}{SUFFIX}", snapshot=asynchronous)
    save = Save(partial, step, keep, writer, values, rank, size)
    try:
        with torch_errors(what):
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            save_tensors(tensors, storage_writer=writer, planner=planner, no_dist=not is_distributed())
    except CheckpointError:
        save.abandon()
        raise
    if asynchronous:
        _unfinished[rank] = save
        save.begin()
    else:
        with together(what):
            save.finish()
    return save


class Save:
    """A save, which may still be going on; made by :func:`save_checkpoint`."""

    def __init__(
        self,
        partial: Path,
        step: int,
        keep: int | None,
        writer: RankWriter,
        values: dict[str, Any],
        rank: int,
        size: int,
    ) -> None:
        self.folder = step_folders.final_of(partial)  #: where the checkpoint is, once it is complete
        self.step = step  #: its step
        self._partial, self._keep, self._writer, self._values = partial, keep, writer, values
        self._rank, self._size = rank, size
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def done(self) -> bool:
        """Whether this rank has nothing left to do; on the first rank, whether the checkpoint is complete or failed."""
        return self._thread is None or not self._thread.is_alive()

    @naming_missing_ranks("saving a checkpoint")
    def wait(self) -> Path:
        """Wait until the checkpoint is complete, and return its folder; every rank calls it.

        A CheckpointError on all ranks alike says why it could not be written. Collectives: a small all-gather.
        """
        with together(f"the save of step {self.step}"):
            self.join()
        return self.folder

    def join(self) -> None:
        """Wait for what this rank has to do, and raise a CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
        _unfinished.pop(self._rank, None)
        if self._error is not None:
            raise CheckpointError(f"the asynchronous save of step {self.step} failed: {self._error}") from self._error

    def begin(self) -> None:
        """Finish in a thread; the interpreter does not end before it."""
        self._thread = threading.Thread(target=self._finish_logged, name=f"save of step {self.step}", daemon=False)
        self._thread.start()

    def _finish_logged(self) -> None:
        try:
            self.finish()
        except Exception as error:
            self._error = error
            logger.exception("the asynchronous save of step %d failed", self.step)

    def finish(self) -> None:
        """Write what is not written yet; on the first rank wait for the others and make it a checkpoint."""
        # No collectives, since the other thread of this process may be amid its own: ranks leave notes.
        try:
            self._writer.write()
            note: dict[str, Any] = {"size": self._writer.size, "checksum": self._writer.checksum}
        except Exception as error:
            if self._rank > 0:
                self._note({"problem": f"{error!r} on rank {self._rank}"})
            else:
                self.abandon()
            raise
        self._note(note)
        if self._rank == 0:
            try:
                files = self._await_notes()
                index = {"tensors": stock_to_json(self._writer.stock), "values": self._values}
                step_folders.commit(self._partial, self.step, index, files)
            except Exception:
                self.abandon()
                raise
            step_folders.prune(self.folder, self.step, self._keep)

    def abandon(self) -> None:
        """On the first rank, remove what was written."""
        if self._rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)

    def _note_of(self, rank: int) -> Path:
        return self._partial / f"rank-{rank:05}.json"

    def _note(self, content: Mapping[str, Any]) -> None:
        step_folders.write_file(self._note_of(self._rank), json.dumps(content).encode())

    def _await_notes(self) -> dict[str, tuple[int, int]]:
        """Size and checksum of the file of each rank, once all are written; the notes are removed."""
        files: dict[str, tuple[int, int]] = {}
        missing, pause = list(range(self._size)), 0.01
        progress, since = -1, time.monotonic()
        while missing:
            for rank in [rank for rank in missing if self._note_of(rank).exists()]:
                note = json.loads(self._note_of(rank).read_bytes())
                if "problem" in note:
                    raise CheckpointError(note["problem"])
                files[self._note_of(rank).with_suffix(SUFFIX).name] = note["size"], note["checksum"]
                missing.remove(rank)
            written = sum(path.stat().st_size for path in self._partial.glob(f"*{SUFFIX}"))
            if written + len(files) != progress:
                progress, since = written + len(files), time.monotonic()
            if missing and time.monotonic() - since > PATIENCE:
                raise CheckpointError(f"rank {', '.join(map(str, missing[:8]))} wrote nothing for {PATIENCE:.0f} s")
            if missing:
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
        for rank in range(self._size):
            self._note_of(rank).unlink()
        return files


def _collect(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and other state of model, optimizer and random generators that this rank has."""
    tensors: dict[str, Tensor] = {}
    own, others = model_entries(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in own.items():
        # Buffers may differ between ranks, as running statistics of replicas do: those of the first rank are saved.
        if rank == 0 or isinstance(value, DTensor) or name in parameters:
            tensors[MODEL + name] = value
    packed: dict[str, Tensor] = {}
    values: dict[str, Any] = {"model": pack(others, f"{MODEL}extra state", packed)}
    values["optimizer"] = None if optimizer is None else optimizer_entries(model, optimizer, tensors)
    tensors.update(packed if rank == 0 else {})
    tensors[f"{RNG}{rank}"] = rng_state()
    return tensors, values


def _add_small(small: Mapping[str, Any], values: dict[str, Any], tensors: dict[str, Tensor], rank: int) -> None:
    """States of schedulers and the like."""
    packed: dict[str, Tensor] = {}
    for name, thing in small.items():
        has_state = name != "extra" and thing is not None and not isinstance(thing, Mapping)
        values[name] = pack(thing.state_dict() if has_state else thing, name, packed)
    tensors.update(packed if rank == 0 else {})


def _agree(what: str, step: int, values: Mapping[str, Any]) -> None:
    """Make sure that the ranks save the same step and optimizer state."""
    optimizer = values["optimizer"]
    names = (
        None if optimizer is None else [sorted(optimizer["state"]), [g["params"] for g in optimizer["param_groups"]]]
    )
    said = gather_numbers([step, zlib.crc32(json.dumps(names).encode())])
    if any(numbers != said[0] for numbers in said):
        steps = sorted({numbers[0] for numbers in said})
        told = f"of steps {steps}" if len(steps) > 1 else "with states of different parameters in their optimizers"
        raise ValueError(f"{what}: ranks save {told}")
