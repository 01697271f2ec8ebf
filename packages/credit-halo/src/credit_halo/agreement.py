"""Before an exchange is used for the first time, the ranks make sure that they mean the same.

One small all-gather, of a checksum, the first time that a plan meets a dtype and a shape; never again after that. A
mistake on one rank becomes the same ValueError on all of them, before any row has moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from credit_halo.bounded import Bounded
from credit_halo.faults import break_group, refuse_broken
from credit_halo.process_wide import batch_gloo_threads
from credit_halo.roll_call import answer_roll_calls

AGREED = 1 << 14
"""How many things a group remembers that its ranks agreed on; all ranks forget the same."""

_agreed: WeakKeyDictionary[ProcessGroup, Bounded[Hashable, None]] = WeakKeyDictionary()


def has_agreed(group: ProcessGroup, key: Hashable) -> bool:
    """Whether :func:`agree` has succeeded for this key on this group."""
    return key in _agreed.get(group, ())


def agree(
    group: ProcessGroup,
    key: Hashable,
    what: str,
    describe: Callable[[], str],
    device: torch.device,
    problem: str | None = None,
    rows: int = 0,
) -> list[int] | None:
    """Make sure, once for each key, that every rank of the group is about to do the same.

    Args:
        group: The ranks that must agree.
        key: Remembered once agreed on; a rank that knows it returns at once. None is never remembered.
        what: What users call that which is about to happen.
        describe: Says what this rank is about to do; must give the same text on every rank.
        device: Where the group can move tensors.
        problem: What is wrong on this rank, if anything is.
        rows: A number that need not agree; how many rows this rank holds.

    Returns:
        ``rows`` of each rank; None if the key was known.

    Raises:
        ValueError: On every rank alike, if any has a problem or describes something else.
        ExchangeError: If a rank does not take part within the timeout of the group.

    Collectives:
        The first time, an all-gather of three numbers; if it shows a difference, one of the descriptions.
    """
    if problem is None and has_agreed(group, key):
        return None
    batch_gloo_threads(group)
    answer_roll_calls()
    refuse_broken(group, what)
    said = describe()
    checksum = int.from_bytes(hashlib.sha1(f"{problem}|{said}".encode(), usedforsecurity=False).digest()[:7], "big")
    mine = torch.tensor([checksum, problem is not None, rows], dtype=torch.int64, device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    texts: list[tuple[str | None, str]] = [(None, "")] * len(theirs)
    try:
        dist.all_gather(theirs, mine, group=group)
        numbers = torch.stack(theirs).tolist()
        same = all(number[:2] == numbers[0][:2] for number in numbers) and problem is None
        if not same:
            dist.all_gather_object(texts, (problem, said), group=group)
    except RuntimeError as error:
        message = (
            f"{what}: rank {dist.get_rank(group)} of {len(theirs)} waited for all ranks to agree on its first use "
            f"({said}), and not all took part: {error}"
        )
        raise break_group(group, message) from error
    if not same:
        raise ValueError(_difference(what, texts))
    if key is not None:
        _agreed.setdefault(group, Bounded(AGREED))[key] = None
    return [number[2] for number in numbers]


def _difference(what: str, texts: list[tuple[str | None, str]]) -> str:
    """One message for all ranks, the same on each: who has a problem, or who says what."""
    by_problem: dict[str, list[int]] = {}
    for rank, (problem, _) in enumerate(texts):
        if problem:
            by_problem.setdefault(problem, []).append(rank)
    if by_problem:
        where = {
            problem: "every rank"
            if 1 < len(ranks) == len(texts)
            else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            for problem, ranks in by_problem.items()
        }
        return f"{what}: {'; '.join(f'on {ranks} {problem}' for problem, ranks in where.items())}"
    by_text: dict[str, list[int]] = {}
    for rank, (_, text) in enumerate(texts):
        by_text.setdefault(text, []).append(rank)
    listed = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())
    return f"{what}: the ranks disagree on what they exchange. {listed}"
