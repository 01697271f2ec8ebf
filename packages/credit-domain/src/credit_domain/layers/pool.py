"""Pooling of sharded rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from credit_domain.functional.adaptive_pool import adaptive_avg_pool, adaptive_max_pool
from credit_domain.functional.conv import per_dim
from credit_domain.functional.pool import avg_pool, lp_pool, max_pool
from credit_domain.layers.base import DomainParallelLayer, halo_of, spatial_dim
from credit_mesh import DomainParallelManager


class _Pool(DomainParallelLayer):
    """What all pooling shares."""

    spatial: int

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
        # Kept negative: a dim counted from the first would be another one where the batch dim is missing.
        self.__dict__["_dim"] = spatial_dim(pool, shard_dim, self.spatial) - self.spatial

    @property
    def pool(self) -> Any:
        """The wrapped pooling."""
        return self.wrapped


class _Window(_Pool):
    @property
    def halo_width(self) -> int:
        """The most rows that a rank reads beyond either side of its own, where its rows divide by the stride."""
        m, at = self.wrapped, self._dim
        stride = m.kernel_size if m.stride is None else m.stride
        # Means have no dilation, and norms no padding either.
        values = (m.kernel_size, stride, getattr(m, "padding", 0), getattr(m, "dilation", 1))
        kernel, strides, before, dilation = (per_dim(value, self.spatial)[at] for value in values)
        return halo_of(before, dilation * (kernel - 1) - before - (strides - 1))


class _MaxPool(_Window):
    def forward(self, x: Tensor) -> Any:
        """The maxima of the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.

        Returns:
            The output rows whose first input row (``j * stride``) this rank owns; with ``return_indices`` a pair of
            them and the indices into the whole tensor.

        Raises:
            ValueError: As :func:`credit_domain.functional.max_pool2d`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        m = self.wrapped
        args = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
        return max_pool(self.spatial, x, *args, self._dim, None, self.manager, self.label, layer=self._layer)


class DomainParallelMaxPool1d(_MaxPool):
    """:class:`torch.nn.MaxPool1d` on a sharded tensor (B, C, L) or (C, L); see :class:`DomainParallelMaxPool2d`."""

    wraps = (nn.MaxPool1d,)
    spatial = 1


class DomainParallelMaxPool2d(_MaxPool):
    """:class:`torch.nn.MaxPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel, stride, padding and dilation, on any partition, in its choice among ties too.

    Args:
        pool: The pooling to wrap.
        shard_dim: The sharded dim; latitude, -2, if not given.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.MaxPool2d,)
    spatial = 2


class DomainParallelMaxPool3d(_MaxPool):
    """:class:`torch.nn.MaxPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    See :class:`DomainParallelMaxPool2d`.
    """

    wraps = (nn.MaxPool3d,)
    spatial = 3


class _AvgPool(_Window):
    def forward(self, x: Tensor) -> Tensor:
        """The means of the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.

        Returns:
            The output rows whose first input row (``j * stride``) this rank owns.

        Raises:
            ValueError: As :func:`credit_domain.functional.avg_pool2d`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        m = self.wrapped
        divisor = m.divisor_override if self.spatial > 1 else None
        args = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)
        return avg_pool(self.spatial, x, *args, self._dim, None, self.manager, self.label, layer=self._layer)


class DomainParallelAvgPool1d(_AvgPool):
    """:class:`torch.nn.AvgPool1d` on a sharded tensor (B, C, L) or (C, L); see :class:`DomainParallelAvgPool2d`."""

    wraps = (nn.AvgPool1d,)
    spatial = 1


class DomainParallelAvgPool2d(_AvgPool):
    """:class:`torch.nn.AvgPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel, stride and padding, on any partition; clipped windows count as torch counts them.

    Args:
        pool: The pooling to wrap.
        shard_dim: The sharded dim; latitude, -2, if not given.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.AvgPool2d,)
    spatial = 2


class DomainParallelAvgPool3d(_AvgPool):
    """:class:`torch.nn.AvgPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    See :class:`DomainParallelAvgPool2d`.
    """

    wraps = (nn.AvgPool3d,)
    spatial = 3


