"""The folders of checkpoints: complete or not there, newest last, and never more than are wanted.

``step-N`` is made under another name, ``step-N.partial-<random>``, and gets its own by one rename once every file is on
the disk. A process that is killed leaves a partial folder, which nothing loads and the next save removes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from credit_parallel.checkpoint.strict_reader import (
    FORMAT,
    INDEX,
    MANIFEST,
    CheckpointError,
    Manifest,
    NewerFormatError,
    check_tensor_files,
    read_index,
    read_manifest,
)

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d+)(?:\.(\d+))?")
_PARTIAL = ".partial-"


def check(step_folder: Path) -> None:
    """Make sure that all files of a checkpoint are there, of their sizes, with the tensors of the index."""
    if _PARTIAL in step_folder.name:
        raise CheckpointError(f"{step_folder} is no complete checkpoint: its save did not end")
    manifest = read_manifest(step_folder)
    problems: list[str] = []
    for name, (size, _) in manifest.files.items():
        path = step_folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            problems.append(f"{name} is missing" if found is None else f"{name} has {found} of {size} bytes")
    index = read_index(step_folder, manifest)
    if problems:
        raise CheckpointError(f"{step_folder} is damaged: {'; '.join(problems[:8])}")
    if manifest.form == FORMAT:
        check_tensor_files(step_folder, index)


def check_contents(step_folder: Path, names: Sequence[str], manifest: Manifest) -> None:
    """Read files of a checkpoint and compare their checksums."""
    for name in names:
        checksum = 0
        with (step_folder / name).open("rb") as file:
            while block := file.read(1 << 24):
                checksum = zlib.crc32(block, checksum)
        if checksum != manifest.files[name][1]:
            raise CheckpointError(f"{step_folder} is damaged: {name} is not what was saved: its checksum differs")


def is_step_folder(path: Path) -> bool:
    """Whether a path is that of one checkpoint, complete or not, rather than of a folder of them."""
    return (path / MANIFEST).exists() or _NAME.fullmatch(path.name.split(_PARTIAL)[0]) is not None


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that was saved last of those that are complete; None if there is none.

    Damaged ones are passed over, with a warning. Contents are not read. A NewerFormatError is raised if the one that
    was saved last is of a format that a later version of this package writes.
    """
    for _, path, newer in reversed(_listed(Path(folder))):
        if newer is not None:
            raise newer
        if _is_good(path):
            return path
    return None


def _listed(folder: Path) -> list[tuple[float, Path, NewerFormatError | None]]:
    """The checkpoints whose manifests can be read, as they were saved: sequences, folders, and later formats.

    Where the sequence of a later format cannot be read, it counts as the last.
    """
    found: list[tuple[float, Path, NewerFormatError | None]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir():
            try:
                found.append((read_manifest(path).sequence, path, None))
            except NewerFormatError as error:
                found.append((math.inf if error.sequence is None else error.sequence, path, error))
            except CheckpointError as error:
                logger.warning("%s; it is passed over", error)
    return sorted(found, key=lambda entry: entry[:2])


def _is_good(path: Path) -> bool:
    try:
        check(path)
    except CheckpointError as error:
        logger.warning("%s; it is passed over", error)
        return False
    return True


# Saving: on the first rank only


def start(folder: Path, step: int) -> Path:
    """Remove what killed saves have left, and make the folder that a save writes to."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"step-*{_PARTIAL}*"):
        _remove(path)
    name, take = f"step-{step:08}", 1
    while (folder / name).exists():  # the same step once more; what is there stays until this one is complete
        take += 1
        name = f"step-{step:08}.{take}"
    partial = folder / f"{name}{_PARTIAL}{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    return partial


def final_of(partial: Path) -> Path:
    """Where a partial folder will be when it is complete."""
    return partial.with_name(partial.name.split(_PARTIAL)[0])


def commit(partial: Path, step: int, index: Mapping[str, Any], files: Mapping[str, tuple[int, int]]) -> Path:
    """Give a folder whose files are all on the disk its index, its manifest and its name."""
    final = final_of(partial)
    content = json.dumps(index).encode()
    write_file(partial / INDEX, content)
    manifest = {
        "format": FORMAT,
        "step": step,
        "sequence": max((int(n) for n, _, _ in _listed(final.parent) if n < math.inf), default=-1) + 1,
        "index": hashlib.sha256(content).hexdigest(),
        "files": files,
    }
    write_file(partial / MANIFEST, json.dumps(manifest).encode())
    _sync_folder(partial)
    partial.rename(final)
    _sync_folder(final.parent)
    return final


def prune(final: Path, step: int, keep: int | None) -> None:
    """Remove older takes of a step, and all but the last checkpoints; damaged ones are left for a person to look at."""
    good = [path for _, path, newer in _listed(final.parent) if newer is None and _is_good(path)]
    old = [path for path in good if path != final and read_manifest(path).step == step]
    rest = [path for path in good if path not in old]
    old += rest[:-keep] if keep else []
    for path in old:
        doomed = path.with_name(f"{path.name}{_PARTIAL}{uuid.uuid4().hex[:8]}")
        path.rename(doomed)  # so that what has its name is complete
        _remove(doomed)


def _remove(path: Path) -> None:
    """Remove a folder that is of no use; if that fails, the next save tries again."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file; a reader sees all of it or none, and it is on the disk."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
