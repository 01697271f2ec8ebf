"""Tensors as raw bytes in one file for each rank, for torch.distributed.checkpoint to plan and to move.

torch's own storage keeps its index as a pickle, which runs code when it is read; this one keeps it as JSON. And raw
bytes are mapped, so that a rank which needs a slice of what another layout has saved whole reads that slice only.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

_ALIGNMENT = 64


class Chunk(NamedTuple):
    """A box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


class Stored(NamedTuple):
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Stock = Mapping[str, Stored]
"""The tensors of a checkpoint, by name."""


def stock_to_json(stock: Stock) -> dict[str, Any]:
    """The tensors' index, as :func:`credit_parallel.checkpoint.reading.parse_index` reads it."""
    return {
        name: {"dtype": str(stored.dtype).removeprefix("torch."), "shape": stored.shape, "chunks": stored.chunks}
        for name, stored in stock.items()
    }


def refuse_uncovered(name: str, stored: Stored) -> None:
    """Make sure that chunks cover a tensor, each value once.

    Raises:
        ValueError: If they do not.
    """
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
"""Returns a chunk of a tensor, by the name of the tensor."""


class RawWriter(StorageWriter):
    """Writes this rank's chunks to one file, or first copies them to memory of its own.

    Args:
        path: The file.
        snapshot: Only copy tensors; :meth:`write` writes them later.
    """

    def __init__(self, path: Path, *, snapshot: bool) -> None:
        self.path, self.snapshot = path, snapshot
        self.stock: dict[str, Stored] = {}
        """On the first rank, once planned, the tensors of all ranks."""
        self.size = self.checksum = 0
        self._parts: list[tuple[int, Tensor]] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, or copy, the chunks that the plan gives this rank."""
        results, position = [], 0
        stream = None if self.snapshot else _Stream(self.path)
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            tensor = tensor.detach().to("cpu", copy=self.snapshot).resolve_conj().resolve_neg().contiguous()
            nbytes = tensor.numel() * tensor.element_size()
            chunk = item.tensor_data.chunk
            at = Chunk(tuple(chunk.offsets), tuple(tensor.shape), self.path.name, position)
            results.append(WriteResult(item.index, nbytes, at))
            if stream is None:
                self._parts.append((position, tensor))
            else:
                stream.put(position, tensor)
            position += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if stream is not None:
            self.size, self.checksum = stream.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def write(self) -> None:
        """Write what was copied."""
        if self.snapshot:
            stream = _Stream(self.path)
            for position, tensor in self._parts:
                stream.put(position, tensor)
            self._parts.clear()
            self.size, self.checksum = stream.close()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: keep the index."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            if math.prod(result.storage_data.sizes):
                chunks[result.index.fqn].append(result.storage_data)
        for name, meta in metadata.state_dict_metadata.items():
            assert isinstance(meta, TensorStorageMetadata)
            self.stock[name] = Stored(meta.properties.dtype, tuple(meta.size), tuple(chunks[name]))
        for name, stored in self.stock.items():
            refuse_uncovered(name, stored)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by torch."""
        return False


class _Stream:
    """A file of tensors, with its checksum; on the disk once closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._size = self._checksum = 0

    def put(self, position: int, tensor: Tensor) -> None:
        self._write(bytes(position - self._size))
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes:
            self._write((ctypes.c_char * nbytes).from_address(tensor.data_ptr()))

    def _write(self, data: Any) -> None:
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        self._file.write(view)
        self._checksum = zlib.crc32(view, self._checksum)
        self._size += view.nbytes

    def close(self) -> tuple[int, int]:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._size, self._checksum


class RawReader(StorageReader):
    """Copies what plans ask for out of tensors that need not be in memory.

    Args:
        stock: The tensors.
        fetch: Returns a chunk of a tensor, by the name of the tensor.
    """

    def __init__(self, stock: Stock, fetch: Fetch) -> None:
        self._stock, self._fetch = stock, fetch
        self._chunks = {(name, chunk.offsets): chunk for name, stored in stock.items() for chunk in stored.chunks}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as torch's planner knows it."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(stored.dtype),
                    torch.Size(stored.shape),
                    [
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in stored.chunks
                    ],
                )
                for name, stored in self._stock.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for."""
        for item in plan.items:
            source = self._fetch(item.storage_index.fqn, self._chunk(item.storage_index))
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dim, offset, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _chunk(self, index: MetadataIndex) -> Chunk:
        assert index.offset is not None
        return self._chunks[index.fqn, tuple(index.offset)]

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by torch."""
        return False


class Mapped:
    """Chunks of the files of a folder, as tensors whose pages are read when they are used.

    Writing to such a tensor changes a private copy of its pages, never the file.
    """

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
