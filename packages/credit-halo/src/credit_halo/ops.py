"""The exchange as operators of torch: traced by torch.compile as they are, and each the other's gradient.

``exchange`` is a linear map F (plus a constant, where the edge rule has one); with ``adjoint`` set it is F'. So the
gradient of either is the other, and can be differentiated again. Cut in two, F = L + R C S: S packs messages, C carries
them, R places what arrived and L copies a rank's own rows. ``post`` is C S, ``collect`` is R, and ``keep`` is L; with
``adjoint`` set, ``post`` is C' R', ``collect`` is S' and ``keep`` is L'.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo import debug
from credit_halo._torch_private import keep_order, prepare_inductor
from credit_halo.agreement import agree, has_agreed
from credit_halo.faults import ExchangeError
from credit_halo.fit import misfit
from credit_halo.groups import group_by_name
from credit_halo.plan import ExchangePlan, plans
from credit_halo.recompute import ask_entry, save_entry
from credit_halo.rows import (
    add_local,
    add_returned,
    collect_local,
    empty_rows,
    memory_format,
    place_local,
    place_received,
)
from credit_halo.transport import InFlight, directions, start
from credit_mesh import RowPartition

__all__ = ["add_arrived", "agree_on", "arrived", "begin", "collect", "empty_halo", "exchange", "post"]

logger = logging.getLogger(__name__)


def describe(x: Tensor, dim: int, plan: ExchangePlan, label: str, gradient: bool) -> str:
    """What a rank is about to exchange, in words that are the same on every rank that does the same."""
    shape = ["rows" if d == dim else str(x.shape[d]) for d in range(x.ndim)]
    kind = f"{str(x.dtype).removeprefix('torch.')} of shape ({', '.join(shape)})"
    with_gradient = "with" if gradient else "without"
    partition = RowPartition(plan.partition.sizes, allow_empty=True)  # its granularity says nothing about what moves
    return (
        f"{kind} {with_gradient} gradient, {partition}, edge {plan.edge.kind}, exchange {label!r}, plan {plan.digest}"
    )


def agree_on(
    x: Tensor,
    dim: int,
    plan: ExchangePlan,
    group: ProcessGroup,
    label: str,
    problem: str | None = None,
    gradient: bool | None = None,
) -> None:
    """Make sure that all ranks of the group exchange the same; costs a look into a dict after the first time.

    ``gradient`` says whether one will be needed, where the tensor itself does not.

    Raises:
        ValueError: On all ranks alike, if they do not, or any has a problem. A rank that has one after all agreed
            raises alone, since the others do not ask again.
    """
    others = tuple(size for d, size in enumerate(x.shape) if d != dim)
    needed = x.requires_grad and torch.is_grad_enabled() if gradient is None else gradient
    key = (plan.digest, dim, x.dtype, others, label, needed)
    what = f"exchange {label!r}"
    if problem is not None and has_agreed(group, key):
        raise ValueError(f"{what}: on rank {plan.rank} {problem}")
    agree(group, key, what, lambda: describe(x, dim, plan, label, needed), x.device, problem)


def _ready(
    x: Tensor, dim: int, plan: str, group: str, label: str, check: bool
) -> tuple[ExchangePlan, ProcessGroup | None]:
    """The plan and the group of a name; compiled code has checked nothing yet, and does so here."""
    the_plan, the_group = plans[plan], group_by_name(group) if group else None
    if check:
        problem = misfit(x.shape, x.dtype, the_plan, dim)
        if the_group is not None:
            agree_on(x, dim, the_plan, the_group, label, problem)
        elif problem is not None:
            raise ValueError(f"exchange {label!r}: {problem}")
    return the_plan, the_group


def _rows_out(plan: str, adjoint: bool) -> int:
    return plans[plan].in_rows if adjoint else plans[plan].out_rows


def _linear(ctx: Any) -> str:
    """The plan to differentiate with: a constant beyond the edge is no part of the derivative."""
    return plans[ctx.plan].linear.key


# The whole exchange


@torch.library.custom_op("credit_halo::exchange", mutates_args=())
def exchange(x: Tensor, dim: int, plan: str, group: str, label: str, adjoint: bool, check: bool) -> Tensor:
    """Exchange rows, and wait for them."""
    the_plan, the_group = _ready(x, dim, plan, group, label, check)
    flight = start(x, dim, the_plan, the_group, label, adjoint=adjoint)
    if adjoint:
        out = collect_local(x, dim, the_plan)
    else:
        out = empty_rows(x, dim, the_plan.out_rows)
        place_local(x, out, dim, the_plan)
    _place(flight, flight.wait(), out, dim)
    return out


def _place(flight: InFlight, received: list[Tensor], out: Tensor, dim: int) -> None:
    _, incoming = directions(flight.plan, flight.adjoint)
    for message, rows in zip(incoming, received, strict=True):
        if flight.adjoint:
            add_returned(message, rows, out, dim)
        else:
            place_received(message, rows, out, dim, flight.plan)


@exchange.register_fake
def _(x: Tensor, dim: int, plan: str, group: str, label: str, adjoint: bool, check: bool) -> Tensor:
    prepare_inductor()
    return empty_rows(x, dim, _rows_out(plan, adjoint))


def _exchange_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.plan, ctx.group, ctx.label, ctx.adjoint, _ = inputs
    ctx.said = debug.said()
    save_entry(ctx, x)


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    with debug.backward_of(ctx.said):
        home = exchange(grad, ctx.dim, _linear(ctx), ctx.group, ctx.label, not ctx.adjoint, False)
    return home, *[None] * 6


exchange.register_autograd(_exchange_backward, setup_context=_exchange_setup)


# The exchange as a part of another operation's forward and backward, which computes while rows travel


def begin(
    x: Tensor, dim: int, plan: str, group: str, label: str, *, adjoint: bool = False, gradient: bool | None = None
) -> InFlight:
    """Start an exchange outside of autograd; :func:`arrived` or :func:`add_arrived` must follow.

    Where ``gradient`` is given (whether one will be needed), the ranks agree first; see :func:`agree_on`.
    """
    the_plan, the_group = plans[plan], group_by_name(group) if group else None
    if gradient is not None and the_group is not None:
        agree_on(x, dim, the_plan, the_group, label, misfit(x.shape, x.dtype, the_plan, dim), gradient)
    return start(x, dim, the_plan, the_group, label, adjoint=adjoint)


def arrived(flight: InFlight, x: Tensor, dim: int) -> Tensor:
    """Wait for an exchange of rows of ``x``; what :func:`exchange` returns."""
    if flight.plan.is_delivery:
        return flight.wait()[0]
    out = empty_rows(x, dim, flight.plan.out_rows)
    place_local(x, out, dim, flight.plan)
    _place(flight, flight.wait(), out, dim)
    return out


def empty_halo(x: Tensor, dim: int, plan: str) -> Tensor:
    """A tensor like the one that :func:`arrived` returns, uninitialised."""
    out = empty_rows(x, dim, plans[plan].out_rows)
    return torch.empty(out.shape, dtype=x.dtype, device=x.device) if plans[plan].is_delivery else out


def add_arrived(flight: InFlight, grad: Tensor, out: Tensor, dim: int) -> None:
    """Wait for an adjoint exchange of ``grad``, and add to ``out`` what :func:`exchange` returns, in place."""
    add_local(grad, out, dim, flight.plan)
    _place(flight, flight.wait(), out, dim)


# The exchange in two halves

_in_flight: dict[int, InFlight] = {}
"""Exchanges that were posted, by the address of their buffer, which they keep alive."""


@torch.library.custom_op("credit_halo::post", mutates_args=())
def post(x: Tensor, dim: int, plan: str, group: str, label: str, adjoint: bool, check: bool) -> Tensor:
    """Start an exchange; the tensor that it returns holds nothing yet, and stands for it."""
    the_plan, the_group = _ready(x, dim, plan, group, label, check)
    flight = start(x, dim, the_plan, the_group, label, adjoint=adjoint, own_memory=True)
    _in_flight[flight.buffer.data_ptr()] = flight
    return flight.buffer


@post.register_fake
def _(x: Tensor, dim: int, plan: str, group: str, label: str, adjoint: bool, check: bool) -> Tensor:
    prepare_inductor()
    size = 1
    for d in range(x.ndim):
        size *= x.shape[d] if d != dim else 1
    most = max(plans[plan].sent_rows, plans[plan].received_rows)
    count = torch.sym_max(1, most * size)  # type: ignore[no-untyped-call]
    return x.new_empty([count])


@torch.library.custom_op("credit_halo::collect", mutates_args=())
def collect(
    posted: Tensor, shape: Sequence[int], dim: int, plan: str, group: str, label: str, adjoint: bool, last: bool
) -> Tensor:
    """Wait for a posted exchange; what it brought, in place, and zeros elsewhere."""
    flight = _in_flight.pop(posted.data_ptr(), None)
    if flight is None:
        raise ExchangeError(f"exchange {label!r} was waited for twice, or was never posted")
    received = flight.wait()
    out = _collected(posted, shape, dim, plan, adjoint, last).zero_()
    _place(flight, received, out, dim)
    return out


def _collected(posted: Tensor, shape: Sequence[int], dim: int, plan: str, adjoint: bool, last: bool) -> Tensor:
    sizes = list(shape)
    sizes[dim] = _rows_out(plan, adjoint)
    channels_last = (torch.channels_last, torch.channels_last_3d)[len(sizes) - 4] if last else torch.contiguous_format
    return torch.empty(sizes, dtype=posted.dtype, device=posted.device, memory_format=channels_last)


@collect.register_fake
def _(
    posted: Tensor, shape: Sequence[int], dim: int, plan: str, group: str, label: str, adjoint: bool, last: bool
) -> Tensor:
    prepare_inductor()
    return _collected(posted, shape, dim, plan, adjoint, last)


def discard(posted: Tensor) -> None:
    """Let an exchange that nobody waits for come to its end, so that its rows are not taken for another's."""
    flight = _in_flight.pop(posted.data_ptr(), None)
    if flight is not None:
        try:
            flight.wait()
        except ExchangeError as error:  # whoever exchanges next on this group is told
            logger.warning("%s", error)


