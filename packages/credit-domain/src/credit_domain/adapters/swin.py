"""Swin V1 and V2: shifted windows, and what makes, merges and expands patches of tokens.

The converters take what the ``is_`` function beside them matches, and raise a ``ValueError`` where its windows, its
resolution or its layers are otherwise than expected.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from credit_domain.adapters.crossformer import is_plain, window_of
from credit_domain.adapters.registry import register
from credit_domain.adapters.window_families import RegroupedModule
from credit_domain.adapters.window_shares import Kind


def _resolution(module: nn.Module, name: str) -> tuple[int, int]:
    """What a module stores as a size (rows, columns) of the whole."""
    value = getattr(module, name)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(size, int) for size in value):
        return value[0], value[1]
    raise ValueError(f"{type(module).__name__}: expected {name} as a pair (rows, columns); got {value!r}")


def _with_resolution(
    module: nn.Module, window: int, width: int, shift: int = 0, kind: Kind = "windows", **settings: Any
) -> nn.Module:
    """A module that stores ``input_resolution``, for tokens or (B, H, W, C)."""
    height, length = _resolution(module, "input_resolution")
    shapes = [(1, height * length, width), (1, height, length, width)]
    return RegroupedModule(module, window, shift, kind, resolution="input_resolution", shapes=shapes, **settings)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _has_bias(module: Any) -> bool:
    """V1 has a table of biases; V2 an MLP of them, and a scale that is learned."""
    if isinstance(getattr(module, "relative_position_bias_table", None), nn.Parameter):
        return True
    return isinstance(getattr(module, "cpb_mlp", None), nn.Module) and hasattr(module, "logit_scale")


def _is_attention(module: Any) -> bool:
    linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))
    return linear and hasattr(module, "window_size") and _has_bias(module)


# A block, which cuts and shifts, around an attention that does not


def is_swin_block(module: nn.Module) -> bool:
    """Whether a module is a block that shifts and cuts, around a plain window attention."""
    m: Any = module
    if not is_plain(module, "window_size", "shift_size", "norm1", "norm2", "mlp"):
        return False
    attention = getattr(m, "attn", None)
    return isinstance(attention, nn.Module) and _is_attention(attention) and not hasattr(attention, "shift_size")


def convert_swin_block(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """Run the block on windows of rows of all ranks."""
    m: Any = module
    name = type(module).__name__
    if hasattr(m, "H") or hasattr(m, "W"):
        raise ValueError(f"{name}: its resolution is set from outside at each call (H, W), which may be that of a rank")
    (rows, columns), (shift, _) = window_of(m.window_size, name), window_of(m.shift_size, name, 0)
    width = m.attn.qkv.in_features
    if not hasattr(m, "input_resolution"):
        if getattr(m, "attn_mask", None) is not None:
            raise ValueError(f"{name}: expected input_resolution, for which its attn_mask is")
        free = [(1, 2 * rows + odd, 2 * columns, width) for odd in (1, 0)]
        return RegroupedModule(module, rows, shift, shapes=free, shard_dim=shard_dim, label=label)
    return _with_resolution(module, rows, width, shift, shard_dim=shard_dim, label=label)


register(
    is_swin_block,
    convert_swin_block,
    name="Swin block",
    matches="`window_size`, `shift_size`, `norm1`, `norm2`, `mlp`, and an `attn` with `qkv`, `proj` and "
    "`relative_position_bias_table` (V1) or `cpb_mlp` and `logit_scale` (V2)",
    notes="tokens (B, H * W, C) where it stores `input_resolution`, or (B, H, W, C); masks stored or made at each call",
    any_rows=True,
)


# An attention that cuts and shifts by itself


def is_shifted_attention(module: nn.Module) -> bool:
    """Whether a module is an attention of (B, H, W, C) that shifts and cuts by itself."""
    return is_plain(module, "window_size", "shift_size") and _is_attention(module) and not hasattr(module, "norm1")


def convert_shifted_attention(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """Run the attention on windows of rows of all ranks."""
    m: Any = module
    name = type(module).__name__
    (rows, columns), (shift, _) = window_of(m.window_size, name), window_of(m.shift_size, name, 0)
    shapes = [(1, 2 * rows + odd, 2 * columns, m.qkv.in_features) for odd in (1, 0)]
    return RegroupedModule(module, rows, shift, shapes=shapes, shard_dim=shard_dim, label=label)


register(
    is_shifted_attention,
    convert_shifted_attention,
    name="Swin attention that shifts by itself",
    matches="`window_size`, `shift_size`, `qkv`, `proj` and `relative_position_bias_table` (V1) or `cpb_mlp` and "
    "`logit_scale` (V2)",
    notes="(B, H, W, C), as in torchvision; heights that the window does not divide, where it pads them",
    any_rows=True,
)


# Patches


def is_patch_merging(module: nn.Module) -> bool:
    """Whether a module makes one token of 2 x 2, by a Linear from 4 C to 2 C."""
    reduction = getattr(module, "reduction", None)
    if not isinstance(reduction, nn.Linear) or not is_plain(module) or _children(module) != {"reduction", "norm"}:
        return False
    return reduction.in_features == 2 * reduction.out_features and reduction.in_features % 4 == 0


def convert_patch_merging(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """Merge pairs of rows at the owner of the first."""
    m: Any = module
    width: int = m.reduction.in_features // 4
    if hasattr(m, "input_resolution"):
        return _with_resolution(module, 2, width, kind="merge", shard_dim=shard_dim, label=label)
    shapes = [(1, 3, 4, width), (1, 4, 4, width)]
    return RegroupedModule(module, 2, kind="merge", shapes=shapes, shard_dim=shard_dim, label=label)


def is_patch_expanding(module: nn.Module) -> bool:
    """Whether a module makes several tokens of one, by a Linear ``expand``, and stores its resolution."""
    m: Any = module
    if not is_plain(module, "input_resolution") or _children(module) != {"expand", "norm"}:
        return False
    return isinstance(m.expand, nn.Linear)


def convert_patch_expanding(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """Expand each row on its own rank."""
    m: Any = module
    settings: dict[str, Any] = {"kind": "expand", "shard_dim": shard_dim, "label": label}
    return _with_resolution(module, _expansion(module), m.expand.in_features, **settings)


def _expansion(module: nn.Module) -> int:
    """Rows that each becomes: channels are divided among points, and normalised."""
    m: Any = module
    channels: int = getattr(m.norm, "normalized_shape", (0,))[-1]
    factor = round(math.sqrt(m.expand.out_features / max(1, channels)))
    if factor < 2 or channels * factor * factor != m.expand.out_features:
        raise ValueError(
            f"{type(module).__name__}: expected a Linear to C * n * n features and a norm of C; got "
            f"{m.expand.out_features} and {channels}"
        )
    return factor


register(
    is_patch_merging,
    convert_patch_merging,
    name="Swin patch merging",
    matches="children `norm` and `reduction`, a Linear from 4 C to 2 C, and no others",
    notes="tokens where it stores `input_resolution`, or (B, H, W, C); odd heights where it pads them",
    stride=lambda module: (2, 1),
)
register(
    is_patch_expanding,
    convert_patch_expanding,
    name="Swin patch expanding",
    matches="children `norm` and `expand`, a Linear, and no others, and `input_resolution`",
    notes="tokens (B, H * W, C)",
    stride=lambda module: (1, _expansion(module)),
)


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a module makes tokens by a convolution ``proj`` of separate patches, and stores the size of images."""
    m: Any = module
    proj = getattr(m, "proj", None)
    if not isinstance(proj, nn.Conv2d) or not is_plain(module, "img_size"):
        return False
    return proj.kernel_size == proj.stride and _children(module) <= {"proj", "norm"}


def convert_patch_embedding(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """Embed patches of rows at the owner of the first."""
    m: Any = module
    name, proj, size = type(module).__name__, m.proj, _resolution(module, "img_size")
    if proj.padding not in ((0, 0), "valid") or proj.dilation != (1, 1):
        raise ValueError(f"{name}: expected a convolution without padding and dilation; got {proj}")
    return RegroupedModule(
        module,
        proj.stride[0],
        kind="merge",
        channels_last=False,
        resolution="img_size",
        shapes=[(1, proj.in_channels, *size)],
        takes=("proj",),
        shard_dim=shard_dim,
        label=label,
    )


register(
    is_patch_embedding,
    convert_patch_embedding,
    name="Swin patch embedding",
    matches="`img_size` and a convolution `proj` of separate patches, beside `norm` alone",
    notes="the size that it stores is that of the whole; it may return tokens or (B, C, H, W)",
)
