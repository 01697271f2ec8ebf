"""Which consecutive rows each domain rank holds: arithmetic only, no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from credit_mesh._check import integer


class RowPiece(NamedTuple):
    """Consecutive global rows ``[start, stop)`` that one rank owns."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True, repr=False, eq=False)
class RowPartition:
    """How many consecutive rows each domain rank holds, north to south; uneven is normal.

    Rank ``r`` owns the global rows ``[offsets[r], offsets[r + 1])``. Boundaries between ranks are multiples of
    ``granularity``, so that strides which divide it cut no rank's rows in the middle of a block; only the end of
    the last rank may lie elsewhere. Partitions compare and hash by their sizes alone: granularity says how one
    was made, not which rows anybody holds.

    Attributes:
        offsets: First row of each rank, and after them the number of rows: one entry more than there are ranks.
        key: The sizes as text, to name the partition by; equal partitions have equal keys.

    Args:
        sizes: Rows of each rank.
        granularity: Boundaries between ranks must be multiples of this.
        allow_empty: Let ranks hold no rows, as they may for results that moved (all rows on one rank, say) and for
            the few rows that deep layers leave. The partition of a model's input has none.

    Raises:
        ValueError: If a size is no integer or negative, a rank would be without rows and ``allow_empty`` is not set,
            or a boundary is not a multiple of ``granularity``.
    """

    sizes: tuple[int, ...]
    granularity: int = 1
    allow_empty: bool = False
    offsets: tuple[int, ...] = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, Sequence) or isinstance(self.sizes, str) or not len(self.sizes):
            raise ValueError(f"sizes must list the rows of each rank, one or more; got {self.sizes!r}")
        sizes = tuple(integer(f"rows of rank {rank}", size, least=0) for rank, size in enumerate(self.sizes))
        granularity = integer("granularity", self.granularity, least=1)
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "granularity", granularity)
        # Worked out here, not on demand: torch.compile cannot trace a cached_property.
        object.__setattr__(self, "offsets", (0, *accumulate(sizes)))
        object.__setattr__(self, "key", ",".join(map(str, sizes)))
        if not self.allow_empty and 0 in sizes:
            raise ValueError(
                f"rank {sizes.index(0)} would hold no rows of {sum(sizes)} (sizes {_runs(sizes)}); "
                f"{_largest_that_fits(sum(sizes), granularity)}"
            )
        # The boundary after the last rows of all may lie anywhere, also where empty ranks follow it.
        for rank, boundary in enumerate(self.offsets[1:-1]):
            if boundary % granularity and boundary != self.rows:
                raise ValueError(
                    f"the boundary after rank {rank} is row {boundary}, which is not a multiple of "
                    f"granularity={granularity} (sizes {_runs(sizes)})"
                )

    @classmethod
    def even(cls, rows: int, ranks: int, granularity: int = 1) -> RowPartition:
        """Spread ``rows`` over ``ranks`` as evenly as whole blocks of ``granularity`` rows allow.

        Earlier ranks take the blocks that do not divide; the last rank takes the rows that fill no block. So 241
        rows over 4 ranks are 61, 60, 60, 60, and with a granularity of 16 they are 64, 64, 64, 49.

        Raises:
            ValueError: If a rank would be left without rows; the message says how many ranks fit.
        """
        rows = integer("rows", rows, least=1)
        ranks = integer("ranks", ranks, least=1)
        granularity = integer("granularity", granularity, least=1)
        blocks, remainder = divmod(rows, granularity)
        share, extra = divmod(blocks, ranks)
        sizes = [(share + (rank < extra)) * granularity for rank in range(ranks)]
        sizes[-1] += remainder
        if 0 in sizes:
            raise ValueError(
                f"{rows} rows over {ranks} ranks with granularity={granularity} would leave rank {sizes.index(0)} "
                f"without rows; {_largest_that_fits(rows, granularity)}"
            )
        return cls(tuple(sizes), granularity)

    @property
    def rows(self) -> int:
        """Number of rows of all ranks together."""
        return self.offsets[-1]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.sizes)

    def interval(self, rank: int) -> range:
        """The global rows of a rank."""
        rank = integer("rank", rank)
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank must be in 0..{self.ranks - 1}; got {rank}")
        return range(self.offsets[rank], self.offsets[rank + 1])

    def owner(self, row: int) -> int:
        """The rank that holds a global row."""
        row = integer("row", row)
        if not 0 <= row < self.rows:
            raise ValueError(f"row must be in 0..{self.rows - 1}; got {row}")
        return bisect_right(self.offsets, row) - 1

    def owners(self, start: int, stop: int) -> Iterator[RowPiece]:
        """Split the global rows ``[start, stop)`` by owner, in order; ranks that hold none of them are left out.

        Raises:
            ValueError: If the interval leaves the rows of this partition.
        """
        start, stop = integer("start", start), integer("stop", stop)
        if not 0 <= start <= stop <= self.rows:
            raise ValueError(f"the interval [{start}, {stop}) must lie within [0, {self.rows})")
        return self._pieces(start, stop)

    def _pieces(self, start: int, stop: int) -> Iterator[RowPiece]:
        while start < stop:
            rank = self.owner(start)
            end = min(stop, self.offsets[rank + 1])
            yield RowPiece(rank, start, end)
            start = end

    def strided(self, stride: int, rows: int | None = None) -> RowPartition:
        """Partition of the output of a layer with a stride: row ``j`` goes to the owner of input row ``j * stride``.

        Args:
            stride: Stride of the layer.
            rows: Output rows of all ranks, where padding or a valid kernel makes them other than
                ``ceil(rows / stride)``. The last rank takes what is left over; where there are fewer, the last ranks
                go without, and may end up empty.
        """
        stride = integer("stride", stride, least=1)
        rows = -(-self.rows // stride) if rows is None else integer("rows", rows, least=0)
        granularity = self.granularity // stride if self.granularity % stride == 0 else 1
        return self._with_boundaries([-(-boundary // stride) for boundary in self.offsets], rows, granularity)

    def upsampled(self, factor: int, rows: int | None = None) -> RowPartition:
        """Partition of the output of an upsampling: row ``i`` goes to the owner of input row ``i // factor``.

        Args:
            factor: Output rows for each input row.
            rows: Output rows of all ranks, where they are other than ``rows * factor``. The last rank takes what is
                left over; where there are fewer, the last ranks go without, and may end up empty.
        """
        factor = integer("factor", factor, least=1)
        rows = self.rows * factor if rows is None else integer("rows", rows, least=0)
        return self._with_boundaries([boundary * factor for boundary in self.offsets], rows, self.granularity * factor)

    def _with_boundaries(self, boundaries: list[int], rows: int, granularity: int) -> RowPartition:
        ends = [min(boundary, rows) for boundary in boundaries[:-1]] + [rows]
        if any(end % granularity and end != rows for end in ends):
            granularity = 1  # ranks at the end that held no rows before now take what is left over
        sizes = tuple(stop - start for start, stop in pairwise(ends))
        return RowPartition(sizes, granularity, allow_empty=True)

    def __eq__(self, other: object) -> bool:
        return self.sizes == other.sizes if isinstance(other, RowPartition) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)  # text remembers its hash, and partitions are keys of caches

    def __repr__(self) -> str:
        block = f", granularity {self.granularity}" if self.granularity > 1 else ""
        return f"RowPartition({self.rows} rows over {self.ranks}: {_runs(self.sizes)}{block})"


def _largest_that_fits(rows: int, granularity: int) -> str:
    return f"at most {max(1, -(-rows // granularity))} ranks fit {rows} rows in blocks of {granularity}"


def _runs(sizes: Sequence[int]) -> str:
    """Sizes with repeats folded: ``61, 60 x 3``."""
    folded = ((size, len(list(repeats))) for size, repeats in groupby(sizes))
    return ", ".join(f"{size} x {count}" if count > 1 else str(size) for size, count in folded)
