"""Attention whose keys and values pass from rank to rank, so that none holds them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from credit_domain.blocks.block import wide, worked_out
from credit_domain.engine.ranks import Domain
from credit_halo import plan_rows
from credit_halo.extend import ops
from credit_mesh import RowPartition

# What a rank holds in one round: the first global key, and the key of the plan that passes it on to the rank before,
# which holds it in the next round. A plain tuple, since torch.compile of torch 2.11 cannot loop over named ones there.
_Round = tuple[int, str]


def ring_attention(
    query: Tensor,
    pair: Tensor,
    mask: Tensor | None,
    scale: float | None,
    chunk: int,
    sizes: tuple[int, ...],
    domain: Domain,
    label: str,
) -> Tensor:
    """Attention of this rank's queries over all keys, as torch's own.

    Scores come a chunk of keys at a time, and each rescales the sums so far by the new maximum. With the logarithm of
    the final sum backward finds the same weights again, in a second turn, in which gradients of keys and values travel
    with them and are home after the last round.

    Args are those of :func:`credit_domain.blocks.attention`, with keys and values as a ``pair``, (..., S, E + Ev), and
    the number of keys of each rank as ``sizes``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None:
        mask = mask.expand(*mask.shape[:-1], sum(sizes))
    out: Tensor = _Ring.apply(query, pair, mask, scale, chunk, _rounds(sizes, domain.rank), domain.group, label)  # type: ignore[no-untyped-call]
    return out


@worked_out
def _rounds(sizes: tuple[int, ...], rank: int) -> tuple[_Round, ...]:
    ranks, offsets = len(sizes), RowPartition(sizes, allow_empty=True).offsets
    rounds = []
    for turn in range(ranks):
        held = RowPartition((*sizes[turn:], *sizes[:turn]), allow_empty=True)  # in round 1 rank 0 holds the keys of 1
        needs = [held.interval((r + 1) % ranks) for r in range(ranks)]
        rounds.append((offsets[(rank + turn) % ranks], plan_rows(held, needs, rank=rank).key))
    return tuple(rounds)


class _Ring(torch.autograd.Function):
    """In both directions a block of keys is passed on before its scores are worked out, and travels meanwhile."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        pair: Tensor,
        mask: Tensor | None,
        scale: float,
        chunk: int,
        rounds: tuple[_Round, ...],
        group: str,
        label: str,
    ) -> Tensor:
        ctx.settings = scale, chunk, rounds, group, label
        held, dtype = pair, wide(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            q = query.to(dtype) * scale
            least = torch.finfo(dtype).min  # not -inf, which would make NaN of what is all masked so far
            top, total = q.new_full((*q.shape[:-1], 1), least), q.new_zeros(*q.shape[:-1], 1)
            out = q.new_zeros(*q.shape[:-1], pair.shape[-1] - q.shape[-1])
            for turn, (first, plan) in enumerate(rounds, 1):
                posted = _pass_on(held, plan, group, label, True) if turn < len(rounds) else None
                for key, value, keys in _chunks(held, q, chunk):
                    scores = _scores(q, key, mask, first, keys)
                    new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                    weights, factor = (scores - new_top).exp(), (top - new_top).exp()
                    total = total * factor + weights.sum(-1, keepdim=True)
                    out, top = out * factor + weights @ value, new_top
                if posted is not None:
                    held = _arrived(posted, held, plan, group, label)
            out = (out / total).masked_fill(total == 0, 0.0)
            log_total = (top + total.log()).clamp_min(least)
        ctx.save_for_backward(query, pair, mask, out, log_total)
        # torch.compile of torch 2.11 takes wrong gradients where `to` gives back the very tensor that is saved.
        return out.to(query.dtype, copy=torch.compiler.is_compiling())

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, chunk, rounds, group, label = ctx.settings
        query, held, mask, out, log_total = ctx.saved_tensors
        dtype = wide(query.dtype)
        with torch.autocast(query.device.type, enabled=False):
            q, grad = query.to(dtype) * scale, grad.to(dtype)
            along = (grad * out).sum(-1, keepdim=True)
            grad_query = torch.zeros_like(q)
            grad_mask = torch.zeros_like(mask, dtype=dtype) if ctx.needs_input_grad[2] else None
            returning, grad_held, before = None, held, ""
            for turn, (first, plan) in enumerate(rounds, 1):
                posted = _pass_on(held, plan, group, label, False) if turn < len(rounds) else None
                so_far, grad_held = grad_held, torch.zeros_like(held, dtype=dtype)
                for key, value, keys in _chunks(held, q, chunk):
                    weights = (_scores(q, key, mask, first, keys) - log_total).exp()
                    grad_scores = weights * (grad @ value.mT - along)
                    grad_query += grad_scores @ key
                    grad_held[..., keys, :] = torch.cat((grad_scores.mT @ q, weights.mT @ grad), -1)
                    if grad_mask is not None:
                        part = grad_mask[..., first + keys.start : first + keys.stop]
                        part += grad_scores.sum_to_size(part.shape)
                if returning is not None:
                    grad_held += _arrived(returning, so_far, before, group, label)
                returning, before = _pass_on(grad_held, plan, group, label, False), plan
                if posted is not None:
                    held = _arrived(posted, held, plan, group, label)
            assert returning is not None
            grad_pair = _arrived(returning, grad_held, before, group, label)
        if grad_mask is not None:
            grad_mask = grad_mask.to(mask.dtype)
        return (grad_query * scale).to(query.dtype), grad_pair.to(held.dtype), grad_mask, *[None] * 5


def _chunks(held: Tensor, q: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Keys and values, a chunk at a time, and which of those held they are."""
    for start in range(0, held.shape[-2], chunk):
        keys = slice(start, min(start + chunk, held.shape[-2]))
        part = held[..., keys, :].to(q.dtype)
        yield part[..., : q.shape[-1]], part[..., q.shape[-1] :], keys


def _scores(q: Tensor, key: Tensor, mask: Tensor | None, first: int, keys: slice) -> Tensor:
    scores = q @ key.mT
    if mask is None:
        return scores
    part = mask[..., first + keys.start : first + keys.stop]
    return scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part


def _pass_on(x: Tensor, plan: str, group: str, label: str, check: bool) -> Tensor:
    posted: Tensor = ops.post(x, x.ndim - 2, plan, group, label, False, check)
    return posted


def _arrived(posted: Tensor, like: Tensor, plan: str, group: str, label: str) -> Tensor:
    arrived: Tensor = ops.collect(posted, list(like.shape), like.ndim - 2, plan, group, label, False, False)
    return arrived
