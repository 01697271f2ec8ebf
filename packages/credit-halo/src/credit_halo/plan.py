"""The plan of an exchange: who sends which rows to whom, and where they land. Integers only, no torch."""

from __future__ import annotations

import hashlib
import operator
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

from credit_halo.edges import EdgeRule, Span
from credit_halo.recipe import Needs, recipe_of, recipe_text
from credit_mesh import RowPartition

Rows = range | tuple[int, ...]
"""Positions along the sharded dim: a range of step 1 where they are consecutive, else each one."""

Need = range | Sequence[int]
"""Global rows that a rank needs, in the order in which it wants them: an interval, or any list."""


class Placement(NamedTuple):
    """Rows of a source that land in what this rank needs: ``need[into[i]] = source[rows[i]]``."""

    into: Rows
    rows: Rows
    crossed: bool


class Message(NamedTuple):
    """Rows that go to, or come from, one peer: each once, ascending.

    Attributes:
        peer: Rank within the domain group.
        rows: The sender's own rows, counted from its first.
        placements: Where they land; known to the receiver only.
    """

    peer: int
    rows: Rows
    placements: tuple[Placement, ...] = ()


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """One rank's part of an exchange of rows.

    Attributes:
        partition: Who owns which rows.
        rank: The rank whose part this is, within the domain group.
        edge: What lies beyond the edges.
        in_rows: Rows that this rank owns.
        out_rows: Rows that this rank needs.
        sends: What goes to whom, by peer.
        recvs: What comes from whom, by peer.
        local: Where this rank's own rows land.
        fills: Positions that hold the constant of the edge rule.
        digest: Names the whole exchange; the same on every rank that planned the same.
        recipe: What it follows from, as text.
        variant: What was made of the plan, if anything; see :attr:`linear`.
        key: Names this rank's part of it, and says how to make it again: ``plans[key]``.
    """

    partition: RowPartition
    rank: int
    edge: EdgeRule
    in_rows: int
    out_rows: int
    sends: tuple[Message, ...]
    recvs: tuple[Message, ...]
    local: tuple[Placement, ...]
    fills: Rows
    digest: str
    recipe: str
    variant: str = ""
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.digest}/{self.rank}{self.variant}:{self.recipe}")

    @property
    def ranks(self) -> int:
        """Number of ranks that take part."""
        return self.partition.ranks

    @property
    def sent_rows(self) -> int:
        """Rows that this rank sends, in ``len(sends)`` messages."""
        return sum(len(message.rows) for message in self.sends)

    @property
    def received_rows(self) -> int:
        """Rows that this rank receives, in ``len(recvs)`` messages."""
        return sum(len(message.rows) for message in self.recvs)

    @cached_property
    def needs(self) -> Needs:
        """The global rows that each rank needs, in order."""
        return recipe_of(self.recipe)[1]

    @cached_property
    def is_delivery(self) -> bool:
        """Whether what this rank needs is one message as it comes."""
        whole = (Placement(range(self.out_rows), range(self.out_rows), False),)
        return not (self.local or self.fills) and [message.placements for message in self.recvs] == [whole]

    @cached_property
    def linear(self) -> ExchangePlan:
        """This plan without the constant that its edge rule may add."""
        if self.edge.linear == self.edge:
            return self
        return replace(self, edge=self.edge.linear, variant=_LINEAR)

    def __repr__(self) -> str:
        to = ", ".join(f"{len(message.rows)} to {message.peer}" for message in self.sends) or "none"
        come = ", ".join(f"{len(message.rows)} from {message.peer}" for message in self.recvs) or "none"
        return (
            f"ExchangePlan(rank {self.rank} of {self.partition}: {self.in_rows} rows in, {self.out_rows} out, "
            f"edge {self.edge.kind}; sends {to}; receives {come})"
        )


_LINEAR = "/linear"


class Plans:
    """Every plan by its key: operators that torch.compile traces can carry a string, not a plan.

    The plans of late are remembered, and others made again.
    """

    def __getitem__(self, key: str) -> ExchangePlan:
        """The plan of a key.

        Raises:
            ValueError: If it is the key of no plan.
        """
        return _plan_of(key)


plans = Plans()


@lru_cache(maxsize=4096)
def _plan_of(key: str) -> ExchangePlan:
    try:
        name, recipe = key.split(":", 1)
        rank = int(name.removesuffix(_LINEAR).split("/")[1])
        sizes, needs, edge = recipe_of(recipe)
        plan = _plan(RowPartition(sizes, allow_empty=True), needs, rank, edge)
    except (ValueError, IndexError, TypeError, zlib.error) as error:
        raise ValueError(f"{key!r} is the key of no plan") from error
    return plan.linear if name.endswith(_LINEAR) else plan


