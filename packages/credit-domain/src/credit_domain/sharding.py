"""Dividing whole tensors and batches over the ranks of the domain, and gathering them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from credit_domain.containers import mapped, tensors_in
from credit_domain.engine.ranks import domain_of, normal_dim, sizes_of
from credit_domain.ops.rearranging import regroup
from credit_halo.extend import memory_format
from credit_mesh import DomainParallelManager, RowPartition, get_domain_parallel_manager

__all__ = [
    "gather_tensor",
    "shard_batch",
    "shard_tensor",
]

_T = TypeVar("_T")


def shard_tensor(x: Tensor, dim: int = -2, manager: DomainParallelManager | None = None) -> Tensor:
    """This rank's rows of a tensor that every rank holds whole.

    Declares how the rows are divided, where the manager has no partition of as many rows: as evenly as its granularity
    allows, so that shards differ in size where the rows do not divide.

    Args:
        x: The whole tensor, the same on every rank: any shape with a dim ``dim``.
        dim: Dim to shard; -2 is latitude in (B, C, H, W) and (B, C, T, H, W).
        manager: Whose domain group shares the rows; None is the present one, or nobody else.

    Returns:
        This rank's rows in memory of their own, so that the whole can be freed, with the dtype, device and memory
        format of ``x``, and pinned if that is. Differentiable: the gradient of ``x`` is that of this rank's rows, and
        zeros elsewhere. Without a manager, or with a domain of one rank, ``x`` itself.

    Raises:
        ValueError: If ``x`` has no such dim, or its rows are too few for the ranks.

    Collectives:
        None.
    """
    dim = normal_dim(dim, x.ndim, x.ndim, f"shard_tensor of shape {tuple(x.shape)}")
    manager = get_domain_parallel_manager() if manager is None else manager
    if manager is None:
        return x
    partition = _declared(manager, x.shape[dim], f"shard_tensor of shape {tuple(x.shape)} along dim {dim}")
    return _own_rows(x, dim, partition, manager.domain_rank)


def gather_tensor(
    x: Tensor, dim: int = -2, manager: DomainParallelManager | None = None, *, partition: RowPartition | None = None
) -> Tensor:
    """The whole of a sharded tensor, on every rank.

    Args:
        x: This rank's rows: any shape with a dim ``dim``.
        dim: The sharded dim.
        manager: Whose domain group shares the rows; None is the present one, or nobody else.
        partition: Who holds which rows; where None, the ranks ask each other at each call.

    Returns:
        The rows of all ranks, in order. This is differentiable; a rank's rows get the sum of the gradients that the
        ranks have for them, since the loss that is differentiated is the sum of the ranks' losses. Where every rank
        computes the same loss of the whole, and it is meant to count once, divide it by the number of ranks. Without a
        manager, or with a domain of one rank, ``x`` itself.

    Raises:
        ValueError: On all ranks alike, if dtypes or other dims differ, or a rank holds other rows than ``partition``
            says; and if ``x`` has no such dim.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        Each rank's rows to every other rank; in the backward their gradients back.
    """
    dim = normal_dim(dim, x.ndim, x.ndim, f"gather_tensor of shape {tuple(x.shape)}")
    domain = domain_of(manager)
    if domain.size == 1:
        return x
    sizes = sizes_of(x, dim, domain, "gather_tensor", partition)
    held = RowPartition(sizes, allow_empty=True)
    everything = [range(held.rows)] * domain.size
    return regroup(x, everything, dim=dim, partition=held, manager=manager, label="gather_tensor")


def shard_batch(
    batch: _T,
    spatial_dims_5d: int = -2,
    spatial_dims_4d: int = -2,
    manager: DomainParallelManager | None = None,
    *,
    height: int | None = None,
    dims: Mapping[str, int | None] | None = None,
) -> _T:
    """A batch with this rank's rows of its spatial tensors; see :func:`shard_tensor`.

    Sharded are the tensors (B, C, T, H, W) and (B, C, H, W) whose H is the height of the batch: ``height``; or the rows
    of the manager's partition, if a tensor of the batch has as many; or the height that all of them share. All other
    tensors, arrays and objects are left as they are, and those named in ``dims`` are treated as it says.

    Args:
        batch: Tensors in dicts, lists, tuples, named tuples, dataclasses and TensorDicts, nested in any way.
        spatial_dims_5d: Dim to shard of tensors with 5 dims.
        spatial_dims_4d: Dim to shard of tensors with 4 dims.
        manager: Whose domain group shares the rows; None is the present one, or nobody else.
        height: Rows of the whole; needed where tensors differ and the manager has no partition yet.
        dims: For tensors by name, the dim to shard, or None to leave them whole: ``{"static.orography": -2}`` shards a
            table (C, H, W). Names are keys joined by dots; places in lists and tuples are written ``x[0]``.

    Returns:
        A new batch, of containers of the same types. The one that was given stays as it is.

    Raises:
        ValueError: If the height is not clear, no tensor has ``height`` rows, a tensor that is named in ``dims`` has
            other rows than that, or is not in the batch, or there are too few rows for the ranks.

    Collectives:
        None.
    """
    manager = get_domain_parallel_manager() if manager is None else manager
    tensors = list(tensors_in(batch))
    named = {} if dims is None else dims
    along = _dims_to_shard(tensors, {5: spatial_dims_5d, 4: spatial_dims_4d}, named)
    spatial = [(path, x, dim) for (path, x), dim in zip(tensors, along, strict=True) if dim is not None]
    rows = _height(spatial, manager, height, named) if manager is not None else None
    if manager is None or rows is None:
        copied: _T = mapped(batch, lambda path, x: x)
        return copied
    partition, rank = _declared(manager, rows, "shard_batch"), manager.domain_rank
    shards: dict[tuple[int, int], Tensor] = {}  # a tensor that the batch holds twice is divided once
    for _, x, dim in spatial:
        if x.shape[dim] == rows and (id(x), dim) not in shards:
            shards[id(x), dim] = _own_rows(x, dim, partition, rank)
    parts = [x if dim is None else shards.get((id(x), dim), x) for (_, x), dim in zip(tensors, along, strict=True)]
    left = iter(parts)
    try:
        result: _T = mapped(batch, lambda path, x: next(left))
    except ValueError as error:
        raise ValueError(f"shard_batch: {error}") from None
    return result


def _declared(manager: DomainParallelManager, rows: int, what: str) -> RowPartition:
    """The manager's partition, declared now if it is of other rows."""
    partition = manager.partition
    if partition is not None and partition.rows == rows:
        return partition
    try:
        return manager.declare(rows)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _own_rows(x: Tensor, dim: int, partition: RowPartition, rank: int) -> Tensor:
    if partition.ranks == 1:
        return x
    own = partition.interval(rank)
    rows = x.narrow(dim, own.start, len(own))
    return torch.empty_like(rows, memory_format=memory_format(x), pin_memory=x.is_pinned()).copy_(rows)


