"""Loading a checkpoint: every rank reads what it needs of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from credit_halo import naming_missing_ranks
from credit_parallel.checkpoint import step_folders
from credit_parallel.checkpoint.former_format import FORMER, FormerFiles
from credit_parallel.checkpoint.json_values import names_in, unpack
from credit_parallel.checkpoint.named_state import (
    MODEL,
    RNG,
    casts,
    changed_settings,
    dtype_problem,
    load_model,
    load_optimizer,
    model_entries,
    model_problem,
    optimizer_problem,
    optimizer_targets,
    rehearse_optimizer,
    settings_of,
)
from credit_parallel.checkpoint.random_states import read_rng_state, reseed, set_rng_state
from credit_parallel.checkpoint.saved_tensors import Stock, read_into
from credit_parallel.checkpoint.strict_reader import INDEX, CheckpointError, read_index, read_manifest
from credit_parallel.checkpoint.tensor_files import TensorFiles
from credit_parallel.checkpoint.together import Context, rank_and_size, resolve, together
from credit_parallel.domain import is_partitioned
from credit_parallel.state_dicts import from_first

logger = logging.getLogger(__name__)


class LoadedState(NamedTuple):
    """What :func:`load_checkpoint` found."""

    step: int  #: how many steps were taken
    extra: Any  #: what was saved as ``extra``; tensors in CPU memory
    folder: Path  #: the checkpoint
    same_layout: bool  #: whether it was saved on this layout, so that random generators go on where they were
    missing: list[str]  #: names of the model that it does not have; only without ``strict``
    unexpected: list[str]  #: its names that the model does not have; only without ``strict``


class Opened(NamedTuple):
    """A checkpoint whose index was read."""

    folder: Path
    stock: Stock
    values: dict[str, Any]
    files: TensorFiles | FormerFiles

    def small(self, name: str) -> Tensor:
        """A tensor that one rank has written whole, in memory of its own."""
        stored = self.stock[name]
        if not stored.chunks:
            return torch.empty(stored.shape, dtype=stored.dtype)
        (chunk,) = stored.chunks
        return self.files.fetch(name, chunk).clone()


@naming_missing_ranks("loading a checkpoint")
def load_checkpoint(
    folder: str | os.PathLike[str],
    target: Context | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    sampler: Any = None,
    strict: bool = True,
    verify: bool = True,
    settings: Literal["checkpoint", "optimizer"] = "checkpoint",
) -> LoadedState:
    """Load a checkpoint on any layout of ranks, or on one rank without torch.distributed; every rank calls it.

    Ranks read what they need and nothing else, straight into the memory of the model. On the layout that was saved the
    random generators of each rank go on where they were; on another they are seeded from the seed and the step of the
    checkpoint.

    Args:
        folder: The folder of one checkpoint, or that of many, of which the latest complete one is taken.
        optimizer: Of the model's parameters, in the same groups as the saved one; a new one will do. None loads none.
        scheduler: Gets its state by ``load_state_dict``, as the next two; None loads none.
        strict: Whether names that only the checkpoint or only the model has are errors, and states that are asked for
            and were not saved. Without it they are left as they are.
        verify: Compare checksums of all files first, which reads them once; each rank takes some of the files.
        settings: Whose learning rate, weight decay and other settings of parameter groups hold: the checkpoint's, or
            those that the optimizer has now. A scheduler that is loaded sets the learning rate at its next step.

    What is not as in the checkpoint is said in the log of the first rank: settings that differ, and whose are used;
    tensors that are cast to another dtype.

    Raises:
        ValueError: On all ranks alike, if there is no checkpoint, it is of another model or optimizer, or has complex
            tensors where the model has real ones; it says what differs, and nothing is changed.
        CheckpointError: On all ranks alike, if it is damaged or not complete; it says which file is.

    Collectives: small ones, by which ranks agree.
    """
    what, (rank, size) = "load_checkpoint", rank_and_size()
    if settings not in ("checkpoint", "optimizer"):
        raise ValueError(f"settings must be 'checkpoint' or 'optimizer'; got {settings!r}")
    opened = open_checkpoint(folder, verify)
    stock, values = opened.stock, opened.values
    given = {"scheduler": scheduler, "scaler": scaler, "sampler": sampler}
    targets: dict[str, Tensor] = {}
    with together(what):
        model, layout = resolve(target)
        own, others = model_entries(model)
        saved = {name.removeprefix(MODEL): stored.dtype for name, stored in stock.items() if name.startswith(MODEL)}
        problem, missing, unexpected = model_problem(own, list(others), _saved_shapes(opened), strict)
        if problem := problem or dtype_problem(own, saved):
            raise ValueError(f"{opened.folder} is of another model: {problem}")
        unsaved = [key for key, x in {**given, "optimizer": optimizer}.items() if x is not None and values[key] is None]
        if strict and unsaved:
            raise ValueError(
                f"{opened.folder} was saved without {', '.join(unsaved)}: leave that out, or pass strict=False"
            )
        if optimizer is not None and values["optimizer"] is not None:
            if problem := optimizer_problem(model, optimizer, values["optimizer"], stock):
                raise ValueError(f"{opened.folder} is of another optimizer: {problem}")
            rehearse_optimizer(model, optimizer, values["optimizer"], stock, str(opened.folder))
            targets.update(optimizer_targets(model, optimizer, values["optimizer"], stock))
        targets.update({MODEL + name: value for name, value in own.items() if MODEL + name in stock})
        same_layout = values["layout"] == [layout.dp, layout.tp, layout.domain] and values["ranks"] == size
        if same_layout:
            generators = read_rng_state(opened.small(f"{RNG}{rank}"), str(opened.folder))
        for key, thing in given.items():
            if thing is not None and values[key] is not None:
                _load_state(key, thing, opened)
    with together(what):
        read_into(targets, stock, opened.files.fetch)
    with together(what):
        loaded = {name: value for name, value in unpack(values["model"], opened.small).items() if name in others}
        loaded.update({name: targets[MODEL + name] for name in own if MODEL + name in targets})
        load_model(model, loaded)
        if optimizer is not None and values["optimizer"] is not None:
            mine = settings_of(optimizer)
            load_optimizer(model, optimizer, values["optimizer"], targets.__getitem__)
            changed = changed_settings(mine, settings_of(optimizer))
            if settings == "optimizer":
                for group, kept in zip(optimizer.param_groups, mine, strict=True):
                    group.update(kept)
            elif changed and rank == 0:
                logger.warning(
                    "%s: the optimizer goes on with the settings of the checkpoint (%s): pass settings='optimizer' to "
                    "keep those that it has",
                    *(opened.folder, "; ".join(changed)),
                )
        if (told := casts(own, saved)) and rank == 0:
            logger.warning("%s: values were cast on loading: %s", opened.folder, "; ".join(told))
        if same_layout:
            set_rng_state(generators)
        else:
            reseed(values["seed"], values["step"], layout, is_partitioned(model))
        extra = unpack(values["extra"], opened.small)
    return LoadedState(values["step"], extra, opened.folder, same_layout, missing, unexpected)


def open_checkpoint(folder: str | os.PathLike[str], verify: bool) -> Opened:
    """Choose the checkpoint, make sure that it is whole, and read its index; on all ranks alike."""
    what, chosen = "load_checkpoint", Path(folder).absolute()
    rank, size = rank_and_size()
    with together(what):
        if rank == 0:
            if not step_folders.is_step_folder(chosen):
                found = step_folders.latest(chosen)
                if found is None:
                    raise ValueError(f"there is no complete checkpoint in {chosen}")
                chosen = found
            step_folders.check(chosen)
    chosen = Path(from_first(str(chosen)))
    with together(what):
        manifest = read_manifest(chosen)
        index = read_index(chosen, manifest)
        if verify:
            step_folders.check_contents(chosen, sorted(manifest.files)[rank::size], manifest)
    files = FormerFiles if manifest.form == FORMER else TensorFiles
    return Opened(chosen, index.stock, index.values, files(chosen, index.stock))


def _saved_shapes(opened: Opened) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the saved model, and () for its other entries."""
    packed = opened.values["model"]
    others = {*names_in(packed)}
    tensors = {name: stored.shape for name, stored in opened.stock.items() if name not in others}
    shapes = {name.removeprefix(MODEL): shape for name, shape in tensors.items() if name.startswith(MODEL)}
    return {**shapes, **{name: () for name, _ in packed["dict"]}}


def _load_state(key: str, thing: Any, opened: Opened) -> None:
    """Load the state of a scheduler or the like; a CheckpointError says that it cannot make anything of it."""
    try:
        thing.load_state_dict(unpack(opened.values[key], opened.small))
    except ValueError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{opened.folder} is damaged, or of another {key}: {type(thing).__name__} cannot load values.{key} "
            f"of {INDEX} ({error!r})"
        ) from error
