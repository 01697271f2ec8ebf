"""Checkpoints of format 1: two that version 0.1.0 has written, and a checkpoint of today as it would have been."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file

ALIGNMENT = 64


def unpacked(folder: Path) -> Path:
    """The checkpoints in ``parallel_former_checkpoints.zip``.

    ``training`` has three steps of a training on two ranks that share rows, under FSDP2; ``dtypes`` has buffers
    ``of_<dtype>``, one without elements, and a scalar.
    """
    with zipfile.ZipFile(Path(__file__).with_name("parallel_former_checkpoints.zip")) as archive:
        archive.extractall(folder)
    return folder


def as_former(step: Path) -> Path:
    """Rewrite a checkpoint in format 1: the bytes of tensors one after another, and where they begin in the index."""
    index = json.loads((step / "index.json").read_bytes())
    manifest = json.loads((step / "manifest.json").read_bytes())
    contents = {path.name: (load_file(path), bytearray()) for path in sorted(step.glob("*.safetensors"))}
    for name, entry in index["tensors"].items():
        for chunk in entry["chunks"]:
            tensors, content = contents[chunk[2]]
            content += bytes(-len(content) % ALIGNMENT)
            chunk[2:] = [chunk[2].replace(".safetensors", ".bin"), len(content)]
            content += tensors[name].flatten().view(torch.uint8).numpy().tobytes()
    manifest.update(format=1, files={})
    for name, (_, content) in contents.items():
        file = (step / name).with_suffix(".bin")
        file.write_bytes(content)
        (step / name).unlink()
        manifest["files"][file.name] = [len(content), zlib.crc32(content)]
    write_index(step, index, manifest)
    return step


def write_index(step: Path, index: object, manifest: dict | None = None) -> None:
    """Write an index, and its checksum into the manifest."""
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (step / "index.json").write_bytes(content)
    manifest = manifest or json.loads((step / "manifest.json").read_bytes())
    manifest["index"] = hashlib.sha256(content).hexdigest()
    (step / "manifest.json").write_text(json.dumps(manifest))
