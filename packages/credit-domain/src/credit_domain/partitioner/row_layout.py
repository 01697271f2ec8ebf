"""How the rows of a value lie on the ranks: integers only, no torch.

A dim of a tensor may hold several things at once: a batch of windows holds samples, rows of windows and columns of
windows. So a dim is taken as a product ``outer * units``, and the units are divided over the ranks. Columns that come
after the rows in such a dim, as in a dim of ``H * W`` tokens, make each rank's share a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class Rows(NamedTuple):
    """A dim is divided over the ranks.

    Attributes:
        dim: The dim, counted from the first.
        outer: How many times the units stand in it; each rank holds its units of each time.
        sizes: How many units each rank holds, in order.
        own: Whether the units are those that the model's input is divided in, or what became of them; not where another
            dim is divided for a while. Layouts that differ in it alone are equal.
    """

    dim: int
    outer: int
    sizes: tuple[int, ...]
    own: bool = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self[:3] == other[:3]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:3])

    @property
    def units(self) -> int:
        """Units of all ranks."""
        return sum(self.sizes)

    def start(self, rank: int) -> int:
        """First unit of a rank."""
        return sum(self.sizes[:rank])

    def size(self, rank: int) -> int:
        """Size of the dim on a rank."""
        return self.outer * self.sizes[rank]

    def shape(self, whole: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of a rank's part of a tensor."""
        return tuple(self.size(rank) if d == self.dim else size for d, size in enumerate(whole))


def plain(dim: int, sizes: Sequence[int], own: bool = True) -> Rows:
    """A dim that is divided as a whole."""
    return Rows(dim, 1, tuple(sizes), own)


def evenly(dim: int, units: int, ranks: int) -> Rows:
    """A dim that is divided for a while, as evenly as can be."""
    return plain(dim, even(units, ranks), own=False)


def even(units: int, ranks: int) -> tuple[int, ...]:
    """Units as even over the ranks as they can be."""
    each, more = divmod(units, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def in_blocks(sizes: Sequence[int], block: int) -> tuple[int, ...]:
    """The division nearest to ``sizes`` whose boundaries are multiples of ``block``, which divides the sum."""
    cuts = [0, *(round(cut / block) * block for cut in accumulate(sizes))]
    return tuple(b - a for a, b in pairwise(cuts))


def scaled(sizes: Sequence[int], units: int) -> tuple[int, ...]:
    """Other units, divided in proportion."""
    total = sum(sizes)
    cuts = [0, *(round(cut * units / total) for cut in accumulate(sizes))] if total else [0] * len(sizes) + [units]
    return tuple(b - a for a, b in pairwise(cuts))


def kept(sizes: Sequence[int], units: int) -> tuple[int, ...]:
    """Other units, whose boundaries have the same numbers; the last rank takes what is left over."""
    cuts = [0, *(min(cut, units) for cut in list(accumulate(sizes))[:-1]), units]
    return tuple(b - a for a, b in pairwise(cuts))


class Viewed(NamedTuple):
    """Where the units are after a view.

    Attributes:
        block: The boundaries between ranks must be multiples of this many units for it.
        dim: The dim that holds them.
        outer: How many times they stand in it.
        inner: How many units one block becomes.
    """

    block: int
    dim: int
    outer: int
    inner: int

    def of(self, sizes: Sequence[int], own: bool = True) -> Rows:
        """The layout for boundaries that are such multiples."""
        return Rows(self.dim, self.outer, tuple(size // self.block * self.inner for size in sizes), own)


def viewed(shape: Sequence[int], rows: Rows, new: Sequence[int]) -> Viewed | None:
    """Where the units of a value of ``shape`` lie once it is viewed as ``new``; None where they are torn apart.

    Where a view splits the units, the first part of the split is divided from then on.
    """
    units = rows.units
    if units < 2 or 0 in shape:
        return None
    stride = math.prod(shape[rows.dim + 1 :])  # entries from a unit to the next
    block = after = 1  # entries from one index of the dim to the next
    for dim in reversed(range(len(new))):
        if new[dim] > 1 and after <= stride < after * new[dim]:
            if stride % after or after * new[dim] % stride:
                return None
            room = after * new[dim] // stride  # how many units the dim has room for
            if room % units == 0:
                return Viewed(block, dim, room // units, stride // after)
            if units % room:
                return None
            stride, units, block = stride * room, units // room, block * room
        after *= new[dim]
    return None
