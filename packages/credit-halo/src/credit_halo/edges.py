"""What lies beyond the edge of a tensor's rows: the edge rules, as arithmetic on row numbers."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("zeros", "constant", "reflect", "replicate", "circular", "pole")


class Span(NamedTuple):
    """Consecutive positions of what a rank needs, and the rows of the tensor that they hold.

    Attributes:
        at: First position.
        length: Number of positions.
        row: Row of the tensor at the first position; None where the rule fills with a constant.
        step: What each further position adds to the row: 0 where one row is repeated, negative where it is mirrored.
        crossed: Whether the rows come from across a pole, half a turn of longitude away.
    """

    at: int
    length: int
    row: int | None
    step: int
    crossed: bool = False


@dataclass(frozen=True)
class EdgeRule:
    """How rows before the first and after the last are filled.

    ========= ===================================================================================
    kind      what row ``-i`` holds, ``i >= 1`` (rows after the last mirror this)
    ========= ===================================================================================
    zeros     0
    constant  ``value``
    reflect   row ``i``: mirrored about the first row, which is not repeated; ``i`` below the height
    replicate row 0
    circular  row ``H - i``: the first and the last row are neighbours; any number of turns
    pole      row ``i - 1`` (row ``i`` where the pole itself is a row), rolled by half the longitudes
    ========= ===================================================================================

    Args:
        kind: One of the kinds above.
        value: Fill of ``constant``.
        pole_is_row: For ``pole``: the first and the last row lie on the poles, as in a 721-row grid, and are not
            repeated.
        signs: For ``pole``: factor of what comes from across the pole. Vector components change sign there: -1 for
            u and v alone, or one factor for each entry of ``channel_dim``.
        lon_dim: For ``pole``: the dim of longitude, with an even number of points.
        channel_dim: For ``pole``: the dim that a sequence of ``signs`` belongs to.

    Raises:
        ValueError: For an unknown kind, or signs other than 1 and -1.
    """

    kind: str = "zeros"
    value: float = 0.0
    pole_is_row: bool = False
    signs: int | tuple[int, ...] = 1
    lon_dim: int = -1
    channel_dim: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"edge must be one of {', '.join(map(repr, KINDS))}; got {self.kind!r}")
        if isinstance(self.signs, Sequence):
            object.__setattr__(self, "signs", tuple(self.signs))
        signs = self.signs if isinstance(self.signs, tuple) else (self.signs,)
        if any(isinstance(sign, (bool, float)) for sign in signs) or not set(signs) <= {1, -1}:
            raise ValueError(f"signs must be 1 or -1, or a sequence of them; got {self.signs!r}")
        whole = tuple(int(sign) for sign in signs)
        object.__setattr__(self, "signs", whole if isinstance(self.signs, tuple) else whole[0])
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise ValueError(f"value must be a number; got {self.value!r}")
        # Plain numbers, whatever they came as: a rule is written into the names of plans.
        object.__setattr__(self, "value", float(self.value) if isinstance(self.value, float) else int(self.value))
        object.__setattr__(self, "pole_is_row", bool(self.pole_is_row))
        for name in ("lon_dim", "channel_dim"):
            try:
                object.__setattr__(self, name, operator.index(getattr(self, name)))
            except TypeError:
                raise ValueError(f"{name} must be an integer; got {getattr(self, name)!r}") from None

    @classmethod
    def of(cls, rule: EdgeRule | str) -> EdgeRule:
        """Take a rule, or the name of one that needs no parameters."""
        return rule if isinstance(rule, EdgeRule) else cls(rule)

    @property
    def linear(self) -> EdgeRule:
        """This rule without the constant that it may add."""
        return EdgeRule("zeros") if self.kind == "constant" else self

    def spans(self, rows: range, height: int) -> Iterator[Span]:
        """Translate needed rows, which may lie beyond the edges, to rows of a tensor of ``height`` rows.

        Raises:
            ValueError: If the rule has no row for one that is needed: ``reflect`` and ``pole`` reach as far as the
                tensor is high, and no rule but a constant fills from a tensor without rows.
        """
        at = 0
        while at < len(rows):
            first = rows[at]
            lower, upper = self._region(first, height)
            # Rows from here on that lie in the same region.
            count = (upper - 1 - first) // rows.step + 1 if rows.step > 0 else (first - lower) // -rows.step + 1
            count = min(count, len(rows) - at)
            yield self._span(at, count, first, rows.step, height)
            at += count

    def _region(self, row: int, height: int) -> tuple[int, int]:
        if self.kind == "circular" and height:
            turn = row // height * height
            return turn, turn + height
        if row < 0:
            return -_FAR, 0
        return (0, height) if row < height else (height, _FAR)

    def _span(self, at: int, count: int, row: int, step: int, height: int) -> Span:
        if 0 <= row < height:
            return Span(at, count, row, step)
        if self.kind in ("zeros", "constant"):
            return Span(at, count, None, 0)
        if height == 0:
            raise ValueError(f"edge {self.kind!r} has nothing to fill row {row} with: the tensor has no rows")
        if self.kind == "circular":
            return Span(at, count, row % height, step)
        if self.kind == "replicate":
            return Span(at, count, 0 if row < 0 else height - 1, 0)
        # Mirrored about the first or the last row, or about the edge just beyond it.
        repeats_edge = self.kind == "pole" and not self.pole_is_row
        mirror = (0 if row < 0 else 2 * (height - 1)) + (0 if not repeats_edge else -1 if row < 0 else 1)
        last = row + (count - 1) * step
        for needed in (row, last):
            if not 0 <= mirror - needed < height:
                reach = height if repeats_edge else height - 1
                raise ValueError(
                    f"edge {self.kind!r} reaches {reach} rows beyond a tensor of {height} rows; row {needed} was needed"
                )
        return Span(at, count, mirror - row, -step, crossed=self.kind == "pole")


_FAR = 1 << 62


def pole_crossing(
    *, pole_is_row: bool = False, signs: int | Sequence[int] = 1, lon_dim: int = -1, channel_dim: int = 1
) -> EdgeRule:
    """The edge rule of a global grid: beyond a pole lie the rows half a turn of longitude away.

    Args:
        pole_is_row: Whether the first and the last row lie on the poles (721 rows) or half a spacing off them (720).
        signs: -1 for vector components, or one factor for each channel.
        lon_dim: The dim of longitude.
        channel_dim: The dim that a sequence of signs belongs to.
    """
    return EdgeRule(
        "pole",
        pole_is_row=pole_is_row,
        signs=tuple(signs) if isinstance(signs, Sequence) else signs,
        lon_dim=lon_dim,
        channel_dim=channel_dim,
    )


def constant(value: float) -> EdgeRule:
    """The edge rule that fills with a constant, such as ``-inf`` before a maximum."""
    return EdgeRule("constant", value=value)
