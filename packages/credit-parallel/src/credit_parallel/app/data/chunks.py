"""Which chunks of a file hold what is asked for, and how many bytes they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from credit_parallel.app.data.dims import Field, Variable


@dataclass(frozen=True)
class Stored:
    """How a file stores a variable."""

    sizes: Mapping[str, int]  #: size of each dim
    chunks: Mapping[str, int]  #: size of a chunk along each dim; 1 along all where any values can be read by themselves
    itemsize: int  #: bytes of a value, as stored


def stored_as(array: Variable, field: Field) -> Stored:
    """How the file stores the variable of a field."""
    encoding, sizes = array.encoding, {str(dim): size for dim, size in array.sizes.items()}
    preferred = encoding.get("preferred_chunks") or {}
    given = encoding.get("chunksizes") or encoding.get("chunks") or [preferred.get(dim) for dim in array.dims]
    if encoding.get("contiguous"):
        given = [None] * len(sizes)
    chunks = dict.fromkeys(sizes, 1)
    if all(given):
        chunks = {dim: int(chunk) for dim, chunk in zip(sizes, given, strict=True)}
    elif "GRIB_gridType" in array.attrs:  # a message is a field
        chunks.update({dim: sizes[dim] for dim in (field.latitude, field.longitude)})
    return Stored(sizes, chunks, np.dtype(encoding.get("dtype", array.dtype)).itemsize)


def values_touched(stored: Stored, dim: str, start: int, stop: int) -> int:
    """How many elements along a dim the chunks span that hold those from start to stop."""
    chunk, size = stored.chunks[dim], stored.sizes[dim]
    return min(size, -(-stop // chunk) * chunk) - start // chunk * chunk if stop > start else 0


def runs(indices: Sequence[int]) -> Iterable[tuple[int, slice]]:
    """Runs of consecutive indices: where each begins in the list, and the slice that it is."""
    begin = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield begin, slice(indices[begin], indices[i - 1] + 1)
            begin = i
