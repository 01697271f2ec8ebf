"""Tensors that several ranks have written in parts: which parts there are, and how a rank reads what it needs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from credit_parallel._torch_private import offsets_of

_DTYPES = re.compile(r"bool|bfloat16|float(16|32|64)|float8_\w+|u?int(8|16|32|64)|complex(32|64|128)")


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype | None:
    """The dtype of a name; None if it is none, or one that files do not hold."""
    found = getattr(torch, name, None) if isinstance(name, str) and _DTYPES.fullmatch(name) else None
    return found if isinstance(found, torch.dtype) else None


class Chunk(NamedTuple):
    """A box of a tensor, and the file that has it, under the name of the tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int = 0  #: where its bytes begin; in the former format only


class Stored(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Stock = Mapping[str, Stored]
"""The tensors of a checkpoint, by name."""


def stock_to_json(stock: Stock) -> dict[str, Any]:
    """The tensors' index, as :func:`credit_parallel.checkpoint.strict_reader.read_index` reads it."""
    return {
        name: {"dtype": name_of(stored.dtype), "shape": stored.shape, "chunks": [chunk[:3] for chunk in stored.chunks]}
        for name, stored in stock.items()
    }


def refuse_uncovered(name: str, stored: Stored) -> None:
    """Raise a ValueError unless chunks cover a tensor, each value once."""
    for chunk in stored.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == len(stored.shape) and all(
            offset >= 0 and size >= 1 and offset + size <= length
            for offset, size, length in zip(chunk.offsets, chunk.sizes, stored.shape, strict=True)
        )
        if not inside:
            raise ValueError(
                f"{name} of shape {stored.shape} has a chunk of {chunk.sizes} at {chunk.offsets}, outside of it"
            )
    if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.shape):
        raise ValueError(f"{name} of shape {stored.shape} has {len(stored.chunks)} chunks that do not add up to it")
    if any(_overlapping(stored.chunks, len(stored.shape))):
        raise ValueError(f"{name} of shape {stored.shape} has chunks that overlap")


def _overlapping(chunks: Sequence[Chunk], ndim: int) -> Iterator[bool]:
    if not ndim:
        yield len(chunks) > 1
        return
    dim = max(range(ndim), key=lambda d: len({chunk.offsets[d] for chunk in chunks}))
    open_ones: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda c: c.offsets[dim]):
        open_ones = [other for other in open_ones if other.offsets[dim] + other.sizes[dim] > chunk.offsets[dim]]
        for other in open_ones:
            yield all(
                a < b + n and b < a + m
                for a, m, b, n in zip(chunk.offsets, chunk.sizes, other.offsets, other.sizes, strict=True)
            )
        open_ones.append(chunk)


Fetch = Callable[[str, Chunk], Tensor]
"""Returns a chunk of a tensor, by the name of the tensor; it need not be in memory."""


def read_into(targets: Mapping[str, Tensor], stock: Stock, fetch: Fetch) -> None:
    """Copy saved tensors to where they belong: targets have the saved shapes, of which this rank may have a part."""
    for name, target in targets.items():
        for start, part in _parts_on_this_rank(target.detach()):
            for chunk in stock[name].chunks:
                lows = [max(pair) for pair in zip(start, chunk.offsets, strict=True)]
                highs = [
                    min(a + m, b + n) for a, m, b, n in zip(start, part.shape, chunk.offsets, chunk.sizes, strict=True)
                ]
                if all(low < high for low, high in zip(lows, highs, strict=True)):
                    source = _box(fetch(name, chunk), chunk.offsets, lows, highs)
                    _box(part, start, lows, highs).copy_(source)


def _parts_on_this_rank(tensor: Tensor) -> list[tuple[Sequence[int], Tensor]]:
    """What this rank has of a tensor, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return [((0,) * tensor.ndim, tensor)]
    return [(start, tensor.to_local()) for start in offsets_of(tensor)]


def _box(tensor: Tensor, start: Sequence[int], lows: Sequence[int], highs: Sequence[int]) -> Tensor:
    """The elements from ``lows`` to below ``highs`` of the whole, of a part of it that begins at ``start``."""
    for dim, (offset, low, high) in enumerate(zip(start, lows, highs, strict=True)):
        tensor = tensor.narrow(dim, low - offset, high - low)
    return tensor
