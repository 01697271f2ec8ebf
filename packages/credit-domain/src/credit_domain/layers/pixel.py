"""Pixel shuffling of sharded rows."""

from __future__ import annotations

from torch import Tensor, nn

from credit_domain.functional.pixel import pixel_shuffle, unshuffle
from credit_domain.layers.base import DomainParallelLayer, spatial_dim
from credit_mesh import DomainParallelManager


class _Pixel(DomainParallelLayer):
    def __init__(
        self,
        module: nn.Module,
        shard_dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(module, shard_dim, manager=manager, label=label)
        self.__dict__["_dim"] = spatial_dim(module, shard_dim, 2) - 2


class DomainParallelPixelShuffle(_Pixel):
    """:class:`torch.nn.PixelShuffle` on a sharded tensor (..., C, H, W).

    Args:
        module: The layer to wrap.
        shard_dim: The sharded dim; -2 is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.PixelShuffle,)

    def forward(self, x: Tensor) -> Tensor:
        """Cut each row of the channels into ``upscale_factor`` rows, which stay where it is.

        Raises:
            ValueError: As :func:`credit_domain.functional.pixel_shuffle`.

        Collectives:
            Those of :func:`credit_domain.functional.pixel_shuffle`.
        """
        return pixel_shuffle(x, self.wrapped.upscale_factor, dim=self._dim, manager=self.manager, label=self.label)


class DomainParallelPixelUnshuffle(_Pixel):
    """:class:`torch.nn.PixelUnshuffle` on a sharded tensor (..., C, H, W), on any partition.

    Args:
        module: The layer to wrap.
        shard_dim: The sharded dim; -2 is latitude.
        manager: Whose domain group takes part; None looks up the present one at each call.
        label: What errors and traces call this layer.
    """

    wraps = (nn.PixelUnshuffle,)

    def forward(self, x: Tensor) -> Tensor:
        """Gather each ``downscale_factor`` rows at the owner of the first of them.

        Raises:
            ValueError: As :func:`credit_domain.functional.pixel_unshuffle`.
            ExchangeError: If a peer died, or did not answer within the timeout of the group.

        Collectives:
            One message to and from each rank that shares a block of rows, forward and backward.
        """
        factor = self.wrapped.downscale_factor
        return unshuffle(x, factor, self._dim, None, self.manager, self.label, self._layer)
