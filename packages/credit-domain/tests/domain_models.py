"""Small models of the kinds that the field trains, written for one rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions with GroupNorm, and a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(2, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
        )
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class UNet(nn.Module):
    """Two levels, strided down and transposed up; ``odd`` is for heights of the form 4 n + 1."""

    def __init__(self, channels: int = 3, width: int = 4, odd: bool = False) -> None:
        super().__init__()
        kernel = (3, 4) if odd else (4, 4)
        self.stem = Block(channels, width)
        self.down1 = nn.Conv2d(width, 2 * width, kernel, 2, 1)
        self.middle1 = Block(2 * width, 2 * width)
        self.down2 = nn.Conv2d(2 * width, 2 * width, kernel, 2, 1)
        self.bottom = Block(2 * width, 2 * width)
        self.up2 = nn.ConvTranspose2d(2 * width, 2 * width, kernel, 2, 1)
        self.middle2 = Block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, kernel, 2, 1)
        self.head = nn.Sequential(Block(2 * width, width), nn.Conv2d(width, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.stem(x)
        skip2 = self.middle1(self.down1(skip1))
        x = self.up2(self.bottom(self.down2(skip2)))
        x = self.up1(self.middle2(torch.cat([x, skip2], 1)))
        return self.head(torch.cat([x, skip1], 1))


class MultiKernelEmbedding(nn.Module):
    """Convolutions of one stride and several kernels over one tensor, concatenated; and the way back."""

    def __init__(self, channels: int = 3, stride: int = 4, kernels: tuple[int, ...] = (4, 8, 16)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, 4, kernel, stride, (kernel - stride) // 2) for kernel in kernels
        )
        self.norm = nn.BatchNorm2d(4 * len(kernels))
        self.recover = nn.Sequential(
            nn.Upsample(scale_factor=stride, mode="bilinear"), nn.Conv2d(4 * len(kernels), channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.recover(F.gelu(self.norm(torch.cat([branch(x) for branch in self.branches], 1))))


class PeriodicConv2d(nn.Module):
    """Longitude wraps around, rows reflect at the poles."""

    def __init__(self, channels: int, out: int, kernel: int = 3) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.conv = nn.Conv2d(channels, out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        p = self.padding
        return self.conv(F.pad(F.pad(x, (p, p, 0, 0), mode="circular"), (0, 0, p, p), mode="reflect"))


class PeriodicResidualNet(nn.Module):
    """Residual blocks of periodic convolutions with InstanceNorm."""

    def __init__(self, channels: int = 3, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.stem = PeriodicConv2d(channels, width, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(PeriodicConv2d(width, width), nn.InstanceNorm2d(width, affine=True), nn.GELU())
            for _ in range(depth)
        )
        self.head = PeriodicConv2d(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class CubeEmbedding(nn.Module):
    """Patches of levels, rows and columns, a 3-D block, and their recovery."""

    def __init__(self, channels: int = 2, width: int = 4, patch: tuple[int, int, int] = (2, 4, 4)) -> None:
        super().__init__()
        self.embed = nn.Conv3d(channels, width, patch, patch)
        self.body = nn.Sequential(
            nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width), nn.GELU(), nn.MaxPool3d(3, 1, 1)
        )
        self.recover = nn.ConvTranspose3d(width, channels, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.recover(x + self.body(x))
