"""What the ranks that save or load a checkpoint must do alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from credit_halo import ExchangeError, naming_missing_ranks
from credit_mesh import RankLayout
from credit_parallel.checkpoint.folder_owner import claim, release
from credit_parallel.checkpoint.strict_reader import CheckpointError
from credit_parallel.contract import gather_numbers, place_of
from credit_parallel.domain import get_raw_model, manager_of


class Context(Protocol):
    """What is asked of a context: :class:`credit_parallel.context.ParallelContext` is one."""

    model: nn.Module  #: the model, wrapped or not
    layout: RankLayout  #: sizes of the axes


def is_distributed() -> bool:
    """Whether there are other ranks to talk to, or there is a process group at least."""
    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def resolve(target: Context | nn.Module) -> tuple[nn.Module, RankLayout]:
    """The plain model of a context, or of a model that may be wrapped, and the layout of the ranks."""
    if not isinstance(target, nn.Module):
        return get_raw_model(target.model), target.layout
    try:
        layout, _ = place_of(manager_of(target))
    except ValueError:  # a world that nobody has divided into axes
        layout = RankLayout(dp=rank_and_size()[1])
    return get_raw_model(target), layout


@contextmanager
def together(what: str) -> Iterator[None]:
    """Around what each rank does by itself: if it fails on any rank, all ranks raise the same error.

    Collectives: an all-gather of a number; if it shows a failure, one of the messages.
    """
    problem: Exception | None = None
    try:
        with naming_missing_ranks(what):
            yield
    except ExchangeError:  # ranks that cannot be reached cannot be told either
        raise
    except Exception as error:
        problem = error
    expected = isinstance(problem, (ValueError, CheckpointError))
    if problem is not None and not is_distributed() and not expected and not isinstance(problem, OSError):
        raise problem
    kind = 0 if problem is None else 1 if isinstance(problem, ValueError) else 2
    with naming_missing_ranks(what):
        kinds = [kind for (kind,) in gather_numbers([kind])]
        if not any(kinds):
            return
        texts = [str(problem) if expected or not is_distributed() else repr(problem)] * len(kinds)
        if is_distributed():
            dist.all_gather_object(texts, texts[0])
    ranks: dict[str, list[str]] = {}
    for rank, (kind, text) in enumerate(zip(kinds, texts, strict=True)):
        if kind:
            ranks.setdefault(text, []).append(str(rank))
    told = "; ".join(
        text if len(failed) == len(kinds) else f"on rank {', '.join(failed)}: {text}" for text, failed in ranks.items()
    )
    raise (CheckpointError if 2 in kinds else ValueError)(f"{what}: {told}") from problem


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Around a run that saves into a folder: a ValueError on all ranks alike if another run does meanwhile."""
    taken = False
    with together(str(folder)):
        if rank_and_size()[0] == 0:
            taken = claim(folder.absolute())
    try:
        yield
    finally:
        if taken:
            release(folder)


@contextmanager
def torch_errors(what: str) -> Iterator[None]:
    """Around torch's save and load, which raise the same error on all ranks: as an Exception, in one line each."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        failures = "; ".join(f"on rank {rank}: {failure[0]!r}" for rank, failure in sorted(error.failures.items()))
        raise CheckpointError(f"{what}: {failures}") from error
