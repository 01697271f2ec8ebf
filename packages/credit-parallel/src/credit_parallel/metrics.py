"""Metrics that do not depend on the layout.

Sums are kept in float64, of this rank's rows and samples. :meth:`Metric.compute` adds them up over the domain ranks,
then over the replicas, and takes roots and quotients only then; all ranks get the same values, those of one rank with
all rows of all samples, also where replicas had different numbers of them. Nothing is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_domain.extend import ALONE, domain_of, new_layer, sizes_of
from credit_halo import naming_missing_ranks
from credit_mesh import DomainParallelManager, RowPartition, get_domain_parallel_manager
from credit_parallel.contract import device_of, gather_numbers
from credit_parallel.losses import own_weights


class Metric:
    """What metrics share: sums that are kept on each rank, and put together in :meth:`compute`.

    Fields are of shape (B, C, ..., H, W), this rank's samples and rows of them; other dims, such as time, count as
    further samples.

    Args:
        weights: Weight of each row, of shape (rows,): of this rank's rows, or of those of all ranks, such as
            :func:`~credit_parallel.losses.latitude_weights` gives. They need no scale. None weighs rows equally.
        partition: Rows of each rank, which only weights need. Where it is None, ranks learn them at the first update
            with rows like these if a partition is declared, and at each update otherwise.
        dim: The dim of latitude, which weights belong to. Which dim is sharded the manager knows.
        channel_dim: The dim of channels; values are computed for each. The first dim that is left is that of samples.

    Raises:
        ValueError: In a world of several ranks without a manager, or if the manager is not of the whole world.

    Collectives:
        ``update``: none; with weights a small all-gather the first time (see ``partition``).
        ``compute``: an all-gather of a few numbers over the world, a sum over the domain ranks, one over the replicas.
    """

    _state: Tensor | None
    _fields: int
    _lists = False  # whether a state lists the sums of each field, or adds them up

    def __init__(
        self,
        weights: Tensor | None = None,
        *,
        manager: DomainParallelManager | None = None,
        partition: RowPartition | None = None,
        dim: int = -2,
        channel_dim: int = 1,
    ) -> None:
        self._name = type(self).__name__
        self.manager = manager or get_domain_parallel_manager()
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks != (1 if self.manager is None else self.manager.layout.world_size):
            raise ValueError(
                f"{self._name}: needs a manager of all {ranks} ranks, to know who holds which rows and samples; got "
                f"{self.manager}. Call initialize_domain_parallel({ranks}, domain_parallel_size) first, with a size of "
                "1 where no rows are shared"
            )
        self.weights, self.partition, self.dim, self.channel_dim = weights, partition, dim, channel_dim
        self._layer = new_layer()
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._state = None
        self._fields = 0

    def compute(self) -> Tensor:
        """The value of each channel over all samples since the last reset: float64, (C,), the same on every rank.

        Raises:
            ValueError: On every rank alike, if no rank has samples, ranks that share samples were not updated with the
                same number of them, or ranks have other channels.
        """
        state = self._agreed()
        if self.manager is not None and self.manager.domain_parallel_size > 1:
            state = _summed(state, self.manager.domain_group)
        state = self._per_replica(state)
        if self.manager is not None and self.manager.data_parallel_size > 1:
            state = _summed(state, self.manager.data_parallel_group)
        return self._finished(state[..., :-1] / state[..., -1:])

    # A state holds sums, and behind them, at the end of its last dim, the sum of their weights.

    def _per_replica(self, state: Tensor) -> Tensor:
        return state

    def _finished(self, mean: Tensor) -> Tensor:
        return mean.squeeze(-1)

    def _add(self, sums: Tensor, fields: int) -> None:
        if self._state is not None:
            if self._common(self._state) != self._common(sums):
                raise ValueError(f"{self._name}: other channels or longitudes than before; reset() starts afresh")
            sums = torch.cat([self._state, sums]) if self._lists else self._state + sums
        self._state = sums
        self._fields += fields

    def _common(self, state: Tensor) -> tuple[int, ...]:
        """What the shapes of the states of all ranks have in common."""
        return tuple(state.shape[1:] if self._lists else state.shape)

    def _agreed(self) -> Tensor:
        """This rank's state, or zeros like those of the ranks that have one."""
        replica = 0 if self.manager is None else self.manager.dp_rank
        common = () if self._state is None else self._common(self._state)
        ranks = gather_numbers([replica, self._fields, len(common), *common, *[0] * (3 - len(common))])
        shapes = {tuple(rank[3 : 3 + rank[2]]) for rank in ranks if rank[2]}
        if not shapes:
            raise ValueError(f"{self._name}: compute() before any update()")
        if len(shapes) > 1 or len({tuple(rank[:3]) for rank in ranks}) > len({rank[0] for rank in ranks}):
            told = "; ".join(
                f"rank {at}: {rank[1]} of replica {rank[0]}, sums {rank[3:]}" for at, rank in enumerate(ranks)
            )
            raise ValueError(
                f"{self._name}: ranks of one replica must be updated with the same samples, and all with the same "
                f"channels; got {told}"
            )
        empty = ((0,) if self._lists else ()) + shapes.pop()
        return torch.zeros(empty, dtype=torch.float64) if self._state is None else self._state

    def _dims(self, x: Tensor) -> tuple[int, int, tuple[int, int]]:
        """The dims of rows, of channels, and the two of a field, counted from the first."""
        dim, channel = (d + x.ndim if d < 0 else d for d in (self.dim, self.channel_dim))
        field = (min(dim, x.ndim - 2), x.ndim - 1)
        if x.ndim < 3 or not 0 <= dim < x.ndim or not 0 <= channel < x.ndim - 1 or channel in field:
            raise ValueError(
                f"{self._name}: needs fields of shape (B, C, ..., H, W), with rows along dim {self.dim} and channels "
                f"along dim {self.channel_dim}; got shape {tuple(x.shape)}"
            )
        if self._sharded(x) not in (None, *field):
            raise ValueError(
                f"{self._name}: the sharded dim must be one of {field} of fields of shape {tuple(x.shape)}; "
                f"{self.manager} shards dim {self._sharded(x)}"
            )
        return dim, channel, field

    def _sharded(self, x: Tensor) -> int | None:
        """The dim that other ranks hold more of, counted from the first."""
        if self.manager is None or self.manager.domain_parallel_size == 1:
            return None
        dim = self.manager.shard_dim
        return dim + x.ndim if dim < 0 else dim

    def _weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weight of each element."""
        dim, _, _ = self._dims(x)
        shared = self.weights is not None and self._sharded(x) == dim
        domain = domain_of(self.manager) if shared else ALONE
        sizes = sizes_of(x, dim, domain, self._name, self.partition if shared else None, self._layer)
        own, _ = own_weights(x, dim, domain, sizes, self._name, self.weights, mask)
        return own.expand_as(x) if mask is None else torch.where(mask, own, 0.0).expand_as(x)

    def _pair(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if prediction.shape != target.shape:
            raise ValueError(
                f"{self._name}: prediction and target must be of one shape; got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}"
            )
        return prediction.detach().double(), target.detach().double()


class _MeanOfErrors(Metric):
    def update(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add samples: this rank's rows of prediction and truth, of shape (B, C, ..., H, W).

        The mask, True for the elements that count, broadcasts against ``prediction``; elsewhere NaN will do. Shapes
        that differ, also from earlier ones, are a ValueError, as are weights or a mask that do not fit.
        """
        prediction, target = self._pair(prediction, target)
        weights = self._weights(prediction, mask)
        _, channel, _ = self._dims(prediction)
        sums = (_weighted(self._error(prediction - target), weights, mask), weights)
        self._add(torch.stack([x.movedim(channel, 0).flatten(1).sum(1) for x in sums], -1), len(prediction))

    def _error(self, difference: Tensor) -> Tensor:
        raise NotImplementedError


