"""Reading the JSON of a checkpoint: everything in it is checked before anything is made of it.

Whoever wrote a checkpoint can write its checksums too, so these are no proof of anything. What passes here has the keys
and types that a save writes; its tensors are covered by chunks that lie in files of the checkpoint, of which no two
share a value or a byte, so that no more memory is ever asked for than the files are large. The headers of the files,
which ``safetensors`` reads and checks, must say the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from credit_parallel.checkpoint.former_format import FORMER, refuse_misplaced
from credit_parallel.checkpoint.json_values import DEEPEST, names_in
from credit_parallel.checkpoint.saved_tensors import Chunk, Stored, dtype_of, refuse_uncovered
from credit_parallel.checkpoint.tensor_files import TensorFiles, form_of

FORMAT = 2
INDEX, MANIFEST = "index.json", "manifest.json"
_MOST_MANIFEST, _MOST_INDEX = 1 << 26, 1 << 30
_NUMBER = 1 << 62
_MOST_STATE_OF_GENERATORS = 1 << 20
_WHOLE = {"model": "model/", "scheduler": "scheduler", "scaler": "scaler", "sampler": "sampler", "extra": "extra"}
"""Values whose tensors one rank has written whole, and how their names begin."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or is damaged."""


class NewerFormatError(CheckpointError):
    """A checkpoint was saved by a later version of this package, in a format that this one does not know.

    Attributes:
        sequence: Its place among the checkpoints of its folder; None where that cannot be read.
    """

    def __init__(self, message: str, sequence: int | None) -> None:
        super().__init__(message)
        self.sequence = sequence


class Manifest(NamedTuple):
    """What a complete checkpoint consists of."""

    form: int  #: the format
    step: int  #: the step it was saved at
    sequence: int  #: how many were saved in this folder before, those removed since included
    digest: str  #: SHA-256 of the index
    files: dict[str, tuple[int, int]]  #: size and CRC-32 of each file of tensors, by name


class Index(NamedTuple):
    """What is in a checkpoint."""

    stock: dict[str, Stored]  #: the tensors, by name
    values: dict[str, Any]  #: everything else, with the names of its tensors


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint; errors name the file and the key."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is no complete checkpoint: {path.name} is missing")
    data = _parsed(path, _bytes_of(path, _MOST_MANIFEST))
    found = _Checks(path)
    found.keys(data, "", ("format",))
    form = found.number(data["format"], "format", 0)
    if form > FORMAT:
        sequence = data.get("sequence")
        known = sequence if isinstance(sequence, int) and not isinstance(sequence, bool) and sequence >= 0 else None
        raise NewerFormatError(
            f"{folder} is of format {form}, and this version reads formats up to {FORMAT}: install a later version of "
            "credit-parallel, or move the folder elsewhere to go on from an older checkpoint",
            known,
        )
    if form not in (FORMER, FORMAT):
        found.wrong("format", form, f"{FORMER} or {FORMAT}")
    found.keys(data, "", ("step", "sequence", "index", "files"))
    digest, files = data["index"], data["files"]
    if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        found.wrong("index", digest, "a SHA-256 in hexadecimal digits")
    found.kind(files, dict, "files", "names of files with their sizes and checksums")
    for name, entry in files.items():
        if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
            found.wrong("files", name, "names of files in this folder")
        if not (isinstance(entry, list) and len(entry) == 2):
            found.wrong(f"files.{name}", entry, "a size and a checksum")
        found.number(entry[0], f"files.{name}", 0)
        found.number(entry[1], f"files.{name}", 0, 1 << 32)
    return Manifest(
        form,
        found.number(data["step"], "step", 0),
        found.number(data["sequence"], "sequence", 0),
        digest,
        {name: (size, checksum) for name, (size, checksum) in files.items()},
    )


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Read and check the index of a checkpoint; errors name the file and the key."""
    path = folder / INDEX
    content = _bytes_of(path, _MOST_INDEX) if path.is_file() else None
    if content is None or hashlib.sha256(content).hexdigest() != manifest.digest:
        what = "is missing" if content is None else "is not what was saved: its checksum differs"
        raise CheckpointError(f"{folder} is damaged: {INDEX} {what}")
    found, data = _Checks(path), _parsed(path, content)
    found.keys(data, "", ("tensors", "values"))
    tensors, values = data["tensors"], data["values"]
    found.kind(tensors, dict, "tensors", "tensors by their names")
    stock = {name: _stored(found, name, entry, manifest) for name, entry in tensors.items()}
    if manifest.form == FORMER:
        try:
            refuse_misplaced(stock, {name: size for name, (size, _) in manifest.files.items()})
        except ValueError as error:
            raise _damaged(path, str(error)) from None
    _check_values(found, values, stock, manifest)
    return Index(stock, values)


def check_tensor_files(folder: Path, index: Index) -> None:
    """Make sure that the files have the tensors of the index, of the same dtypes and shapes; no values are read."""
    files = TensorFiles(folder, index.stock)
    for name, stored in index.stock.items():
        for chunk in stored.chunks:
            try:
                form = files.form(name, chunk)
            except Exception as error:
                raise CheckpointError(f"{folder} is damaged: {chunk.file} cannot be read for {name}: {error}") from None
            if form != (wanted := form_of(stored.dtype, chunk.sizes)):
                raise CheckpointError(
                    f"{folder} is damaged: {chunk.file} has {name} as {form[0]} of shape {form[1]}, and {INDEX} as "
                    f"{wanted[0]} of shape {wanted[1]}"
                )


class _Checks:
    """Complaints about a file, by its keys."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def wrong(self, key: str, value: object, expected: str) -> NoReturn:
        shown = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__} of {len(value)}"
        raise _damaged(self.path, f"{key} must be {expected}; got {shown[:80]}")

    def kind(self, value: object, kind: type, key: str, expected: str) -> None:
        if not isinstance(value, kind):
            self.wrong(key, value, expected)

    def keys(self, data: Any, key: str, wanted: Sequence[str]) -> None:
        self.kind(data, dict, key or "the content", "a block of keys and values")
        missing = [name for name in wanted if name not in data]
        if missing:
            raise _damaged(self.path, f"{'.'.join(filter(None, (key, missing[0])))} is missing")

    def number(self, value: Any, key: str, least: int, below: int = _NUMBER) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
            self.wrong(key, value, f"a whole number from {least} to below {below}")
        return int(value)

    def numbers(self, value: Any, key: str, least: int) -> tuple[int, ...]:
        self.kind(value, list, key, "a list of whole numbers")
        return tuple(self.number(item, key, least) for item in value)


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path.parent} is damaged: {path.name} cannot be read: {problem}")


