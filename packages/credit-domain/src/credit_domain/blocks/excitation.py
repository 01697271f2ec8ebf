"""Squeeze and excitation: channels weighted by what is in the whole grid."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn

from credit_domain.blocks.block import Block, Pointwise2d, wide
from credit_domain.engine.ranks import domain_of, normal_dim, sizes_of, sum_over
from credit_mesh import DomainParallelManager, RowPartition


def global_mean(
    x: Tensor,
    *,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "global_mean",
    layer: Hashable = None,
) -> Tensor:
    """Mean over the whole grid, the same on every rank: each point counts the same, whoever holds it.

    Args:
        x: This rank's rows: (B, C, H, W), or another number of spatial dims.

    Returns:
        (B, C, 1, 1).

    Raises:
        ValueError: On all ranks alike, if ``dim`` is no spatial dim or ranks differ in other dims.

    Collectives:
        One sum of (B, C, 1, 1) forward, one backward.
    """
    dim = normal_dim(dim, x.ndim, x.ndim - 2, label)
    domain = domain_of(manager)
    grid = tuple(range(2, x.ndim))
    if domain.size == 1:
        return x.mean(grid, keepdim=True)
    points = sum(sizes_of(x, dim, domain, label, partition, layer))
    for d in range(2 - x.ndim, 0):
        points *= 1 if d == dim else x.shape[d]
    total = sum_over(x.sum(grid, keepdim=True, dtype=wide(x.dtype)), domain)
    return (total / points).to(x.dtype)


class GlobalMean(Block):
    """:func:`global_mean` in the place of :class:`torch.nn.AdaptiveAvgPool2d` ``(1)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean of each channel, (B, C, 1, 1); see :func:`global_mean` for errors and collectives."""
        return global_mean(x, dim=self.dim, **self.sharding)


class SqueezeExcitation(nn.Module):
    """Each of C channels times a factor between 0 and 1, made of all means by ``squeezed`` channels in between.

    Parameters are named as torchvision's.
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.avgpool = GlobalMean(dim, manager=manager, label=label or "SqueezeExcitation")
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Weight the channels of this rank's rows, (B, C, H, W); see :func:`global_mean` for errors and collectives."""
        factor: Tensor = self.fc2(self.fc1(self.avgpool(x)).relu()).sigmoid()
        return x * factor


class ScSE(nn.Module):
    """Squeeze and excitation of channels, of which C / ``reduction`` are in between, plus that of points.

    Parameters are named as segmentation_models_pytorch's.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__()
        self.cSE = nn.Sequential(
            GlobalMean(dim, manager=manager, label=label or "ScSE"),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(Pointwise2d(channels, 1, 1), nn.Sigmoid())  # of each point alone: nothing to exchange

    def forward(self, x: Tensor) -> Tensor:
        """Weight this rank's rows, (B, C, H, W); see :func:`global_mean` for errors and collectives."""
        out: Tensor = x * self.cSE(x) + x * self.sSE(x)
        return out
