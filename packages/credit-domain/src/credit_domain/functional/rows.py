"""Moving the rows of a sharded tensor: roll, flip, crop, another partition, any regrouping."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Step, bring, constant, domain_of, normal_dim, sizes_of, step_of
from credit_domain.footprint import Footprint
from credit_halo import EdgeRule, Need, plan_rows
from credit_halo.extend import repartition_needs
from credit_mesh import DomainParallelManager, RowPartition

Ints = int | Sequence[int]


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
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: If there is not one shift for each dim, or ``x`` has no such dim; and as
            :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

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
    step = _roll_step(sizes_of(x, dim, domain, label, partition), domain.rank, operator.index(shift))
    return bring(x, dim, step, domain, label, new=True)


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
        dim: The sharded dim.
        partition: See :func:`roll`.
        manager: See :func:`roll`.
        label: See :func:`roll`.

    Raises:
        ValueError: If a dim is named twice, or ``x`` has no such dim; and as :func:`credit_halo.exchange_rows`.
        ExchangeError: As :func:`roll`.

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
    step = _flip_step(sizes_of(x, dim, domain, label, partition), domain.rank)
    return bring(x, dim, step, domain, label, new=True)


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
        dim: The sharded dim.
        partition: See :func:`roll`.
        manager: See :func:`roll`.
        label: See :func:`roll`.

    Returns:
        A new tensor with this rank's share of the rows, of the same dtype and other dims.

    Raises:
        ValueError: On all ranks alike, if there are no such rows, none would be left, or ``target`` is one of other
            rows or ranks; and as :func:`credit_halo.exchange_rows`.
        ExchangeError: As :func:`roll`.

    Collectives:
        Those of :func:`roll`.
    """
    dim, domain = normal_dim(dim, x.ndim, x.ndim, label), domain_of(manager)
    sizes = sizes_of(x, dim, domain, label, partition)
    rows = sum(sizes)
    first = operator.index(start + rows if start < 0 else start)
    last = rows if stop is None else operator.index(stop + rows if stop < 0 else stop)
    step = _crop_step(sizes, domain.rank, first, last, () if target is None else target.sizes, label)
    return bring(x, dim, step, domain, label, new=True)


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
        dim: The sharded dim.
        partition: See :func:`roll`.
        manager: See :func:`roll`.
        label: See :func:`roll`.

    Returns:
        This rank's rows under ``target``: a new tensor.

    Raises:
        ValueError: On all ranks alike, if ``target`` is one of other rows or ranks; and as
            :func:`credit_halo.exchange_rows`.
        ExchangeError: As :func:`roll`.

    Collectives:
        Those of :func:`roll`.
    """
    dim, domain = normal_dim(dim, x.ndim, x.ndim, label), domain_of(manager)
    step = _repartition_step(sizes_of(x, dim, domain, label, partition), domain.rank, target.sizes, label)
    return bring(x, dim, step, domain, label, new=True)


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
        dim: The sharded dim.
        partition: See :func:`roll`.
        manager: See :func:`roll`.
        label: See :func:`roll`.

    Returns:
        The rows that this rank wants, of the same dtype and other dims. In the backward, gradients of rows that were
        given to several places add up.

    Raises:
        ValueError: On all ranks alike, if there is not one list for each rank, or no such row; and as
            :func:`credit_halo.exchange_rows`.
        ExchangeError: As :func:`roll`.

    Collectives:
        Those of :func:`roll`.
    """
    dim, domain = normal_dim(dim, x.ndim, x.ndim, label), domain_of(manager)
    step = _regroup_step(sizes_of(x, dim, domain, label, partition), domain.rank, _plain(rows), label)
    return bring(x, dim, step, domain, label, new=True)


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
        dim: The sharded dim.
        manager: See :func:`roll`.
        label: See :func:`roll`.

    Returns:
        This rank's rows under ``target``.

    Raises:
        ValueError: On all ranks alike, if a row is missing or named twice, or a rank holds other rows than ``rows``
            says; and as :func:`credit_halo.exchange_rows`.
        ExchangeError: As :func:`roll`.

    Collectives:
        Those of :func:`roll`.
    """
    dim, domain, plain = normal_dim(dim, x.ndim, x.ndim, label), domain_of(manager), _plain(rows)
    step = _regroup_back_step(domain.size, domain.rank, plain, target.sizes, label)
    held = RowPartition(tuple([len(need) for need in plain]), allow_empty=True)
    if sizes_of(x, dim, domain, label, held) != held.sizes:  # a single rank, which has nobody to compare with
        raise ValueError(f"{label}: rows lists {held.rows} rows; got a tensor of shape {tuple(x.shape)}")
    return bring(x, dim, step, domain, label, new=True)


def partition_of(
    x: Tensor, *, dim: int = -2, manager: DomainParallelManager | None = None, label: str = "partition_of"
) -> RowPartition:
    """Who holds which rows of a sharded tensor; ask once, and pass it on as ``partition=``.

    Args:
        x: This rank's rows.
        dim: The sharded dim.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors call this.

    Raises:
        ValueError: On all ranks alike, if their dtypes or other dims differ.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        A small all-gather; in compiled code only while it is traced.
    """
    dim = normal_dim(dim, x.ndim, x.ndim, label)
    return RowPartition(sizes_of(x, dim, domain_of(manager), label), allow_empty=True)


# Steps


def _step_of(source: RowPartition, needs: Sequence[Need], rank: int) -> Step:
    """This rank's part of any needs: lists too, which a footprint has none of."""
    plan = plan_rows(source, needs, rank=rank)
    own = (range(*pair) for pair in pairwise(source.offsets))
    local = all(tuple(need) == tuple(rows) for need, rows in zip(needs, own, strict=True))
    rows = len(needs[rank])
    return Step(plan.key, local, 0, rows, 0, rows, sum(map(len, needs)))


