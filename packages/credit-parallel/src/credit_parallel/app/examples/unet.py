"""A UNet for fields on a latitude-longitude grid, written for one rank."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """A 3x3 convolution: circular along longitude where the grid is periodic, zeros beyond the poles.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Rows and columns that become one; ``n`` of them become ``ceil(n / stride)``.
        periodic: Whether the column after the last one is the first one.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, periodic: bool = True) -> None:
        super().__init__()
        self.periodic = periodic
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=(1, 0 if periodic else 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        if self.periodic:
            x = torch.cat([x[..., -1:], x, x[..., :1]], -1)
        out: Tensor = self.conv(x)
        return out


class Up(nn.Module):
    """Twice the rows and columns, by a transposed convolution, cropped to those of the skip connection, and joined."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """From (B, C, H, W) and a skip connection (B, D, 2H or 2H - 1, 2W or 2W - 1)."""
        x = self.conv(x)
        # Exact on sharded rows: all ranks but the last hold a multiple of the total stride, so it alone has a row over.
        return torch.cat([x[..., : skip.shape[-2], : skip.shape[-1]], skip], 1)


class Block(nn.Module):
    """A residual block: two convolutions, each after a GroupNorm and a SiLU."""

    _fsdp2_shard = True

    def __init__(self, in_channels: int, out_channels: int, groups: int, periodic: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, in_channels), nn.GroupNorm(groups, out_channels)
        self.conv1 = Conv(in_channels, out_channels, periodic=periodic)
        self.conv2 = Conv(out_channels, out_channels, periodic=periodic)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, H, W) to (B, out_channels, H, W)."""
        out: Tensor = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        skip: Tensor = self.skip(x)
        return out + skip


class UNet(nn.Module):
    """A UNet of residual blocks, for grids of any height and width.

    The last convolution starts as zeros: where the model predicts changes, it begins with persistence.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        width: Channels at the resolution of the input; they double with each level.
        levels: How often the resolution is halved. The total stride is ``2 ** levels``.
        blocks: Residual blocks at each level, on the way down and on the way up.
        periodic: Whether longitude is.
        groups: Of the GroupNorms; must divide ``width``.

    Raises:
        ValueError: If ``groups`` does not divide ``width``, or a number is less than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 32,
        levels: int = 2,
        blocks: int = 1,
        periodic: bool = True,
        groups: int = 8,
    ) -> None:
        super().__init__()
        if min(width, levels, blocks, groups) < 1 or width % groups:
            raise ValueError(
                "width, levels, blocks and groups must be 1 or more, and width a multiple of groups; got "
                f"width={width}, levels={levels}, blocks={blocks}, groups={groups}"
            )
        widths = [width * 2**level for level in range(levels + 1)]

        def stage(first: int, channels: int) -> nn.Sequential:
            inputs = [first, *[channels] * (blocks - 1)]
            return nn.Sequential(*(Block(size, channels, groups, periodic) for size in inputs))

        self.stem = Conv(in_channels, width, periodic=periodic)
        self.encoder = nn.ModuleList(stage(size, size) for size in widths[:-1])
        self.down = nn.ModuleList(Conv(fine, coarse, 2, periodic=periodic) for fine, coarse in pairwise(widths))
        self.middle = stage(widths[-1], widths[-1])
        self.up = nn.ModuleList(Up(coarse, fine) for fine, coarse in pairwise(widths))
        self.decoder = nn.ModuleList(stage(2 * size, size) for size in widths[:-1])
        self.norm = nn.GroupNorm(groups, width)
        self.head = Conv(width, out_channels, periodic=periodic)
        nn.init.zeros_(self.head.conv.weight)
        nn.init.zeros_(self.head.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, H, W) to (B, out_channels, H, W)."""
        x = self.stem(x)
        skips = []
        for encode, down in zip(self.encoder, self.down, strict=True):
            x = encode(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for up, decode in zip(reversed(self.up), reversed(self.decoder), strict=True):
            x = decode(up(x, skips.pop()))
        out: Tensor = self.head(F.silu(self.norm(x)))
        return out
