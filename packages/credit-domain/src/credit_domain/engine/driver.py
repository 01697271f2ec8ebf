"""The driver that runs any operation on this rank's part of a tensor.

An operation says which rows it reads (:class:`credit_domain.engine.row_op.RowOp`). The driver does the rest for all of
them alike: it finds the sharded dim, asks who holds which rows, works out this rank's part once, brings the rows, calls
torch's own operator on them, and keeps a rank without rows in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import Domain, constant, domain_of, known_sizes, normal_dim, sizes_of
from credit_domain.engine.row_op import ROW_OPS, RowOp, footprint_for
from credit_domain.engine.skips import follow
from credit_domain.engine.traced_rows import rows as rows_of_all
from credit_halo import exchange_rows, plan_rows
from credit_halo.extend import marked, ops, plans
from credit_mesh import DomainParallelManager, RowPartition


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
        """The rows that this rank reads; see :func:`credit_domain.engine.driver.bring`."""
        return bring(x, self.dim, self.step, self.domain, self.call.label, new=new)


def place(op: RowOp, x: Tensor, call: Call, dim: int, domain: Domain) -> Placed:
    """Find this rank's part of an operation.

    Raises:
        ValueError: On all ranks alike, if the operation cannot work on the rows.

    Collectives:
        Those of :func:`credit_domain.engine.ranks.sizes_of`.
    """
    sizes = known_sizes(x.shape, dim, domain, call.layer) if call.partition is None and domain.size > 1 else None
    if sizes is None:
        sizes = sizes_of(x, dim, domain, call.label, call.partition, call.layer)
    return Placed(dim, domain, sizes, step_for(op, sizes, domain.rank, call.label), call)


def step_for(op: RowOp, sizes: tuple[int, ...], rank: int, label: str) -> Step:
    """This rank's part of an operation; worked out once for the same numbers, and while compiled code is traced.

    Raises:
        ValueError: If the operation is not known, or cannot work on the rows.
    """
    return _step_for(type(op).__name__, tuple(op), sizes, rank, label)


@constant
def _step_for(kind: str, numbers: tuple[Any, ...], sizes: tuple[int, ...], rank: int, label: str) -> Step:
    if kind not in ROW_OPS:
        raise ValueError(f"{label}: {kind} is no known operation; put @row_op before its class")
    return _cached_step(ROW_OPS[kind], numbers, sizes, rank, label)


@lru_cache(maxsize=4096)  # by class, not by name: in a notebook, a class is written more than once
def _cached_step(op: type, numbers: tuple[Any, ...], sizes: tuple[int, ...], rank: int, label: str) -> Step:
    try:
        return step_of(footprint_for(op, numbers, sizes), rank)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error.__cause__


class Step(NamedTuple):
    """How a rank gets the rows of a footprint, in terms that compiled code can carry.

    Attributes:
        plan: Key of the plan.
        local: Whether no rank needs more or less than its own rows, so that nothing is to be done.
        start: First global row that this rank reads.
        rows: Number of rows that it reads.
        first: First global row of the output that this rank owns.
        out: Number of output rows that it owns.
        total: Output rows of all ranks.
        sizes: Input and output rows of each rank, where a layer makes the one of the other.
    """

    plan: str
    local: bool
    start: int
    rows: int
    first: int
    out: int
    total: int
    sizes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def step_of(footprint: Footprint, rank: int) -> Step:
    """This rank's part of a footprint, planned."""
    plan = plan_rows(footprint.source, footprint.needs, rank=rank, edge=footprint.edge)
    need, own = footprint.needs[rank], footprint.target.interval(rank)
    target = footprint.target
    sizes = footprint.source.sizes, target.sizes
    start = need.start if isinstance(need, range) else 0
    return Step(plan.key, footprint.is_local, start, len(need), own.start, len(own), target.rows, sizes)


def bring(x: Tensor, dim: int, step: Step, domain: Domain, label: str, *, new: bool = False) -> Tensor:
    """The rows that a footprint says this rank reads.

    Where every rank needs just its own rows, this may be ``x`` itself or a view of it, which is right before an
    operator of torch. Functions that return what is brought ask for a ``new`` tensor, as torch's own return.

    Collectives:
        One message to and from each rank within reach; none where every rank needs just its own rows.
    """
    if not new:
        follow(*step.sizes, domain, label)
    if step.local:
        own = marked(x) if domain.size > 1 else x  # whatever asked for the partition asks again
        return own.clone() if new else own
    if domain.size == 1 and torch.compiler.is_exporting():
        traced: Tensor = rows_of_all(x, dim % x.ndim, step.plan)
        return traced
    if domain.size == 1 or torch.compiler.is_compiling():
        rows: Tensor = ops.exchange(x, dim % x.ndim, step.plan, domain.group, label, False, True)
        return rows
    return exchange_rows(x, plans[step.plan], dim=dim, group=domain.process_group, label=label)


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
    made = out.shape[dim] if isinstance(out, Tensor) else out[0].shape[dim]
    if made != placed.step.out:
        raise ValueError(f"{call.label}: {made} rows came out, where {type(op).__name__} says {placed.step.out}")
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


def is_unbatched(shape: Sequence[int], nd: int, label: str) -> bool:
    """Whether a tensor is (C, ...) with ``nd`` dims after the channels, and not (B, C, ...).

    Raises:
        ValueError: If it is neither.
    """
    if len(shape) not in (nd + 1, nd + 2):
        raise ValueError(f"{label}: expected {nd + 1} or {nd + 2} dims; got a tensor of shape {tuple(shape)}")
    return len(shape) == nd + 1


def _each(out: Result, fn: Callable[[Tensor], Tensor]) -> Result:
    return fn(out) if isinstance(out, Tensor) else tuple(fn(x) for x in out)


def per_dim(value: Any, nd: int) -> tuple[Any, ...]:
    """One entry for each spatial dim, as torch's layers take either."""
    if isinstance(value, (tuple, list)):
        return tuple(value) * nd if len(value) == 1 else tuple(value)
    return (value,) * nd