def _within(own: RowPartition, need: Callable[[int, int], range], edge: str = "zeros") -> Footprint:
    """The footprint of what leaves the partition as it is."""
    return Footprint(own, own, tuple(need(start, stop) for start, stop in pairwise(own.offsets)), EdgeRule(edge))


@constant
def _roll_step(sizes: tuple[int, ...], rank: int, shift: int) -> Step:
    return _cached_roll_step(sizes, rank, shift % (sum(sizes) or 1))


@lru_cache(maxsize=4096)
def _cached_roll_step(sizes: tuple[int, ...], rank: int, shift: int) -> Step:
    own = RowPartition(sizes, allow_empty=True)
    return step_of(_within(own, lambda start, stop: range(start - shift, stop - shift), "circular"), rank)


@constant
def _flip_step(sizes: tuple[int, ...], rank: int) -> Step:
    return _cached_flip_step(sizes, rank)


@lru_cache(maxsize=4096)
def _cached_flip_step(sizes: tuple[int, ...], rank: int) -> Step:
    own = RowPartition(sizes, allow_empty=True)
    last = own.rows - 1
    return step_of(_within(own, lambda start, stop: range(last - start, last - stop, -1)), rank)


@constant
def _crop_step(sizes: tuple[int, ...], rank: int, start: int, stop: int, target: tuple[int, ...], label: str) -> Step:
    return _cached_crop_step(sizes, rank, start, stop, target, label)


@lru_cache(maxsize=4096)
def _cached_crop_step(
    sizes: tuple[int, ...], rank: int, start: int, stop: int, target: tuple[int, ...], label: str
) -> Step:
    source = RowPartition(sizes, allow_empty=True)
    if not 0 <= start < stop <= source.rows:
        raise ValueError(f"{label}: cannot keep the rows [{start}, {stop}) of {source.rows} rows")
    try:
        return step_of(padded_to(source, -start, stop - source.rows, EdgeRule(), target), rank)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


