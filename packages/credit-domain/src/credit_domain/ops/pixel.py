"""Pixel shuffling of a sharded tensor: rows to channels and back."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.engine.driver import Call, place, with_rows
from credit_domain.engine.footprint import Footprint, footprint_from, windows
from credit_domain.engine.layer import DomainParallelLayer, Seen, known_layer
from credit_domain.engine.ranks import domain_of, normal_dim, sizes_of
from credit_domain.engine.row_op import RowOp, row_op
from credit_domain.engine.skips import follow, has_strides
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition


@row_op
class PixelShuffle(NamedTuple):
    """Each row becomes ``factor`` rows, which stay where it is."""

    factor: int

    @property
    def ratio(self) -> tuple[int, int]:
        """One row becomes ``factor``."""
        return 1, self.factor

    def footprint(self, source: RowPartition) -> Footprint:
        """Output row ``i`` reads row ``i // factor``."""

        def need(start: int, stop: int) -> range:
            return range(start // self.factor, -(-stop // self.factor))

        return footprint_from(source, source.upsampled(self.factor), need, EdgeRule())


@row_op
class PixelUnshuffle(NamedTuple):
    """Blocks of ``factor`` rows become one row, at the owner of the first of them."""

    factor: int

    @property
    def ratio(self) -> tuple[int, int]:
        """``factor`` rows become one."""
        return self.factor, 1

    def footprint(self, source: RowPartition) -> Footprint:
        """Output row ``j`` reads its block."""
        if self.factor < 1:
            raise ValueError(f"downscale_factor must be at least 1; got {self.factor}")
        if source.rows % self.factor:
            raise ValueError(f"{source.rows} rows cannot be cut into blocks of {self.factor}")
        return windows(source, source.strided(self.factor), self.factor, self.factor, 0, EdgeRule())


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

    Raises:
        ValueError: On all ranks alike, if the rows of the whole do not divide, or ``dim`` is neither rows nor columns;
            and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank that shares a block; none where boundaries are multiples of
        ``downscale_factor``.
    """
    return unshuffle(x, downscale_factor, Call(dim, partition, manager, label))


def unshuffle(x: Tensor, factor: int, call: Call) -> Tensor:
    """:func:`pixel_unshuffle`, also for layers."""
    dim, domain = normal_dim(call.dim, x.ndim, 2, call.label), domain_of(call.manager)
    if domain.size > 1:
        x = place(PixelUnshuffle(factor), x, call, dim, domain).bring(x)
    return with_rows(x, dim, factor, lambda x: F.pixel_unshuffle(x, factor))


@known_layer
class DomainParallelPixelShuffle(DomainParallelLayer):
    """:class:`torch.nn.PixelShuffle` on a sharded tensor (..., C, H, W); see :mod:`credit_domain.layers`."""

    wraps = (nn.PixelShuffle,)
    spatial = 2
    reason = "torch's own has no gradient where there are no rows"

    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp:
        """See the base class."""
        return PixelShuffle(module.upscale_factor)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Cut each row of the channels into ``upscale_factor`` rows: :func:`credit_domain.functional.pixel_shuffle`."""
        return pixel_shuffle(x, self.wrapped.upscale_factor, dim=self._dim, manager=self.manager, label=self.label)


@known_layer
class DomainParallelPixelUnshuffle(DomainParallelLayer):
    """:class:`torch.nn.PixelUnshuffle` on a sharded tensor (..., C, H, W), on any partition.

    See :mod:`credit_domain.layers`.
    """

    wraps = (nn.PixelUnshuffle,)
    spatial = 2
    reason = "gathers blocks of rows"

    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp:
        """See the base class."""
        return PixelUnshuffle(module.downscale_factor)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Gather each ``downscale_factor`` rows: :func:`credit_domain.functional.pixel_unshuffle`."""
        return unshuffle(x, self.wrapped.downscale_factor, self.call)
