"""``CREDIT_HALO_DEBUG=1``: one line for each exchange and rank, and a comparison of calls before anything is sent.

Without it, ranks that make two like calls in another order are told apart only where a message carries their labels.
With it, all ranks first say what they are about to do and from which lines of the program, by one small all-gather.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from credit_halo.faults import break_group, refuse_broken
from credit_halo.plan import Message

__all__ = ["backward_of", "compare", "differing", "said"]

logger = logging.getLogger("credit_halo.trace")


def enabled() -> bool:
    """Whether exchanges are to be traced; looked up at each exchange, so that it can be switched on at any time."""
    return os.environ.get("CREDIT_HALO_DEBUG", "") not in ("", "0")


def trace(
    what: str,
    rank: int,
    ranks: int,
    sent: Iterable[Message],
    received: Iterable[Message],
    sent_bytes: int,
    seconds: float,
) -> None:
    """Log one exchange of this rank."""
    if not logger.handlers:  # asked for by the environment, so it must be seen without any set-up of logging
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logger.debug(
        "%s, rank %d of %d: to %s; from %s; %d bytes sent, %.3f ms",
        *(what, rank, ranks, _peers(sent), _peers(received), sent_bytes, seconds * 1e3),
    )


def _peers(messages: Iterable[Message]) -> str:
    return ", ".join(f"{message.peer} ({len(message.rows)} rows)" for message in messages) or "nobody"


# What the ranks are about to do

_LIBRARIES = tuple(
    f"{Path(path).resolve()}{os.sep}" for path in (Path(torch.__file__).parent, os.path.dirname(threading.__file__))
)
_PACKAGES = frozenset(("credit_mesh", "credit_halo", "credit_domain", "credit_parallel"))
_SHOWN = 3
"""How many lines of the program an error shows."""


class _Here(threading.local):
    label: str = ""
    origin: str = ""
    said: str = ""


_here = _Here()


def compare(group: ProcessGroup, describe: Callable[[], str], device: torch.device) -> None:
    """Where debugging is on, make sure that all ranks make the same call from the same lines of their program.

    Args:
        group: The ranks that are about to make it.
        describe: Says what they do, in words that are the same on every rank: kind, label, dtype and shape.
        device: Where the group can move tensors.

    Raises:
        ValueError: On every rank alike, if they do not; it names both calls.
        ExchangeError: If a rank does not take part within the timeout of the group.

    Collectives:
        An all-gather of one number; if it shows a difference, one of the descriptions.
    """
    if not enabled():
        return
    what = describe()
    refuse_broken(group, what)
    if _here.label:
        what = f"{_here.label!r}: {what}"
    if _here.origin:
        what = f"{what}, in the backward of [{_here.origin}]"
    lines = _lines()
    full = f"{what}|{lines}"
    said = f"{what}, at {' < '.join(line for line, _ in lines[:_SHOWN])}" if lines else what
    checksum = int.from_bytes(hashlib.sha1(full.encode(), usedforsecurity=False).digest()[:7], "big")
    mine = torch.tensor([checksum], dtype=torch.int64, device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    texts: list[str] = [""] * len(theirs)
    try:
        dist.all_gather(theirs, mine, group=group)
        numbers = torch.cat(theirs).tolist()
        if len(set(numbers)) > 1:
            dist.all_gather_object(texts, said, group=group)
    except RuntimeError as error:
        message = (
            f"{said}: rank {dist.get_rank(group)} of {len(theirs)} waited for all ranks to make this call: {error}"
        )
        raise break_group(group, message) from error
    _here.said = said
    if len(set(numbers)) > 1:
        raise ValueError(differing("the ranks make different calls at the same time", numbers, texts))


def differing(problem: str, numbers: Iterable[object], texts: list[str]) -> str:
    """One message for all ranks: which of them do what; ``numbers`` are the same where ranks do the same."""
    ranks: dict[object, list[int]] = {}
    for rank, number in enumerate(numbers):
        ranks.setdefault(number, []).append(rank)
    told = (f"rank {', '.join(map(str, those))}: {texts[those[0]]}" for those in ranks.values())
    return f"{problem}. {'; '.join(told)}. All ranks must make the same calls in the same order"


def said() -> str:
    """What this thread said last, for the backward of it; empty where debugging is off."""
    return _here.said if enabled() else ""


@contextmanager
def backward_of(origin: str) -> Iterator[None]:
    """Say of what comes that it is the backward of a call."""
    before, _here.origin = _here.origin, origin
    try:
        yield
    finally:
        _here.origin = before


@contextmanager
def named(label: str) -> Iterator[None]:
    """Say what users call the collective that comes: its operator has no argument for that."""
    before, _here.label = _here.label, label
    try:
        yield
    finally:
        _here.label = before


def _lines() -> list[tuple[str, int]]:
    """The lines of the program that led here, innermost first, without those of torch, of Python and of ours.

    With the instruction in each, which tells two calls in one line apart.
    """
    found: list[tuple[str, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, package = frame.f_code.co_filename, frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in _PACKAGES and not name.startswith("<") and not os.path.abspath(name).startswith(_LIBRARIES):
            found.append((f"{os.path.basename(name)}:{frame.f_lineno}", frame.f_lasti))
        frame = frame.f_back
    return found
