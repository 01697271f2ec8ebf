"""Resampling of sharded rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from credit_domain.domain import new_layer
from credit_domain.functional.interpolate import resample
from credit_domain.layers.base import DomainParallelLayer
from credit_halo import HaloExchange
from credit_mesh import DomainParallelManager


class DomainParallelUpsample(DomainParallelLayer):
    """:class:`torch.nn.Upsample`, in each of its modes, on a sharded tensor (B, C, L), (B, C, H, W) or (B, C, T, H, W).

    ``size`` is that of the whole. Who owns the output rows is said in :func:`credit_domain.functional.interpolate`.

    Args:
        module: The layer to wrap.
        shard_dim: The sharded dim; -2 is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.Upsample,)

    def forward(self, x: Tensor) -> Tensor:
        """Resample the whole of which ``x`` is this rank's part.

        Raises:
            ValueError: As :func:`credit_domain.functional.interpolate`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank within reach, forward and backward.
        """
        m = self.wrapped
        how = (m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor, False)
        return resample(x, *how, None, self.shard_dim, None, self.manager, self.label, self._layer)


class DomainParallelInterpolate(nn.Module):
    """:func:`torch.nn.functional.interpolate` of a sharded tensor, as a layer.

    Who owns the output rows is said in :func:`credit_domain.functional.interpolate`.

    Args:
        size: Size of the whole output, (H, W): the global number of rows. None where ``scale_factor`` is given.
        mode: As in torch, like all further arguments up to ``antialias``.
        shard_dim: The sharded dim; -2 is latitude.
        scale_factor: See ``mode``.
        align_corners: See ``mode``.
        recompute_scale_factor: See ``mode``.
        antialias: See ``mode``.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer; the same on every rank. None takes the name of the class.

    Attributes:
        halo_exchange: None: which rows a rank lacks depends on the heights, and they are asked for one by one.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None,
        mode: str = "bilinear",
        shard_dim: int = -2,
        *,
        scale_factor: float | Sequence[float] | None = None,
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.mode = mode
        self.shard_dim = shard_dim
        self.scale_factor = scale_factor
        self.align_corners = align_corners
        self.recompute_scale_factor = recompute_scale_factor
        self.antialias = antialias
        self.manager = manager
        self.label = type(self).__name__ if label is None else label
        self.halo_exchange: HaloExchange | None = None
        self._layer = new_layer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layer = new_layer()  # a copy learns for itself

    def forward(self, x: Tensor) -> Tensor:
        """Resample the whole of which ``x`` is this rank's part; see :meth:`DomainParallelUpsample.forward`."""
        how = (self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor, self.antialias)
        return resample(x, *how, None, self.shard_dim, None, self.manager, self.label, self._layer)

    def extra_repr(self) -> str:
        """The arguments."""
        sized = f"size={self.size}" if self.scale_factor is None else f"scale_factor={self.scale_factor}"
        return f"{sized}, mode={self.mode!r}, shard_dim={self.shard_dim}"
