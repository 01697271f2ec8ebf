"""Which input rows each output row of an operation reads, and who owns what comes out: integers only, no torch.

What is refused here is refused for all ranks alike, since nothing depends on the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from credit_halo import EdgeRule
from credit_mesh import RowPartition


@dataclass(frozen=True)
class Footprint:
    """The rows that an operation reads on each rank.

    Attributes:
        source: Partition of the input rows.
        target: Partition of the output rows.
        needs: Global input rows that each rank reads, in order: a range, which may reach beyond the edges, where
            ``edge`` fills it, or a tuple.
        edge: What lies beyond the edges.
    """

    source: RowPartition
    target: RowPartition
    needs: tuple[range | tuple[int, ...], ...]
    edge: EdgeRule

    @property
    def is_local(self) -> bool:
        """Whether every rank needs just its own rows."""
        own = (range(*pair) for pair in pairwise(self.source.offsets))
        pairs = zip(self.needs, own, strict=True)
        return all(need == rows or not (need or rows) or tuple(rows) == need for need, rows in pairs)


def footprint_from(
    source: RowPartition, target: RowPartition, need: Callable[[int, int], range], edge: EdgeRule
) -> Footprint:
    """A footprint from what output rows ``[start, stop)`` need; a rank without output rows needs nothing."""
    needs = tuple(need(start, stop) if stop > start else range(0) for start, stop in pairwise(target.offsets))
    return Footprint(source, target, needs, edge)


def window_rows(rows: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool = False) -> int:
    """Output rows of a window that slides over ``rows`` rows; at most 0 if it does not fit once."""
    room = rows + before + after - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    out = -(-room // stride) + 1
    # As in torch: a window of pooling must start within the rows or the padding before them.
    return out - 1 if (out - 1) * stride >= rows + before else out


def check_reach(rows: int, padding: tuple[int, int], edge: EdgeRule) -> None:
    """Refuse what torch refuses: padding as far as (reflect) or farther than (circular) the rows reach."""
    widest = max(padding)
    if edge.kind == "reflect" and widest >= rows:
        raise ValueError(f"reflection by {widest} rows needs more than {widest} rows; there are {rows}")
    if edge.kind == "circular" and widest > rows:
        raise ValueError(f"circular padding by {widest} rows would wrap around {rows} rows more than once")


def windows(
    source: RowPartition, target: RowPartition, span: int, stride: int, before: int, edge: EdgeRule
) -> Footprint:
    """The footprint of a window of ``span`` rows: output row ``j`` reads from row ``j * stride - before`` on."""

    def need(start: int, stop: int) -> range:
        return range(start * stride - before, (stop - 1) * stride - before + span)

    return footprint_from(source, target, need, edge)