class RMSE(_MeanOfErrors):
    """Root mean square error: the root of the weighted mean over rows, longitudes and samples."""

    def _error(self, difference: Tensor) -> Tensor:
        return difference.square()

    def _finished(self, mean: Tensor) -> Tensor:
        return mean.squeeze(-1).sqrt()


class MAE(_MeanOfErrors):
    """Mean absolute error."""

    def _error(self, difference: Tensor) -> Tensor:
        return difference.abs()


class Bias(_MeanOfErrors):
    """Mean of prediction minus target."""

    def _error(self, difference: Tensor) -> Tensor:
        return difference


class ACC(Metric):
    """Anomaly correlation, the mean over samples of the correlation of each.

    With anomalies p and t, of prediction and target from the climatology, that of a field is
    ``sum(w p t) / sqrt(sum(w p p) sum(w t t))`` over its rows and longitudes; their means are not subtracted. Fields
    that are masked wholly do not count; one without anomalies, or with NaN, makes the mean NaN.

    Args:
        climatology: Climatology to take where ``update`` is given none; this rank's rows.
        **options: Those of :class:`Metric`.
    """

    _lists = True

    def __init__(self, climatology: Tensor | None = None, weights: Tensor | None = None, **options: Any) -> None:
        super().__init__(weights, **options)
        self.climatology = climatology

    def update(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, climatology: Tensor | None = None
    ) -> None:
        """Add samples, as ``RMSE.update``, with a climatology that broadcasts against them; a ValueError without."""
        normal = self.climatology if climatology is None else climatology
        if normal is None:
            raise ValueError("ACC: needs a climatology: pass it to ACC() or to update()")
        prediction, target = self._pair(prediction, target)
        weights = self._weights(prediction, mask)
        _, channel, field = self._dims(prediction)
        normal = normal.detach().to(prediction)
        p, t = prediction - normal, target - normal
        if p.shape != prediction.shape:
            raise ValueError(f"ACC: a climatology of shape {tuple(normal.shape)} does not fit {tuple(p.shape)}")
        sums = [_weighted(x, weights, mask).sum(field) for x in (p * t, p * p, t * t)]
        stacked = torch.stack([*sums, weights.sum(field)], -1).movedim(channel - (field[0] < channel), -2)
        self._add(stacked.reshape(-1, *stacked.shape[-2:]), len(prediction))

    def _per_replica(self, state: Tensor) -> Tensor:
        products, predictions, targets, weights = state.unbind(-1)
        correlations = torch.where(weights > 0, products / (predictions.sqrt() * targets.sqrt()), 0.0)
        return torch.stack([correlations.sum(0), (weights > 0).double().sum(0)], -1)