def _post_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, ctx.plan, ctx.group, ctx.label, ctx.adjoint, _ = inputs
    ctx.shape = list(x.shape)
    ctx.last = memory_format(x) != torch.contiguous_format
    save_entry(ctx, x)


def _post_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    home = collect(grad, ctx.shape, ctx.dim, ctx.plan, ctx.group, ctx.label, not ctx.adjoint, ctx.last)
    return home, *[None] * 6


def _collect_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    posted, _, ctx.dim, ctx.plan, ctx.group, ctx.label, ctx.adjoint, _ = inputs
    ctx.said = debug.said()
    save_entry(ctx, posted)


def _collect_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ask_entry(ctx)
    with debug.backward_of(ctx.said):
        return post(grad, ctx.dim, ctx.plan, ctx.group, ctx.label, not ctx.adjoint, False), *[None] * 7


post.register_autograd(_post_backward, setup_context=_post_setup)
collect.register_autograd(_collect_backward, setup_context=_collect_setup)


@torch.library.custom_op("credit_halo::keep", mutates_args=())
def keep(x: Tensor, dim: int, plan: str, adjoint: bool) -> Tensor:
    """What a rank takes from its own rows and from the edge rule's constant; zeros where others' rows go."""
    the_plan = plans[plan]
    if adjoint:
        return collect_local(x, dim, the_plan)
    out = empty_rows(x, dim, the_plan.out_rows).zero_()
    place_local(x, out, dim, the_plan)
    return out


@keep.register_fake
def _(x: Tensor, dim: int, plan: str, adjoint: bool) -> Tensor:
    prepare_inductor()
    return empty_rows(x, dim, _rows_out(plan, adjoint))


def _keep_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, ctx.plan, ctx.adjoint = inputs


def _keep_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return keep(grad, ctx.dim, _linear(ctx), not ctx.adjoint), None, None, None


keep.register_autograd(_keep_backward, setup_context=_keep_setup)

for _op in (exchange, post, collect):
    keep_order(_op)
