"""Normalisation layers; see :mod:`credit_domain.layers` for what all of them take."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from credit_domain.engine.layer import LAYERS, Decision, WeightedLayer, known_layer
from credit_domain.engine.ranks import constant, domain_of
from credit_domain.ops.norms.normalization import (
    batch_norm_over,
    group_norm,
    instance_norm,
    layer_norm_of,
    rms_norm_of,
)
from credit_halo.extend import group_by_name
from credit_mesh import DomainParallelManager


class _Norm(WeightedLayer):
    """What all normalisations share."""

    reason = "statistics over the rows of all ranks"

    def __init__(
        self,
        norm: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(norm, shard_dim, manager=manager, label=label)

    @property
    def norm(self) -> Any:
        """The wrapped normalisation."""
        return self.wrapped


@known_layer
class DomainParallelGroupNorm(_Norm):
    """:class:`torch.nn.GroupNorm` with the statistics of all ranks' rows, on a sharded tensor (B, C, ...)."""

    wraps = (nn.GroupNorm,)

    @classmethod
    def fate(cls, module: nn.Module, shard_dim: int) -> Decision:
        """The statistics are over all positions, whichever dim is sharded."""
        return Decision("converted", cls.reason, _convert_group_norm)

    def __init__(
        self,
        norm: nn.GroupNorm,
        *,
        shard_dim: int = -2,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(norm, shard_dim, manager=manager, label=label)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the whole of which ``x`` is this rank's part.

        Raises:
            ValueError: As :func:`credit_domain.functional.group_norm`.

        Collectives:
            One all-gather of the statistics forward, one sum backward.
        """
        m = self.wrapped
        return group_norm(x, m.num_groups, m.weight, m.bias, m.eps, manager=self.manager, label=self.label)


def _convert_group_norm(module: nn.Module, shard_dim: int, label: str | None = None) -> nn.Module:
    assert isinstance(module, nn.GroupNorm)
    return DomainParallelGroupNorm(module, label=label)


class _BatchNorm(_Norm):
    dims: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the whole of which ``x``, (B, C, ...), is this rank's part, and track its statistics.

        Raises:
            ValueError: If ``x`` has other dims, or as :func:`credit_domain.functional.batch_norm`.

        Collectives:
            One all-gather of the statistics forward, one sum backward; none where running statistics are used.
        """
        m = self.wrapped
        domain = domain_of(self.manager)
        if domain.size == 1 or not (m.training or (m.running_mean is None and m.running_var is None)):
            out: Tensor = m.forward(x)
            return out
        synchronised = isinstance(m, nn.SyncBatchNorm)  # of any number of dims
        if x.ndim != self.dims + 2 and not synchronised:
            raise ValueError(
                f"{self.label}: expected (B, C, ...) with {self.dims} spatial dims; got {tuple(x.shape)}. Where "
                "every rank holds the same, keep torch's own layer"
            )
        group = domain.group
        if synchronised and m.training:
            group = _synchronised(domain.group, m.process_group.group_name if m.process_group else "", self.label)
        mean, var = m.running_mean, m.running_var
        momentum: float | Tensor = 0.0 if m.momentum is None else m.momentum
        if not (m.training and m.track_running_stats):
            mean = var = None
        elif m.num_batches_tracked is not None:
            m.num_batches_tracked.add_(1)
            if m.momentum is None:  # the mean of all batches so far, without waiting for the device
                momentum = 1.0 / m.num_batches_tracked.double()
        return batch_norm_over(group, x, mean, var, m.weight, m.bias, momentum, m.eps, self.label)


@constant
def _synchronised(group: str, wanted: str, label: str) -> str:
    """The group of a SyncBatchNorm, which must hold the whole domain."""
    assert dist.group.WORLD is not None
    wanted = wanted or dist.group.WORLD.group_name
    ranks, domain = (dist.get_process_group_ranks(group_by_name(name)) for name in (wanted, group))
    if not set(domain) <= set(ranks):
        raise ValueError(
            f"{label}: the process_group of SyncBatchNorm holds ranks {ranks}, and not all of the domain's, {domain}: "
            "give it one that does, such as the data-parallel and domain ranks together"
        )
    return wanted


@known_layer
class DomainParallelBatchNorm1d(_BatchNorm):
    """:class:`torch.nn.BatchNorm1d` on a sharded tensor (B, C, L); see :class:`DomainParallelBatchNorm2d`."""

    wraps = (nn.BatchNorm1d, nn.SyncBatchNorm)
    dims = 1


@known_layer
class DomainParallelBatchNorm2d(_BatchNorm):
    """:class:`torch.nn.BatchNorm2d` with the statistics of all ranks' rows, on a sharded tensor (B, C, H, W).

    The batch is that of the domain, which is what one rank would normalise. :class:`torch.nn.SyncBatchNorm` normalises
    over its own process group, the whole world unless it was given one, which must hold the domain.
    """

    wraps = (nn.BatchNorm2d, nn.SyncBatchNorm)
    dims = 2


@known_layer
class DomainParallelBatchNorm3d(_BatchNorm):
    """:class:`torch.nn.BatchNorm3d` on a sharded tensor (B, C, T, H, W); see :class:`DomainParallelBatchNorm2d`."""

    wraps = (nn.BatchNorm3d, nn.SyncBatchNorm)
    dims = 3


LAYERS[nn.SyncBatchNorm] = DomainParallelBatchNorm2d  # of any number of dims


class _InstanceNorm(_Norm):
    dims: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the whole of which ``x``, (B, C, ...) or (C, ...), is this rank's part.

        Raises:
            ValueError: If ``x`` has other dims, or as :func:`credit_domain.functional.instance_norm`.

        Collectives:
            One all-gather of the statistics forward, one sum backward; none where running statistics are used.
        """
        m = self.wrapped
        if domain_of(self.manager).size == 1 or not (m.training or not m.track_running_stats):
            out: Tensor = m.forward(x)
            return out
        batched = x.ndim == self.dims + 2
        if not batched and x.ndim != self.dims + 1:
            raise ValueError(
                f"{self.label}: expected (B, C, ...) or (C, ...) with {self.dims} spatial dims; got {tuple(x.shape)}"
            )
        momentum = 0.0 if m.momentum is None else m.momentum
        running = (m.running_mean, m.running_var)
        settings: Any = {"momentum": momentum, "eps": m.eps, "manager": self.manager, "label": self.label}
        out = instance_norm(x if batched else x.unsqueeze(0), *running, m.weight, m.bias, **settings)
        return out if batched else out.squeeze(0)


@known_layer
class DomainParallelInstanceNorm1d(_InstanceNorm):
    """:class:`torch.nn.InstanceNorm1d` on a sharded tensor (B, C, L) or (C, L)."""

    wraps = (nn.InstanceNorm1d,)
    dims = 1


@known_layer
class DomainParallelInstanceNorm2d(_InstanceNorm):
    """:class:`torch.nn.InstanceNorm2d` on a sharded tensor (B, C, H, W) or (C, H, W)."""

    wraps = (nn.InstanceNorm2d,)
    dims = 2


@known_layer
class DomainParallelInstanceNorm3d(_InstanceNorm):
    """:class:`torch.nn.InstanceNorm3d` on a sharded tensor (B, C, T, H, W) or (C, T, H, W)."""

    wraps = (nn.InstanceNorm3d,)
    dims = 3


class _NormOver(_Norm):
    """What those share that normalise over a shape, with or without the rows in it."""

    @classmethod
    def fate(cls, module: nn.Module, shard_dim: int) -> Decision:
        """Local where the rows are not normalised over; see the base class."""
        if len(module.normalized_shape) < -shard_dim:  # type: ignore[arg-type]
            return Decision("local", "normalises dims after the sharded one")
        return super().fate(module, shard_dim)


@known_layer
class DomainParallelLayerNorm(_NormOver):
    """:class:`torch.nn.LayerNorm` on a sharded tensor, over dims with or without the rows.

    Where ``normalized_shape`` has the rows it has those of all ranks, and so have weight and bias, which every rank
    holds whole; a rank's gradient of them is zero outside of its own rows.
    """

    wraps = (nn.LayerNorm,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the whole of which ``x`` is this rank's part.

        Raises:
            ValueError: As :func:`credit_domain.functional.layer_norm`.

        Collectives:
            One all-gather of the statistics forward, one sum backward; none where rows are not normalised over.
        """
        m = self.wrapped
        return layer_norm_of(x, m.normalized_shape, m.weight, m.bias, m.eps, self.call)


@known_layer
class DomainParallelRMSNorm(_NormOver):
    """:class:`torch.nn.RMSNorm` on a sharded tensor; see :class:`DomainParallelLayerNorm`."""

    wraps = (nn.RMSNorm,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the whole of which ``x`` is this rank's part.

        Raises:
            ValueError: As :func:`credit_domain.functional.rms_norm`.

        Collectives:
            Those of :meth:`DomainParallelLayerNorm.forward`.
        """
        m = self.wrapped
        return rms_norm_of(x, m.normalized_shape, m.weight, m.eps, self.call)
