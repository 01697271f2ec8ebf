"""Pooling layers; see :mod:`credit_domain.layers` for what all of them take."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from credit_domain.engine.driver import per_dim
from credit_domain.engine.layer import DomainParallelLayer, Seen, halo_of, known_layer
from credit_domain.engine.row_op import RowOp
from credit_domain.ops.pooling.adaptive_pooling import AdaptiveWindows, adaptive_avg_pool, adaptive_max_pool
from credit_domain.ops.pooling.pooling import MaxWindows, Windows, avg_pool, lp_pool, max_pool
from credit_mesh import DomainParallelManager


class _Pool(DomainParallelLayer):
    """What all pooling shares."""

    spatial: int
    reason = "pools rows of other ranks"

    def __init__(
        self,
        pool: nn.Module,
        shard_dim: int | None = None,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        if shard_dim is None:  # latitude, or the only dim
            shard_dim = -min(2, self.spatial)
        super().__init__(pool, shard_dim, manager=manager, label=label)

    @property
    def pool(self) -> Any:
        """The wrapped pooling."""
        return self.wrapped


class _Window(_Pool):
    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp:
        """See the base class."""
        return cls._windows(module, dim)

    @classmethod
    def _windows(cls, module: nn.Module, dim: int) -> Windows:
        m: Any = module
        stride = m.kernel_size if m.stride is None else m.stride
        # Means have no dilation, and norms no padding either.
        values = (m.kernel_size, stride, getattr(m, "padding", 0), getattr(m, "dilation", 1))
        kernel, stride, padding, dilation = (per_dim(value, cls.spatial)[dim] for value in values)
        return Windows(kernel, stride, padding, dilation, m.ceil_mode)

    @property
    def halo_width(self) -> int:
        """The most rows that a rank reads beyond either side of its own, where its rows divide by the stride."""
        window = self._windows(self.wrapped, self._dim)
        return halo_of(window.padding, window.span - 1 - window.padding - (window.stride - 1))


class _MaxPool(_Window):
    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> MaxWindows:
        """See the base class."""
        return MaxWindows(cls._windows(module, dim), -math.inf)

    def forward(self, x: Tensor) -> Any:
        """The maxima of this rank's output rows, with their indices if asked for.

        See :func:`credit_domain.functional.max_pool2d`.
        """
        m = self.wrapped
        args = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
        return max_pool(self.spatial, x, *args, self.call)


class _AvgPool(_Window):
    def forward(self, x: Tensor) -> Tensor:
        """The means of this rank's output rows: :func:`credit_domain.functional.avg_pool2d`."""
        m = self.wrapped
        divisor = m.divisor_override if self.spatial > 1 else None
        args = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)
        return avg_pool(self.spatial, x, *args, self.call)


class _LPPool(_Window):
    def forward(self, x: Tensor) -> Tensor:
        """The norms of this rank's output rows: :func:`credit_domain.functional.lp_pool2d`."""
        m = self.wrapped
        return lp_pool(self.spatial, x, m.norm_type, m.kernel_size, m.stride, m.ceil_mode, self.call)


class _Adaptive(_Pool):
    @classmethod
    def record(cls, module: nn.Module, dim: int, seen: Seen | None = None) -> RowOp | None:
        """None to a single row, which reduces over all of them; see the base class."""
        wanted = per_dim(module.output_size, cls.spatial)[dim]
        return None if wanted == 1 else AdaptiveWindows(wanted)


class _AdaptiveAvgPool(_Adaptive):
    def forward(self, x: Tensor) -> Tensor:
        """The means of this rank's output rows: :func:`credit_domain.functional.adaptive_avg_pool2d`."""
        return adaptive_avg_pool(self.spatial, x, self.wrapped.output_size, self.call)


class _AdaptiveMaxPool(_Adaptive):
    def forward(self, x: Tensor) -> Any:
        """The maxima of this rank's output rows, with their indices if asked for.

        See :func:`credit_domain.functional.adaptive_max_pool2d`.
        """
        return adaptive_max_pool(self.spatial, x, self.wrapped.output_size, self.wrapped.return_indices, self.call)


@known_layer
class DomainParallelMaxPool1d(_MaxPool):
    """:class:`torch.nn.MaxPool1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.MaxPool1d,)
    spatial = 1


@known_layer
class DomainParallelMaxPool2d(_MaxPool):
    """:class:`torch.nn.MaxPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel, stride, padding and dilation, on any partition, in its choice among ties too.
    """

    wraps = (nn.MaxPool2d,)
    spatial = 2


@known_layer
class DomainParallelMaxPool3d(_MaxPool):
    """:class:`torch.nn.MaxPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.MaxPool3d,)
    spatial = 3


@known_layer
class DomainParallelAvgPool1d(_AvgPool):
    """:class:`torch.nn.AvgPool1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.AvgPool1d,)
    spatial = 1


@known_layer
class DomainParallelAvgPool2d(_AvgPool):
    """:class:`torch.nn.AvgPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel, stride and padding, on any partition; clipped windows count as torch counts them.
    """

    wraps = (nn.AvgPool2d,)
    spatial = 2


@known_layer
class DomainParallelAvgPool3d(_AvgPool):
    """:class:`torch.nn.AvgPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.AvgPool3d,)
    spatial = 3


@known_layer
class DomainParallelLPPool1d(_LPPool):
    """:class:`torch.nn.LPPool1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.LPPool1d,)
    spatial = 1


@known_layer
class DomainParallelLPPool2d(_LPPool):
    """:class:`torch.nn.LPPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel and stride, on any partition.
    """

    wraps = (nn.LPPool2d,)
    spatial = 2


@known_layer
class DomainParallelLPPool3d(_LPPool):
    """:class:`torch.nn.LPPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.LPPool3d,)
    spatial = 3


@known_layer
class DomainParallelAdaptiveAvgPool1d(_AdaptiveAvgPool):
    """:class:`torch.nn.AdaptiveAvgPool1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.AdaptiveAvgPool1d,)
    spatial = 1


@known_layer
class DomainParallelAdaptiveAvgPool2d(_AdaptiveAvgPool):
    """:class:`torch.nn.AdaptiveAvgPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    To one row the mean is the same on every rank, and counts once for each of them; to more rows it is sharded.
    """

    wraps = (nn.AdaptiveAvgPool2d,)
    spatial = 2


@known_layer
class DomainParallelAdaptiveAvgPool3d(_AdaptiveAvgPool):
    """:class:`torch.nn.AdaptiveAvgPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.AdaptiveAvgPool3d,)
    spatial = 3


@known_layer
class DomainParallelAdaptiveMaxPool1d(_AdaptiveMaxPool):
    """:class:`torch.nn.AdaptiveMaxPool1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.AdaptiveMaxPool1d,)
    spatial = 1


@known_layer
class DomainParallelAdaptiveMaxPool2d(_AdaptiveMaxPool):
    """:class:`torch.nn.AdaptiveMaxPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    To one row the output is the maximum over all ranks, the same on each, and counts once for each of them: the loss is
    the sum of the ranks' losses. To more rows it is sharded.
    """

    wraps = (nn.AdaptiveMaxPool2d,)
    spatial = 2


@known_layer
class DomainParallelAdaptiveMaxPool3d(_AdaptiveMaxPool):
    """:class:`torch.nn.AdaptiveMaxPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.AdaptiveMaxPool3d,)
    spatial = 3
