"""What a ``forward`` may do with rows, each case a small model, and what of it may be gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.blocks import WindowAttention
from credit_domain.functional import pad_boundary

H, W = 12, 16


class Fn(nn.Module):
    """A function of what a convolution gives."""

    def __init__(self, fn: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fn = fn
        self.conv = nn.Conv2d(4, 4, 1)
        self.weight = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> object:
        return self.fn(self.conv(x) * self.weight)


class Case(NamedTuple):
    """A model.

    Attributes:
        make: Makes it.
        shapes: Shapes of its arguments.
        gathers: Whether a value is brought together as a whole.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((2, 4, H, W),)
    gathers: bool = False


def fn(function: Callable[[Tensor], object], gathers: bool = False) -> Case:
    return Case(lambda: Fn(function), gathers=gathers)


def table(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def windows(x: Tensor) -> Tensor:
    """Shifted windows of 4 x 4, each attending to itself."""
    b, c, h, w = x.shape
    x = torch.roll(x, (-2, -2), (2, 3))
    t = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    t = (t @ t.transpose(1, 2)).softmax(-1) @ t
    t = t.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
    return torch.roll(t, (2, 2), (2, 3))


def groups(dilated: bool) -> Callable[[Tensor], Tensor]:
    """Attention of columns within 3 groups of 4 rows: neighbours, or every third row."""

    def attend(x: Tensor) -> Tensor:
        t = x.view(2, 4, 4, 3, W).permute(0, 4, 3, 2, 1) if dilated else x.view(2, 4, 3, 4, W).permute(0, 4, 2, 3, 1)
        t = t.reshape(-1, 4, 4)
        t = ((t @ t.transpose(-1, -2)).softmax(-1) @ t).view(2, W, 3, 4, 4)
        t = t.permute(0, 4, 3, 2, 1) if dilated else t.permute(0, 4, 2, 3, 1)
        return t.reshape(2, 4, H, W)

    return attend


def set_rows(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 2:7] = x[:, :, 3:8] * 2
    y[:, :, 3] = x[:, :, 5]
    y[..., ::2, 1:] += 1
    return y


class Attention(nn.Module):
    """Attention over tokens, or along columns."""

    def __init__(self, columns: bool, heads: int = 4) -> None:
        super().__init__()
        self.columns = columns
        self.attention = nn.MultiheadAttention(4, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.permute(0, 3, 2, 1).reshape(b * w, h, c) if self.columns else x.flatten(2).transpose(1, 2)
        t = self.attention(t, t, t, need_weights=False)[0]
        return t.reshape(b, w, h, c).permute(0, 3, 2, 1) if self.columns else t.transpose(1, 2).reshape(x.shape) + x


class Net(nn.Module):
    """A stride and back, with norms, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.down = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.down(self.first(x)))) + x


class Tables(nn.Module):
    """A position table, a mask of rows, a second argument without rows; a dict of results, some without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 4, H, W))
        self.register_buffer("mask", torch.randn(H, 1))
        self.embed = nn.Linear(3, 4)

    def forward(self, x: Tensor, time: Tensor) -> dict[str, object]:
        y = (x + self.positions) * self.mask + self.embed(time)[:, :, None, None]
        return {"y": y, "scores": (y.mean(), [y.amax((2, 3))]), "time": time * 2}


