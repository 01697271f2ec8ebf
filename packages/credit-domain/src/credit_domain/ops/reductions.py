"""Reductions of a sharded tensor over its rows: sum, mean, extremes, variance, softmax.

A result over the sharded dim is that of the whole tensor, the same on every rank. Such a replicated value counts once
for each rank: the loss that is differentiated is the sum of the ranks' losses. Where every rank computes the same loss
from it, and that is meant to count once, divide the loss by the number of ranks. What does not reduce the sharded dim
is torch's own function of this rank's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from credit_domain.engine.driver import bring, step_for
from credit_domain.engine.ranks import ALONE, Domain, domain_of, normal_dim, sizes_of, sum_over
from credit_domain.engine.row_op import RowOfEach
from credit_domain.ops.rearranging import Ints, distinct_dims
from credit_mesh import DomainParallelManager, RowPartition


def sum(
    x: Tensor,
    dims: Ints | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "sum",
) -> Tensor:
    """Sum of a sharded tensor: :func:`torch.sum` of the whole.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dims: The dims to sum over; None is all of them.
        keepdim: Keep the summed dims, with one entry.
        dtype: Of the result; None is torch's choice. Half precision is summed in float32.
        partition: Who holds which rows of ``x``. It need not be known, and is only checked.

    Returns:
        The sum, the same on every rank where ``dims`` hold the sharded dim; else that of this rank's rows.

    Raises:
        ValueError: If there is no such dim, or one is named twice; and as :func:`credit_halo.all_sum`.

    Collectives:
        One sum forward, one backward; none where ``dims`` do not hold the sharded dim.
    """
    along, dim, domain = _reduced(x, dims, dim, partition, manager, label)
    if domain.size == 1:
        return torch.sum(x, along, keepdim, dtype=dtype)
    result = _result_dtype(torch.sum, x, dtype)
    total = torch.sum(_rounded(x, dtype), along, keepdim, dtype=_wide(result))
    return sum_over(total, domain).to(result)


def mean(
    x: Tensor,
    dims: Ints | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "mean",
) -> Tensor:
    """Mean of a sharded tensor: :func:`torch.mean` of the whole, where each row counts the same.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dims: The dims to average over; None is all of them.
        keepdim: Keep the averaged dims, with one entry.
        dtype: Of the result; None is torch's choice. Half precision is summed in float32.

    Returns:
        See :func:`sum`.

    Raises:
        ValueError: If the dtype has no mean; and as :func:`sum`.

    Collectives:
        Those of :func:`sum`.
    """
    along, dim, domain = _reduced(x, dims, dim, partition, manager, label)
    if domain.size == 1:
        return torch.mean(x, along, keepdim, dtype=dtype)
    result = _result_dtype(torch.mean, x, dtype)
    if not result.is_complex:
        _check_real(result, label)  # integers have no mean
    total = torch.sum(x, along, True, dtype=_wide(result))
    # The number of rows travels with the sum, so that nobody needs to know the partition.
    count = total.new_full((1,), x.shape[dim])
    both = sum_over(torch.cat([total.flatten(), count]), domain)
    out = both[:-1].reshape(total.shape) / (torch.real(both[-1]) * _entries_in_row(x, along, dim))
    return _squeezed(out, along, keepdim).to(result)


def amax(
    x: Tensor,
    dims: Ints | None = None,
    keepdim: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "amax",
) -> Tensor:
    """Maximum of a sharded tensor: :func:`torch.amax` of the whole.

    The gradient is spread evenly over entries that are equal to the maximum, on whichever ranks they are.

    Args:
        x: This rank's rows: any shape with a dim ``dim``, and a row on one rank at least.
        dims: The dims to reduce; None is all of them.
        keepdim: Keep the reduced dims, with one entry.

    Returns:
        See :func:`sum`.

    Raises:
        ValueError: As :func:`sum`.

    Collectives:
        One message to and from each rank forward, one sum backward; none where ``dims`` do not hold the sharded dim.
    """
    return _extreme(x, torch.amax, dims, keepdim, dim, partition, manager, label)


def amin(
    x: Tensor,
    dims: Ints | None = None,
    keepdim: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "amin",
) -> Tensor:
    """Minimum of a sharded tensor: :func:`torch.amin` of the whole; see :func:`amax`."""
    return _extreme(x, torch.amin, dims, keepdim, dim, partition, manager, label)


def var_mean(
    x: Tensor,
    dims: Ints | None = None,
    *,
    correction: float = 1,
    keepdim: bool = False,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "var_mean",
) -> tuple[Tensor, Tensor]:
    """Variance and mean of a sharded tensor: :func:`torch.var_mean` of the whole.

    Each rank's mean and squares about it are combined, so that nothing is lost where the mean is far from zero.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dims: The dims to reduce; None is all of them.
        correction: The variance is divided by the number of entries less this.
        keepdim: Keep the reduced dims, with one entry.

    Returns:
        The variance and the mean; see :func:`sum`.

    Raises:
        ValueError: If the dtype is not a real floating-point one; and as :func:`sum`.

    Collectives:
        One message to and from each rank, forward and backward; none where ``dims`` do not hold the sharded dim.
    """
    return _moments(x, torch.var_mean, dims, correction, keepdim, dim, partition, manager, label)


def var(
    x: Tensor,
    dims: Ints | None = None,
    *,
    correction: float = 1,
    keepdim: bool = False,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "var",
) -> Tensor:
    """Variance of a sharded tensor: :func:`torch.var` of the whole; see :func:`var_mean`."""
    return _moments(x, torch.var_mean, dims, correction, keepdim, dim, partition, manager, label)[0]


def std(
    x: Tensor,
    dims: Ints | None = None,
    *,
    correction: float = 1,
    keepdim: bool = False,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "std",
) -> Tensor:
    """Standard deviation of a sharded tensor: :func:`torch.std` of the whole; see :func:`var_mean`.

    Like torch's, it has a gradient of zero where it is zero.
    """
    return _moments(x, torch.std_mean, dims, correction, keepdim, dim, partition, manager, label)[0]


def logsumexp(
    x: Tensor,
    dims: Ints | None = None,
    keepdim: bool = False,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "logsumexp",
) -> Tensor:
    """Logarithm of the sum of exponentials of a sharded tensor: :func:`torch.logsumexp` of the whole.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dims: The dims to reduce; None is all of them.
        keepdim: Keep the reduced dims, with one entry.

    Returns:
        See :func:`sum`.

    Raises:
        ValueError: If the dtype is not a real floating-point one; and as :func:`sum`.

    Collectives:
        Those of :func:`var_mean`.
    """
    along, dim, domain = _reduced(x, dims, dim, partition, manager, label)
    if domain.size == 1:
        return torch.logsumexp(x, along, keepdim)
    _check_real(x.dtype, label)
    own = torch.logsumexp(x.to(_wide(x.dtype)), along, keepdim)
    return torch.logsumexp(_gathered(own, domain, label), 0).to(_result_dtype(torch.logsumexp, x))


def softmax(
    x: Tensor,
    dims: int,
    dtype: torch.dtype | None = None,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "softmax",
) -> Tensor:
    """Softmax of a sharded tensor along one dim: :func:`torch.softmax` of the whole.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dims: The dim along which the result sums to one.
        dtype: Of the result; None is torch's choice. Half precision is computed in float32.

    Returns:
        This rank's rows of the softmax.

    Raises:
        ValueError: As :func:`logsumexp`.

    Collectives:
        Those of :func:`var_mean`.
    """
    along, dim, domain = _reduced(x, dims, dim, partition, manager, label)
    if domain.size == 1:
        return torch.softmax(x, along[0], dtype)
    _check_real(dtype or x.dtype, label)
    result = _result_dtype(torch.softmax, x, dtype)
    x = _rounded(x, dtype).to(_wide(result))
    most = _own_extreme(x.detach(), torch.amax, along, dim)
    terms = torch.exp(x - most.masked_fill(most == -torch.inf, 0))
    every = _gathered(torch.stack([most, terms.sum(along, keepdim=True)]), domain, label)
    mosts, sums = every[:, 0].detach(), every[:, 1]
    highest = mosts.amax(0)
    whole = (sums * torch.exp(mosts - highest)).sum(0)
    return (terms * (torch.exp(most - highest) / whole)).to(result)


# Parts of the above


def _reduced(
    x: Tensor,
    dims: Ints | None,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
) -> tuple[tuple[int, ...], int, Domain]:
    """The dims to reduce, the sharded dim, and the ranks that have a part in it: none but this one for other dims."""
    dim = normal_dim(dim, x.ndim, x.ndim, label)
    along = tuple(range(-x.ndim, 0)) if dims is None or dims == () else distinct_dims(dims, x.ndim, label)
    domain = domain_of(manager)
    if partition is not None:
        sizes_of(x, dim, domain, label, partition)
    return along, dim, domain if dim in along else ALONE


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.int64
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The entries as torch takes them where a dtype is asked for: converted to it first, if that loses anything."""
    return x if dtype is None or dtype == _wide(dtype) else x.to(dtype)


