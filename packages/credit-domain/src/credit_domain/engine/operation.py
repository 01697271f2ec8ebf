"""What an operation is to the rest of the package (:class:`RowOp`), and the driver that runs any of them.

An operation says which rows it reads, by integers. The driver does the rest for all operations alike: it finds the
sharded dim, asks who holds which rows, works out this rank's part once, brings the rows, calls torch's own operator on
them, and keeps a rank without rows in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from credit_domain.domain import Domain, Step, bring, constant, domain_of, normal_dim, sizes_of, step_of
from credit_domain.engine.footprint import Footprint
from credit_halo import EdgeRule
from credit_halo.extend import marked
from credit_mesh import DomainParallelManager, RowPartition


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


class Call(NamedTuple):
    """What every operation is told beside its own arguments.

    Attributes:
        dim: The sharded dim.
        partition: Who holds which rows of the input; where None, the ranks ask each other.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call the operation.
        layer: The number that a layer remembers its partition by; None for a function.
    """

    dim: int
    partition: RowPartition | None
    manager: DomainParallelManager | None
    label: str
    layer: Hashable = None


class Placed(NamedTuple):
    """An operation on this rank.

    Attributes:
        dim: The sharded dim, negative.
        domain: Whose ranks take part.
        sizes: Input rows of each rank.
        step: The rows to bring, and those that come out.
        call: What the operation was told.
    """

    dim: int
    domain: Domain
    sizes: tuple[int, ...]
    step: Step
    call: Call

    def bring(self, x: Tensor, *, new: bool = False) -> Tensor:
        """The rows that this rank reads; see :func:`credit_domain.domain.bring`."""
        return bring(x, self.dim, self.step, self.domain, self.call.label, new=new)


def place(op: RowOp, x: Tensor, call: Call, dim: int, domain: Domain) -> Placed:
    """Find this rank's part of an operation.

    Raises:
        ValueError: On all ranks alike, if the operation cannot work on the rows.

    Collectives:
        Those of :func:`credit_domain.domain.sizes_of`.
    """
    sizes = sizes_of(x, dim, domain, call.label, call.partition, call.layer)
    return Placed(dim, domain, sizes, step_for(op, sizes, domain.rank, call.label), call)


def step_for(op: RowOp, sizes: tuple[int, ...], rank: int, label: str) -> Step:
    """This rank's part of an operation; worked out once for the same numbers, and while compiled code is traced."""
    return _step_for(type(op).__name__, tuple(op), sizes, rank, label)


@constant
def _step_for(kind: str, numbers: tuple[Any, ...], sizes: tuple[int, ...], rank: int, label: str) -> Step:
    return _cached_step(kind, numbers, sizes, rank, label)


@lru_cache(maxsize=4096)
def _cached_step(kind: str, numbers: tuple[Any, ...], sizes: tuple[int, ...], rank: int, label: str) -> Step:
    try:
        return step_of(footprint_for(kind, numbers, sizes), rank)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error.__cause__


@lru_cache(maxsize=4096)
def footprint_for(kind: str, numbers: tuple[Any, ...], sizes: tuple[int, ...]) -> Footprint:
    """The footprint of an operation, given by its name and numbers.

    Raises:
        ValueError: If it cannot work on these rows.
    """
    op: RowOp = ROW_OPS[kind](*numbers)
    return op.footprint(RowPartition(sizes, allow_empty=True))


Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


def run(
    op: RowOp,
    x: Tensor,
    call: Call,
    nd: int,
    whole: Callable[[Tensor], Result],
    part: Callable[[Tensor, Placed], Result],
    least: int = 1,
) -> Result:
    """Run an operation on the last ``nd`` dims of this rank's part of a tensor.

    Args:
        op: What it does along the sharded dim.
        x: This rank's rows: a batch, channels and ``nd`` dims, or as many without a batch.
        call: What it was told.
        nd: Number of dims that may be sharded.
        whole: Torch's operator where one rank has all rows.
        part: Torch's operator on the rows that were brought, (B, C, ...), without padding along the sharded dim.
        least: The fewest rows of which torch's operator makes one.

    Returns:
        This rank's rows of what comes out.

    Raises:
        ValueError: On all ranks alike, if ``call.dim`` is none of the last ``nd`` dims; and as :func:`place`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where no row is missing.
    """
    dim, domain = normal_dim(call.dim, x.ndim, nd, call.label), domain_of(call.manager)
    if domain.size == 1:
        return whole(x)
    unbatched = x.ndim == nd + 1
    x = x.unsqueeze(0) if unbatched else x
    placed = place(op, x, call, dim, domain)
    rows = placed.bring(x)
    out = part(rows, placed) if placed.step.out else without_rows(lambda x: part(x, placed), rows, dim, least)
    return _each(out, lambda x: x.squeeze(0)) if unbatched else out


def move(op: RowOp, x: Tensor, call: Call) -> Tensor:
    """Rows that only change their place or owner: a new tensor, as torch's own functions return.

    Args, errors and collectives are those of :func:`run`; any dim of ``x`` may be the sharded one.
    """
    dim = normal_dim(call.dim, x.ndim, x.ndim, call.label)
    return place(op, x, call, dim, domain_of(call.manager)).bring(x, new=True)


def without_rows(fn: Callable[[Tensor], Result], rows: Tensor, dim: int, least: int) -> Result:
    """What a function makes of no rows, which torch's own refuse: it runs on no batch of ``least`` rows.

    So this rank stays in the graph, and the parameters that the function uses have gradients.
    """
    batch = rows.shape[0]
    return _each(fn(resized(rows, dim, 0, least)), lambda out: resized(out, dim, batch, 0))


def with_rows(x: Tensor, dim: int, few: int, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function without parameters makes of rows; of no rows, no rows of the shape that ``few`` give."""
    if x.shape[dim]:
        return fn(x)
    shape = [*x.shape]
    shape[dim] = few
    shape = [*fn(x.new_empty(shape)).shape]
    shape[dim] = 0
    return marked(x.reshape(shape)).clone()  # a new tensor, and a part of what a checkpoint computes again, as others


def resized(none: Tensor, dim: int, batch: int, rows: int) -> Tensor:
    """A tensor without elements, with another number of samples and of rows, one of which is 0."""
    return none.reshape(batch, *none.shape[1:dim], rows, *none.shape[none.ndim + dim + 1 :])


def batched(x: Tensor, nd: int, label: str) -> None:
    """Refuse tensors that are neither (B, C, ...) nor (C, ...) with ``nd`` dims after the channels.

    Raises:
        ValueError: If so.
    """
    if x.ndim not in (nd + 1, nd + 2):
        raise ValueError(f"{label}: expected {nd + 1} or {nd + 2} dims; got a tensor of shape {tuple(x.shape)}")


def _each(out: Result, fn: Callable[[Tensor], Tensor]) -> Result:
    return fn(out) if isinstance(out, Tensor) else tuple(fn(x) for x in out)


def per_dim(value: Any, nd: int) -> tuple[Any, ...]:
    """One entry for each spatial dim, as torch's layers take either."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * nd if len(value) == 1 else tuple(value)
    return (value,) * nd
