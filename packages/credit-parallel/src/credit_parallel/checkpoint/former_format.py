"""Reading checkpoints of format 1, whose files are bytes of tensors: the index says where each chunk begins."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from credit_parallel.checkpoint.saved_tensors import Chunk, Stock

FORMER = 1


def refuse_misplaced(stock: Stock, sizes: Mapping[str, int]) -> None:
    """Raise a ValueError unless chunks lie in their files, of these sizes, and no two share a byte."""
    places = []
    for name, stored in stock.items():
        for chunk in stored.chunks:
            stop = chunk.start + math.prod(chunk.sizes) * stored.dtype.itemsize
            if chunk.start % stored.dtype.itemsize or stop > sizes[chunk.file]:
                size = sizes[chunk.file]
                raise ValueError(f"tensors.{name} lies at {chunk.start} of {chunk.file}, which has {size} bytes")
            places.append((chunk.file, chunk.start, stop, name))
    for (file, _, stop, name), (next_file, start, _, other) in itertools.pairwise(sorted(places)):
        if file == next_file and start < stop:
            raise ValueError(f"tensors.{name} and tensors.{other} share bytes of {file}")


class FormerFiles:
    """As :class:`credit_parallel.checkpoint.tensor_files.TensorFiles`."""

    def __init__(self, folder: Path, stock: Stock) -> None:
        self._folder, self._stock = folder, stock
        self._maps: dict[str, mmap.mmap] = {}

    def fetch(self, name: str, chunk: Chunk) -> Tensor:
        """A chunk of the tensor of that name."""
        dtype = self._stock[name].dtype
        if chunk.file not in self._maps:
            with (self._folder / chunk.file).open("rb") as file:
                self._maps[chunk.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = math.prod(chunk.sizes)
        return torch.frombuffer(self._maps[chunk.file], dtype=dtype, count=count, offset=chunk.start).view(chunk.sizes)