def _result_dtype(op: Callable[..., Tensor], x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """What torch's own function makes of a dtype, under autocast too."""
    if dtype is not None:
        return dtype
    if torch.is_autocast_enabled(x.device.type):
        return op(x.new_zeros(2), 0).dtype
    return _wide(x.dtype) if op is torch.sum and not x.is_floating_point() and not x.is_complex() else x.dtype


def _check_real(dtype: torch.dtype, label: str) -> None:
    if not dtype.is_floating_point:
        raise ValueError(f"{label}: expected a real floating-point dtype; got {dtype}: convert it first")


def _squeezed(out: Tensor, along: tuple[int, ...], keepdim: bool) -> Tensor:
    return out if keepdim else out.squeeze(along)


def _entries_in_row(x: Tensor, along: tuple[int, ...], dim: int) -> int:
    """Entries of one row that are reduced to one."""
    return math.prod([x.shape[d] for d in along if d != dim])


def _gathered(x: Tensor, domain: Domain, label: str) -> Tensor:
    """The tensors of all ranks, of the same shape, stacked along a new first dim."""
    step = step_for(RowOfEach(), (1,) * domain.size, domain.rank, label)
    return bring(x.unsqueeze(0), 0, step, domain, label)


def _moments(
    x: Tensor,
    op: Callable[..., tuple[Tensor, Tensor]],
    dims: Ints | None,
    correction: float,
    keepdim: bool,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
) -> tuple[Tensor, Tensor]:
    """Variance (for ``torch.std_mean`` its root) and mean of the whole."""
    along, dim, domain = _reduced(x, dims, dim, partition, manager, label)
    if domain.size == 1 and (x.shape[dim] or dim in along):
        return op(x, along, correction=correction, keepdim=keepdim)
    if domain.size == 1:  # no rows, of which torch warns
        none = x.mean(along, keepdim)
        return none, none
    _check_real(x.dtype, label)
    result, x = _result_dtype(torch.var, x), x.to(_wide(x.dtype))
    if x.shape[dim]:
        squares, mean = torch.var_mean(x, along, correction=0, keepdim=True)
    else:  # zeros, which keep this rank in the graph
        squares = mean = x.sum(along, keepdim=True)
    count = mean.new_full((1,), x.shape[dim])
    every = _gathered(torch.cat([mean.flatten(), squares.flatten(), count]), domain, label)
    means, squares, rows = every[:, : mean.numel()], every[:, mean.numel() : -1], every[:, -1:]
    share, total = rows / rows.sum(), rows.sum() * _entries_in_row(x, along, dim)
    whole = (share * means).sum(0)
    around = (share * (squares + (means - whole).square())).sum(0) * (total / (total - correction).clamp_min(0))
    if op is torch.std_mean:
        zero = around == 0
        around = around.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    around, whole = (_squeezed(out.reshape(mean.shape), along, keepdim) for out in (around, whole))
    return around.to(result), whole.to(result)


def _extreme(
    x: Tensor,
    op: Callable[..., Tensor],
    dims: Ints | None,
    keepdim: bool,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
) -> Tensor:
    along, dim, domain = _reduced(x, dims, dim, partition, manager, label)
    if domain.size == 1:
        return op(x, along, keepdim)
    if not _entries_in_row(x, along, dim):
        raise ValueError(f"{label}: a tensor of shape {tuple(x.shape)} has no extreme over dims {along}")
    with torch.no_grad():
        out = op(_gathered(_own_extreme(x, op, along, dim), domain, label), 0)
    spread: Tensor = _EvenGradient.apply(x, out, along, domain)  # type: ignore[no-untyped-call, unused-ignore]
    return _squeezed(spread, along, keepdim)


def _own_extreme(x: Tensor, op: Callable[..., Tensor], along: tuple[int, ...], dim: int) -> Tensor:
    """The extreme of this rank's rows, with the reduced dims kept; where it has none, what loses to any other."""
    if x.shape[dim]:
        return op(x, along, True)
    lowest: float
    if x.is_floating_point() or x.dtype == torch.bool:
        lowest, highest = (0, 1) if x.dtype == torch.bool else (-torch.inf, torch.inf)
    else:
        lowest, highest = torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max
    shape = [1 if d - x.ndim in along else size for d, size in enumerate(x.shape)]
    return x.new_full(shape, lowest if op is torch.amax else highest)


class _EvenGradient(torch.autograd.Function):
    """The extreme of the whole; its gradient is spread evenly over the entries that are equal to it."""

    @staticmethod
    def forward(x: Tensor, out: Tensor, along: tuple[int, ...], domain: Domain) -> Tensor:
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, out, ctx.along, ctx.domain = inputs
        ctx.save_for_backward(x, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, out = ctx.saved_tensors
        equal, wide = x == out, _wide(grad.dtype)
        parts = torch.stack([grad.to(wide), equal.sum(ctx.along, keepdim=True, dtype=wide)])
        total, count = sum_over(parts, ctx.domain)
        return (equal * (total / count)).to(x.dtype), None, None, None
