"""What the rows of other ranks reach of a convolution's output: integers only, no torch.

A convolution can run on a rank's own rows while the halo travels. The output rows that the halo reaches, its borders,
are then computed from the halo and the few own rows that they read. Where that can be done follows from the partition
and the layer's parameters, so that all ranks do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from credit_domain.engine.footprint import Footprint
from credit_halo import EdgeRule, plan_rows
from credit_mesh import RowPartition

Reach = tuple[tuple[int, int], ...]
"""How many rows each rank lacks above and below its own."""


class Border(NamedTuple):
    """Output rows of a rank that read rows of another.

    Attributes:
        halo: Where those rows are in what the exchange brings: first, and one past the last.
        own: The rank's own rows that are read with them.
        out: The output rows.
        cut: Rows that come out before them, where halo and own rows are convolved without padding.
        taps: The part of the kernel, along the sharded dim, that reaches the halo.
        fill: Rows between the halo and the farthest own rows that this part of the kernel reaches with it.
        above: Whether the halo lies before the own rows.
    """

    halo: tuple[int, int]
    own: tuple[int, int]
    out: tuple[int, int]
    cut: int
    taps: tuple[int, int]
    fill: int
    above: bool


class Borders(NamedTuple):
    """How a rank computes its own rows, and then its borders.

    Attributes:
        plan: Key of the plan that brings the halo alone.
        padding: Padding along the sharded dim with which its own rows give all its output rows.
        extra: Output padding, for a transposed convolution.
        borders: At most one at each end.
        reach: How many rows the exchange brings each rank, from above its own and from below.
        source: Who holds which rows.
        edge: What lies beyond the edges.
    """

    plan: str
    padding: int
    extra: int
    borders: tuple[Border, ...]
    reach: Reach
    source: RowPartition
    edge: EdgeRule


class End(NamedTuple):
    """One end of a rank's rows: what Border says of it."""

    own: range
    out: range
    cut: int
    taps: tuple[int, int]
    fill: int


class Local(NamedTuple):
    """What Borders says, whatever the rest of the ranks hold."""

    padding: int
    extra: int
    above: End
    below: End


class Overlapping(Protocol):
    """A :class:`credit_domain.engine.row_op.RowOp` that can run on own rows while the halo travels."""

    def footprint(self, source: RowPartition) -> Footprint:
        """Which rows each rank reads."""

    def local(self, rows: range, need: range, out: range) -> Local | None:
        """What a rank's own rows give; None where no padding by the same amount at both ends gives its output rows."""

    def __iter__(self) -> Iterator[Any]:
        """Its numbers."""


def borders_of(op: Overlapping, footprint: Footprint, rank: int) -> Borders | None:
    """The borders of an operation; None where it must wait for the halo.

    That is where a rank has no rows, where its borders meet, and where the rows that it lacks at its two ends are such
    that no padding by the same amount at both gives its output rows.
    """
    source, zeros = footprint.source, footprint.edge.kind == "zeros"
    found, needs = [], []
    offsets = zip(pairwise(source.offsets), pairwise(footprint.target.offsets), strict=True)
    for need, (inner, outer) in zip(footprint.needs, offsets, strict=True):
        assert isinstance(need, range)
        rows, out = range(*inner), range(*outer)
        local = op.local(rows, need, out) if rows and out else None
        if local is None or need.start > rows.start or need.stop < rows.stop:
            return None
        halo: list[int] = []
        borders = []
        for end, lacking, at_edge in (
            (local.above, range(need.start, rows.start), rows.start == 0),
            (local.below, range(rows.stop, need.stop), rows.stop == source.rows),
        ):
            if not end.out or not lacking or (zeros and at_edge):  # the padding stands for zeros
                continue
            if not 0 <= end.own.start <= end.own.stop <= len(rows) or end.fill < 0:  # it reads the other halo too
                return None
            places = (len(halo), len(halo) + len(lacking)), (end.own.start, end.own.stop), (end.out.start, end.out.stop)
            borders.append(Border(*places, end.cut, end.taps, end.fill, end is local.above))
            halo += lacking
        found.append((local, tuple(borders)))
        needs.append(tuple(halo))
    local, mine = found[rank]
    plan = plan_rows(source, needs, rank=rank, edge=footprint.edge)
    reach = tuple((_rows(borders, above=True), _rows(borders, above=False)) for _, borders in found)
    return Borders(plan.key, local.padding, local.extra, mine, reach, source, footprint.edge)


def _rows(borders: tuple[Border, ...], above: bool) -> int:
    """How many rows of the halo lie above, or below, the own ones."""
    return sum(border.halo[1] - border.halo[0] for border in borders if border.above == above)


def local_of_conv(kernel: int, stride: int, dilation: int, rows: range, need: range, out: range) -> Local | None:
    """What a convolution's own rows give, and its ends."""
    # Counted from need.start, output row j reads from row j * stride on, and own rows are before to end - 1.
    span, before = dilation * (kernel - 1) + 1, rows.start - need.start
    end = before + len(rows)
    if before < 0 or (end + before - span) // stride + 1 != len(out):
        return None
    top = min(len(out), _up(before, stride))
    taps = min(kernel, _up(before, dilation))
    reach = (top - 1) * stride
    own = range(reach + span - before)
    above = End(own, range(top), 0, (0, taps), reach + (taps - 1) * dilation + 1 - before)
    low = max(0, _up(end - span + 1, stride))
    first = max(0, _up(end - (len(out) - 1) * stride, dilation))
    own = range(low * stride - before, len(rows))
    below = End(own, range(low, len(out)), 0, (first, kernel), end - low * stride - first * dilation)
    return Local(before, 0, above, below)


def local_of_transposed(
    kernel: int, stride: int, dilation: int, padding: int, rows: range, need: range, out: range
) -> Local | None:
    """What a transposed convolution's own rows give, and its ends."""
    # Input row i reaches output rows i * stride - padding to span - 1 rows on.
    span, have = dilation * (kernel - 1) + 1, len(rows)
    trim = out.start + padding - rows.start * stride
    extra = len(out) - ((have - 1) * stride + span - 2 * trim)
    if trim < 0 or not 0 <= extra < stride or span < stride:
        return None
    top = min(len(out), max(0, span - stride - trim))
    own = range((top - 1 + trim) // stride + 1)
    above = End(own, range(top), trim + (rows.start - need.start) * stride, (0, kernel), 0)
    low = min(len(out), max(0, have * stride - trim))
    own = range(max(0, have - (span - 1) // stride), have)
    below = End(own, range(low, len(out)), low + trim - own.start * stride, (0, kernel), 0)
    return Local(trim, extra, above, below)


def _up(rows: int, by: int) -> int:
    return -(-rows // by)
