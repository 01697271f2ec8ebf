"""Pooling of a sharded tensor to a given size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Domain, Step, bring, constant, domain_of, normal_dim, sizes_of, step_of, sum_over
from credit_domain.functional.conv import batched, per_dim
from credit_domain.functional.pool import HALF, check_floating, dtype_of, global_index, on_rows
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

Size = int | None | Sequence[int | None]
_MAX: tuple[Callable[..., Any], ...] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_AVG: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def adaptive_avg_pool1d(
    x: Tensor,
    output_size: Size,
    *,
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "adaptive_avg_pool1d",
) -> Tensor:
    """Means of a sharded tensor (B, C, L) or (C, L); see :func:`adaptive_avg_pool2d`."""
    return adaptive_avg_pool(1, x, output_size, dim, partition, manager, label)


def adaptive_avg_pool2d(
    x: Tensor,
    output_size: Size,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "adaptive_avg_pool2d",
) -> Tensor:
    """Means of a sharded tensor: :func:`torch.nn.functional.adaptive_avg_pool2d` of the whole.

    To **one** row it is the mean over all ranks, replicated: the same on every rank, and counted once for each. The
    loss that is differentiated is the sum of the ranks' losses, so that one which every rank computes from such a value
    alone counts as many times as there are ranks.

    To more rows the output is sharded: output row ``i`` comes out on the owner of the first row that it reads,
    ``floor(i * H / rows)``.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W), of a floating-point dtype.
        output_size: As in torch: the **global** size. None keeps a dim as it is: along the sharded dim, sharded.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if ``dim`` is no spatial dim, the size negative or the dtype not floating-point;
            and as :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        To one row a sum of the ranks' means, forward and backward. To more, a message to and from each rank within
        reach, forward and backward; none where no row is missing.
    """
    return adaptive_avg_pool(2, x, output_size, dim, partition, manager, label)


def adaptive_avg_pool3d(
    x: Tensor,
    output_size: Size,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "adaptive_avg_pool3d",
) -> Tensor:
    """Means of a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`adaptive_avg_pool2d`."""
    return adaptive_avg_pool(3, x, output_size, dim, partition, manager, label)


def adaptive_max_pool1d(
    x: Tensor,
    output_size: Size,
    return_indices: bool = False,
    *,
    dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "adaptive_max_pool1d",
) -> Any:
    """Maxima of a sharded tensor (B, C, L) or (C, L); see :func:`adaptive_max_pool2d`."""
    return adaptive_max_pool(1, x, output_size, return_indices, dim, partition, manager, label)


def adaptive_max_pool2d(
    x: Tensor,
    output_size: Size,
    return_indices: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "adaptive_max_pool2d",
) -> Any:
    """Maxima of a sharded tensor: :func:`torch.nn.functional.adaptive_max_pool2d` of the whole.

    To **one** row it is the maximum over all ranks, replicated, and to more rows it is sharded: both as
    :func:`adaptive_avg_pool2d` says.

    Args:
        x: This rank's rows, (B, C, H, W) or (C, H, W), of a floating-point dtype.
        output_size: As in torch: the **global** size. None keeps a dim as it is: along the sharded dim, sharded.
        return_indices: Return a pair: the maxima, and where each is in the **whole** tensor, flat as in torch.
        dim: The sharded dim.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: As :func:`adaptive_avg_pool2d`.
        ExchangeError: As :func:`adaptive_avg_pool2d`.

    Collectives:
        To one row each rank's maxima to all others, their gradients back, and their indices where asked for or where
        the sharded dim is not the first spatial one. To more, those of :func:`adaptive_avg_pool2d`.
    """
    return adaptive_max_pool(2, x, output_size, return_indices, dim, partition, manager, label)


def adaptive_max_pool3d(
    x: Tensor,
    output_size: Size,
    return_indices: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "adaptive_max_pool3d",
) -> Any:
    """Maxima of a sharded tensor (B, C, T, H, W) or (C, T, H, W); see :func:`adaptive_max_pool2d`."""
    return adaptive_max_pool(3, x, output_size, return_indices, dim, partition, manager, label)


# For any number of spatial dims


def adaptive_avg_pool(
    nd: int,
    x: Tensor,
    output_size: Size,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Tensor:
    """The means of any number of spatial dims.

    Args are those of :func:`adaptive_avg_pool2d`; ``layer`` is the number that a layer remembers its partition by.
    """
    dim = normal_dim(dim, x.ndim, nd, label)
    domain = domain_of(manager)
    if domain.size == 1:
        return _AVG[nd - 1](x, output_size)
    check_floating(x, label)
    x, unbatched = batched(x, nd, label)
    sizes = sizes_of(x, dim, domain, label, partition, layer)

    def pool(part: Tensor, rows: int) -> tuple[Tensor, ...]:
        return (_AVG[nd - 1](part, _local_size(output_size, nd, dim, rows)),)

    if per_dim(output_size, nd)[dim] == 1:
        dtype = dtype_of(lambda part: pool(part, 1), x, dim, 1)
        total = x.sum(dim, keepdim=True, dtype=torch.float32 if x.dtype in HALF else x.dtype)
        out = (sum_over(pool(total, 1)[0], domain) / sum(sizes)).to(dtype)
    else:
        (out,) = _to_rows(pool, x, output_size, nd, dim, sizes, domain, label)
    return out.squeeze(0) if unbatched else out


def adaptive_max_pool(
    nd: int,
    x: Tensor,
    output_size: Size,
    return_indices: bool,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Any:
    """The maxima of any number of spatial dims.

    Args are those of :func:`adaptive_max_pool2d`; ``layer`` is the number that a layer remembers its partition by.
    """
    dim = normal_dim(dim, x.ndim, nd, label)
    domain = domain_of(manager)
    if domain.size == 1:
        return _MAX[nd - 1](x, output_size, return_indices)
    check_floating(x, label)
    x, unbatched = batched(x, nd, label)
    sizes = sizes_of(x, dim, domain, label, partition, layer)

    def pool(part: Tensor, rows: int) -> tuple[Tensor, ...]:
        out, index = _MAX[nd - 1](part, _local_size(output_size, nd, dim, rows), True)
        return out, index

    if per_dim(output_size, nd)[dim] == 1:
        outs = on_rows(lambda part: pool(part, 1), x, dim, 1, x.shape[dim])
        outs = _maximum(x, outs, nd, dim, sizes, domain, label, return_indices)
    else:
        outs = _to_rows(pool, x, output_size, nd, dim, sizes, domain, label)
    if unbatched:
        outs = tuple(out.squeeze(0) for out in outs)
    return outs if return_indices else outs[0]


def _local_size(output_size: Size, nd: int, dim: int, rows: int) -> tuple[int | None, ...]:
    size = list(per_dim(output_size, nd))
    size[dim] = rows
    return tuple(size)


# To one row


def _maximum(
    x: Tensor,
    own: tuple[Tensor, ...],
    nd: int,
    dim: int,
    sizes: tuple[int, ...],
    domain: Domain,
    label: str,
    return_indices: bool,
) -> tuple[Tensor, ...]:
    """The maxima of all ranks from those of each: the first among equals, and the last among NaNs, as in torch."""
    step, first = _gather_step(sizes, domain.rank)
    out, index = own
    outs = bring(out, dim, step, domain, label)
    if return_indices or dim != -nd:
        if x.shape[dim]:
            index = global_index(index, x, nd, dim, first, sum(sizes))
        indices = bring(index, dim, step, domain, label)
    else:  # the ranks come in the order in which torch looks
        indices = torch.arange(outs.shape[dim], device=x.device).reshape(-1, *[1] * (-1 - dim)).expand(outs.shape)
    with torch.no_grad():
        best = outs.amax(dim, keepdim=True)
        hit = (outs == best) | outs.isnan()
        early = indices.masked_fill(~hit, torch.iinfo(indices.dtype).max).argmin(dim, keepdim=True)
        late = indices.masked_fill(~hit, -1).argmax(dim, keepdim=True)
        chosen = torch.where(best.isnan(), late, early)
    return outs.gather(dim, chosen), indices.gather(dim, chosen)


@constant
def _gather_step(sizes: tuple[int, ...], rank: int) -> tuple[Step, int]:
    """How every rank gets one row of each rank that has any, and the first row of this rank."""
    return _cached_gather_step(sizes, rank)


@lru_cache(maxsize=4096)
def _cached_gather_step(sizes: tuple[int, ...], rank: int) -> tuple[Step, int]:
    one = RowPartition(tuple(min(1, size) for size in sizes), allow_empty=True)
    gather = footprint.Footprint(one, one, (range(one.rows),) * one.ranks, EdgeRule())
    return step_of(gather, rank), sum(sizes[:rank])


# To more rows


def _to_rows(
    pool: Callable[[Tensor, int], tuple[Tensor, ...]],
    x: Tensor,
    output_size: Size,
    nd: int,
    dim: int,
    sizes: tuple[int, ...],
    domain: Domain,
    label: str,
) -> tuple[Tensor, ...]:
    """The pooled rows of this rank, and their global indices if there are any."""
    wanted = per_dim(output_size, nd)[dim]
    step, runs = _adaptive_step(sizes, domain.rank, sum(sizes) if wanted is None else wanted, label)
    rows = bring(x, dim, step, domain, label)
    if not step.out:
        return on_rows(lambda part: pool(part, 1), rows, dim, 1, 0)
    parts = []
    for first, count, out_rows in runs:
        part = rows.narrow(dim, first - step.start, count)
        out, *index = pool(part, out_rows)
        parts.append((out, *(global_index(each, part, nd, dim, first, sum(sizes)) for each in index)))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(each, dim) for each in zip(*parts, strict=True))


@constant
def _adaptive_step(
    sizes: tuple[int, ...], rank: int, rows: int, label: str
) -> tuple[Step, tuple[tuple[int, int, int], ...]]:
    """The rows to bring, and the runs in which to pool them."""
    return _cached_adaptive_step(sizes, rank, rows, label)


@lru_cache(maxsize=4096)
def _cached_adaptive_step(
    sizes: tuple[int, ...], rank: int, rows: int, label: str
) -> tuple[Step, tuple[tuple[int, int, int], ...]]:
    source = RowPartition(sizes, allow_empty=True)
    try:
        plan = footprint.adaptive_pooling(source, rows)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    own = plan.target.interval(rank)
    return step_of(plan, rank), footprint.adaptive_runs(own.start, own.stop, source.rows, rows)