# Which tensors of a batch are sharded

Spatial = list[tuple[str, Tensor, int]]


def _dims_to_shard(
    tensors: list[tuple[str, Tensor]], by_ndim: Mapping[int, int], named: Mapping[str, int | None]
) -> list[int | None]:
    """Along which dim each tensor may be sharded, counted from the last; None for those that are left whole."""
    unknown = [name for name in named if name not in dict(tensors)]
    if unknown:
        names = ", ".join(path for path, _ in tensors) or "none"
        raise ValueError(f"shard_batch: dims names no tensor of the batch: {', '.join(unknown)}; it has {names}")
    along = []
    for path, x in tensors:
        dim = named[path] if path in named else by_ndim.get(x.ndim)
        what = f"shard_batch: {path} of shape {tuple(x.shape)}"
        along.append(None if dim is None else normal_dim(dim, x.ndim, x.ndim, what))
    return along


def _height(
    spatial: Spatial, manager: DomainParallelManager, height: int | None, named: Mapping[str, int | None]
) -> int | None:
    """Rows of the batch; None where it has nothing to shard."""
    heights = {x.shape[dim] for _, x, dim in spatial}
    listed = ", ".join(f"{path} {tuple(x.shape)} along dim {dim}" for path, x, dim in spatial) or "none"
    if height is None:
        if manager.partition is not None and manager.partition.rows in heights:
            height = manager.partition.rows
        elif len(heights) > 1:
            raise ValueError(
                f"shard_batch: tensors of several heights, of which none is declared: {listed}; pass height=, or name "
                "those that are no part of the grid in dims, with None"
            )
        elif not heights:
            return None
        else:
            (height,) = heights
    elif height not in heights:
        raise ValueError(f"shard_batch: no tensor has height={height}; those that can be sharded are {listed}")
    for path, x, dim in spatial:
        if path in named and x.shape[dim] != height:
            raise ValueError(
                f"shard_batch: dims says to shard {path} of shape {tuple(x.shape)} along dim {dim}, where it has "
                f"{x.shape[dim]} rows; the height of the batch is {height}"
            )
    return height
