"""Transformers of the field, small, written for one rank from the published architectures."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# CrossFormer: embeddings of several kernels, attention of short and of long distance, a bias by an MLP of offsets


class ChannelNorm(nn.Module):
    """Normalises the channels of each point of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).square().mean(1, keepdim=True)
        return (x - mean) * (var + 1e-5).rsqrt() * self.g + self.b


class CrossScaleEmbedding(nn.Module):
    """Convolutions of one stride; the wider a kernel, the fewer channels it makes."""

    def __init__(self, channels: int, out: int, kernels: tuple[int, ...], stride: int) -> None:
        super().__init__()
        shares = [out // 2**i for i in range(1, len(kernels))]
        shares.append(out - sum(shares))
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, share, kernel, stride, (kernel - stride) // 2)
            for kernel, share in zip(sorted(kernels), shares, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class DynamicPositionBias(nn.Module):
    """An MLP from an offset between two positions to a bias for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2, width), nn.LayerNorm(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()),
            nn.Linear(width, heads),
        )

    def forward(self, offsets: Tensor) -> Tensor:
        return self.layers(offsets)


class CrossAttention(nn.Module):
    """Attention in windows of adjacent positions (short), or of positions far apart (long)."""

    def __init__(
        self, channels: int, attn_type: str, window_size: int, heads: int = 2, pads: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn_type, self.window_size, self.heads, self.pads = attn_type, window_size, heads, pads
        self.scale = (channels // heads) ** -0.5
        self.norm = ChannelNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.dpb = DynamicPositionBias(8, heads)
        s = window_size
        grid = torch.stack(torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")).flatten(1)
        offsets = grid[:, :, None] - grid[:, None] + s - 1
        self.register_buffer("rel_pos_indices", offsets[0] * (2 * s - 1) + offsets[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        s = self.window_size
        x = self.norm(x)
        if self.pads:
            x = F.pad(x, (0, -W % s, 0, -H % s))
        h, w = x.shape[2] // s, x.shape[3] // s
        if self.attn_type == "short":
            x = x.reshape(B, C, h, s, w, s).permute(0, 2, 4, 1, 3, 5).reshape(B * h * w, C, s, s)
        else:
            x = x.reshape(B, C, s, h, s, w).permute(0, 3, 5, 1, 2, 4).reshape(B * h * w, C, s, s)
        q, k, v = self.to_qkv(x).reshape(-1, 3, self.heads, C // self.heads, s * s).mT.unbind(1)
        span = torch.arange(1 - s, s, device=x.device, dtype=x.dtype)
        bias = self.dpb(torch.stack(torch.meshgrid(span, span, indexing="ij"), -1).reshape(-1, 2))
        bias = bias[self.rel_pos_indices].permute(2, 0, 1)
        attn = self.dropout((q * self.scale @ k.mT + bias).softmax(-1))
        x = self.to_out((attn @ v).mT.reshape(-1, C, s, s))
        if self.attn_type == "short":
            x = x.reshape(B, h, w, C, s, s).permute(0, 3, 1, 4, 2, 5)
        else:
            x = x.reshape(B, h, w, C, s, s).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(B, C, h * s, w * s)[:, :, :H, :W]


class CrossFormer(nn.Module):
    """Stages of an embedding and blocks of short and long attention, and a head that goes back up with skips."""

    def __init__(
        self, channels: int = 2, windows: tuple[int, int] = (3, 2), pads: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        before = channels
        for width, window, kernels in zip((8, 16), windows, ((4, 8, 16, 32), (2, 4)), strict=True):
            blocks = []
            for kind in ("short", "long"):
                feed = nn.Sequential(
                    ChannelNorm(width), nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, width, 1)
                )
                blocks += [CrossAttention(width, kind, window, pads=pads, dropout=dropout), feed]
            embed = CrossScaleEmbedding(before, width, kernels, min(kernels))
            self.stages.append(nn.ModuleList([embed, *blocks]))
            before = width
        self.up = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(16, 16 * channels, 3, padding=1), nn.PixelShuffle(4))
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for embed, *blocks in self.stages:
            x = embed(x)
            for block in blocks:
                x = x + block(x)
            levels.append(x)
        x = torch.cat([self.up(levels[1]), levels[0]], 1)
        return self.last(self.head(x))


# Swin: shifted windows, whose mask keeps apart what the roll brought together


def cut(x: Tensor, s: int) -> Tensor:
    """(B, H, W, C) to (B * windows, s * s, C)."""
    B, H, W, C = x.shape
    return x.view(B, H // s, s, W // s, s, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, C)


def join(windows: Tensor, s: int, H: int, W: int) -> Tensor:
    """Undo :func:`cut`."""
    x = windows.view(-1, H // s, W // s, s, s, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, H, W, windows.shape[-1])


def offsets_in(s: int) -> Tensor:
    grid = torch.stack(torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")).flatten(1)
    return (grid[:, :, None] - grid[:, None]).permute(1, 2, 0) + s - 1


def shift_mask(H: int, W: int, s: int, shift: int, device: torch.device | None = None) -> Tensor:
    """What tokens of each window of the rolled grid may not see each other: (windows, s * s, s * s)."""
    region = torch.zeros(1, H, W, 1, device=device)
    number = 0
    for rows in (slice(0, -s), slice(-s, -shift), slice(-shift, None)):
        for columns in (slice(0, -s), slice(-s, -shift), slice(-shift, None)):
            region[:, rows, columns] = number
            number += 1
    region = cut(region, s).squeeze(-1)
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)


class WindowAttention(nn.Module):
    """Attention within windows with a table of biases; version 2 is of cosines, with an MLP of offsets."""

    def __init__(self, dim: int, window_size: int, num_heads: int = 2, version: int = 1) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.version = (window_size, window_size), num_heads, version
        s, offsets = window_size, offsets_in(window_size)
        self.register_buffer("relative_position_index", offsets[..., 0] * (2 * s - 1) + offsets[..., 1])
        if version == 1:
            self.relative_position_bias_table = nn.Parameter(0.5 * torch.randn((2 * s - 1) ** 2, num_heads))
        else:
            self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, num_heads, bias=False))
            span = torch.arange(1 - s, s) / max(1, s - 1) * 8
            table = torch.stack(torch.meshgrid(span, span, indexing="ij"), -1).flatten(0, 1)
            self.register_buffer("relative_coords_table", table.sign() * (table.abs() + 1).log2() / 3)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, N, C = x.shape
        q, k, v = self.qkv(x).reshape(n, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind()
        if self.version == 1:
            scores = q * (C // self.num_heads) ** -0.5 @ k.mT
            bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
            scores = scores * self.logit_scale.clamp(max=math.log(100.0)).exp()
            bias = 16 * self.cpb_mlp(self.relative_coords_table)[self.relative_position_index.view(-1)].sigmoid()
        scores = scores + bias.view(N, N, -1).permute(2, 0, 1)
        if mask is not None:
            scores = scores.view(-1, len(mask), self.num_heads, N, N) + mask[:, None]
            scores = scores.view(n, self.num_heads, N, N)
        return self.proj((self.attn_drop(self.softmax(scores)) @ v).transpose(1, 2).reshape(n, N, C))


class DropPath(nn.Module):
    """Drops whole samples."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = x.new_empty([len(x)] + [1] * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * keep / (1 - self.drop_prob)


class SwinBlock(nn.Module):
    """Shifted window attention and an MLP, of tokens (B, H * W, C); version 2 normalises after each."""

    def __init__(self, dim: int, resolution: tuple[int, int], window_size: int, shift: bool, version: int = 1) -> None:
        super().__init__()
        self.input_resolution, self.window_size, self.version = resolution, window_size, version
        self.shift_size = window_size // 2 if shift else 0
        if min(resolution) <= window_size:
            self.window_size, self.shift_size = min(resolution), 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, self.window_size, version=version)
        self.drop_path = DropPath(0.2)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * dim, dim))
        mask = shift_mask(*resolution, self.window_size, self.shift_size) if self.shift_size else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, L, C = x.shape
        if L != H * W:
            raise ValueError("input feature has wrong size")
        attended = self.attend((x if self.version == 2 else self.norm1(x)).view(B, H, W, C)).view(B, L, C)
        if self.version == 2:
            x = x + self.drop_path(self.norm1(attended))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        shift = self.shift_size
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        x = join(self.attn(cut(x, self.window_size), self.attn_mask), self.window_size, H, W)
        return torch.roll(x, (shift, shift), (1, 2)) if shift else x


