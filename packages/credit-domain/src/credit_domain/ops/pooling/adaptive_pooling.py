"""Pooling of a sharded tensor to a given size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from credit_domain.engine.driver import Call, Placed, bring, is_unbatched, per_dim, run, step_for, without_rows
from credit_domain.engine.footprint import Footprint, footprint_from
from credit_domain.engine.ranks import Domain, constant, domain_of, normal_dim, sizes_of, sum_over
from credit_domain.engine.row_op import RowOfEach, row_op
from credit_domain.ops.pooling.pooling import HALF, check_floating, dtype_of, global_index
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

Size = int | None | Sequence[int | None]
_MAX: tuple[Callable[..., Any], ...] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_AVG: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def adaptive_window(row: int, rows: int, out: int) -> range:
    """The input rows that an output row of adaptive pooling from ``rows`` to ``out`` rows reads."""
    return range(row * rows // out, -(-(row + 1) * rows // out))


@row_op
class AdaptiveWindows(NamedTuple):
    """Pooling to a number of rows, two or more; None keeps their number.

    Output row ``i`` reads the rows of :func:`adaptive_window`; its owner is that of the first of them.
    """

    rows: int | None

    def footprint(self, source: RowPartition) -> Footprint:
        """See the class.

        Raises:
            ValueError: If the number of output rows is negative.
        """
        rows = source.rows if self.rows is None else self.rows
        if rows < 0:
            raise ValueError(f"the output of adaptive pooling must have 0 rows or more; got {rows}")
        ends = [-(-offset * rows // source.rows) for offset in source.offsets]
        target = RowPartition(tuple(b - a for a, b in pairwise(ends)), allow_empty=True)

        def need(start: int, stop: int) -> range:
            first, last = (adaptive_window(row, source.rows, rows) for row in (start, stop - 1))
            return range(first.start, last.stop)

        return footprint_from(source, target, need, EdgeRule())


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
    return adaptive_avg_pool(1, x, output_size, Call(dim, partition, manager, label))


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

    Raises:
        ValueError: On all ranks alike, if ``dim`` is no spatial dim, the size negative or the dtype not floating-point;
            and as :func:`credit_halo.exchange_rows`.

    Collectives:
        To one row a sum of the ranks' means, forward and backward. To more, a message to and from each rank within
        reach, forward and backward; none where no row is missing.
    """
    return adaptive_avg_pool(2, x, output_size, Call(dim, partition, manager, label))


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
    return adaptive_avg_pool(3, x, output_size, Call(dim, partition, manager, label))


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
    return adaptive_max_pool(1, x, output_size, return_indices, Call(dim, partition, manager, label))


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

    Raises:
        ValueError: As :func:`adaptive_avg_pool2d`.

    Collectives:
        To one row each rank's maxima to all others, their gradients back, and their indices where asked for or where
        the sharded dim is not the first spatial one. To more, those of :func:`adaptive_avg_pool2d`.
    """
    return adaptive_max_pool(2, x, output_size, return_indices, Call(dim, partition, manager, label))


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
    return adaptive_max_pool(3, x, output_size, return_indices, Call(dim, partition, manager, label))


# For any number of spatial dims


def adaptive_avg_pool(nd: int, x: Tensor, output_size: Size, call: Call) -> Tensor:
    """The means of any number of spatial dims; args are those of :func:`adaptive_avg_pool2d`."""

    def whole(x: Tensor) -> Tensor:
        return _AVG[nd - 1](x, output_size)

    def pool(part: Tensor, rows: int) -> tuple[Tensor, ...]:
        return (_AVG[nd - 1](part, _local_size(output_size, nd, dim, rows)),)

    def mean(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        dtype = dtype_of(lambda part: pool(part, 1)[0], x, dim, 1)
        total = x.sum(dim, keepdim=True, dtype=torch.float32 if x.dtype in HALF else x.dtype)
        return (sum_over(pool(total, 1)[0], domain) / sum(sizes)).to(dtype)

    check_floating(x, call)
    is_unbatched(x.shape, nd, call.label)
    dim, domain = normal_dim(call.dim, x.ndim, nd, call.label), domain_of(call.manager)
    wanted = per_dim(output_size, nd)[dim]
    if wanted != 1 or domain.size == 1:
        return _to_rows(pool, x, wanted, nd, call, lambda x: (whole(x),))[0]
    unbatched = x.ndim == nd + 1
    x = x.unsqueeze(0) if unbatched else x
    out = mean(x, sizes_of(x, dim, domain, call.label, call.partition, call.layer))
    return out.squeeze(0) if unbatched else out


def adaptive_max_pool(nd: int, x: Tensor, output_size: Size, return_indices: bool, call: Call) -> Any:
    """The maxima of any number of spatial dims; args are those of :func:`adaptive_max_pool2d`."""

    def whole(x: Tensor) -> tuple[Tensor, ...]:
        out = _MAX[nd - 1](x, output_size, return_indices)
        return out if return_indices else (out,)

    def pool(part: Tensor, rows: int) -> tuple[Tensor, ...]:
        out, index = _MAX[nd - 1](part, _local_size(output_size, nd, dim, rows), True)
        return out, index

    check_floating(x, call)
    is_unbatched(x.shape, nd, call.label)
    dim, domain = normal_dim(call.dim, x.ndim, nd, call.label), domain_of(call.manager)
    wanted = per_dim(output_size, nd)[dim]
    if wanted != 1 or domain.size == 1:
        outs = _to_rows(pool, x, wanted, nd, call, whole)
    else:
        unbatched = x.ndim == nd + 1
        x = x.unsqueeze(0) if unbatched else x
        sizes = sizes_of(x, dim, domain, call.label, call.partition, call.layer)
        one = pool(x, 1) if x.shape[dim] else without_rows(lambda part: pool(part, 1), x, dim, 1)
        outs = _maximum(x, one, nd, dim, sizes, domain, call.label, return_indices)
        outs = tuple(out.squeeze(0) for out in outs) if unbatched else outs
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
    step = step_for(RowOfEach(), tuple(min(1, size) for size in sizes), domain.rank, label)
    first = sum(sizes[: domain.rank])
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


# To more rows


def _to_rows(
    pool: Callable[[Tensor, int], tuple[Tensor, ...]],
    x: Tensor,
    wanted: int | None,
    nd: int,
    call: Call,
    whole: Callable[[Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """The pooled rows of this rank, and their global indices if there are any."""

    def part(rows: Tensor, placed: Placed) -> tuple[Tensor, ...]:
        step, dim, total = placed.step, placed.dim, sum(placed.sizes)
        if not step.out:
            return pool(rows, 1)
        parts = []
        for first, count, out_rows in runs_of(step.first, step.out, total, step.total):
            part = rows.narrow(dim, first - step.start, count)
            out, *index = pool(part, out_rows)
            parts.append((out, *(global_index(each, part, nd, dim, first, total) for each in index)))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(each, dim) for each in zip(*parts, strict=True))

    return run(AdaptiveWindows(wanted), x, call, nd, whole, part)


@constant
def runs_of(start: int, count: int, rows: int, out: int) -> tuple[tuple[int, int, int], ...]:
    """Cut output rows into runs that are an adaptive pooling of their own: (first input row, input rows, output rows).

    The windows of one are irregular, so that its rows from the middle are not, in general, the pooling of the rows that
    they read. A single row always is.
    """
    return _cached_runs(start, start + count, rows, out)


@lru_cache(maxsize=4096)
def _cached_runs(start: int, stop: int, rows: int, out: int) -> tuple[tuple[int, int, int], ...]:
    windows = [adaptive_window(row, rows, out) for row in range(start, stop)]
    runs = []
    while windows:
        first = windows[0].start
        for count in range(len(windows), 0, -1):
            read = windows[count - 1].stop - first
            shifted = (range(w.start - first, w.stop - first) for w in windows[:count])
            if all(adaptive_window(row, read, count) == window for row, window in enumerate(shifted)):
                break
        runs.append((first, read, count))
        windows = windows[count:]
    return tuple(runs)
