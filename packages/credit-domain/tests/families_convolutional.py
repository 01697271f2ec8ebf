"""Small convolutional models of the field, written for one rank from what is published about their architectures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from domain_models import PeriodicConv2d
from torch import Tensor, nn

# A residual diffusion UNet


class ChannelRMSNorm(nn.Module):
    """Each point divided by the root mean square of its channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class TimeEmbedding(nn.Module):
    """Sines and cosines of the diffusion step, through a small network."""

    def __init__(self, features: int, out: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, time: Tensor) -> Tensor:
        half = self.features // 2
        frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000.0) / (half - 1)))
        angles = time[:, None] * frequencies[None]
        return self.mlp(torch.cat([angles.sin(), angles.cos()], -1))


class DiffusionBlock(nn.Module):
    """Two periodic convolutions with GroupNorm; the step scales and shifts after the first."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * out))
        self.conv1, self.norm1 = PeriodicConv2d(channels, out), nn.GroupNorm(2, out)
        self.conv2, self.norm2 = PeriodicConv2d(out, out), nn.GroupNorm(2, out)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        return F.silu(self.norm2(self.conv2(h))) + self.shortcut(x)


class LinearAttention(nn.Module):
    """Attention at a cost linear in the tokens; ``memory`` learned tokens go before those of the grid."""

    def __init__(self, channels: int, heads: int = 2, head_channels: int = 3, memory: int = 0) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_channels**-0.5
        hidden = heads * head_channels
        self.norm = ChannelRMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, head_channels, memory)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden, channels, 1), nn.GroupNorm(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        if self.mem_kv is not None:
            mk, mv = (t[None].expand(b, -1, -1, -1) for t in self.mem_kv)
            k, v = torch.cat([mk, k], -1), torch.cat([mv, v], -1)
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v)
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(out.reshape(b, -1, h, w))


class Attention(nn.Module):
    """Attention over all tokens."""

    def __init__(self, channels: int, heads: int = 2, head_channels: int = 3, memory: int = 0) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_channels**-0.5
        hidden = heads * head_channels
        self.mem_kv = nn.Parameter(torch.randn(2, heads, memory, head_channels)) if memory else None
        self.to_qkv = nn.Conv2d(channels, 3 * hidden, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w).mT for t in self.to_qkv(x).chunk(3, dim=1))
        if self.mem_kv is not None:
            mk, mv = (t[None].expand(b, -1, -1, -1) for t in self.mem_kv)
            k, v = torch.cat([mk, k], -2), torch.cat([mv, v], -2)
        weights = torch.einsum("bhid,bhjd->bhij", q * self.scale, k).softmax(dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", weights, v)
        return self.to_out(out.mT.reshape(b, -1, h, w))


class DiffusionUNet(nn.Module):
    """Levels of residual blocks with linear attention, full attention at the bottom, and skips between them.

    ``down`` is ``strided`` (kernel 4, stride 2, padding 1) or ``unshuffled`` (space to depth, then 1 x 1).
    """

    def __init__(self, channels: int = 2, widths: tuple[int, ...] = (4, 6), down: str = "strided", memory: int = 0):
        super().__init__()
        time = 8
        self.time = TimeEmbedding(4, time)
        self.stem = PeriodicConv2d(channels, widths[0], 5)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        pairs = list(zip(widths, (*widths[1:], widths[-1]), strict=True))
        for width, out in pairs:
            half = (
                nn.Conv2d(width, out, 4, 2, 1)
                if down == "strided"
                else nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1))
            )
            attend = LinearAttention(width, memory=memory)
            self.downs.append(nn.ModuleList([DiffusionBlock(width, width, time), attend, half]))
        bottom = widths[-1]
        self.middle1 = DiffusionBlock(bottom, bottom, time)
        self.attention = Attention(bottom, memory=memory)
        self.middle2 = DiffusionBlock(bottom, bottom, time)
        for width, out in reversed(pairs):
            double = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(out, width, 3, padding=1))
            attend = LinearAttention(width, memory=memory)
            self.ups.append(nn.ModuleList([double, DiffusionBlock(2 * width, width, time), attend]))
        self.head = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = self.time(time)
        x, skips = self.stem(x), []
        for block, attend, half in self.downs:
            x = block(x, t)
            x = attend(x) + x
            skips.append(x)
            x = half(x)
        x = self.middle1(x, t)
        x = self.attention(x) + x
        x = self.middle2(x, t)
        for double, block, attend in self.ups:
            x = block(torch.cat([double(x), skips.pop()], dim=1), t)
            x = attend(x) + x
        return self.head(x)


# A UNet with the encoder of a ResNet


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class SCSE(nn.Module):
    """Channels weighted by what is in the grid, plus points weighted by what is in their channels."""

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.cSE(x) + x * self.sSE(x)


def conv_bn_relu(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    """Doubled, joined with the skip connection, convolved twice."""

    def __init__(self, channels: int, skip: int, out: int, attention: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn_relu(channels + skip, out), conv_bn_relu(out, out)
        self.attention1 = SCSE(channels + skip) if attention and skip else nn.Identity()
        self.attention2 = SCSE(out) if attention else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
            x = self.attention1(x)
        x = self.conv1(x)
        x = self.conv2(x)
        return self.attention2(x)


class ResNetUNet(nn.Module):
    """Strides 2, 4, 8, ... of a ResNet, and as many decoder blocks; a last one without a skip connection."""

    def __init__(self, channels: int = 2, widths: tuple[int, ...] = (4, 4, 6), attention: bool = True) -> None:
        super().__init__()
        stem, *stages = widths
        self.conv1, self.bn1 = nn.Conv2d(channels, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.ModuleList(
            BasicBlock(before, after, 1 if i == 0 else 2)
            for i, (before, after) in enumerate(zip(widths, stages, strict=False))
        )
        decoder = [
            DecoderBlock(below, skip, skip, attention)
            for below, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        ]
        self.decoder = nn.ModuleList([*decoder, DecoderBlock(stem, 0, 4, attention)])
        self.head = nn.Conv2d(4, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        skips = [x]
        x = self.maxpool(x)
        for layer in self.layers:
            x = layer(x)
            skips.append(x)
        x = skips.pop()
        for block in self.decoder:
            x = block(x, skips.pop() if skips else None)
        return self.head(x)


class PaddedResNetUNet(ResNetUNet):
    """Any height and width: padded to multiples of the total stride, and cropped again."""

    def __init__(self, *args, multiple: int = 8, both_sides: bool = False, mode: str = "constant", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.multiple, self.both_sides, self.mode = multiple, both_sides, mode

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        high, wide = -h % self.multiple, -w % self.multiple
        top, left = (high // 2, wide // 2) if self.both_sides else (0, 0)
        x = super().forward(F.pad(x, (left, wide - left, top, high - top), mode=self.mode))
        return x[..., top : top + h, left : left + w]


# Patches of levels, rows and columns


def to_whole_patches(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, ...]:
    """Padding to whole patches, half of it first, as torch lists it: from the last dim on."""
    totals = [-n % p for n, p in zip(size, patch, strict=True)]
    return tuple(amount for total in reversed(totals) for amount in (total // 2, total - total // 2))


class PatchEmbedding(nn.Module):
    """Padding to whole patches, and one convolution step for each."""

    def __init__(self, channels: int, out: int, size: tuple[int, ...], patch: tuple[int, ...]) -> None:
        super().__init__()
        spatial = len(patch)
        self.pad = (nn.ZeroPad2d, nn.ZeroPad3d)[spatial - 2](to_whole_patches(size, patch))
        self.proj = (nn.Conv2d, nn.Conv3d)[spatial - 2](channels, out, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.pad(x))


class PatchRecovery(nn.Module):
    """The way back: transposed, and cropped to the grid."""

    def __init__(self, channels: int, out: int, size: tuple[int, ...], patch: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = (nn.ConvTranspose2d, nn.ConvTranspose3d)[len(patch) - 2](channels, out, patch, patch)
        self.img_size = size

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for d, size in enumerate(self.img_size):
            first = (x.shape[2 + d] - size) // 2
            x = x.narrow(2 + d, first, size)
        return x


class CubeBlock(nn.Module):
    """A convolution over levels, rows and columns, and a perceptron for each point, channels last, both residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(self.norm1(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        return x + self.mlp(self.norm2(x))


class DownSample(nn.Module):
    """2 x 2 points of (B, levels, H, W, C) become one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        b, z, h, w, c = x.shape
        x = x.reshape(b, z, h // 2, 2, w // 2, 2, c).permute(0, 1, 2, 4, 3, 5, 6)
        return self.linear(self.norm(x.reshape(b, z, h // 2, w // 2, 4 * c)))


class MergePoints(nn.Module):
    """The same in two dims, the points listed down the columns first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.linear(self.norm(x))


class UpSample(nn.Module):
    """One point becomes 2 x 2, cut to the grid there was."""

    def __init__(self, channels: int, out: int, output_resolution: tuple[int, ...]) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, 4 * out, bias=False), nn.Linear(out, out, bias=False)
        self.norm = nn.LayerNorm(out)
        self.output_resolution = output_resolution

    def forward(self, x: Tensor) -> Tensor:
        b, z, h, w, _ = x.shape
        x = self.linear1(x).reshape(b, z, h, w, 2, 2, -1).permute(0, 1, 2, 4, 3, 5, 6).reshape(b, z, 2 * h, 2 * w, -1)
        _, rows, columns = self.output_resolution
        return self.linear2(self.norm(x[:, :, :rows, :columns]))


class PanguLike(nn.Module):
    """Levels and the surface in one grid of patches, two resolutions of it, and their recovery.

    The attention in windows of the published model is a :class:`CubeBlock` here.
    """

    def __init__(self, size: tuple[int, int, int] = (5, 33, 16), upper: int = 2, surface: int = 2, width: int = 4):
        super().__init__()
        patch = (2, 4, 4)
        levels, rows, columns = (-(-n // p) for n, p in zip(size, patch, strict=True))
        self.embed_upper = PatchEmbedding(upper, width, size, patch)
        self.embed_surface = PatchEmbedding(surface, width, size[1:], patch[1:])
        self.first, self.last = CubeBlock(width), CubeBlock(width)
        self.down, self.up = DownSample(width), UpSample(2 * width, width, (levels + 1, rows, columns))
        self.bottom = CubeBlock(2 * width)
        self.recover_upper = PatchRecovery(2 * width, upper, size, patch)
        self.recover_surface = PatchRecovery(2 * width, surface, size[1:], patch[1:])

    def forward(self, upper: Tensor, surface: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.embed_surface(surface)[:, :, None], self.embed_upper(upper)], 2)
        skip = self.first(x.permute(0, 2, 3, 4, 1))
        x = self.up(self.bottom(self.down(skip)))
        x = torch.cat([self.last(x), skip], -1).permute(0, 4, 1, 2, 3)
        return self.recover_upper(x[:, :, 1:]), self.recover_surface(x[:, :, 0])


class FuXiLike(nn.Module):
    """Cubes of two times become patches; their body; points recovered by one map, and resized to the full grid.

    The transformer between two resolutions of the published model is residual convolutions here.
    """

    def __init__(self, img_size: tuple[int, int] = (33, 16), channels: int = 2, width: int = 4) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, (2, 4, 4)
        self.cube_embedding = CubeOfTimes(channels, width, self.patch_size)
        self.u_transformer = ResidualBody(width)
        self.fc = nn.Linear(width, channels * 4 * 4)

    def forward(self, x: Tensor) -> Tensor:
        _, rows, columns = self.patch_size
        x = self.u_transformer(self.cube_embedding(x).squeeze(2))
        b, _, h, w = x.shape
        x = self.fc(x.permute(0, 2, 3, 1)).reshape(b, h, w, rows, columns, -1)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * rows, w * columns)
        return F.interpolate(x, size=self.img_size, mode="bilinear")


class CubeOfTimes(nn.Module):
    """A convolution step for each cube, and LayerNorm over its channels."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv3d(channels, width, patch, patch), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1)).movedim(-1, 1)


class ResidualBody(nn.Module):
    """Down and up again, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        down = self.down(x)
        return x + self.up(torch.cat([down, down + self.block(down)], 1))
