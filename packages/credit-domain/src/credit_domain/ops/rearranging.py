"""Moving the rows of a sharded tensor: roll, flip, crop, another partition, any regrouping."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from credit_domain.engine.driver import Call, move, step_for
from credit_domain.engine.footprint import Footprint, check_reach, footprint_from
from credit_domain.engine.ranks import domain_of, normal_dim, sizes_of
from credit_domain.engine.row_op import row_op
from credit_halo import EdgeRule, Need
from credit_halo.extend import repartition_needs
from credit_mesh import DomainParallelManager, RowPartition

Ints = int | Sequence[int]
Plain = tuple[range | tuple[int, ...], ...]
"""Lists of rows as constants of compiled code."""


@row_op
class Roll(NamedTuple):
    """Row ``i`` comes from row ``i - shift``, around the ends."""

    shift: int

    def footprint(self, source: RowPartition) -> Footprint:
        """See the class."""
        shift = self.shift % (source.rows or 1)
        return _within(source, lambda start, stop: range(start - shift, stop - shift), "circular")


@row_op
class Flip(NamedTuple):
    """Row ``i`` comes from row ``rows - 1 - i``."""

    def footprint(self, source: RowPartition) -> Footprint:
        """See the class."""
        last = source.rows - 1
        return _within(source, lambda start, stop: range(last - start, last - stop, -1))


@row_op
class Crop(NamedTuple):
    """The rows ``[start, stop)``, counted from the end where negative; ``target`` says who is to own them, if given."""

    start: int
    stop: int | None
    target: tuple[int, ...] = ()

    def footprint(self, source: RowPartition) -> Footprint:
        """See :func:`padded_to`."""
        rows = source.rows
        first = self.start + rows if self.start < 0 else self.start
        last = rows if self.stop is None else self.stop + rows if self.stop < 0 else self.stop
        if not 0 <= first < last <= rows:
            raise ValueError(f"cannot keep the rows [{first}, {last}) of {rows} rows")
        return padded_to(source, -first, last - rows, EdgeRule(), self.target)


@row_op
class Repartition(NamedTuple):
    """The same rows under another partition."""

    target: tuple[int, ...]

    def footprint(self, source: RowPartition) -> Footprint:
        """See the class."""
        wanted = RowPartition(self.target, allow_empty=True)
        return Footprint(source, wanted, tuple(repartition_needs(source, wanted)), EdgeRule())


@row_op
class Regroup(NamedTuple):
    """Each rank gets the rows that it lists."""

    rows: Plain

    def footprint(self, source: RowPartition) -> Footprint:
        """See the class."""
        _check_lists(self.rows, source.ranks)
        for peer, need in enumerate(self.rows):
            if len(need) and not 0 <= min(need) <= max(need) < source.rows:
                raise ValueError(f"rows[{peer}] names rows {min(need)} to {max(need)}; there are {source.rows}")
        return Footprint(source, _held(self.rows), self.rows, EdgeRule())


@row_op
class RegroupBack(NamedTuple):
    """The rows that :class:`Regroup` handed out come home."""

    rows: Plain
    target: tuple[int, ...]

    def footprint(self, source: RowPartition) -> Footprint:
        """See the class."""
        _check_lists(self.rows, source.ranks)
        home = RowPartition(self.target, allow_empty=True)
        listed = [row for need in self.rows for row in need]
        if home.ranks != source.ranks or sorted(listed) != list(range(home.rows)):
            raise ValueError(
                f"rows must name each of the rows of target={home} exactly once, over {source.ranks} ranks; it names "
                f"{len(listed)} rows, {len(set(listed))} of them different"
            )
        place = sorted(range(home.rows), key=listed.__getitem__)  # where each row lies now, counted over all ranks
        return Footprint(source, home, tuple(tuple(place[a:b]) for a, b in pairwise(home.offsets)), EdgeRule())


def _within(own: RowPartition, need: Callable[[int, int], range], edge: str = "zeros") -> Footprint:
    """The footprint of what leaves the partition as it is."""
    return Footprint(own, own, tuple(need(start, stop) for start, stop in pairwise(own.offsets)), EdgeRule(edge))


def _held(rows: Plain) -> RowPartition:
    return RowPartition(tuple(map(len, rows)), allow_empty=True)


def _check_lists(rows: Plain, ranks: int) -> None:
    if len(rows) != ranks:
        raise ValueError(f"rows must hold one list for each of the {ranks} ranks; got {len(rows)}")


def padded(source: RowPartition, before: int, after: int, edge: EdgeRule) -> Footprint:
    """Rows are added at the edges (or cut off, where negative), and boundaries between ranks stay where they are.

    Output row ``i`` belongs to the owner of input row ``i``, so that a convolution which takes the padding off again
    restores the partition.

    Raises:
        ValueError: If the edge rule does not reach that far, or no row would be left.
    """
    rows = source.rows + before + after
    if rows < 1:
        raise ValueError(f"padding {source.rows} rows by {before} and {after} leaves {rows} rows")
    check_reach(source.rows, (before, after), edge)

    def need(start: int, stop: int) -> range:
        return range(start - before, stop - before)

    return footprint_from(source, source.strided(1, rows), need, edge)


def padded_to(source: RowPartition, before: int, after: int, edge: EdgeRule, target: tuple[int, ...]) -> Footprint:
    """The footprint of rows that are added at the edges, or cut off, under any partition of what comes out.

    Args:
        source: Partition of the input rows.
        before: Rows added before the first; negative where rows are cut off.
        after: Likewise after the last.
        edge: What lies beyond the edges.
        target: Output rows of each rank; empty leaves the boundaries between ranks where they are.

    Raises:
        ValueError: If ``target`` is for other rows or ranks; and as :func:`padded`.
    """
    plain = padded(source, before, after, edge)
    if not target:
        return plain
    wanted = RowPartition(target, allow_empty=True)
    repartition_needs(plain.target, wanted)  # refuses other rows or ranks
    return Footprint(source, wanted, tuple(range(a - before, b - before) for a, b in pairwise(wanted.offsets)), edge)


def roll(
    x: Tensor,
    shifts: Ints,
    dims: Ints,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "roll",
) -> Tensor:
    """Roll a sharded tensor: :func:`torch.roll` of the whole; each rank holds as many rows as before.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        shifts: By how many places, for each of ``dims``.
        dims: The dims to roll along; the sharded one may be among them.

    Raises:
        ValueError: If there is not one shift for each dim, or ``x`` has no such dim; and as
            :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where ``dim`` is not rolled.
    """
    dim, along = normal_dim(dim, x.ndim, x.ndim, label), normal_dims(dims, x.ndim, label)
    amounts = (shifts,) if isinstance(shifts, int) else tuple(shifts)
    if not along or len(amounts) != len(along):
        raise ValueError(f"{label}: expected one shift for each dim; got shifts={shifts} and dims={dims}")
    domain = domain_of(manager)
    if domain.size == 1 or dim not in along:
        return torch.roll(x, amounts, along)
    others = [(amount, d) for amount, d in zip(amounts, along, strict=True) if d != dim]
    if others:
        x = torch.roll(x, [amount for amount, _ in others], [d for _, d in others])
    shift = sum(amount for amount, d in zip(amounts, along, strict=True) if d == dim)
    return move(Roll(operator.index(shift)), x, Call(dim, partition, manager, label))


def flip(
    x: Tensor,
    dims: Ints,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "flip",
) -> Tensor:
    """Reverse a sharded tensor: :func:`torch.flip` of the whole; each rank holds as many rows as before.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dims: The dims to reverse; the sharded one may be among them.

    Raises:
        ValueError: If a dim is named twice, or ``x`` has no such dim; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        Those of :func:`roll`.
    """
    dim, along = normal_dim(dim, x.ndim, x.ndim, label), distinct_dims(dims, x.ndim, label)
    domain = domain_of(manager)
    if domain.size == 1 or dim not in along:
        return torch.flip(x, along)
    others = [d for d in along if d != dim]
    if others:
        x = torch.flip(x, others)
    return move(Flip(), x, Call(dim, partition, manager, label))


def crop(
    x: Tensor,
    start: int = 0,
    stop: int | None = None,
    *,
    target: RowPartition | None = None,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "crop",
) -> Tensor:
    """The global rows ``[start, stop)`` of a sharded tensor.

    Boundaries between ranks stay where they are: row ``i`` of what is left belongs to the owner of row ``i`` of the
    input. So this undoes a padding that left them where they were.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        start: First global row that is kept; negative numbers count from the end.
        stop: The row after the last one that is kept; negative numbers count from the end, and None is the end.
        target: Who is to own which of the rows that are left, if not as above.

    Returns:
        A new tensor with this rank's share of the rows, of the same dtype and other dims.

    Raises:
        ValueError: On all ranks alike, if there are no such rows, none would be left, or ``target`` is one of other
            rows or ranks; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        Those of :func:`roll`.
    """
    op = Crop(operator.index(start), None if stop is None else operator.index(stop), _sizes(target))
    return move(op, x, Call(dim, partition, manager, label))


def repartition(
    x: Tensor,
    target: RowPartition,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "repartition",
) -> Tensor:
    """Move the rows of a sharded tensor to another partition; only rows that change hands are sent.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        target: Who is to own which rows.

    Returns:
        This rank's rows under ``target``: a new tensor.

    Raises:
        ValueError: On all ranks alike, if ``target`` is one of other rows or ranks; and as
            :func:`credit_halo.exchange_rows`.

    Collectives:
        Those of :func:`roll`.
    """
    return move(Repartition(target.sizes), x, Call(dim, partition, manager, label))


def regroup(
    x: Tensor,
    rows: Sequence[Need],
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "regroup",
) -> Tensor:
    """Give each rank any global rows, such as every ``n``-th one for a dilated window.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        rows: For each rank the global rows that it wants, in order: a ``range`` or any sequence of integers, which may
            repeat. The same on every rank.

    Returns:
        The rows that this rank wants, of the same dtype and other dims. In the backward, gradients of rows that were
        given to several places add up.

    Raises:
        ValueError: On all ranks alike, if there is not one list for each rank, or no such row; and as
            :func:`credit_halo.exchange_rows`.

    Collectives:
        Those of :func:`roll`.
    """
    return move(Regroup(_plain(rows)), x, Call(dim, partition, manager, label))


def regroup_back(
    x: Tensor,
    rows: Sequence[Need],
    target: RowPartition,
    *,
    dim: int = -2,
    manager: DomainParallelManager | None = None,
    label: str = "regroup_back",
) -> Tensor:
    """Bring rows home that :func:`regroup` handed out.

    Args:
        x: What became of the rows that this rank was given: one row for each of ``rows[rank]``.
        rows: What :func:`regroup` was called with; over all ranks, each global row exactly once.
        target: Who is to own which rows.

    Returns:
        This rank's rows under ``target``.

    Raises:
        ValueError: On all ranks alike, if a row is missing or named twice, or a rank holds other rows than ``rows``
            says; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        Those of :func:`roll`.
    """
    dim, domain, plain = normal_dim(dim, x.ndim, x.ndim, label), domain_of(manager), _plain(rows)
    op, held = RegroupBack(plain, target.sizes), tuple([len(need) for need in plain])
    step_for(op, held, domain.rank, label)  # refuses lists that fit nothing, before the ranks compare their rows
    partition = RowPartition(held, allow_empty=True)
    if sizes_of(x, dim, domain, label, partition) != held:  # a single rank, which has nobody to compare with
        raise ValueError(f"{label}: rows lists {partition.rows} rows; got a tensor of shape {tuple(x.shape)}")
    return move(op, x, Call(dim, partition, manager, label))


def partition_of(
    x: Tensor, *, dim: int = -2, manager: DomainParallelManager | None = None, label: str = "partition_of"
) -> RowPartition:
    """Who holds which rows of a sharded tensor; ask once, and pass it on as ``partition=``.

    Args:
        x: This rank's rows.
        label: What errors call this.

    Raises:
        ValueError: On all ranks alike, if their dtypes or other dims differ.

    Collectives:
        A small all-gather; in compiled code only while it is traced.
    """
    dim = normal_dim(dim, x.ndim, x.ndim, label)
    return RowPartition(sizes_of(x, dim, domain_of(manager), label), allow_empty=True)


# Arguments


def _sizes(target: RowPartition | None) -> tuple[int, ...]:
    return () if target is None else target.sizes


def _plain(rows: Sequence[Need]) -> Plain:
    return tuple(need if isinstance(need, range) else tuple([operator.index(row) for row in need]) for need in rows)


def normal_dims(dims: Ints, ndim: int, label: str) -> tuple[int, ...]:
    """Dims counted from the last one.

    Raises:
        ValueError: If a tensor of ``ndim`` dims has no such dim.
    """
    listed = (dims,) if isinstance(dims, int) else tuple(dims)
    for d in listed:
        if not -ndim <= d < ndim:
            raise ValueError(f"{label}: dims={dims} names dim {d}; the tensor has {ndim} dims")
    return tuple(d - ndim if d >= 0 else d for d in listed)


def distinct_dims(dims: Ints, ndim: int, label: str) -> tuple[int, ...]:
    """Dims counted from the last one, each once.

    Raises:
        ValueError: If a dim is named twice, or as :func:`normal_dims`.
    """
    along = normal_dims(dims, ndim, label)
    if len(set(along)) != len(along):
        raise ValueError(f"{label}: dims={dims} names a dim twice, in a tensor of {ndim} dims")
    return along