def _bytes_of(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise _damaged(path, f"it has {size} bytes, and none has more than {most}")
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, f"{error.strerror or error}") from None


def _parsed(path: Path, content: bytes) -> Any:
    def block(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ValueError(f"the key {twice[:80]!r} comes twice")
        return made

    try:
        return json.loads(content, object_pairs_hook=block)
    except RecursionError:
        raise _damaged(path, "its blocks are nested too deeply") from None
    except ValueError as error:
        raise _damaged(path, f"it is no JSON: {error}") from None


def _stored(found: _Checks, name: str, entry: Any, manifest: Manifest) -> Stored:
    key = f"tensors.{name}"
    found.keys(entry, key, ("dtype", "shape", "chunks"))
    dtype = dtype_of(entry["dtype"])
    if dtype is None:
        found.wrong(f"{key}.dtype", entry["dtype"], "a dtype of torch")
    shape = found.numbers(entry["shape"], f"{key}.shape", 0)
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize >= _NUMBER:
        found.wrong(f"{key}.shape", entry["shape"], "the shape of a tensor")
    found.kind(entry["chunks"], list, f"{key}.chunks", "a list of chunks")
    chunks: list[Chunk] = []
    former = manifest.form == FORMER
    for i, part in enumerate(entry["chunks"]):
        at = f"{key}.chunks.{i}"
        if not (isinstance(part, list) and len(part) == 3 + former):
            found.wrong(at, part, f"offsets, sizes and a file{' and a position in it' if former else ''}")
        offsets, sizes = (found.numbers(numbers, at, least) for least, numbers in enumerate(part[:2]))
        if not isinstance(part[2], str) or part[2] not in manifest.files:
            raise _damaged(found.path, f"{at} names files that are no part of it: {str(part[2])[:80]!r}")
        chunks.append(Chunk(offsets, sizes, part[2], found.number(part[3], at, 0) if former else 0))
    stored = Stored(dtype, shape, tuple(chunks))
    try:
        refuse_uncovered(key, stored)
    except ValueError as error:
        raise _damaged(found.path, str(error)) from None
    if not former and len({chunk.file for chunk in chunks}) < len(chunks):
        found.wrong(f"{key}.chunks", entry["chunks"], "in a file each")
    return stored


def _check_values(found: _Checks, values: Any, stock: Mapping[str, Stored], manifest: Manifest) -> None:
    numbers = ("step", "seed", "layout", "ranks")
    found.keys(values, "values", (*numbers, "optimizer", *_WHOLE))
    if found.number(values["step"], "values.step", 0) != manifest.step:
        found.wrong("values.step", values["step"], f"the step of the manifest, {manifest.step}")
    found.number(values["seed"], "values.seed", 0, 1 << 63)
    ranks = found.number(values["ranks"], "values.ranks", 1)
    if len(found.numbers(values["layout"], "values.layout", 1)) != 3:
        found.wrong("values.layout", values["layout"], "three numbers of ranks")
    for key, prefix in _WHOLE.items():
        for name in _packed(found, values[key], f"values.{key}", prefix, stock):
            if len(stock[name].chunks) > 1:
                found.wrong(f"values.{key}", name, "made of tensors that were written whole")
    _named(found, values["model"], "values.model")
    if values["optimizer"] is not None:
        _check_optimizer(found, values["optimizer"], stock)
    if ranks > len(stock):
        found.wrong("values.ranks", ranks, "the number of ranks that saved it")
    for rank in range(ranks):
        stored = stock.get(f"rng/{rank}")
        if stored is None:
            raise _damaged(found.path, f"tensors.rng/{rank} is missing")
        fits = len(stored.shape) == 1 and 0 < stored.shape[0] <= _MOST_STATE_OF_GENERATORS and len(stored.chunks) == 1
        if stored.dtype != torch.uint8 or not fits:
            found.wrong(f"tensors.rng/{rank}", stored.shape, "the state of random generators, in bytes")


def _check_optimizer(found: _Checks, saved: Any, stock: Mapping[str, Stored]) -> None:
    key = "values.optimizer"
    found.keys(saved, key, ("state", "param_groups"))
    found.kind(saved["state"], dict, f"{key}.state", "states by names of parameters")
    for name, entries in saved["state"].items():
        at = f"{key}.state.{name}"
        found.keys(entries, at, ())
        for entry, value in entries.items():
            _packed(found, value, f"{at}.{entry}", "optimizer/", stock)
    found.kind(saved["param_groups"], list, f"{key}.param_groups", "a list of groups")
    for i, group in enumerate(saved["param_groups"]):
        at = f"{key}.param_groups.{i}"
        found.keys(group, at, ("params", "settings"))
        if not (isinstance(group["params"], list) and all(isinstance(name, str) for name in group["params"])):
            found.wrong(f"{at}.params", group["params"], "names of parameters")
        _packed(found, group["settings"], f"{at}.settings", "optimizer/", stock)
        _named(found, group["settings"], f"{at}.settings")


def _named(found: _Checks, packed: Any, key: str) -> None:
    """Make sure that a packed value is a dict whose keys are text."""
    if not (isinstance(packed, dict) and "dict" in packed and all(isinstance(name, str) for name, _ in packed["dict"])):
        found.wrong(key, packed, "a packed dict with names as keys")


def _packed(found: _Checks, packed: Any, key: str, prefix: str, stock: Mapping[str, Stored]) -> list[str]:
    """Make sure that a value is one that ``pack`` makes; the names of its tensors."""

    def look(value: Any, depth: int) -> None:
        if depth > DEEPEST:
            found.wrong(key, value, f"nested {DEEPEST} times at most")
        if value is None or isinstance(value, (bool, int, float, str)):
            return
        if isinstance(value, list):
            for item in value:
                look(item, depth + 1)
            return
        if len(value) != 1:
            found.wrong(key, value, "a packed value, with one key in each block")
        ((kind, content),) = value.items()
        if kind == "tensor":
            if not isinstance(content, str) or content not in stock or not content.startswith(prefix):
                found.wrong(key, content, f"the name of a tensor that is there and begins with {prefix}")
        elif kind == "tuple" and isinstance(content, list):
            look(content, depth)
        elif kind in ("dict", "counter") and isinstance(content, list):
            seen: set[Hashable] = set()
            for pair in content:
                if not (isinstance(pair, list) and len(pair) == 2):
                    found.wrong(key, pair, "made of pairs of a key and a value")
                name = _as_key(pair[0])
                if name in seen or name is _NO_KEY:
                    found.wrong(key, pair[0], "made of pairs whose keys differ: numbers, text and tuples of them")
                seen.add(name)
                look(pair[1], depth + 1)
        else:
            found.wrong(key, kind, "a packed value: tensor, tuple, dict or counter")

    look(packed, 0)
    return names_in(packed)


_NO_KEY = object()


def _as_key(packed: Any, depth: int = 0) -> Hashable:
    """A key of a dict, as it will be unpacked; ``_NO_KEY`` for what cannot be one."""
    if packed is None or isinstance(packed, (bool, int, float, str)):
        return packed
    if depth > 8 or not (isinstance(packed, dict) and list(packed) == ["tuple"] and isinstance(packed["tuple"], list)):
        return _NO_KEY
    parts = tuple(_as_key(item, depth + 1) for item in packed["tuple"])
    return _NO_KEY if _NO_KEY in parts else parts
