"""Fourier transforms: dim by dim, another dim divided where the rows are transformed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.rules.table import able, rule

aten = torch.ops.aten


def _one(b: Builder, x: Value, target: Any, n: Any, dim: int, norm: Any, done: Sequence[int], like: Any) -> Value:
    """A transform along one dim, which every rank has whole."""
    layout = b.free(x, [dim], prefer=done)
    return Value(like, layout, b.emit(able(b, target, layout), b.at(x, layout), n, dim, norm))


def _like(x: Value, target: Any, n: Any, dim: int, norm: Any) -> torch.Tensor:
    empty = torch.empty(x.shape, dtype=x.dtype, device="meta")
    out: torch.Tensor = target(empty, n, dim, norm)
    return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")


def _chain(b: Builder, x: Value, chain: Sequence[tuple[Any, Any, int]], norm: Any) -> Value:
    """Transforms one after another; the divided dim comes as late as the order allows."""
    done: list[int] = []
    for target, n, dim in chain:
        like = _like(x, target, n, dim, norm)
        made = _one(b, x, target, n, dim, norm, [d for d in reversed(done) if d != dim], like)
        made.device = x.device
        x = made
        done.append(dim)
    return x


def _named(x: Value, sizes: Any, dims: Any, default: int) -> list[tuple[Any, int]]:
    if dims is None:
        dims = range(x.ndim - (default if sizes is None else len(sizes)), x.ndim) if default or sizes else range(x.ndim)
    dims = [dims] if isinstance(dims, int) else list(dims)
    sizes = [None] * len(dims) if sizes is None else [None if n == -1 else n for n in sizes]
    return [(n, d % x.ndim) for n, d in zip(sizes, dims, strict=True)]


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def along_one(b: Builder, x: Value, n: Any = None, dim: int = -1, norm: Any = None) -> Any:
    """Along one dim."""
    return _one(b, x, b.node.target, n, dim % x.ndim, norm, [], b.meta)


@rule("fft_fft2", "fft_ifft2", "fft_fftn", "fft_ifftn")
def complex_(b: Builder, x: Value, sizes: Any = None, dims: Any = None, norm: Any = None) -> Any:
    """Along several dims: first those that are whole."""
    two = "2" in str(b.node.target)
    one = aten.fft_ifft.default if "ifft" in str(b.node.target) else aten.fft_fft.default
    along = _named(x, sizes, dims, 2 if two else 0)
    rows = None if x.layout is None else x.layout.dim
    along.sort(key=lambda each: each[1] == rows)
    return _chain(b, x, [(one, n, d) for n, d in along], norm)


@rule("fft_rfft2", "fft_rfftn")
def real(b: Builder, x: Value, sizes: Any = None, dims: Any = None, norm: Any = None) -> Any:
    """The last dim first, which is halved."""
    *others, (n, last) = _named(x, sizes, dims, 2 if "2" in str(b.node.target) else 0)
    rows = None if x.layout is None else x.layout.dim
    others.sort(key=lambda each: each[1] == rows)
    chain = [(aten.fft_rfft.default, n, last), *((aten.fft_fft.default, n, d) for n, d in others)]
    return _chain(b, x, chain, norm)


@rule("fft_irfft2", "fft_irfftn")
def real_back(b: Builder, x: Value, sizes: Any = None, dims: Any = None, norm: Any = None) -> Any:
    """The last dim last."""
    *others, (n, last) = _named(x, sizes, dims, 2 if "2" in str(b.node.target) else 0)
    rows = None if x.layout is None else x.layout.dim
    others.sort(key=lambda each: each[1] == rows)
    chain = [*((aten.fft_ifft.default, n, d) for n, d in others), (aten.fft_irfft.default, n, last)]
    return _chain(b, x, chain, norm)


@rule("fft_fftshift", "fft_ifftshift")
def shift(b: Builder, x: Value, dims: Any = None) -> Any:
    """Around the ends."""
    named = list(range(x.ndim)) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    layout = b.free(x, named)
    return b.value(b.emit(b.node.target, b.at(x, layout), dims), layout)