def plan_rows(
    partition: RowPartition, needs: Sequence[Need], *, rank: int, edge: EdgeRule | str = "zeros"
) -> ExchangePlan:
    """Plan an exchange that brings each rank the rows that it needs.

    Pure arithmetic on integers; it looks at every rank's need, but works out this rank's part alone. Plans are
    cached.

    Args:
        partition: Who owns which rows.
        needs: For each rank the global rows that it needs, in order: a ``range``, or any sequence of integers. They
            may repeat, lie before row 0 or after the last one, and be empty.
        rank: The rank whose part is wanted.
        edge: What lies beyond the edges: a rule, or the name of one without parameters.

    Raises:
        ValueError: If there is not one need for each rank, the rank is none of them, or the edge rule does not reach
            as far as a need.
    """
    if len(needs) != partition.ranks:
        raise ValueError(f"needs must hold one entry for each of the {partition.ranks} ranks; got {len(needs)}")
    if not 0 <= rank < partition.ranks:
        raise ValueError(f"rank must be in 0..{partition.ranks - 1}; got {rank}")
    return _plan(partition, tuple(map(_canonical, needs)), rank, EdgeRule.of(edge))


def _canonical(need: Need) -> range | tuple[int, ...]:
    """One way to write a need, so that ranks which mean the same say the same."""
    if not isinstance(need, range):
        return tuple(operator.index(row) for row in need)
    return range(need.start, need.start + len(need) * need.step, need.step) if len(need) else range(0)


def plan_halo(
    partition: RowPartition, before: int, after: int, *, rank: int, edge: EdgeRule | str = "zeros"
) -> ExchangePlan:
    """Plan an exchange that brings each rank ``before`` rows before its own and ``after`` rows after them.

    Raises:
        ValueError: If a width is negative, or the edge rule does not reach that far.
    """
    before, after = halo_width("the halo before", before), halo_width("the halo after", after)
    return _plan_halo(partition, before, after, rank, EdgeRule.of(edge))


@lru_cache(maxsize=4096)
def _plan_halo(partition: RowPartition, before: int, after: int, rank: int, edge: EdgeRule) -> ExchangePlan:
    needs = [range(start - before, stop + after) for start, stop in pairwise(partition.offsets)]
    return plan_rows(partition, needs, rank=rank, edge=edge)


def halo_width(name: str, width: object) -> int:
    """A number of rows as an int.

    Raises:
        ValueError: If it is no integer (a boolean is none), or negative.
    """
    try:
        number = -1 if isinstance(width, bool) else operator.index(width)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer >= 0; got {width!r}")
    return number


def plan_repartition(source: RowPartition, target: RowPartition, *, rank: int) -> ExchangePlan:
    """Plan the move of all rows from one partition to another; only rows that change hands are sent.

    Raises:
        ValueError: If the partitions differ in their rows or their ranks.
    """
    return plan_rows(source, repartition_needs(source, target), rank=rank)


def repartition_needs(source: RowPartition, target: RowPartition) -> list[range]:
    """What each rank needs of ``source`` to hold its rows of ``target``.

    Raises:
        ValueError: If the partitions differ in their rows or their ranks.
    """
    if source.rows != target.rows or source.ranks != target.ranks:
        raise ValueError(f"cannot move rows from {source} to {target}: both must have the same rows and ranks")
    return [range(*pair) for pair in pairwise(target.offsets)]


