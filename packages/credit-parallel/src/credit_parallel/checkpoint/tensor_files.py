"""Files of tensors in the format of safetensors.

``safetensors`` opens and checks them. They are written here, since its ``save_file`` wants all tensors in CPU memory at
once: a second copy of a state that is on a GPU, and in versions before 0.8 of any state.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from credit_parallel.checkpoint.saved_tensors import Chunk, Stock, name_of

SUFFIX = ".safetensors"
METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # that safetensors reads
_CODES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
}
"""The dtypes that every version of safetensors from 0.4.3 on reads."""
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _carrier(dtype: torch.dtype) -> torch.dtype:
    """The dtype under which values are in a file: that of their parts, or integers with the same bits."""
    if dtype in _CODES:
        return dtype
    return dtype.to_real() if dtype.is_complex else _OF_SIZE[dtype.itemsize]


def form_of(dtype: torch.dtype, shape: Sequence[int]) -> tuple[str, list[int]]:
    """Dtype and shape with which a file holds a tensor; complex ones have a last dim of two."""
    return _CODES[_carrier(dtype)], [*shape, 2] if dtype.is_complex else list(shape)


def restored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a file in its own dtype; it shares the memory."""
    return torch.view_as_complex(tensor) if dtype.is_complex and not tensor.is_complex() else tensor.view(dtype)


class Piece(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]  #: returns the tensor, in CPU memory


def write_tensors(path: Path, pieces: Sequence[Piece], content: str) -> tuple[int, int]:
    """Write a safetensors file, with one tensor in memory at a time; return its size and CRC-32 when it is on the disk.

    ``content`` says what the file is. A ValueError refuses names so many or so long that no program would read the
    file.
    """
    # The largest values first, which aligns all of them: the format knows no gaps.
    pieces = sorted(pieces, key=lambda piece: -_carrier(piece.dtype).itemsize)
    others = {piece.name: name_of(piece.dtype) for piece in pieces if piece.dtype not in _CODES}
    metadata = {"format": "pt", "content": content, **({"dtypes": json.dumps(others)} if others else {})}
    header: dict[str, Any] = {METADATA: metadata}
    end = 0
    for piece in pieces:
        code, shape = form_of(piece.dtype, piece.shape)
        start, end = end, end + math.prod(piece.shape) * piece.dtype.itemsize
        header[piece.name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _LONGEST_HEADER:
        raise ValueError(f"{path} would have a header of {len(encoded)} bytes; safetensors takes {_LONGEST_HEADER}")
    checksum = 0
    with path.open("xb") as file:
        for part in _parts(encoded, pieces):
            file.write(part)
            checksum = zlib.crc32(part, checksum)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), checksum


def _parts(header: bytes, pieces: Sequence[Piece]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in pieces:
        yield piece.get().contiguous().flatten().view(torch.uint8).numpy()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write_tensors`, or another program, has written; they are mapped."""
    with safe_open(path, "pt") as file:
        dtypes = json.loads((file.metadata() or {}).get("dtypes", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, dtype in dtypes.items():
        tensors[name] = restored(tensors[name], getattr(torch, dtype))
    return tensors


class TensorFiles:
    """Chunks of the files of a folder, as tensors whose pages are read when they are used.

    Writing to such a tensor changes a private copy of its pages, never the file.
    """

    def __init__(self, folder: Path, stock: Stock) -> None:
        self._folder, self._stock = folder, stock
        self._opened: dict[str, Any] = {}

    def fetch(self, name: str, chunk: Chunk) -> Tensor:
        """A chunk of the tensor of that name."""
        return restored(self._file(chunk).get_tensor(name), self._stock[name].dtype)

    def form(self, name: str, chunk: Chunk) -> tuple[str, list[int]]:
        """What the file says of a chunk, as :func:`form_of`; its values are not read."""
        part = self._file(chunk).get_slice(name)
        return part.get_dtype(), part.get_shape()

    def _file(self, chunk: Chunk) -> Any:
        if chunk.file not in self._opened:
            self._opened[chunk.file] = safe_open(self._folder / chunk.file, "pt")
        return self._opened[chunk.file]
