"""Dropout layers; see :mod:`credit_domain.layers` for what all of them take."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from credit_domain.engine.layer import DomainParallelLayer, known_layer
from credit_domain.ops.dropout.dropping import (
    alpha_dropout,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    feature_alpha_dropout,
)
from credit_mesh import DomainParallelManager


@known_layer
class DomainParallelDropout(DomainParallelLayer):
    """:class:`torch.nn.Dropout` on a sharded tensor, with another mask on each rank.

    Masks differ also where the ranks' random generators are in the same state, and those stay so.
    """

    wraps = (nn.Dropout,)
    reason = "ranks drop different positions"

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements; see :func:`credit_domain.functional.dropout`."""
        m = self.wrapped
        return dropout(x, m.p, m.training, m.inplace, manager=self.manager)


@known_layer
class DomainParallelAlphaDropout(DomainParallelLayer):
    """:class:`torch.nn.AlphaDropout` on a sharded tensor; see :class:`DomainParallelDropout`."""

    wraps = (nn.AlphaDropout,)
    reason = "ranks drop different positions"

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements; see :func:`credit_domain.functional.alpha_dropout`."""
        m = self.wrapped
        return alpha_dropout(x, m.p, m.training, m.inplace, manager=self.manager)


class _ChannelDropout(DomainParallelLayer):
    """What those share that drop whole channels, the same on every rank."""

    spatial: int
    reason = "whole channels drop alike on all ranks"
    drop: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Drop channels; see :func:`credit_domain.functional.dropout2d`.

        Raises:
            ValueError: If the sharded dim is none that a channel extends over; on all ranks alike, if they differ in
                the batch, the channels or the dtype.

        Collectives:
            One broadcast of the mask of channels, forward.
        """
        m = self.wrapped
        drop = type(self).drop
        return drop(x, m.p, m.training, m.inplace, dim=self._dim, manager=self.manager, label=self.label)


@known_layer
class DomainParallelDropout1d(_ChannelDropout):
    """:class:`torch.nn.Dropout1d` on a sharded tensor (B, C, L) or (C, L); see :class:`DomainParallelDropout2d`."""

    wraps = (nn.Dropout1d,)
    spatial = 1
    drop = staticmethod(dropout1d)

    def __init__(
        self,
        module: nn.Dropout1d,
        shard_dim: int = -1,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(module, shard_dim, manager=manager, label=label)


@known_layer
class DomainParallelDropout2d(_ChannelDropout):
    """:class:`torch.nn.Dropout2d` on a sharded tensor (B, C, H, W): the same channels on every rank."""

    wraps = (nn.Dropout2d,)
    spatial = 2
    drop = staticmethod(dropout2d)


@known_layer
class DomainParallelDropout3d(_ChannelDropout):
    """:class:`torch.nn.Dropout3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W).

    See :class:`DomainParallelDropout2d`.
    """

    wraps = (nn.Dropout3d,)
    spatial = 3
    drop = staticmethod(dropout3d)

    def __init__(
        self,
        module: nn.Dropout3d,
        shard_dim: int = 3,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(module, shard_dim, manager=manager, label=label)


@known_layer
class DomainParallelFeatureAlphaDropout(DomainParallelLayer):
    """:class:`torch.nn.FeatureAlphaDropout` on a sharded tensor (B, C, ...); see :class:`DomainParallelDropout2d`."""

    wraps = (nn.FeatureAlphaDropout,)
    reason = "ranks drop different positions"

    def forward(self, x: Tensor) -> Tensor:
        """Drop channels; see :func:`credit_domain.functional.feature_alpha_dropout`."""
        m, where = self.wrapped, {"dim": self.shard_dim, "manager": self.manager, "label": self.label}
        return feature_alpha_dropout(x, m.p, m.training, m.inplace, **where)