@lru_cache(maxsize=4096)
def _plan(partition: RowPartition, needs: Needs, rank: int, edge: EdgeRule) -> ExchangePlan:
    own = partition.interval(rank)
    for need in needs:  # on every rank alike, so that all of them refuse what the edge rule cannot fill
        inside = isinstance(need, range) and len(need) and min(need[0], need[-1]) >= 0
        if not (inside and max(need[0], need[-1]) < partition.rows):
            deque(_spans(need, partition.rows, edge), maxlen=0)
    # What each rank wants of my rows, and what I want of each rank's: (position, row, crossed), by position.
    wanted: dict[int, list[tuple[int, int, bool]]] = {}
    fills: list[int] = []
    for span in _spans(needs[rank], partition.rows, edge):
        if span.row is None:
            fills.extend(range(span.at, span.at + span.length))
            continue
        for i in range(span.length):
            row = span.row + i * span.step
            owner = bisect_right(partition.offsets, row) - 1
            wanted.setdefault(owner, []).append((span.at + i, row, span.crossed))

    sends = []
    for peer, need in enumerate(needs):
        if peer != rank and own and (rows := _rows_within(need, own, partition.rows, edge)):
            sends.append(Message(peer, _compact(row - own.start for row in rows)))

    recvs = []
    local: tuple[Placement, ...] = ()
    for peer, entries in sorted(wanted.items()):
        first = partition.offsets[peer]
        if peer == rank:
            local = _placements((at, row - first, crossed) for at, row, crossed in entries)
            continue
        rows = sorted({row for _, row, _ in entries})
        index = {row: i for i, row in enumerate(rows)}
        placements = _placements((at, index[row], crossed) for at, row, crossed in entries)
        recvs.append(Message(peer, _compact(row - first for row in rows), placements))

    return ExchangePlan(
        partition=partition,
        rank=rank,
        edge=edge,
        in_rows=len(own),
        out_rows=len(needs[rank]),
        sends=tuple(sends),
        recvs=tuple(recvs),
        local=local,
        fills=_compact(fills) if fills else (),
        digest=hashlib.sha1(repr((partition.sizes, needs, edge)).encode(), usedforsecurity=False).hexdigest()[:16],
        recipe=recipe_text(partition.sizes, needs, edge),
    )


def _spans(need: Need, height: int, edge: EdgeRule) -> Iterator[Span]:
    """Spans of a need; a list of rows is a chain of short ranges."""
    at = 0
    for run in [need] if isinstance(need, range) else _runs(need):
        for span in edge.spans(run, height):
            yield span._replace(at=at + span.at)
        at += len(run)


def _rows_within(need: Need, own: range, height: int, edge: EdgeRule) -> list[int]:
    """The rows of ``own`` that a need asks for: each once, ascending."""
    if not len(need):
        return []
    if isinstance(need, range):
        low, high = min(need[0], need[-1]), max(need[0], need[-1])
        if low >= 0 and high < height and (high < own.start or low >= own.stop):
            return []  # by far the commonest case in a large group
    found: set[int] = set()
    for span in _spans(need, height, edge):
        if span.row is None:
            continue
        if span.step == 0:
            found.update(own[:0] if span.row not in own else (span.row,))
            continue
        rows = range(span.row, span.row + span.length * span.step, span.step)
        rising = rows if rows.step > 0 else rows[::-1]
        skip = max(0, -(-(own.start - rising.start) // rising.step))  # to the first row at or after my first
        found.update(range(rising.start + skip * rising.step, min(rising.stop, own.stop), rising.step))
    return sorted(found)


def _runs(rows: Sequence[int]) -> Iterator[range]:
    """Cut a list of rows into ranges of constant step, greedily."""
    at = 0
    while at < len(rows):
        end, step = at + 1, 1
        if end < len(rows) and rows[end] != rows[at]:
            step = rows[end] - rows[at]
            while end < len(rows) and rows[end] - rows[end - 1] == step:
                end += 1
        yield range(rows[at], rows[at] + (end - at) * step, step)
        at = end


def _placements(entries: Iterable[tuple[int, int, bool]]) -> tuple[Placement, ...]:
    """Group (position, row, crossed), by position, into few copies.

    Consecutive rows at consecutive positions are one slice copied to another. Runs too short to be worth a copy of
    their own, such as the rows of a mirrored halo, are gathered into one indexed copy.
    """
    runs: list[list[tuple[int, int, bool]]] = []
    for entry in entries:
        if runs and entry == (runs[-1][-1][0] + 1, runs[-1][-1][1] + 1, entry[2]) and entry[2] == runs[-1][-1][2]:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    placements = []
    for crossed in (False, True):
        alike = [run for run in runs if run[0][2] == crossed]
        short = [run for run in alike if len(run) <= _SHORT_RUN]
        if len(short) > 1:
            alike = [run for run in alike if len(run) > _SHORT_RUN] + [[entry for run in short for entry in run]]
        for run in alike:
            into, rows, _ = zip(*run, strict=True)
            placements.append(Placement(_compact(into), _compact(rows), crossed))
    return tuple(placements)


_SHORT_RUN = 3


def _compact(rows: Iterable[int]) -> Rows:
    """Rows as a range where they are consecutive, else as a tuple."""
    listed = tuple(rows)
    if listed == tuple(range(listed[0], listed[0] + len(listed))):
        return range(listed[0], listed[0] + len(listed))
    return listed
