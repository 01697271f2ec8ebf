"""The footprint of a torch layer along the sharded dim: what the plan of a model is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from credit_domain import footprint
from credit_domain.footprint import Footprint
from credit_domain.functional.conv import padding_pairs, per_dim
from credit_domain.functional.interpolate import Along, map_of
from credit_halo import EdgeRule
from credit_mesh import RowPartition


def footprint_of(
    module: nn.Module,
    source: RowPartition,
    shard_dim: int,
    output: tuple[int, ...],
    declared: RowPartition | None = None,
    shape: tuple[int, ...] = (),
) -> Footprint | None:
    """The footprint of a layer of torch.nn; None for layers that reduce over rows or mix none.

    Args:
        module: The layer.
        source: Partition of its input rows.
        shard_dim: The sharded dim, negative.
        output: Global shape of its output.
        declared: Partition of the model's input.
        shape: Global shape of its input.

    Raises:
        ValueError: If the layer cannot work on these rows.
    """
    m: Any = module
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        rows = footprint.transposed_rows(
            source.rows, m.kernel_size[shard_dim], m.stride[shard_dim], m.padding[shard_dim], 0, m.dilation[shard_dim]
        )
        return footprint.transposed_convolution(
            source,
            m.kernel_size[shard_dim],
            m.stride[shard_dim],
            m.padding[shard_dim],
            output[shard_dim] - rows,
            m.dilation[shard_dim],
        )
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        pads = padding_pairs(m.padding, m.kernel_size, m.stride, m.dilation, len(m.kernel_size))[shard_dim]
        along = (m.kernel_size[shard_dim], m.stride[shard_dim], pads, m.dilation[shard_dim])
        return footprint.convolution(source, *along, EdgeRule(m.padding_mode))
    if isinstance(module, _WINDOWS):
        spatial = int(type(module).__name__[-2])
        kernel = per_dim(m.kernel_size, spatial)[shard_dim]
        stride = kernel if m.stride is None else per_dim(m.stride, spatial)[shard_dim]
        padding = per_dim(getattr(m, "padding", 0), spatial)[shard_dim]
        dilation = per_dim(getattr(m, "dilation", 1), spatial)[shard_dim]
        return footprint.pooling(source, kernel, stride, padding, dilation, m.ceil_mode)
    if isinstance(module, nn.PixelUnshuffle):
        return footprint.pixel_unshuffle(source, m.downscale_factor)
    if type(module).__name__[:-2] in _EDGES and type(module).__name__.endswith("d"):
        edge = EdgeRule(_EDGES[type(module).__name__[:-2]])
        amounts = m.padding  # pairs, last dim first
        return footprint.padded(source, amounts[-2 * shard_dim - 2], amounts[-2 * shard_dim - 1], edge)
    if isinstance(module, nn.Upsample):
        moved = source.rows == output[shard_dim] and shape[2:] not in ((), output[2:])
        return _upsample(module, source, len(output) - 2 + shard_dim, len(output) - 2, declared, moved)
    if type(module).__name__.startswith("Adaptive") and output[shard_dim] > 1:
        return footprint.adaptive_pooling(source, output[shard_dim])
    return None


def _upsample(
    module: nn.Upsample, source: RowPartition, at: int, nd: int, declared: RowPartition | None, moved: bool
) -> Footprint:
    size, scale = (None if v is None else per_dim(v, nd)[at] for v in (module.size, module.scale_factor))
    how = (module.mode, module.align_corners, module.recompute_scale_factor, False)
    taps = map_of(Along(nd, at, source.rows, size, scale, *how, torch.float32, "cpu", moved))
    target = footprint.resampled_partition(source, taps.rows, declared)
    return footprint.resampling(source, target, taps.first, taps.last)


_WINDOWS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
)
_EDGES = {
    "ZeroPad": "zeros",
    "ConstantPad": "zeros",
    "ReflectionPad": "reflect",
    "ReplicationPad": "replicate",
    "CircularPad": "circular",
}
