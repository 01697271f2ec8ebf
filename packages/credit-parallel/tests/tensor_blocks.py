"""Blocks that declare what of them is tensor-parallel, of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 4
HEADS = 6  # which divides by 2 and by 3


class Mlp(nn.Module):
    _tp_col, _tp_row = "up", "down"

    def __init__(self, bias: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 12, bias=bias), nn.Linear(12, CHANNELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class InSequential(nn.Module):
    """Dotted paths, and a learned slope that all channels share."""

    _tp_col, _tp_row, _tp_partial = "layers.1", "layers.4", ("layers.2.weight",)

    def __init__(self, bias: bool = True):
        super().__init__()
        norm, act, drop = nn.LayerNorm(CHANNELS), nn.PReLU(), nn.Dropout(0.0)
        self.layers = nn.Sequential(norm, nn.Linear(CHANNELS, 6, bias), act, drop, nn.Linear(6, CHANNELS, bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Attention(nn.Module):
    """Separate projections, a temperature for each head and a scale for all."""

    _tp_col, _tp_row, _tp_heads = ("to_q", "to_k", "to_v"), "to_out", "heads"
    _tp_shard, _tp_partial = {"temperature": -3}, "scale"

    def __init__(self, bias: bool = True):
        super().__init__()
        self.heads, inner = HEADS, 2 * HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, inner, bias=bias) for _ in range(3))
        self.to_out = nn.Linear(inner, CHANNELS, bias=bias)
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1))
        self.scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        q, k, v = (split_heads(layer(y), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(attend(q * self.temperature * self.scale, k, v))


class Fused(nn.Module):
    """Queries and keys of 2 channels a head, values of 3, in one layer."""

    _tp_col, _tp_row, _tp_heads = "to_qkv", "to_out", ("heads", "q_size", "v_size")
    _tp_parts: ClassVar = {"to_qkv": (2 * HEADS, 2 * HEADS, 3 * HEADS)}

    def __init__(self, bias: bool = True):
        super().__init__()
        self.heads, self.q_size, self.v_size = HEADS, 2 * HEADS, 3 * HEADS
        self.to_qkv = nn.Linear(CHANNELS, 7 * HEADS, bias=bias)
        self.to_out = nn.Linear(3 * HEADS, CHANNELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(x).split((self.q_size, self.q_size, self.v_size), -1)
        return x + self.to_out(attend(*(split_heads(part, self.heads) for part in parts)))


class Glu(nn.Module):
    _tp_col, _tp_row, _tp_parts = "up", "down", {"up": 2}

    def __init__(self, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, 12, bias=bias), nn.Linear(6, CHANNELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x)))


class Transformer(nn.Module):
    """Two pairs in one block, one of them with equal parts."""

    _tp_col, _tp_row, _tp_heads = (("qkv",), "up"), ("out", "down"), "num_heads"
    _tp_parts: ClassVar = {"qkv": 3}

    def __init__(self, bias: bool = True):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * HEADS, bias=bias), nn.Linear(HEADS, CHANNELS, bias=bias)
        self.up, self.down = nn.Linear(CHANNELS, 12, bias=bias), nn.Linear(12, CHANNELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(attend(*(split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))))
        return x + self.down(F.silu(self.up(x)))


class Parallel(nn.Module):
    """Two branches side by side that one row layer reads: the parts are those of its input."""

    _tp_col, _tp_row, _tp_parts = ("a", "b"), "out", {"out": (6, 12)}

    def __init__(self, bias: bool = True):
        super().__init__()
        self.a, self.b = nn.Linear(CHANNELS, 6, bias=bias), nn.Linear(CHANNELS, 12, bias=bias)
        self.out = nn.Linear(18, CHANNELS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x).sin(), self.b(x).cos()], -1))


class Native(nn.Module):
    _tp_plan: ClassVar = {"to_q": "colwise", "to_v": "colwise", "to_out": "rowwise"}

    def __init__(self, bias: bool = True):
        super().__init__()
        self.to_q, self.to_v = nn.Linear(CHANNELS, 6, bias=bias), nn.Linear(CHANNELS, 6, bias=bias)
        self.to_out = nn.Linear(6, CHANNELS, bias=bias)

    @staticmethod
    def _tp_constraints(block: Native, tp_size: int) -> list[str]:
        return [] if block.to_q.out_features >= tp_size else ["too few channels"]

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(self.to_q(x).tanh() * self.to_v(x))


class ConvMlp(nn.Module):
    _tp_col, _tp_row = "proj_up", "proj_out"

    def __init__(self, bias: bool = True):
        super().__init__()
        self.proj_up, self.proj_out = nn.Conv2d(CHANNELS, 12, 1, bias=bias), nn.Conv2d(12, CHANNELS, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(F.gelu(self.proj_up(x)))


class InvertedBottleneck(nn.Module):
    """A depthwise convolution and a group norm between, which treat channels or whole groups apart."""

    _tp_col, _tp_row = "net.0", "net.4"
    _tp_heads = ("net.1.groups", "net.2.num_groups")
    _tp_shard = dict.fromkeys(("net.1.weight", "net.1.bias", "net.2.weight", "net.2.bias"), 0)

    def __init__(self, bias: bool = True):
        super().__init__()
        depthwise, norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GroupNorm(HEADS, 12)
        first, last = nn.Conv2d(CHANNELS, 12, 1, bias=bias, padding="same"), nn.Conv2d(12, CHANNELS, 1, bias=bias)
        self.net = nn.Sequential(first, depthwise, norm, nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class ConvGlu(nn.Module):
    _tp_col, _tp_row, _tp_parts = "up", "down", {"up": 2}

    def __init__(self, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Conv2d(CHANNELS, 12, 1, bias=bias), nn.Conv2d(6, CHANNELS, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x), 1))


LINEAR = (Mlp, InSequential, Attention, Fused, Glu, Transformer, Parallel)
CONV = (ConvMlp, InvertedBottleneck, ConvGlu)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(-2, -3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


def build(*kinds: Callable[..., nn.Module], seed: int = 0, bias: bool = True) -> nn.Sequential:
    """The same weights on every rank, from a generator of their own."""
    model, generator = nn.Sequential(*(kind(bias) for kind in kinds)).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
