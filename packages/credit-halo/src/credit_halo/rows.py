"""Copying rows within one rank: packing messages, placing what arrived, and the adjoints of both."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from credit_halo.edges import EdgeRule
from credit_halo.plan import ExchangePlan, Message, Placement, Rows


def empty_rows(x: Tensor, dim: int, rows: int) -> Tensor:
    """An uninitialised tensor like ``x`` with another number of rows, in the same memory format."""
    shape = list(x.shape)
    shape[dim] = rows
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that ``x`` is in: channels_last for its kind of strides, else contiguous."""
    if x.ndim in (4, 5) and x.shape[1] > 1:
        order = [x.stride(dim) for dim in (0, *range(2, x.ndim), 1)]
        if order[-1] == 1 and all(outer >= inner for outer, inner in pairwise(order)):
            channels_last = (torch.channels_last, torch.channels_last_3d)[x.ndim - 4]
            return torch.contiguous_format if x.is_contiguous() else channels_last
    return torch.contiguous_format


def pack(x: Tensor, dim: int, rows: Rows) -> Tensor:
    """The given rows of ``x``, contiguous: what a message carries."""
    return _take(x, dim, rows).contiguous()


def place_local(x: Tensor, out: Tensor, dim: int, plan: ExchangePlan) -> None:
    """Copy this rank's own rows to where it needs them, and fill what lies beyond a constant edge."""
    for placement in plan.local:
        _put(out, dim, placement.into, _crossed(_take(x, dim, placement.rows), plan.edge, placement))
    if plan.fills:
        value = plan.edge.value if plan.edge.kind == "constant" else 0.0
        if isinstance(plan.fills, range):
            out.narrow(dim, plan.fills.start, len(plan.fills)).fill_(value)
        else:
            out.index_fill_(dim, _index(plan.fills, out.device), value)


def place_received(message: Message, received: Tensor, out: Tensor, dim: int, plan: ExchangePlan) -> None:
    """Copy the rows of a message to where this rank needs them."""
    for placement in message.placements:
        _put(out, dim, placement.into, _crossed(_take(received, dim, placement.rows), plan.edge, placement))


def collect_local(grad: Tensor, dim: int, plan: ExchangePlan) -> Tensor:
    """Adjoint of :func:`place_local`: a new tensor of this rank's own rows."""
    whole = Placement(range(0), range(plan.in_rows), False)
    first = next((p for p in plan.local if p.rows == whole.rows and isinstance(p.into, range) and not p.crossed), None)
    out = empty_rows(grad, dim, plan.in_rows)
    if first is None:
        out.zero_()
    else:  # commonly the one placement there is: copied, not added to zeros
        out.copy_(_take(grad, dim, first.into))
    add_local(grad, out, dim, plan, but=first)
    return out


def add_local(grad: Tensor, out: Tensor, dim: int, plan: ExchangePlan, but: Placement | None = None) -> None:
    """Adjoint of :func:`place_local`, added in place; one of the placements can be left out."""
    for placement in plan.local:
        if placement is not but:
            _add(out, dim, placement.rows, _crossed(_take(grad, dim, placement.into), plan.edge, placement))


def collect_for(message: Message, grad: Tensor, dim: int, plan: ExchangePlan) -> Tensor:
    """Adjoint of :func:`place_received`: the gradient of a message, contiguous, to be sent home."""
    if len(message.placements) == 1:
        (placement,) = message.placements
        if placement.rows == range(len(message.rows)):
            return _crossed(_take(grad, dim, placement.into), plan.edge, placement).contiguous()
    shape = list(grad.shape)
    shape[dim] = len(message.rows)
    out = grad.new_zeros(shape)
    for placement in message.placements:
        _add(out, dim, placement.rows, _crossed(_take(grad, dim, placement.into), plan.edge, placement))
    return out


def add_returned(message: Message, returned: Tensor, out: Tensor, dim: int) -> None:
    """Adjoint of :func:`pack`: add the gradient of the rows that were sent, in place."""
    _add(out, dim, message.rows, returned)


def _take(x: Tensor, dim: int, rows: Rows) -> Tensor:
    if isinstance(rows, range):
        return x.narrow(dim, rows.start, len(rows))
    return x.index_select(dim, _index(rows, x.device))


def _put(out: Tensor, dim: int, rows: Rows, value: Tensor) -> None:
    if isinstance(rows, range):
        out.narrow(dim, rows.start, len(rows)).copy_(value)
    else:
        out.index_copy_(dim, _index(rows, out.device), value)


def _add(out: Tensor, dim: int, rows: Rows, value: Tensor) -> None:
    if isinstance(rows, range):
        out.narrow(dim, rows.start, len(rows)).add_(value)
    else:
        out.index_add_(dim, _index(rows, out.device), value)


def _crossed(x: Tensor, edge: EdgeRule, placement: Placement) -> Tensor:
    """Turn rows by half the longitudes where they come from across a pole; its own inverse and adjoint."""
    if not placement.crossed:
        return x
    x = x.roll(x.shape[edge.lon_dim] // 2, edge.lon_dim)
    if isinstance(edge.signs, int):
        return x if edge.signs == 1 else -x
    shape = [1] * x.ndim
    shape[edge.channel_dim] = len(edge.signs)
    return x * _signs(edge.signs, x.dtype, x.device).view(shape)


# Kept on their device, since bringing them there makes the host wait.


@lru_cache(maxsize=4096)
def _signs(signs: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(signs, dtype=dtype, device=device)


@lru_cache(maxsize=4096)
def _index(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
