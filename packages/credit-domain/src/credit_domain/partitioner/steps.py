"""What a program does to a value between two operators: functions of this rank's tensor, named for traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from credit_domain.engine.driver import Call, move
from credit_domain.engine.ranks import domain_of
from credit_domain.ops.rearranging import Regroup, Repartition
from credit_domain.partitioner.row_layout import Rows
from credit_halo import transpose_rows
from credit_halo.extend import group_by_name
from credit_mesh import DomainParallelManager, RowPartition

Step = Callable[..., Any]


class Planned:
    """A manager for operations of which it is decided before anything runs how their rows lie."""

    rows_are_planned = True

    def __init__(self, manager: DomainParallelManager) -> None:
        self._manager = manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_manager"], name)


class Place(NamedTuple):
    """Where a program runs.

    Attributes:
        manager: Its domain-parallel manager, which tells operations that rows are planned.
        rank: This domain rank.
        ranks: Number of domain ranks.
    """

    manager: Any
    rank: int
    ranks: int


def partition(sizes: Sequence[int]) -> RowPartition:
    """The partition of units of which a rank may have none."""
    return RowPartition(tuple(sizes), allow_empty=True)


def named(step: Step, name: str) -> Step:
    """Give a step the name that it has in the text of a program."""
    step.__name__ = step.__qualname__ = name
    step.__module__ = "credit_domain"
    return step


def sliced(rows: Rows, place: Place) -> Step:
    """This rank's part of a value that it holds whole."""
    start, size, dim, outer = rows.start(place.rank), rows.sizes[place.rank], rows.dim, rows.outer

    def slice_rows(x: Tensor) -> Tensor:
        if outer == 1:
            return x.narrow(dim, start, size)
        return split(x, dim, outer).narrow(dim + 1, start, size).flatten(dim, dim + 1)

    return named(slice_rows, "slice_rows")


def split(x: Tensor, dim: int, outer: int) -> Tensor:
    """A dim as two: how often the units stand there, and the units. Sizes are written out: there may be no rows."""
    return x.reshape(*x.shape[:dim], outer, x.shape[dim] // outer, *x.shape[dim + 1 :])


def on_no_rows(target: Step, dim: int) -> Step:
    """An operator for a rank without rows: it gets one row, and none of what comes out; the rank stays in the graph."""

    def one_row(value: Any) -> Any:
        if isinstance(value, Tensor):
            for at, size in enumerate(value.shape):
                if not size:
                    shape = [max(1, n) if d <= at else n for d, n in enumerate(value.shape)]
                    value = torch.cat([value, value.new_ones(shape)], at)
        return [one_row(item) for item in value] if isinstance(value, (list, tuple)) else value

    def no_row(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.narrow(dim, 0, 0)
        return tuple(no_row(item) for item in value) if isinstance(value, (list, tuple)) else value

    def step(*args: Any, **kwargs: Any) -> Any:
        return no_row(target(*one_row(args), **kwargs))

    return named(step, str(getattr(target, "__name__", "step")).replace(".", "_"))


def _on_units(rows: Rows, after: int, fn: Callable[[Tensor, int], Tensor]) -> Step:
    """A function of the units as a dim of their own; ``after`` says how many of them a rank has then."""
    dim, outer = rows.dim, rows.outer

    def step(x: Tensor) -> Tensor:
        if outer == 1:
            return fn(x, dim)
        return fn(split(x, dim, outer), dim + 1).flatten(dim, dim + 1)

    return step


def taken(rows: Rows, needs: Sequence[range | tuple[int, ...]], place: Place, label: str, name: str) -> Step:
    """Each rank gets the units that it lists."""
    part, op = partition(rows.sizes), Regroup(tuple(needs))

    def take(x: Tensor, dim: int) -> Tensor:
        return move(op, x, Call(dim, part, place.manager, label))

    return named(_on_units(rows, len(needs[place.rank]), take), name)


def whole(rows: Rows, place: Place, label: str) -> Step:
    """Every rank gets all units."""
    return taken(rows, (range(rows.units),) * place.ranks, place, label, "gather_rows")


def repartitioned(rows: Rows, sizes: tuple[int, ...], place: Place, label: str) -> Step:
    """The same units under another partition."""
    part, op = partition(rows.sizes), Repartition(sizes)

    def repartition(x: Tensor, dim: int) -> Tensor:
        return move(op, x, Call(dim, part, place.manager, label))

    return named(_on_units(rows, sizes[place.rank], repartition), "repartition")


def transposed(rows: Rows, target: Rows, place: Place, label: str) -> Step:
    """Another dim is divided instead."""
    source, wanted = partition(rows.sizes), partition(target.sizes)
    first, second = sorted((rows, target))

    def transpose(x: Tensor) -> Tensor:
        group = group_by_name(domain_of(place.manager).group)
        dims = {rows.dim: rows.dim, target.dim: target.dim}
        for each in (second, first):  # the later one first, so that the earlier keeps its number
            if each.outer > 1:
                x = split(x, each.dim, each.outer)
                dims = {dim: at + (dim >= each.dim) for dim, at in dims.items()}
        x = transpose_rows(x, source, wanted, dim=dims[rows.dim], to_dim=dims[target.dim], group=group, label=label)
        for each in (first, second):
            if each.outer > 1:
                x = x.flatten(each.dim, each.dim + 1)
        return x

    return named(transpose, "transpose_rows")
