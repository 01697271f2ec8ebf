"""Exchanging rows of a sharded tensor: the functions that users call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo import ops
from credit_halo.edges import EdgeRule
from credit_halo.faults import ExchangeError
from credit_halo.fit import misfit
from credit_halo.plan import ExchangePlan, Need, plan_rows, repartition_needs
from credit_halo.recompute import reach
from credit_halo.rows import memory_format
from credit_mesh import RowPartition


def exchange_rows(
    x: Tensor, plan: ExchangePlan, *, dim: int = -2, group: ProcessGroup | None = None, label: str = "rows"
) -> Tensor:
    """Bring each rank the rows that the plan says it needs.

    Differentiable to any order: the backward is the exact adjoint, with as many messages, and every rank must run it
    if one does. The input is never modified.

    Args:
        x: This rank's rows: any shape, dtype and layout, with ``plan.in_rows`` entries along ``dim``.
        plan: This rank's plan.
        dim: The sharded dim.
        group: The ranks that take part, in the order of the plan's partition; None means the whole world, or nobody
            else where torch.distributed is not initialised.
        label: What errors and traces call this exchange; the same on every rank.

    Returns:
        A new tensor like ``x`` with ``plan.out_rows`` entries along ``dim``, in the same dtype and memory format, also
        where this rank needs just its own rows.

    Raises:
        ValueError: On all ranks alike, if the tensor of any does not fit its plan, or ranks disagree on the plan, the
            dtype, the other dims, the label, or whether a gradient is needed. Ranks compare once for each of these; a
            mistake that one rank makes later is raised there at once, and reaches the others as an ExchangeError.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to each rank in ``plan.sends``, one from each in ``plan.recvs``. At the first use of a plan,
        dtype, shape and label one small all-gather.
    """
    dim, name = _checked(x, plan, dim, group, label)
    out: Tensor = ops.exchange(x, dim, plan.key, name, label, False, torch.compiler.is_compiling())
    return out


def take_rows(
    x: Tensor,
    rows: Sequence[Need],
    *,
    partition: RowPartition,
    dim: int = -2,
    edge: EdgeRule | str = "zeros",
    group: ProcessGroup | None = None,
    label: str = "rows",
) -> Tensor:
    """Bring each rank any global rows, in the order asked for: :func:`exchange_rows` with the plan made on the way.

    Args:
        x: This rank's rows.
        rows: For each rank the global rows that it wants: a ``range`` or any sequence of integers, with repeats, in any
            order, also beyond the edges. The same on every rank.
        partition: Who owns which rows.
        dim: The sharded dim.
        edge: What lies beyond the edges.
        group: The ranks that take part; see :func:`exchange_rows`.
        label: What errors and traces call this exchange.

    Raises:
        ValueError: As :func:`plan_rows` and :func:`exchange_rows`.
        ExchangeError: As :func:`exchange_rows`.

    Collectives:
        Those of :func:`exchange_rows`.
    """
    if torch.compiler.is_compiling():
        # torch.compile cannot trace the making of a plan; it takes what it is called as a constant of its arguments.
        # Those are plain: of an object that is made in the compiled code it would see the defaults of its class.
        needs = tuple(need if isinstance(need, range) else tuple(need) for need in rows)
        rule = EdgeRule.of(edge)
        # Not the value where nobody reads it: torch 2.11 takes any float for a symbol under dynamic=True.
        value = rule.value if rule.kind == "constant" else 0.0
        fields = (rule.kind, value, rule.pole_is_row, rule.signs, rule.lon_dim, rule.channel_dim)
        key = _plan_key(partition.sizes, needs, _rank(group), fields)
        many = dist.is_initialized() and dist.get_world_size(group) > 1
        name = _group_of(group).group_name if many else ""
        out: Tensor = ops.exchange(x, dim % x.ndim, key, name, label, False, True)
        return out
    plan = plan_rows(partition, rows, rank=_rank(group), edge=edge)
    return exchange_rows(x, plan, dim=dim, group=group, label=label)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _plan_key(sizes: tuple[int, ...], needs: tuple[Need, ...], rank: int, edge: tuple[Any, ...]) -> str:
    return plan_rows(RowPartition(sizes, allow_empty=True), needs, rank=rank, edge=EdgeRule(*edge)).key


def repartition_rows(
    x: Tensor,
    source: RowPartition,
    target: RowPartition,
    *,
    dim: int = -2,
    group: ProcessGroup | None = None,
    label: str = "repartition",
) -> Tensor:
    """Move rows from one partition to another; only rows that change hands are sent.

    Args:
        x: This rank's rows under ``source``.
        source: Who owns which rows.
        target: Who is to own which rows; of the same number of rows and ranks.
        dim: The sharded dim.
        group: The ranks that take part; see :func:`exchange_rows`.
        label: What errors and traces call this exchange.

    Returns:
        This rank's rows under ``target``.

    Raises:
        ValueError: If the partitions do not match each other, or as :func:`exchange_rows`.
        ExchangeError: As :func:`exchange_rows`.

    Collectives:
        Those of :func:`exchange_rows`.
    """
    needs = repartition_needs(source, target)
    return take_rows(x, needs, partition=source, dim=dim, group=group, label=label)


class PendingRows:
    """Rows under way, between :func:`post_rows` and :meth:`wait`."""

    def __init__(self, x: Tensor, plan: ExchangePlan, dim: int, group: str, label: str) -> None:
        self._plan, self._dim, self._group, self._label = plan, dim, group, label
        self._shape, self._last = list(x.shape), memory_format(x) != torch.contiguous_format
        self._own = ops.keep(x, dim, plan.key, False) if plan.local or plan.fills else None
        compiling = torch.compiler.is_compiling()
        self._posted: Tensor | None = ops.post(x, dim, plan.key, group, label, False, compiling)
        if not compiling:  # nobody waits where recomputation under checkpointing stops early
            weakref.finalize(self, ops.discard, self._posted.detach()).atexit = False

    def wait(self) -> Tensor:
        """Wait for the rows; what :func:`exchange_rows` would have returned.

        In backward this is where gradients are posted, so that they travel while the gradients of everything computed
        between post and wait are worked out.

        Raises:
            ExchangeError: If a peer died, did not answer within the timeout of the group, or this was called before.
        """
        if self._posted is None:
            raise ExchangeError(f"exchange {self._label!r} was waited for twice")
        posted, self._posted = self._posted, None
        rows: Tensor = ops.collect(
            posted, self._shape, self._dim, self._plan.key, self._group, self._label, False, self._last
        )
        return rows if self._own is None else rows + self._own


def post_rows(
    x: Tensor, plan: ExchangePlan, *, dim: int = -2, group: ProcessGroup | None = None, label: str = "rows"
) -> PendingRows:
    """Start an exchange and return at once, so that something else can be computed while rows travel.

    .. code-block:: python

        pending = post_rows(x, missing, dim=-2, group=group)
        inner = conv(x)          # needs no other rank's rows
        halo = pending.wait()

    It overlaps most with a plan that asks for missing rows only; what a plan asks of a rank's own rows is copied
    before this returns. Every posted exchange must be waited for, in any order.

    Args:
        x: This rank's rows; it may be modified once this returns.
        plan: This rank's plan.
        dim: The sharded dim.
        group: The ranks that take part; see :func:`exchange_rows`.
        label: What errors and traces call this exchange.

    Raises:
        ValueError: As :func:`exchange_rows`.
        ExchangeError: As :func:`exchange_rows`.

    Collectives:
        Those of :func:`exchange_rows`, not waited for.
    """
    dim, name = _checked(x, plan, dim, group, label)
    return PendingRows(x, plan, dim, name, label)


def _checked(x: Tensor, plan: ExchangePlan, dim: int, group: ProcessGroup | None, label: str) -> tuple[int, str]:
    """Return dim counted from the first, and the name of the group; all ranks agree, or all raise."""
    many = dist.is_initialized() and dist.get_world_size(group) > 1
    name = _group_of(group).group_name if many else ""
    if torch.compiler.is_compiling():  # the operator itself checks
        return dim % x.ndim, name
    problem = _problem(x, plan, dim, group)
    dim = dim % x.ndim if -x.ndim <= dim < x.ndim else dim
    if many:
        ops.agree_on(x, dim, plan, _group_of(group), label, problem)
    elif problem is not None:
        raise ValueError(f"exchange {label!r}: on rank {plan.rank} {problem}")
    if many and not x.requires_grad:
        reach(x)
    return dim, name


def _problem(x: Tensor, plan: ExchangePlan, dim: int, group: ProcessGroup | None) -> str | None:
    """What is wrong with a call, if anything is."""
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    if size != plan.ranks:
        hint = "" if dist.is_initialized() else "; torch.distributed is not initialised"
        return f"the plan is for {plan.ranks} ranks, the group has {size}{hint}"
    if plan.ranks > 1 and dist.get_rank(group) != plan.rank:
        return f"the plan is that of rank {plan.rank}; this is rank {dist.get_rank(group)} of the group"
    return misfit(x.shape, x.dtype, plan, dim)


def _group_of(group: ProcessGroup | None) -> ProcessGroup:
    chosen = dist.group.WORLD if group is None else group
    assert chosen is not None
    return chosen


def _rank(group: ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0
