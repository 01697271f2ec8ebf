"""Adapters for models of patches in three dimensions: cropped recovery, merging and expanding, resizing at the end."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from credit_domain.adapters.adapter import ProvedAdapter, is_candidate, landing, partition_at, prove
from credit_domain.adapters.registry import register
from credit_domain.ops.interpolation.interpolation import resample
from credit_domain.ops.padding.padding import pad
from credit_domain.ops.pixel import unshuffle
from credit_domain.ops.rearranging import crop

_SIDES = ("after", "both")
"""Where padding goes: all after the last row, or half of it, rounded down, before the first."""


def _before(total: int, form: str) -> int:
    return total // 2 if form == "both" else 0


class _Grid(ProvedAdapter):
    """An adapter with rows, -2, or columns, -1, sharded; of channels first, whatever the module takes."""

    def _prove(self) -> None:
        if self.shard_dim not in (-2, -1):
            raise ValueError(f"{self.label}: shard_dim must be -2 (rows) or -1 (columns); got {self.shard_dim}")
        self._prove_grid()

    def _prove_grid(self) -> None:
        raise NotImplementedError

    def _crop(self, x: Tensor, dim: int, size: int, sharded: bool, form: str) -> Tensor:
        """Cut a dim to the size of the whole grid, where it was padded before."""
        if not sharded:
            return x.narrow(dim, _before(x.shape[dim] - size, form), size)
        held = partition_at(self, x, dim, "cropped")
        start = _before(held.rows - size, form)
        settings: dict[str, Any] = {"dim": dim, "manager": self.manager, "label": self.label}
        return crop(x, start, start + size, target=landing(self, held, size), partition=held, **settings)


# From patches to the grid


def is_patch_recovery(module: nn.Module) -> bool:
    """Whether a module looks like one that makes a grid of patches: ``conv``, transposed, and ``img_size``."""
    conv, size = getattr(module, "conv", None), getattr(module, "img_size", None)
    if not isinstance(conv, (nn.ConvTranspose2d, nn.ConvTranspose3d)) or not is_candidate(module):
        return False
    sized = isinstance(size, (tuple, list)) and len(size) == len(conv.kernel_size)
    plain = conv.kernel_size == conv.stride and not any((*conv.padding, *conv.output_padding))
    return sized and plain and [name for name, _ in module.named_children()] == ["conv"]


class DomainParallelPatchRecovery(_Grid):
    """A transposed convolution, cut to the grid ``img_size`` where that was padded to whole patches.

    Rows come out divided as those of the model's input, where they are as many.

    The module has ``conv`` and ``img_size``, (H, W) or (levels, H, W), of the whole.
    """

    def _prove_grid(self) -> None:
        conv = self.conv
        size = type(self.img_size)(3 * p - -n % p for n, p in zip(self.img_size, conv.kernel_size, strict=True))
        inputs = [[(2, conv.in_channels, *[3] * len(size))]]
        prove(self, "a recovery of a grid from its patches", inputs, _SIDES, img_size=size)

    def forward(self, x: Tensor) -> Tensor:
        """Recover this rank's rows of (B, C, H, W) or (B, C, T, H, W).

        Errors and collectives are those of :func:`credit_domain.functional.crop`.
        """
        m: Any = self.wrapped
        x = m.conv(x)
        for dim, size in zip(range(-len(m.img_size), 0), m.img_size, strict=True):
            x = self._crop(x, dim, size, dim == self.shard_dim, self.form)
        return x


register(
    is_patch_recovery,
    DomainParallelPatchRecovery,
    name="Patch recovery",
    matches="a transposed convolution `conv` and `img_size`",
    notes="cuts what was padded",
)


# Coarser and finer patches, channels last


def is_patch_merging(module: nn.Module) -> bool:
    """Whether a module looks like one that makes one patch of 2 x 2: ``norm`` and ``linear`` of four times C."""
    norm, linear = getattr(module, "norm", None), getattr(module, "linear", None)
    if not isinstance(norm, nn.LayerNorm) or not isinstance(linear, nn.Linear) or not is_candidate(module):
        return False
    names = {name for name, _ in module.named_children()}
    return names == {"norm", "linear"} and norm.normalized_shape == (linear.in_features,) and not linear.in_features % 4


class DomainParallelPatchMerging(_Grid):
    """Each 2 x 2 points of (..., H, W, C) concatenated, normalised and mapped; odd rows and columns padded by zeros."""

    def _prove_grid(self) -> None:
        channels = self.linear.in_features // 4
        forms = [f"{sides} {order}" for order in ("rows first", "columns first") for sides in _SIDES]
        what = "a merging of 2 x 2 points, channels last"
        try:
            prove(self, what, [[(2, 6, 4, channels)], [(2, 5, 3, channels)]], forms)
        except ValueError:
            prove(self, what, [[(2, 2, 6, 4, channels)], [(2, 1, 5, 3, channels)]], forms)

    def forward(self, x: Tensor) -> Tensor:
        """Merge this rank's rows of (..., H, W, C); returns (..., H / 2, W / 2, new C), rounded up.

        Errors and collectives are those of :func:`credit_domain.functional.pad` and
        :func:`credit_domain.functional.pixel_unshuffle`.
        """
        m: Any = self.wrapped
        sides, order = self.form.split(" ", 1)
        x = x.movedim(-1, -3)
        held = partition_at(self, x, self.shard_dim)
        pads = []
        for dim in (-1, -2):
            odd = (held.rows if dim == self.shard_dim else x.shape[dim]) % 2
            pads += [_before(odd, sides), odd - _before(odd, sides)]
        if any(pads):
            x = pad(x, pads, dim=self.shard_dim, partition=held, manager=self.manager, label=self.label)
        channels = x.shape[-3]
        x = unshuffle(x, 2, self.call)
        x = torch.unflatten(x, -3, (channels, 2, 2))
        x = x.movedim(-5, -3) if order == "rows first" else x.transpose(-4, -3).movedim(-5, -3)
        x = x.flatten(-5, -3).movedim(-3, -1)
        out: Tensor = m.linear(m.norm(x))
        return out


register(
    is_patch_merging,
    DomainParallelPatchMerging,
    name="Pangu patch merging",
    matches="`norm` and `linear` of four times C",
    notes="(..., H, W, C); pads odd sizes",
)


def is_patch_expanding(module: nn.Module) -> bool:
    """Whether a module looks like one that makes 2 x 2 patches of one: ``linear1``, ``norm``, ``linear2``."""
    first, second, norm = (getattr(module, name, None) for name in ("linear1", "linear2", "norm"))
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear) or not isinstance(norm, nn.LayerNorm):
        return False
    size = getattr(module, "output_resolution", None)
    if not is_candidate(module) or not isinstance(size, (tuple, list)) or len(size) not in (2, 3):
        return False
    names = {name for name, _ in module.named_children()}
    return names == {"linear1", "linear2", "norm"} and first.out_features == 4 * second.in_features


class DomainParallelPatchExpanding(_Grid):
    """Each point of (..., H, W, C) mapped to 2 x 2, cut to ``output_resolution``, normalised and mapped.

    ``output_resolution`` is the size of the whole, (H, W) or (levels, H, W).
    """

    def _prove_grid(self) -> None:
        *levels, rows, columns = self.output_resolution
        size = type(self.output_resolution)([*[2] * len(levels), 6 - rows % 2, 4 - columns % 2])
        inputs = [[(2, *[2] * len(levels), 3, 2, self.linear1.in_features)]]
        prove(self, "an expansion to 2 x 2 points, channels last", inputs, _SIDES, output_resolution=size)

    def forward(self, x: Tensor) -> Tensor:
        """Expand this rank's rows of (..., H, W, C).

        Errors and collectives are those of :func:`credit_domain.functional.crop`.
        """
        m: Any = self.wrapped
        x = m.linear1(x)
        x = torch.unflatten(x, -1, (2, 2, -1)).movedim(-3, -4)  # (..., H, 2, W, 2, C)
        x = x.flatten(-3, -2).flatten(-4, -3)
        for dim, size in zip((-3, -2), m.output_resolution[-2:], strict=True):
            x = self._crop(x, dim, size, dim == self.shard_dim - 1, self.form)
        out: Tensor = m.linear2(m.norm(x))
        return out


register(
    is_patch_expanding,
    DomainParallelPatchExpanding,
    name="Pangu patch expanding",
    matches="`linear1`, `norm`, `linear2`",
    notes="cut to `output_resolution`",
)


# A model that resizes its output to the grid of its input


def is_resizing_model(module: nn.Module) -> bool:
    """Whether a module looks like FuXi: ``cube_embedding``, ``u_transformer``, ``fc``, ``patch_size``, ``img_size``."""
    names = {name for name, _ in module.named_children()}
    if names != {"cube_embedding", "u_transformer", "fc"} or not is_candidate(module):
        return False
    patch, size, fc = (getattr(module, name, None) for name in ("patch_size", "img_size", "fc"))
    if not isinstance(patch, (tuple, list)) or not isinstance(size, (tuple, list)) or not isinstance(fc, nn.Linear):
        return False
    return len(patch) == 3 and len(size) in (2, 3) and fc.out_features % (patch[1] * patch[2]) == 0


class DomainParallelResizingModel(_Grid):
    """Cubes of two times embedded, a body, patches recovered by ``fc``, and a bilinear resizing to ``img_size``.

    The children are called in this order, on (B, C, T, H, W), then (B, C, H, W); ``fc`` makes ``patch_size[1]`` x
    ``patch_size[2]`` points of each, channels last.
    """

    def _prove_grid(self) -> None:
        size = type(self.img_size)([*self.img_size[:-2], 3 * self.patch_size[1] + 1, 2 * self.patch_size[2]])
        patches = _Patches(self.fc.in_features, tuple(self.patch_size))
        children = {"cube_embedding": patches, "u_transformer": nn.Identity()}
        inputs = [[(2, 1, self.patch_size[0], *size[-2:])]]
        prove(self, "a model that resizes its output to img_size", inputs, children=children, img_size=size)

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on this rank's rows of (B, C, T, H, W); returns (B, C, H, W).

        Errors and collectives are those of :func:`credit_domain.functional.interpolate` and of the children.
        """
        m: Any = self.wrapped
        x = m.cube_embedding(x)
        x = m.u_transformer(x.squeeze(2) if x.ndim == 5 else x)
        x = torch.unflatten(m.fc(x.movedim(1, -1)), -1, (*m.patch_size[1:], -1))  # (B, h, w, rows, columns, C)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        how = (tuple(m.img_size[-2:]), None, "bilinear", None, None, False, None)
        return resample(x, *how, self.call)


class _Patches(nn.Module):
    """Any features of each patch, for a test of what follows."""

    def __init__(self, features: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.features, self.patch = features, patch

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool3d(x, self.patch)[:, :1]
        return (x * torch.arange(1, self.features + 1).reshape(-1, 1, 1, 1)).sin()


register(
    is_resizing_model,
    DomainParallelResizingModel,
    name="FuXi",
    matches="`cube_embedding`, `u_transformer`, `fc`, `patch_size` and `img_size`",
    notes="the model itself; its body is converted by the other families",
)
