"""A multi-scale transformer for fields on a latitude-longitude grid, written for one rank.

Its blocks say what a tensor-parallel run may divide: see :mod:`credit_parallel.tensor_parallel`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.blocks import WindowAttention
from credit_parallel.app.examples.unet import Conv, Up


class Block(nn.Module):
    """A transformer block: attention within windows, then two layers for each point, each after a LayerNorm.

    Between the layers that are named in pairs every rank of a tensor-parallel run has some of the heads, or of the
    hidden channels.
    """

    _fsdp2_shard = True
    _tp_col = ("attention.qkv", "mlp.0")
    _tp_row = ("attention.proj", "mlp.2")
    _tp_parts = {"attention.qkv": 3}  # noqa: RUF012
    _tp_heads = "attention.heads"
    _tp_shard = {"attention.relative_position_bias_table": 1}  # noqa: RUF012

    def __init__(
        self, channels: int, heads: int, window: Sequence[int], shifted: bool, periodic: bool, mlp_ratio: int
    ) -> None:
        super().__init__()
        shift = tuple(size // 2 if shifted else 0 for size in window)
        hidden = mlp_ratio * channels
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, window, heads, shift, cyclic=(False, periodic))
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C, H, W) to the same."""
        x = x + self.attention(self.norm1(x.movedim(1, -1)).movedim(-1, 1))
        out: Tensor = x + self.mlp(self.norm2(x.movedim(1, -1))).movedim(-1, 1)
        return out


class Transformer(nn.Module):
    """Transformer blocks at several resolutions, for grids of any height and width.

    A strided convolution whose patches overlap embeds the fields at half their resolution; others lead from stage to
    stage. On the way back each stage is joined with the one before. The last convolution starts as zeros: where the
    model predicts changes, it begins with persistence.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        width: Channels of the first stage; they double with each one.
        depths: Blocks of each stage; every other one has its windows shifted by half their size. The total stride is
            ``2 ** len(depths)``.
        heads: Heads of each stage; must divide its channels.
        window: Rows and columns of a window.
        periodic: Whether longitude is, along which shifted windows then wrap around.
        mlp_ratio: Hidden channels for each channel.

    Raises:
        ValueError: If there are not as many heads as depths, a number is less than 1, or heads do not divide channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 64,
        depths: Sequence[int] = (2, 2),
        heads: Sequence[int] = (4, 8),
        window: Sequence[int] = (4, 8),
        periodic: bool = True,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if min(width, mlp_ratio, *depths, *heads, *window) < 1 or len(heads) != len(depths) or len(window) != 2:
            raise ValueError(
                "depths and heads must list a number for each stage, window rows and columns, all of them 1 or more; "
                f"got width={width}, depths={depths}, heads={heads}, window={window}, mlp_ratio={mlp_ratio}"
            )
        widths = [width * 2**stage for stage in range(len(depths))]

        def stage(channels: int, depth: int, heads: int) -> nn.Sequential:
            return nn.Sequential(
                *(Block(channels, heads, window, bool(i % 2), periodic, mlp_ratio) for i in range(depth))
            )

        self.stem = Conv(in_channels, width, periodic=periodic)
        self.down = nn.ModuleList(
            Conv(fine, coarse, 2, periodic=periodic) for fine, coarse in zip([width, *widths], widths, strict=False)
        )
        self.stages = nn.ModuleList(map(stage, widths, depths, heads))
        self.up = nn.ModuleList(Up(coarse, fine) for fine, coarse in zip([width, *widths], widths, strict=False))
        self.join = nn.ModuleList(nn.Conv2d(2 * fine, fine, 1) for fine in [width, *widths[:-1]])
        self.head = Conv(width, out_channels, periodic=periodic)
        nn.init.zeros_(self.head.conv.weight)
        nn.init.zeros_(self.head.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, H, W) to (B, out_channels, H, W)."""
        x = F.gelu(self.stem(x))
        skips = []
        for down, stage in zip(self.down, self.stages, strict=True):
            skips.append(x)
            x = stage(down(x))
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            x = F.gelu(join(up(x, skips.pop())))
        out: Tensor = self.head(x)
        return out