class Fourier(nn.Module):
    """A spectral convolution as it is usually written: zeros, into which modes are put."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.randn(4, 4, 5, 4, dtype=torch.complex128))
        self.high = nn.Parameter(torch.randn(4, 4, 5, 4, dtype=torch.complex128))
        self.skip = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft2(x)
        out = torch.zeros_like(modes)
        out[:, :, :5, :4] = torch.einsum("bixy,ioxy->boxy", modes[:, :, :5, :4], self.low)
        out[:, :, -5:, :4] = torch.einsum("bixy,ioxy->boxy", modes[:, :, -5:, :4], self.high)
        return F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.skip(x))


class Normed(nn.Module):
    """Weights that are computed: a spectral norm, whose buffers change, and a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.second = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Graph(nn.Module):
    """From the grid to 20 nodes and back along edges, with sums at both ends."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("source", torch.randint(0, H * W, (300,), generator=draw))
        self.register_buffer("node", torch.randint(0, 20, (300,), generator=draw))
        self.embed, self.mix, self.out = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x.flatten(2).transpose(1, 2))
        nodes = grid.new_zeros(x.shape[0], 20, 6).index_add(1, self.node, grid[:, self.source])
        nodes = nodes + self.mix(torch.cat([nodes, nodes.roll(1, 1)], -1)).relu()
        grid = grid.index_add(1, self.source, nodes[:, self.node])
        return self.out(grid).transpose(1, 2).reshape(x.shape)


def legendre(x: Tensor) -> Tensor:
    """A spherical harmonic transform and back, written as contractions over latitude."""
    modes = torch.fft.rfft(x)
    polynomials = table(H, 5, W // 2 + 1)
    there = torch.einsum("bchm,hlm->bclm", modes, polynomials.to(modes.dtype))
    return torch.fft.irfft(torch.einsum("bclm,hlm->bchm", there, polynomials.to(modes.dtype)), n=W)


class OwnLayers(nn.Module):
    """Layers of this package, which bring rows of their own."""

    def __init__(self, window: tuple[int, int], shift: tuple[int, int], **how: object) -> None:
        super().__init__()
        self.attention = WindowAttention(4, window, 2, shift, **how)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return F.conv2d(pad_boundary(x, 1, 1), table(4, 4, 3, 3))


CASES: dict[str, Case] = {
    "pad at one end": fn(lambda x: F.pad(x, (0, 1, 0, 1))),
    "pad reflect": fn(lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect")),
    "pad circular": fn(lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    "pad replicate": fn(lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate")),
    "pad negative": fn(lambda x: F.pad(x, (0, 0, -1, -2))),
    "interpolate to the full grid": fn(lambda x: F.interpolate(x[..., ::2, ::2], size=(H, W), mode="bilinear")),
    "interpolate nearest": fn(lambda x: F.interpolate(x, scale_factor=2, mode="nearest")),
    "interpolate bicubic": fn(lambda x: F.interpolate(x, size=(17, 9), mode="bicubic", align_corners=True)),
    "interpolate area": fn(lambda x: F.interpolate(x, size=(5, 8), mode="area")),
    "interpolate antialias": fn(lambda x: F.interpolate(x, size=(5, 8), mode="bilinear", antialias=True)),
    "roll": fn(lambda x: torch.roll(x, (3, 1), (-2, -1))),
    "flip": fn(lambda x: x.flip(-2)),
    "slices with steps": fn(lambda x: torch.cat([x[..., 0::2, :], x[..., 1::2, :]], 1)),
    "crop": fn(lambda x: x[..., 2:-3, :]),
    "cat rows": fn(lambda x: torch.cat([x[..., :2, :].flip(-2), x, x[..., -2:, :]], -2)),
    "cat zeros": fn(lambda x: torch.cat([x, torch.ones_like(x[:, :, :2])], 2)[:, :, 1:-1]),
    "stack": fn(lambda x: torch.stack([x, x * 2], 2).flatten(1, 2)),
    "split rows": fn(lambda x: torch.cat([part * i for i, part in enumerate(x.split(5, -2))], -2)),
    "chunks in another order": fn(lambda x: torch.cat(x.chunk(3, 2)[::-1], 2)),
    "one row": fn(lambda x: x * x[:, :, 3:4] + x[:, :, 0].unsqueeze(2)),
    "rows in place": fn(set_rows),
    "mean over rows": fn(lambda x: x - x.mean(-2, keepdim=True)),
    "sum over all": fn(lambda x: x * x.sum()),
    "var": fn(lambda x: x / x.var(dim=(-2, -1), keepdim=True)),
    "std over all": fn(lambda x: x / x.std(dim=(1, 2, 3), keepdim=True)),
    "amax": fn(lambda x: x - x.amax((-2, -1), keepdim=True)),
    "logsumexp": fn(lambda x: x - x.logsumexp(-2, keepdim=True)),
    "softmax over rows": fn(lambda x: x.softmax(-2)),
    "log_softmax over rows": fn(lambda x: x.log_softmax(-2)),
    "cumsum over rows": fn(lambda x: x.cumsum(-2)),
    "sort": fn(lambda x: x.sort(-2)[0]),
    "normalize": fn(lambda x: F.normalize(x, dim=2)),
    "max over rows": fn(lambda x: x * x.max(2, keepdim=True)[0], gathers=True),
    "einsum over rows": fn(lambda x: torch.einsum("bchw,kh->bckw", x, table(5, H))),
    "matmul over rows": fn(lambda x: table(H, H) @ x),
    "linear over rows": fn(lambda x: F.linear(x.transpose(-1, -2), table(H, H), table(H)).transpose(-1, -2)),
    "contraction to a few": fn(lambda x: x * torch.einsum("bchw,hw->bc", x, table(H, W))[..., None, None]),
    "contraction of two": fn(lambda x: x * torch.einsum("bchw,bdhw->bcd", x, x.tanh()).sum(2)[..., None, None]),
    "tensordot over rows": fn(lambda x: torch.tensordot(x, table(H, 5), ([2], [0])), gathers=True),
    "activations": fn(lambda x: F.hardswish(x) + F.mish(x) * F.softplus(x) + F.elu(x) + F.relu6(x) + F.logsigmoid(x)),
    "outer product": fn(lambda x: x.mean(-1)[..., None] * x.mean(-2)[..., None, :]),
    "gram of rows": fn(lambda x: x.transpose(-1, -2) @ x),
    "attention of rows": fn(lambda x: F.scaled_dot_product_attention(x, x, x)),
    "attention of columns": fn(
        lambda x: F.scaled_dot_product_attention(*[x.permute(0, 3, 2, 1)] * 3).permute(0, 3, 2, 1)
    ),
    "attention of tokens": Case(lambda: Attention(False)),
    "attention of tokens, few heads": Case(lambda: Attention(False, 1), gathers=True),
    "attention along columns": Case(lambda: Attention(True)),
    "shifted windows": fn(windows),
    "groups of rows": fn(groups(False)),
    "dilated groups of rows": fn(groups(True)),
    "written-out sizes": fn(lambda x: x.reshape(2, 4, 1, H, W).squeeze(2)),
    "rows behind channels": fn(lambda x: x.reshape(2, 4 * H, W).roll(1, -1).reshape(2, 4, H, W)),
    "unfold": fn(lambda x: F.unfold(x, 3, padding=1, stride=(2, 1)).view(2, 36, H // 2, W)),
    "fold": fn(lambda x: F.fold(F.unfold(x, 3, padding=1), (H, W), 3, padding=1)),
    "pixel shuffle": fn(lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)),
    "pixel unshuffle": fn(lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2)),
    "grid_sample": fn(lambda x: F.grid_sample(x, table(2, 5, 6, 2), align_corners=False), gathers=True),
    "rows by a table": fn(lambda x: x[:, :, torch.tensor([3, 1, 2, 11, 0, 5, 5])]),
    "columns by a table": fn(lambda x: x[..., torch.tensor([3, 1, 2])]),
    "gather": fn(lambda x: x.gather(2, torch.arange(H).flip(0).view(1, 1, H, 1).expand(2, 4, H, W)), gathers=True),
    "a graph": Case(Graph),
    "rfft2": fn(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(H, W))),
    "fft of columns": fn(lambda x: torch.fft.fft(x, dim=-2).abs()),
    "a Fourier layer": Case(Fourier),
    "harmonics": fn(legendre),
    "norms and strides": Case(Net),
    "tables": Case(Tables, ((2, 4, H, W), (2, 3))),
    "computed weights": Case(Normed),
    "max pool": fn(lambda x: F.max_pool2d(x, 2)),
    "avg pool": fn(lambda x: F.avg_pool2d(x, 3, 2, 1)),
    "adaptive pool": fn(lambda x: F.adaptive_avg_pool2d(x, (5, 4))),
    "excitation": fn(lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid()),
    "layer norm of all": fn(lambda x: F.layer_norm(x, x.shape[1:])),
    "layer norm of channels": fn(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)),
    "instance norm": fn(F.instance_norm),
    "conv same": fn(lambda x: F.conv2d(x, table(4, 4, 5, 3), padding="same")),
    "conv3d": fn(lambda x: F.conv3d(x.unsqueeze(2), table(4, 4, 1, 3, 3), padding=(0, 1, 1)).squeeze(2)),
    "conv over columns and rows": fn(lambda x: F.conv2d(x.mT, table(4, 4, 3, 3), padding=1).mT),
    "fewer rows than ranks": fn(lambda x: F.conv2d(F.avg_pool2d(x, 6), table(4, 4, 3, 3), padding=1)),
    "coordinates": fn(lambda x: torch.cat([x, table(H).view(1, 1, H, 1).expand(2, 1, H, W)], 1)),
    "repeated rows": fn(lambda x: x.repeat(1, 1, 2, 1)[:, :, :H], gathers=True),
    "detached": fn(lambda x: x * x.detach().mean()),
    "gates": fn(lambda x: x[:, :2] * x.chunk(2, 1)[1].sigmoid()),
    "unbind": fn(lambda x: sum(x.unbind(1))),
    "complex": fn(lambda x: torch.view_as_real(torch.complex(x, x * 2) * (1 + 2j))[..., 0]),
    "several results": fn(lambda x: (x, x[:, :, ::2], x.mean((2, 3)), [x.sum()])),
}

LAYERS: dict[str, Case] = {
    "own windows, shifted around": Case(lambda: OwnLayers((4, 4), (2, 2), cyclic=(True, True))),
    "own windows, masked": Case(lambda: OwnLayers((4, 4), (1, 2), cyclic=(False, True))),
    "own windows, padded": Case(lambda: OwnLayers((5, 3), (2, 1))),
    "own windows, dilated": Case(lambda: OwnLayers((3, 4), (0, 0), dilated=True)),
    "own padding of rows behind channels": fn(
        lambda x: pad_boundary(x.reshape(2, 4 * H, W), 1, 1)[:, 1:-1, 1:-1].reshape(2, 4, H, W),
        gathers=True,  # where there are more ranks than samples
    ),
    "own padding with signs of channels": fn(
        lambda x: pad_boundary(x, 1, 0, signs=(1, -1, 1, -1))[:, :, 1:-1] + pad_boundary(x.mT, 1, 0)[:, :, 2:].mT
    ),
    "kernels of several widths": fn(
        lambda x: sum(F.conv2d(x, table(4, 4, k, 3), padding=(k // 2, 1)) for k in (3, 5, 7)) + F.max_pool2d(x, 3, 1, 1)
    ),
    "a transposed kernel beside one": fn(
        lambda x: F.conv_transpose2d(x, table(4, 4, 3, 3), padding=1) * F.conv2d(x, table(4, 4, 3, 3), padding=1)
    ),
}
"""Layers and functions of this package, and convolutions that share an exchange."""
