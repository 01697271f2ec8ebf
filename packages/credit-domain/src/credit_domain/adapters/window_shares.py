"""Which rows each rank is brought so that a module's own code cuts them into whole windows of that rank."""

from __future__ import annotations

from typing import Literal, NamedTuple

from credit_domain.blocks.block import step_between, worked_out
from credit_domain.engine.driver import Step
from credit_mesh import RowPartition

Kind = Literal["windows", "dilated", "merge", "expand"]
"""``windows``: consecutive rows, perhaps rolled; ``dilated``: every n-th row of n windows; ``merge``: each window
becomes one row; ``expand``: each row becomes several."""

PADDING = ("pad", "pad roll", "roll pad")
"""What a module may call, in this order, to make up whole windows."""

_NO_ROW = -1  # beyond the edge: the exchange fills it with zeros
_PAD = None  # padding that the module itself adds at the end


class Cutting(NamedTuple):
    """How a module cuts the grid into windows.

    Attributes:
        window: Rows of a window; of ``expand``, rows that a row becomes.
        shift: Rows that it rolls towards row 0 before it cuts.
        kind: What it does with windows.
        padding: One of :data:`PADDING` if it pads rows that its window does not divide; empty otherwise.
        channels_last: Whether it takes (B, H, W, C).
        resolution: Name of the attribute that stores the resolution (H, W) of the whole input; empty if it has none.
    """

    window: int
    shift: int
    kind: Kind
    padding: str
    channels_last: bool
    resolution: str


class Share(NamedTuple):
    """What a rank works on.

    Attributes:
        rows: The rows that it gets.
        windows: Windows of all ranks.
        own: This rank's windows ``[own[0], own[1])``.
        around: Windows of zeros before and after them.
    """

    rows: tuple[int, ...]
    windows: int
    own: tuple[int, int]
    around: tuple[int, int]

    @property
    def listed(self) -> list[range]:
        """Its windows; those of zeros count as the first."""
        before, after = self.around
        return [*[range(1)] * before, range(*self.own), *[range(1)] * after]

    def result(self, window: int, kind: Kind) -> tuple[int, int]:
        """Rows that come of them, and how many of these are kept where nothing is brought back."""
        if kind == "merge":
            return -(-len(self.rows) // window), self.own[1] - self.own[0]
        if kind == "expand":
            return len(self.rows) * window, (self.own[1] - self.own[0]) * window
        return len(self.rows), len(self.rows)


def _owners(source: RowPartition, window: int, shift: int, kind: Kind) -> list[int]:
    """Who works on each window: the owner of its first row; those with padding go to one rank."""
    windows = -(-source.rows // window)
    first = [k * window + (0 if kind == "dilated" else shift) for k in range(windows)]
    owners = [source.owner(min(row, source.rows - 1)) for row in first]
    if shift and windows > 1 and first[-1] > source.rows:
        owners[-1] = owners[-2]
    return owners


def _share(rank: int, source: RowPartition, window: int, shift: int, kind: Kind, roll_first: bool) -> Share:
    """The rows of a rank, in the order in which the module's own code cuts them into that rank's windows."""
    rows, owners = source.rows, _owners(source, window, shift, kind)
    windows = len(owners)
    mine = [k for k, owner in enumerate(owners) if owner == rank]
    own = (mine[0], mine[-1] + 1) if mine else (0, 0)
    if kind == "dilated":
        listed = [slot * windows + k for slot in range(window) for k in mine]
        return Share(
            tuple(row for row in listed if row < rows) or (_NO_ROW,) * window, windows, own, (0, int(not mine))
        )
    before = after = 0
    if not mine:
        after = 1
    elif shift and windows > 1:
        # Code that masks the last window, or does not roll a single one, is to find that here as in the whole.
        if mine[-1] != windows - 1:
            after = 1
        elif len(mine) == 1:
            before = 1
    period = rows if roll_first else windows * window
    slots: list[int | None] = []
    for k in mine:
        for slot in range(k * window, (k + 1) * window):
            row = (slot + shift) % period
            slots.append(row if row < rows and slot < period else _PAD)
    slots = [_NO_ROW] * (before * window) + slots + [_NO_ROW] * (after * window)
    if roll_first:
        while slots[-1] is _PAD:
            slots.pop()
    turn = len(slots) - shift % len(slots)
    slots = slots[turn:] + slots[:turn]  # which its own roll undoes
    while slots[-1] is _PAD:
        slots.pop()
    found = tuple(row for row in slots if row is not None)
    assert len(found) == len(slots), "padding must come last"
    return Share(found, windows, own, (before, after))


def shares_of(
    source: RowPartition, window: int, shift: int = 0, kind: Kind = "windows", roll_first: bool = False
) -> list[Share]:
    """What each rank works on, for a module that cuts so, and perhaps rolls before it pads."""
    size = 1 if kind == "expand" else window
    return [_share(rank, source, size, shift, kind, roll_first) for rank in range(source.ranks)]


class Regrouping(NamedTuple):
    """What a rank is brought and sends back.

    Attributes:
        split: Brings the rows of this rank's windows.
        join: Brings its own rows back; of ``merge`` and ``expand`` the output stays, and this is None.
        share: What this rank works on.
        out: Rows that the module must return.
        kept: Those of them, from the first, that are this rank's, where nothing is brought back.
    """

    split: Step
    join: Step | None
    share: Share
    out: int
    kept: int


@worked_out
def regroup(sizes: tuple[int, ...], rank: int, window: int, shift: int, kind: Kind, roll_first: bool) -> Regrouping:
    """This rank's part, where the ranks hold so many rows."""
    source = RowPartition(sizes, allow_empty=True)
    shares = shares_of(source, window, shift, kind, roll_first)
    held = RowPartition(tuple(len(share.rows) for share in shares), allow_empty=True)
    split = step_between(source, held, [share.rows for share in shares], rank)
    join = None
    if kind not in ("merge", "expand"):
        place = places(shares)
        home = [tuple(place[row] for row in source.interval(r)) for r in range(len(sizes))]
        join = step_between(held, source, home, rank)
    return Regrouping(split, join, shares[rank], *shares[rank].result(window, kind))


def places(shares: list[Share]) -> dict[int, int]:
    """Where each row lies after the regrouping, counted over all ranks."""
    return {row: i for i, row in enumerate(row for share in shares for row in share.rows)}