class PatchEmbed(nn.Module):
    """Tokens of patches."""

    def __init__(self, channels: int, dim: int, img_size: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.patches_resolution = [img_size[0] // patch, img_size[1] // patch]
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.img_size[0] or x.shape[3] != self.img_size[1]:
            raise ValueError(f"input image of size {tuple(x.shape[2:])} is none of {self.img_size}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class PatchMerging(nn.Module):
    """Makes one token of 2 x 2."""

    def __init__(self, resolution: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.input_resolution = resolution
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, L, C = x.shape
        if L != H * W or H % 2 or W % 2:
            raise ValueError("input feature has wrong size")
        x = x.view(B, H, W, C)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.view(B, -1, 4 * C)))


class PatchExpand(nn.Module):
    """Makes ``factor`` x ``factor`` tokens of one."""

    def __init__(self, resolution: tuple[int, int], dim: int, out: int, factor: int) -> None:
        super().__init__()
        self.input_resolution, self.factor = resolution, factor
        self.expand = nn.Linear(dim, out * factor * factor, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        (H, W), f = self.input_resolution, self.factor
        B, L, _ = x.shape
        if L != H * W:
            raise ValueError("input feature has wrong size")
        x = self.expand(x).view(B, H, W, f, f, -1).permute(0, 1, 3, 2, 4, 5)
        return self.norm(x.reshape(B, H * f * W * f, -1))


class SwinUNet(nn.Module):
    """Two levels of Swin blocks on tokens, merged and expanded again, with a skip; all resolutions are stored."""

    def __init__(self, rows: int = 40, columns: int = 24, window: int = 3, version: int = 1, patch: int = 2) -> None:
        super().__init__()
        fine = rows // patch, columns // patch
        coarse = fine[0] // 2, fine[1] // 2
        self.columns = columns
        self.embed = PatchEmbed(2, 4, (rows, columns), patch)
        self.fine = nn.ModuleList(SwinBlock(4, fine, window, shift, version) for shift in (False, True))
        self.merge = PatchMerging(fine, 4)
        self.coarse = nn.ModuleList(SwinBlock(8, coarse, window, shift, version) for shift in (False, True))
        self.expand = PatchExpand(coarse, 8, 4, 2)
        self.both = nn.Linear(8, 4)
        self.back = SwinBlock(4, fine, window, True, version)
        self.last = PatchExpand(fine, 4, 4, patch)
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.fine:
            x = block(x)
        skip, x = x, self.merge(x)
        for block in self.coarse:
            x = block(x)
        x = self.back(self.both(torch.cat([self.expand(x), skip], -1)))
        x = self.last(x)
        return self.head(x.transpose(1, 2).unflatten(2, (-1, self.columns)))


class ShiftedWindowAttention(nn.Module):
    """Attention of (B, H, W, C) that pads, rolls, cuts and masks by itself at each call, whatever the size."""

    def __init__(self, dim: int, window_size: int, shift_size: int, version: int = 1, masked: bool = True) -> None:
        super().__init__()
        self.window_size, self.shift_size, self.masked = [window_size] * 2, [shift_size] * 2, masked
        inner = WindowAttention(dim, window_size, version=version)
        for name, child in inner._modules.items():
            self.add_module(name, child)
        for name, parameter in inner._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in inner._buffers.items():
            self.register_buffer(name, buffer)
        self.num_heads, self.version = inner.num_heads, version

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        s, shift = self.window_size[0], list(self.shift_size)
        x = F.pad(x, (0, 0, 0, -W % s, 0, -H % s))
        h, w = x.shape[1:3]
        if h <= s:
            shift[0] = 0
        if w <= s:
            shift[1] = 0
        mask = None
        if sum(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
            if self.masked and all(shift):
                mask = shift_mask(h, w, s, shift[0], x.device).to(x.dtype)
        x = join(WindowAttention.forward(self, cut(x, s), mask), s, h, w)
        if sum(shift):
            x = torch.roll(x, (shift[0], shift[1]), (1, 2))
        return x[:, :H, :W]


class Merging(nn.Module):
    """Makes one point of 2 x 2 in (B, H, W, C), and pads odd sizes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1)
        return self.norm(self.reduction(x))


class ChannelsLastSwin(nn.Module):
    """Swin on (B, H, W, C) of any size: an embedding, blocks, a merging, blocks."""

    def __init__(self, window: int = 4, version: int = 1, masked: bool = True, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 4, 2, 2)
        self.attend, self.feed = nn.ModuleList(), nn.ModuleList()
        self.merge = Merging(4)
        for i in range(2 * depth):
            dim = 4 if i < depth else 8
            attention = ShiftedWindowAttention(dim, window, (i % 2) * (window // 2), version, masked)
            self.attend.append(nn.Sequential(nn.LayerNorm(dim), attention))
            self.feed.append(
                nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for i, (attend, feed) in enumerate(zip(self.attend, self.feed, strict=True)):
            if 2 * i == len(self.attend):
                x = self.merge(x)
            x = x + attend(x)
            x = x + feed(x)
        return self.head(x).permute(0, 3, 1, 2)
