"""Weighted sums of rows along one dim, as an operator that compiled code calls."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from credit_domain.engine.text import as_text, from_text
from credit_domain.ops.interpolation.taps import HALF, Along, Taps, map_of
from credit_halo.extend import empty_rows, memory_format


class _Pass(NamedTuple):
    """Add weighted input rows to output rows: to all, in order, to those of ``into``, or all to the one of ``into``."""

    into: Tensor | None
    rows: Tensor
    weight: Tensor | None


class _Part(NamedTuple):
    """A rank's part of a map, and of its adjoint, as passes over the output.

    Each output row takes one input row in a pass; where output rows are fewer than the input rows of one of them, each
    is summed at once instead.
    """

    rows: tuple[int, int]
    passes: tuple[tuple[_Pass, ...], tuple[_Pass, ...]]


def part_of(along: Along, part: tuple[int, int, int, int]) -> str:
    """The key of a map of ``rows`` input rows from ``start`` on to ``out`` output rows from ``first`` on.

    It says all that :func:`_part` makes of it: operators that torch.compile traces can carry a string.
    """
    key = as_text((along._replace(dtype=str(along.dtype)), part))  # type: ignore[arg-type]
    _part(key)
    return key


@lru_cache(maxsize=1024)
def _part(key: str) -> _Part:
    numbers, (start, rows, first, out) = from_text(key)
    along = Along(*numbers)
    along = along._replace(dtype=getattr(torch, str(along.dtype).removeprefix("torch.")))
    the_map = map_of(along)

    def own(taps: Taps) -> tuple[Tensor, Tensor, Tensor | None]:
        mine = (taps.out >= first) & (taps.out < first + out)
        return taps.out[mine] - first, taps.row[mine] - start, None if taps.weight is None else taps.weight[mine]

    into, row, weight = own(the_map.taps)
    back_from, back_into, back_weight = own(the_map.back)
    forward = _passes(into, row, weight, out, along.device)
    return _Part((out, rows), (forward, _passes(back_into, back_from, back_weight, rows, along.device)))


def _passes(out: Tensor, row: Tensor, weight: Tensor | None, rows_out: int, device: str) -> tuple[_Pass, ...]:
    by_out = out.argsort(stable=True)
    out, row, weight = out[by_out], row[by_out], None if weight is None else weight[by_out]
    counts = torch.bincount(out, minlength=rows_out)
    number = torch.arange(len(out)) - (counts.cumsum(0) - counts)[out]  # of a tap among those of its output row
    many = int(counts.max()) if rows_out else 0
    by_row = many > rows_out
    passes = []
    for each in range(rows_out if by_row else many):
        chosen = (out == each) if by_row else (number == each)
        into = torch.tensor([each]) if by_row else out[chosen]
        every = not by_row and len(into) == rows_out
        part = None if weight is None else weight[chosen].to(device)
        passes.append(_Pass(None if every else into.to(device), row[chosen].to(device), part))
    return tuple(passes)


@torch.library.custom_op("credit_domain::weigh_rows", mutates_args=())
def weigh(x: Tensor, dim: int, key: str, adjoint: bool) -> Tensor:
    """Rows summed as the part of a map says, or gradients as its adjoint does."""
    part = _part(key)
    rows, passes = part.rows[adjoint], part.passes[adjoint]
    last = memory_format(x) != torch.contiguous_format
    y = x.movedim(1, -1) if last else x
    at = dim - 1 if last else dim
    wide = torch.float32 if x.dtype in HALF and len(passes) > 1 else x.dtype
    before, after = y.shape[:at], y.shape[at + 1 :]
    y = y.reshape(before.numel(), y.shape[at], after.numel()).to(wide)
    out = _sum_rows(y.squeeze(2) if after.numel() == 1 else y, rows, passes)
    out = out.to(x.dtype).reshape(*before, rows, *after)
    return out.movedim(-1, 1) if last else out


def _sum_rows(x: Tensor, rows: int, passes: tuple[_Pass, ...]) -> Tensor:
    """The rows of a tensor (before, rows, after) or (before, rows)."""
    out = None
    if not passes or passes[0].into is not None:
        out = x.new_zeros(x.shape[0], rows, *x.shape[2:])
    for into, row, by in passes:
        weight = by if by is None or x.ndim == 2 else by[:, None]
        # To gather is many times faster than to select along the last dim.
        part = x.index_select(1, row) if x.ndim == 3 else x.gather(1, row.expand(x.shape[0], -1))
        if out is None:
            out = part if weight is None else part.mul_(weight)
        elif into is None:
            out = out.add_(part) if weight is None else out.addcmul_(part, weight)
        else:
            part = part if weight is None else part.mul_(weight)
            out.index_add_(1, into, part if len(into) == len(row) else part.sum(1, keepdim=True))
    assert out is not None
    return out


@weigh.register_fake
def _(x: Tensor, dim: int, key: str, adjoint: bool) -> Tensor:
    return empty_rows(x, dim, _part(key).rows[adjoint])


def _weigh_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, ctx.key, ctx.adjoint = inputs


def _weigh_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return weigh(grad, ctx.dim, ctx.key, not ctx.adjoint), None, None, None


weigh.register_autograd(_weigh_backward, setup_context=_weigh_setup)