class ZonalSpectrum(Metric):
    """Power at each wavenumber along longitude, averaged over rows and samples.

    Wavenumbers are 0 to W // 2, and the powers of a row add up to the mean of its squares (a wave of amplitude a has
    the power a * a / 2).
    """

    def update(self, prediction: Tensor, target: Tensor | None = None) -> None:
        """Add samples: this rank's rows, with all longitudes, of shape (B, C, ..., H, W).

        Leave the target out, always, to see the spectrum of one thing alone. Errors are those of ``RMSE.update``; also,
        the last dim, longitude, must not be sharded.
        """
        dim, channel, _ = self._dims(prediction)
        last = prediction.ndim - 1
        if last in (dim, self._sharded(prediction)):
            raise ValueError(
                f"{self._name}: needs all longitudes of a row on one rank, along the last dim; gather them first "
                f"(gather_rows), or shard latitude. Here the sharded dim is "
                f"{'none' if self.manager is None else self.manager.shard_dim}, and dim={self.dim}"
            )
        fields = self._pair(prediction, prediction if target is None else target)[: 1 if target is None else 2]
        weights = self._weights(fields[0])[..., :1]
        width = prediction.shape[-1]
        folded = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=prediction.device)
        folded[0] = 1  # the mean, and the wave of two points, have no other half
        if width % 2 == 0:
            folded[-1] = 1
        sums = []
        for field in fields:
            power = torch.fft.rfft(field).abs().square() * folded / width**2
            weighted = torch.cat([power * weights, weights], -1)
            sums.append(weighted.movedim(channel, 0).flatten(1, -2).sum(1))
        self._add(torch.stack(sums), len(prediction))

    def compute(self) -> Tensor:
        """The powers over all samples since the last reset; errors as :meth:`Metric.compute`.

        They are float64, of shape (2, C, W // 2 + 1), of prediction and target, or (1, C, W // 2 + 1) without targets.
        """
        return super().compute()

    def _finished(self, mean: Tensor) -> Tensor:
        return mean


# The same for one batch


def rmse(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, *, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """:class:`RMSE` of a batch; ``options`` are those of :class:`Metric`."""
    return _once(RMSE(weights, **options), prediction, target, mask)


def mae(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, *, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """:class:`MAE` of a batch; ``options`` are those of :class:`Metric`."""
    return _once(MAE(weights, **options), prediction, target, mask)


def bias(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, *, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """:class:`Bias` of a batch; ``options`` are those of :class:`Metric`."""
    return _once(Bias(weights, **options), prediction, target, mask)


def acc(
    prediction: Tensor,
    target: Tensor,
    climatology: Tensor,
    weights: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """:class:`ACC` of a batch; ``options`` are those of :class:`Metric`."""
    return _once(ACC(climatology, weights, **options), prediction, target, mask)


def zonal_spectrum(field: Tensor, weights: Tensor | None = None, **options: Any) -> Tensor:
    """:class:`ZonalSpectrum` of a batch, of shape (C, W // 2 + 1); ``options`` are those of :class:`Metric`."""
    return _once(ZonalSpectrum(weights, **options), field)[0]


def _once(metric: Any, *batch: Tensor | None) -> Tensor:
    metric.update(*batch)
    value: Tensor = metric.compute()
    return value


def _weighted(x: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    return x * weights if mask is None else torch.where(mask, x * weights, 0.0)


@naming_missing_ranks("adding up a metric")
def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    total = x.to(device_of(group), copy=True)
    dist.all_reduce(total, group=group)
    return total
