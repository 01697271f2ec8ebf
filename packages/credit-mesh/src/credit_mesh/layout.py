"""Which rank sits where on the (dp, tp, domain) mesh: arithmetic only, no torch, no process groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from credit_mesh._check import integer

AXES = ("dp", "tp", "domain")
"""The mesh axes, outermost first: consecutive ranks are domain neighbours."""


class Coords(NamedTuple):
    """Where a rank sits on each axis."""

    dp: int
    tp: int
    domain: int


@dataclass(frozen=True)
class RankLayout:
    """A world of ranks, row-major over ``(dp, tp, domain)`` with domain innermost.

    The rank at ``(d, t, m)`` is ``(d * tp + t) * domain + m``. Every answer is a formula: a layout of 100,000
    ranks costs as much as one of 8.

    Attributes:
        dp: Number of data-parallel replicas.
        tp: Tensor-parallel degree.
        domain: Number of domain ranks that share a sample's rows.

    Raises:
        ValueError: If a size is no positive integer.
    """

    dp: int = 1
    tp: int = 1
    domain: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            object.__setattr__(self, axis, integer(f"the {axis} axis", getattr(self, axis), least=1))

    @classmethod
    def from_world(cls, world_size: int, *, tensor: int = 1, domain: int = 1) -> RankLayout:
        """Arrange ``world_size`` ranks; what tensor and domain leave over is the data axis.

        Raises:
            ValueError: If a number is no positive integer, or ``world_size`` is not divisible by ``tensor * domain``;
                then the message says which degrees fit.
        """
        world_size = integer("world_size", world_size, least=1)
        tensor = integer("tensor", tensor, least=1)
        domain = integer("domain", domain, least=1)
        if world_size % (tensor * domain):
            raise ValueError(
                f"world_size={world_size} is not divisible by tensor * domain = {tensor} * {domain} = "
                f"{tensor * domain}; {_degrees_that_fit(world_size, tensor, domain)}"
            )
        return cls(world_size // (tensor * domain), tensor, domain)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp * self.tp * self.domain

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return (self.dp, self.tp, self.domain)[_axis_index(axis)]

    def coords(self, rank: int) -> Coords:
        """Coordinates of a rank."""
        rest, domain = divmod(self._checked(rank), self.domain)
        return Coords(*divmod(rest, self.tp), domain)

    def rank(self, dp: int = 0, tp: int = 0, domain: int = 0) -> int:
        """Rank at the given coordinates."""
        for axis, at in zip(AXES, (dp, tp, domain), strict=True):
            if not 0 <= integer(f"{axis} coordinate", at) < self.size(axis):
                raise ValueError(f"{axis} coordinate must be in 0..{self.size(axis) - 1}; got {at}")
        return (dp * self.tp + tp) * self.domain + domain

    def group(self, rank: int, axis: str) -> range:
        """The ranks that differ from ``rank`` only along ``axis``, in order along it."""
        stride = self._stride(axis)
        first = rank - self.coords(rank)[_axis_index(axis)] * stride
        return range(first, first + self.size(axis) * stride, stride)

    def groups(self, axis: str) -> Iterator[range]:
        """Every group along ``axis``, by first rank; together they hold each rank once."""
        stride = self._stride(axis)
        block = stride * self.size(axis)
        for start in range(0, self.world_size, block):
            for first in range(start, start + stride):
                yield range(first, first + block, stride)

    def neighbors(self, rank: int, axis: str = "domain", *, periodic: bool = False) -> tuple[int | None, int | None]:
        """Ranks before and after ``rank`` along ``axis``; for the domain axis, north and south of it.

        Args:
            rank: The rank whose neighbours are wanted.
            axis: The axis to look along.
            periodic: Whether the first and the last rank are neighbours, as on a circle of longitude.

        Returns:
            ``(before, after)``. At an edge the entry is None; a periodic axis has no edge, and on one of a single
            rank that rank is its own neighbour.
        """
        group = self.group(rank, axis)
        at = group.index(rank)
        if periodic:
            return group[at - 1], group[(at + 1) % len(group)]
        return (group[at - 1] if at else None), (group[at + 1] if at + 1 < len(group) else None)

    def _stride(self, axis: str) -> int:
        return (self.tp * self.domain, self.domain, 1)[_axis_index(axis)]

    def _checked(self, rank: int) -> int:
        rank = integer("rank", rank)
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}; got {rank}")
        return rank


def _axis_index(axis: str) -> int:
    if axis not in AXES:
        raise ValueError(f"axis must be one of {', '.join(AXES)}; got {axis!r}")
    return AXES.index(axis)


def _degrees_that_fit(world_size: int, tensor: int, domain: int) -> str:
    """Say which degrees would divide the world, and which fit beside each one that was asked for."""
    parts = [f"tensor * domain must be one of {_listed(_divisors(world_size))}"]
    for name, value, other in (("tensor", tensor, "domain"), ("domain", domain, "tensor")):
        if world_size % value == 0:
            parts.append(f"with {name}={value}, {other} may be {_listed(_divisors(world_size // value))}")
    return "; ".join(parts)


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
