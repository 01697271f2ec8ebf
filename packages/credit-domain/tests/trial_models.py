"""Models whose own code mixes rows, so that converting their modules gives other numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

ROWS, COLUMNS = 24, 8


class Attention(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        q, k, v = (t.flatten(2).transpose(1, 2) for t in self.qkv(x).chunk(3, 1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class ZeroAttention(Attention):
    """As at the start of a training: its result is multiplied by zero."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class PoolByHand(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(x.mean((-2, -1))))[:, :, None, None]


class AsymmetricPad(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResizeToTheGrid(nn.Module):
    def forward(self, x):
        return F.interpolate(x, size=(ROWS, COLUMNS), mode="bilinear")


class Rolled(nn.Module):
    def forward(self, x):
        return torch.roll(x, 3, -2)


class Table(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, channels, ROWS, COLUMNS))

    def forward(self, x):
        return x + F.interpolate(self.table, size=x.shape[-2:], mode="bilinear")


class Average(nn.Module):
    """Its result is right at first, and its buffer is a mean over the rows of one rank."""

    def __init__(self, channels=4):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        y = x - self.mean[:, None, None]
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return y


FAULTS = [Attention, ZeroAttention, PoolByHand, AsymmetricPad, ResizeToTheGrid, Rolled, Table, Average]


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 3, padding=1), middle, nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def whole_input(channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, ROWS, COLUMNS, generator=generator)