def padded_to(source: RowPartition, before: int, after: int, edge: EdgeRule, target: tuple[int, ...]) -> Footprint:
    """The footprint of rows that are added at the edges, or cut off, under any partition of what comes out.

    Args:
        source: Partition of the input rows.
        before: Rows added before the first; negative where rows are cut off.
        after: Likewise after the last.
        edge: What lies beyond the edges.
        target: Output rows of each rank; empty leaves the boundaries between ranks where they are.

    Raises:
        ValueError: If ``target`` is for other rows or ranks; and as :func:`credit_domain.footprint.padded`.
    """
    plain = footprint.padded(source, before, after, edge)
    if not target:
        return plain
    wanted = RowPartition(target, allow_empty=True)
    repartition_needs(plain.target, wanted)  # refuses other rows or ranks
    return Footprint(source, wanted, tuple(range(a - before, b - before) for a, b in pairwise(wanted.offsets)), edge)


@constant
def _repartition_step(sizes: tuple[int, ...], rank: int, target: tuple[int, ...], label: str) -> Step:
    return _cached_repartition_step(sizes, rank, target, label)


@lru_cache(maxsize=4096)
def _cached_repartition_step(sizes: tuple[int, ...], rank: int, target: tuple[int, ...], label: str) -> Step:
    source, wanted = RowPartition(sizes, allow_empty=True), RowPartition(target, allow_empty=True)
    try:
        needs = repartition_needs(source, wanted)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    return step_of(Footprint(source, wanted, tuple(needs), EdgeRule()), rank)


Plain = tuple[range | tuple[int, ...], ...]


def _plain(rows: Sequence[Need]) -> Plain:
    """Lists of rows as constants of compiled code."""
    return tuple(need if isinstance(need, range) else tuple([operator.index(row) for row in need]) for need in rows)


@constant
def _regroup_step(sizes: tuple[int, ...], rank: int, rows: Plain, label: str) -> Step:
    return _cached_regroup_step(sizes, rank, rows, label)


@lru_cache(maxsize=4096)
def _cached_regroup_step(sizes: tuple[int, ...], rank: int, rows: Plain, label: str) -> Step:
    source = RowPartition(sizes, allow_empty=True)
    _check_lists(rows, source.ranks, label)
    for peer, need in enumerate(rows):
        if len(need) and not 0 <= min(need) <= max(need) < source.rows:
            raise ValueError(f"{label}: rows[{peer}] names rows {min(need)} to {max(need)}; there are {source.rows}")
    return _step_of(source, rows, rank)


@constant
def _regroup_back_step(ranks: int, rank: int, rows: Plain, target: tuple[int, ...], label: str) -> Step:
    return _cached_regroup_back_step(ranks, rank, rows, target, label)


@lru_cache(maxsize=4096)
def _cached_regroup_back_step(ranks: int, rank: int, rows: Plain, target: tuple[int, ...], label: str) -> Step:
    _check_lists(rows, ranks, label)
    held, home = RowPartition(tuple(map(len, rows)), allow_empty=True), RowPartition(target, allow_empty=True)
    listed = [row for need in rows for row in need]
    if home.ranks != ranks or sorted(listed) != list(range(home.rows)):
        raise ValueError(
            f"{label}: rows must name each of the rows of target={home} exactly once, over {ranks} ranks; it names "
            f"{len(listed)} rows, {len(set(listed))} of them different"
        )
    place = sorted(range(home.rows), key=listed.__getitem__)  # where each row lies now, counted over all ranks
    return _step_of(held, [tuple(place[start:stop]) for start, stop in pairwise(home.offsets)], rank)


def _check_lists(rows: Plain, ranks: int, label: str) -> None:
    if len(rows) != ranks:
        raise ValueError(f"{label}: rows must hold one list for each of the {ranks} ranks; got {len(rows)}")


# Arguments


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
