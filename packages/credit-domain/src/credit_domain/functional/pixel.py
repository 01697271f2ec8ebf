"""Pixel shuffling of a sharded tensor: rows to channels and back."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from credit_domain import footprint
from credit_domain.domain import Step, bring, constant, domain_of, follow, has_strides, normal_dim, sizes_of, step_of
from credit_domain.functional.pad import with_rows
from credit_mesh import DomainParallelManager, RowPartition


def pixel_shuffle(
    x: Tensor,
    upscale_factor: int,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "pixel_shuffle",
) -> Tensor:
    """Each row becomes ``upscale_factor`` rows: :func:`torch.nn.functional.pixel_shuffle` of the whole.

    The output rows come out where their input row is: under ``partition.upsampled(upscale_factor)``.

    Args:
        x: This rank's rows, (..., C * upscale_factor**2, H, W).
        upscale_factor: As in torch.
        dim: The sharded dim: rows or columns.
        partition: Who holds which rows of ``x``.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: If ``dim`` is neither rows nor columns; on all ranks alike, if rows that were strided would come
            back on a partition with which they broadcast.

    Collectives:
        None where a partition is declared. Else, after a layer with a stride, the ranks ask each other for their rows.
    """
    dim, domain = normal_dim(dim, x.ndim, 2, label), domain_of(manager)
    if domain.declared == "" and has_strides(domain):  # else the granularity of the declared partition has been checked
        sizes = sizes_of(x, dim, domain, label, partition)
        follow(sizes, tuple(size * upscale_factor for size in sizes), domain, label)
    return with_rows(x, dim, 1, lambda x: F.pixel_shuffle(x, upscale_factor))


def pixel_unshuffle(
    x: Tensor,
    downscale_factor: int,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "pixel_unshuffle",
) -> Tensor:
    """Each ``downscale_factor`` rows become one: :func:`torch.nn.functional.pixel_unshuffle` of the whole.

    A row comes out on the owner of the first row of its block: under ``partition.strided(downscale_factor)``.

    Args:
        x: This rank's rows, (..., C, H, W).
        downscale_factor: As in torch.
        dim: The sharded dim: rows or columns.
        partition: Who holds which rows of ``x``; where None, the ranks ask each other at each call.
        manager: Whose domain group takes part; None is the present one, or nobody else.
        label: What errors and traces call this.

    Raises:
        ValueError: On all ranks alike, if the rows of the whole do not divide, or ``dim`` is neither rows nor columns;
            and as :func:`credit_halo.exchange_rows`.
        ExchangeError: If a peer died, or did not answer within the timeout of the group.

    Collectives:
        One message to and from each rank that shares a block; none where boundaries are multiples of
        ``downscale_factor``.
    """
    return unshuffle(x, downscale_factor, dim, partition, manager, label)


def unshuffle(
    x: Tensor,
    factor: int,
    dim: int,
    partition: RowPartition | None,
    manager: DomainParallelManager | None,
    label: str,
    layer: Hashable = None,
) -> Tensor:
    """:func:`pixel_unshuffle`, with the number that a layer remembers its partition by."""
    domain = domain_of(manager)
    dim = normal_dim(dim, x.ndim, 2, label)
    if domain.size > 1:
        sizes = sizes_of(x, dim, domain, label, partition, layer)
        x = bring(x, dim, _unshuffle_step(sizes, domain.rank, factor, label), domain, label)
    return with_rows(x, dim, factor, lambda x: F.pixel_unshuffle(x, factor))


@constant
def _unshuffle_step(sizes: tuple[int, ...], rank: int, factor: int, label: str) -> Step:
    return _cached_unshuffle_step(sizes, rank, factor, label)


@lru_cache(maxsize=4096)
def _cached_unshuffle_step(sizes: tuple[int, ...], rank: int, factor: int, label: str) -> Step:
    if factor < 1:
        raise ValueError(f"{label}: downscale_factor must be at least 1; got {factor}")
    try:
        plan = footprint.pixel_unshuffle(RowPartition(sizes, allow_empty=True), factor)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    return step_of(plan, rank)
