"""What an operation is to the rest of the package: one record of integers, its footprint."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

from credit_domain.engine.footprint import Footprint
from credit_halo import EdgeRule
from credit_mesh import RowPartition


class RowOp(Protocol):
    """What an operation does along the sharded dim: a NamedTuple of integers and strings, marked :func:`row_op`.

    Layer, function, converter, planner and granularity ask the same record. One that makes several rows one, or one row
    several, has a property ``ratio``; see :func:`ratio_of`.
    """

    def footprint(self, source: RowPartition) -> Footprint:
        """Which rows each rank reads, and who owns what comes out.

        Raises:
            ValueError: If the operation cannot work on these rows; for every rank alike.
        """

    def __iter__(self) -> Iterator[Any]:
        """Its numbers, in the order in which its class takes them."""


def ratio_of(op: RowOp | None) -> tuple[int, int]:
    """How many rows become one, and how many one becomes; ``(1, 1)`` where no number of the operation says so."""
    ratio: tuple[int, int] = getattr(op, "ratio", (1, 1))
    return ratio


_Op = TypeVar("_Op")
ROW_OPS: dict[str, Any] = {}
"""The operations by name: compiled code carries a name and numbers, not an object."""


def row_op(kind: type[_Op]) -> type[_Op]:
    """Make the class of a :class:`RowOp` known, under its name.

    Raises:
        ValueError: If another class has that name.
    """
    make: Any = kind
    known = ROW_OPS.get(kind.__name__, make)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(f"two operations are called {kind.__name__}: one is of {known.__module__}")
    ROW_OPS[kind.__name__] = make
    return kind


@row_op
class RowOfEach(NamedTuple):
    """Every rank gets the one row that each rank has, if it has any."""

    def footprint(self, source: RowPartition) -> Footprint:
        """Every rank reads all rows."""
        return Footprint(source, source, (range(source.rows),) * source.ranks, EdgeRule())


@lru_cache(maxsize=4096)
def footprint_for(op: type, numbers: tuple[Any, ...], sizes: tuple[int, ...]) -> Footprint:
    """The footprint of an operation, given by its class and numbers.

    Raises:
        ValueError: If it cannot work on these rows.
    """
    record: RowOp = op(*numbers)
    return record.footprint(RowPartition(sizes, allow_empty=True))