class _LPPool(_Window):
    def forward(self, x: Tensor) -> Tensor:
        """The norms of the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.

        Returns:
            The output rows whose first input row (``j * stride``) this rank owns.

        Raises:
            ValueError: As :func:`credit_domain.functional.lp_pool2d`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        m = self.wrapped
        args = (m.norm_type, m.kernel_size, m.stride, m.ceil_mode)
        return lp_pool(self.spatial, x, *args, self._dim, None, self.manager, self.label, layer=self._layer)


class DomainParallelLPPool1d(_LPPool):
    """:class:`torch.nn.LPPool1d` on a sharded tensor (B, C, L) or (C, L); see :class:`DomainParallelLPPool2d`."""

    wraps = (nn.LPPool1d,)
    spatial = 1


class DomainParallelLPPool2d(_LPPool):
    """:class:`torch.nn.LPPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    Exact for every kernel and stride, on any partition.

    Args:
        pool: The pooling to wrap.
        shard_dim: The sharded dim; latitude, -2, if not given.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.LPPool2d,)
    spatial = 2


class DomainParallelLPPool3d(_LPPool):
    """:class:`torch.nn.LPPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    See :class:`DomainParallelLPPool2d`.
    """

    wraps = (nn.LPPool3d,)
    spatial = 3


class _AdaptiveAvgPool(_Pool):
    def forward(self, x: Tensor) -> Tensor:
        """The means of the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.

        Returns:
            To one row the same on every rank, counted once for each. To more, the rows ``i`` whose first input row,
            ``floor(i * H / rows)``, this rank owns.

        Raises:
            ValueError: As :func:`credit_domain.functional.adaptive_avg_pool2d`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            Those of :func:`credit_domain.functional.adaptive_avg_pool2d`.
        """
        args = (self.wrapped.output_size, self._dim, None, self.manager, self.label)
        return adaptive_avg_pool(self.spatial, x, *args, layer=self._layer)


class DomainParallelAdaptiveAvgPool1d(_AdaptiveAvgPool):
    """:class:`torch.nn.AdaptiveAvgPool1d` on a sharded tensor (B, C, L) or (C, L).

    See :class:`DomainParallelAdaptiveAvgPool2d`.
    """

    wraps = (nn.AdaptiveAvgPool1d,)
    spatial = 1


class DomainParallelAdaptiveAvgPool2d(_AdaptiveAvgPool):
    """:class:`torch.nn.AdaptiveAvgPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    See :class:`DomainParallelAdaptiveAvgPool2d`.
    """

    wraps = (nn.AdaptiveAvgPool2d,)
    spatial = 2


class DomainParallelAdaptiveAvgPool3d(_AdaptiveAvgPool):
    """:class:`torch.nn.AdaptiveAvgPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    See :class:`DomainParallelAdaptiveAvgPool2d`.
    """

    wraps = (nn.AdaptiveAvgPool3d,)
    spatial = 3


class _AdaptiveMaxPool(_Pool):
    def forward(self, x: Tensor) -> Any:
        """The maxima of the whole of which ``x`` is this rank's part.

        Args:
            x: This rank's rows.

        Returns:
            To one row the same on every rank, counted once for each. To more, the rows ``i`` whose first input row,
            ``floor(i * H / rows)``, this rank owns. With ``return_indices`` a pair of these and the indices into the
            whole tensor.

        Raises:
            ValueError: As :func:`credit_domain.functional.adaptive_max_pool2d`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            Those of :func:`credit_domain.functional.adaptive_max_pool2d`.
        """
        m = self.wrapped
        args = (m.output_size, m.return_indices, self._dim, None, self.manager, self.label)
        return adaptive_max_pool(self.spatial, x, *args, layer=self._layer)


class DomainParallelAdaptiveMaxPool1d(_AdaptiveMaxPool):
    """:class:`torch.nn.AdaptiveMaxPool1d` on a sharded tensor (B, C, L) or (C, L).

    See :class:`DomainParallelAdaptiveMaxPool2d`.
    """

    wraps = (nn.AdaptiveMaxPool1d,)
    spatial = 1


class DomainParallelAdaptiveMaxPool2d(_AdaptiveMaxPool):
    """:class:`torch.nn.AdaptiveMaxPool2d` on a sharded tensor (B, C, H, W) or (C, H, W).

    To one row the output is the maximum over all ranks, the same on each, and counts once for each of them: the loss is
    the sum of the ranks' losses. To more rows it is sharded.

    Args:
        pool: The pooling to wrap.
        shard_dim: The sharded dim; latitude, -2, if not given.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.AdaptiveMaxPool2d,)
    spatial = 2


class DomainParallelAdaptiveMaxPool3d(_AdaptiveMaxPool):
    """:class:`torch.nn.AdaptiveMaxPool3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    See :class:`DomainParallelAdaptiveMaxPool2d`.
    """

    wraps = (nn.AdaptiveMaxPool3d,)
    spatial = 3
