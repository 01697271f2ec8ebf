"""Padding of a sharded tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Step, bring, constant, domain_of, normal_dim, sizes_of, step_of
from credit_halo import EdgeRule
from credit_halo.extend import marked
from credit_mesh import DomainParallelManager, RowPartition


def pad(
    x: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "pad",
) -> Tensor:
    """Pad a sharded tensor: :func:`torch.nn.functional.pad` of the whole.

    Along the sharded dim rows are added before the first and after the last of all ranks (or cut off there, where
    negative), and boundaries between ranks keep their row numbers: output row ``i`` comes out on the owner of input row
    ``i``, and the last rank takes what is left over. So a convolution that takes the padding off again restores the
    partition, and each rank's rows shift by the padding before the first.

    Args:
        x: This rank's rows, of any shape that torch takes.
        pad: Amounts as in torch, (before, after) from the last dim on; of the whole tensor.
        mode: As in torch: ``constant``, ``reflect``, ``replicate`` or ``circular``.
        value: As in torch.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if torch refuses to pad the rows of the whole so, or no row would be left; and
            as :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where rows are not padded.
    """
    return pad_rows(x, pad, mode, value, dim, partition, manager, label)


def pad_rows(
    x: Tensor,
    amounts: Sequence[int],
    mode: str,
    value: float | None,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Tensor:
    """:func:`pad`, with the number that a layer remembers its partition by."""
    domain = domain_of(manager)
    amounts = [operator.index(amount) for amount in amounts]
    if domain.size == 1:
        return F.pad(x, amounts, mode, value)
    dim = normal_dim(dim, x.ndim, x.ndim, label)
    if len(amounts) % 2:
        raise ValueError(f"{label}: pad must list pairs (before, after); got {len(amounts)} numbers: {tuple(amounts)}")
    at = -2 - 2 * dim
    rows = tuple(amounts[at : at + 2])
    if any(rows):
        sizes = sizes_of(x, dim, domain, label, partition, layer)
        # A float of a module may be symbolic in compiled code, and its digits are not.
        fill = None if value is None else float(value).hex()
        amounts[at : at + 2] = 0, 0
        for step in _pad_steps(sizes, domain.rank, rows, mode, fill, dim, x.ndim, len(amounts), label):
            x = bring(x, dim, step, domain, label, new=not any(amounts))
        if not any(amounts):
            return x
    return with_rows(x, dim, 1, lambda x: F.pad(x, amounts, mode, value))


def with_rows(x: Tensor, dim: int, few: int, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What a function makes of rows; of no rows, which torch's own refuse, no rows of the shape that ``few`` give."""
    if x.shape[dim]:
        return fn(x)
    shape = [*x.shape]
    shape[dim] = few
    shape = [*fn(x.new_empty(shape)).shape]
    shape[dim] = 0
    return marked(x.reshape(shape)).clone()  # a new tensor, and a part of what a checkpoint computes again, as others


@constant
def _pad_steps(
    sizes: tuple[int, ...],
    rank: int,
    amounts: tuple[int, ...],
    mode: str,
    value: str | None,
    dim: int,
    ndim: int,
    listed: int,
    label: str,
) -> tuple[Step, ...]:
    return _cached_pad_steps(sizes, rank, amounts, mode, value, dim, ndim, listed, label)


@lru_cache(maxsize=4096)
def _cached_pad_steps(
    sizes: tuple[int, ...],
    rank: int,
    amounts: tuple[int, ...],
    mode: str,
    value: str | None,
    dim: int,
    ndim: int,
    listed: int,
    label: str,
) -> tuple[Step, ...]:
    source = RowPartition(sizes, allow_empty=True)
    fill = None if value is None else float.fromhex(value)
    shape, whole = [1] * ndim, [0] * listed
    shape[dim] = source.rows
    whole[-2 - 2 * dim : -2 * dim] = amounts
    before, after = amounts
    cropped = min(before, 0), min(after, 0)
    # Where torch both crops and wraps, it wraps around what is left; all else it fills from the rows that there were.
    each = [(before, after)]
    if mode == "circular" and any(cropped) and max(amounts) > 0:
        each = [cropped, (max(before, 0), max(after, 0))]
    steps = []
    try:
        F.pad(torch.empty(shape, device="meta"), whole, mode, fill)  # what torch refuses
        edge = EdgeRule("constant", 0.0 if fill is None else fill) if mode == "constant" else EdgeRule(mode)
        for front, back in each:
            plan = footprint.padded(source, front, back, edge)
            steps.append(step_of(plan, rank))
            source = plan.target
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{label}: {error}") from error
    return tuple(steps)
