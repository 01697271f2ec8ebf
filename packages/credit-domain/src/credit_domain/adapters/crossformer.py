"""CrossFormer: attention within windows of adjacent positions (short) or of positions far apart (long)."""

from __future__ import annotations

from typing import Any

from torch import nn

from credit_domain.adapters.registry import register
from credit_domain.adapters.window_families import RegroupedModule
from credit_domain.engine.layer import DomainParallelLayer


def is_plain(module: nn.Module, *names: str) -> bool:
    """Whether a module has these attributes, and is not converted: what is answers for what it wraps."""
    return not isinstance(module, DomainParallelLayer) and all(hasattr(module, name) for name in names)


def is_cross_attention(module: nn.Module) -> bool:
    """Whether a module is the attention of a CrossFormer: channels first, short or long distance, with a bias MLP."""
    m: Any = module
    if not is_plain(module, "attn_type", "window_size"):
        return False
    return isinstance(getattr(m, "dpb", None), nn.Module) and all(
        isinstance(getattr(m, name, None), nn.Conv2d) for name in ("to_qkv", "to_out")
    )


def convert_cross_attention(module: nn.Module, shard_dim: int = -2, label: str | None = None) -> nn.Module:
    """Run the attention on windows of rows of all ranks; raises where its type or window is not as expected."""
    m: Any = module
    name = type(module).__name__
    if m.attn_type not in ("short", "long"):
        raise ValueError(f"{name}: expected attn_type 'short' or 'long'; got {m.attn_type!r}")
    rows, columns = window_of(m.window_size, name)
    return RegroupedModule(
        module,
        rows,
        kind="windows" if m.attn_type == "short" else "dilated",
        channels_last=False,
        shapes=[(1, m.to_qkv.in_channels, 2 * rows + odd, 2 * columns) for odd in (1, 0)],
        shard_dim=shard_dim,
        label=label,
    )


def window_of(value: Any, name: str, least: int = 1) -> tuple[int, int]:
    """A window or shift as (rows, columns); raises where it is neither an integer nor a pair."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(size, int) and size >= least for size in pair):
        raise ValueError(f"{name}: expected a window as an integer or a pair (rows, columns); got {value!r}")
    return pair[0], pair[1]


register(
    is_cross_attention,
    convert_cross_attention,
    name="CrossFormer attention",
    matches="`attn_type` (`short`, `long`), `window_size`, `dpb`, and convolutions `to_qkv` and `to_out`",
    notes="(B, C, H, W); embeddings of several kernels, channel norms and heads need no converter",
    any_rows=True,
)
