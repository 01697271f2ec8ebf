"""To and from the state dict of the plain model, in a file of safetensors or of ``torch.save``."""

from __future__ import annotations

import logging
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from credit_domain.extend import COMPILED, with_plain_names
from credit_parallel.checkpoint.json_values import unpack
from credit_parallel.checkpoint.load import Opened, open_checkpoint
from credit_parallel.checkpoint.named_state import MODEL, casts, dtype_problem, load_model, model_entries, model_problem
from credit_parallel.checkpoint.saved_tensors import Chunk, Stored, read_into
from credit_parallel.checkpoint.tensor_files import METADATA, SUFFIX, Piece, read_tensors, write_tensors
from credit_parallel.checkpoint.together import Context, rank_and_size, resolve, together
from credit_parallel.state_dicts import plain_name

logger = logging.getLogger(__name__)


def export_plain(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: Literal["safetensors", "torch"] | None = None,
    verify: bool = True,
) -> None:
    """Write the model of a checkpoint as a state dict of the plain model; on one rank.

    No model is needed, and no torch.distributed. Tensors are mapped, never all in memory. ``folder`` is that of one
    checkpoint, or of many, of which the latest complete one is taken; ``verify`` compares checksums of its files first.
    ``format`` is ``"safetensors"``, or ``"torch"`` for what ``torch.load`` reads; None takes the former where ``path``
    ends in ``.safetensors``, and the latter elsewhere.

    Raises:
        ValueError: If there is no checkpoint, or the file cannot hold its model, or would not be read under its name.
        CheckpointError: If it is damaged or not complete.
    """
    target = Path(path)
    form = format or ("safetensors" if target.suffix == SUFFIX else "torch")
    if form not in ("safetensors", "torch"):
        raise ValueError(f"format must be 'safetensors', 'torch' or None; got {format!r}")
    if form == "torch" and target.suffix == SUFFIX:  # torch.load goes by the name
        raise ValueError(f"torch.load would not read {target}, since it ends in {SUFFIX}: choose another name for it")
    opened = open_checkpoint(folder, verify)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as scratch:
        written = Path(scratch) / "state"
        (_write_safetensors if form == "safetensors" else _write_torch)(opened, written)
        written.replace(target)


def _write_torch(opened: Opened, path: Path) -> None:
    names = [name for name in opened.stock if name.startswith(MODEL)]
    state: dict[str, Any] = {name.removeprefix(MODEL): _assembled(opened, name, path.parent) for name in names}
    others = unpack(opened.values["model"], lambda name: state.pop(name.removeprefix(MODEL)))
    with path.open("wb") as file:
        torch.save({**state, **others}, file)
        file.flush()
        os.fsync(file.fileno())


def _write_safetensors(opened: Opened, path: Path) -> None:
    names = {name.removeprefix(MODEL): name for name in opened.stock if name.startswith(MODEL)}
    unfit = [*(name for name, _ in opened.values["model"]["dict"]), *(name for name in names if name == METADATA)]
    if unfit:
        raise ValueError(
            f"a safetensors file holds tensors alone, and none of the name {METADATA}; this model also has "
            f"{', '.join(unfit[:8])}: write it with format='torch'"
        )
    pieces = [
        Piece(plain, opened.stock[name].dtype, opened.stock[name].shape, partial(_assembled, opened, name, path.parent))
        for plain, name in names.items()
    ]
    write_tensors(path, pieces, "state dict of a plain model")


def _assembled(opened: Opened, name: str, scratch: Path) -> Tensor:
    """A whole tensor: the one chunk that it is, or a file of its own that its chunks are copied to."""
    stored, fetch = opened.stock[name], opened.files.fetch
    if not stored.chunks:
        return torch.empty(stored.shape, dtype=stored.dtype)
    if len(stored.chunks) == 1:
        return fetch(name, stored.chunks[0]).clone() if not stored.shape else fetch(name, stored.chunks[0])
    with (scratch / "tensors").open("w+b") as file:
        (scratch / "tensors").unlink()  # it lives as long as it is mapped
        file.truncate(math.prod(stored.shape) * stored.dtype.itemsize)
        memory = mmap.mmap(file.fileno(), 0)
    whole = torch.frombuffer(memory, dtype=stored.dtype).view(stored.shape)
    read_into({name: whole}, opened.stock, fetch)
    return whole


def load_plain(
    source: str | os.PathLike[str] | Mapping[str, Any],
    target: Context | nn.Module,
    *,
    key: str | None = None,
    strict: bool = True,
) -> tuple[list[str], list[str]]:
    """Load a state dict of the plain model into a model on any layout of ranks; every rank calls it.

    A file is mapped, and each rank reads what it needs of it. It is read by ``safetensors`` or by
    ``torch.load(weights_only=True)``, which run no code. Names may begin with ``module.`` or ``_orig_mod.``, as wrapped
    models save them, and may be those of a converted model of the reference (``a.conv.weight`` for ``a.weight``).

    Returns names of the model that are not there, and names there that the model does not have.

    Args:
        source: A file that ``safetensors`` or ``torch.save`` wrote, or a state dict, the same on every rank.
        key: Where in the file the state dict is, such as ``"model_state_dict"``; None if it is the whole.
        strict: Whether names that only one of both has are errors.

    Raises:
        ValueError: On all ranks alike, if the file cannot be read, or is of another model; nothing is changed then.
            Complex values do not become real; other casts are said in the log.

    Collectives: small ones, by which ranks agree.
    """
    what = "load_plain"
    with together(what):
        model, _ = resolve(target)
        own, others = model_entries(model)
        given = _plain_names(source if isinstance(source, Mapping) else _read(Path(source)), key)
        given = {plain_name(name): value for name, value in with_plain_names(model, given).items()}
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in given.items()}
        problem, missing, unexpected = model_problem(own, list(others), shapes, strict)
        dtypes = {name: value.dtype for name, value in given.items() if isinstance(value, Tensor)}
        if problem := problem or dtype_problem(own, dtypes):
            raise ValueError(f"{source if not isinstance(source, Mapping) else 'it'} is of another model: {problem}")
    tensors = {name: given[name].detach() for name in own if isinstance(given.get(name), Tensor)}
    stock = {
        name: Stored(t.dtype, tuple(t.shape), (Chunk((0,) * t.ndim, tuple(t.shape), ""),))
        for name, t in tensors.items()
    }
    targets = {name: own[name] for name in tensors}
    with together(what):
        read_into(targets, stock, lambda name, chunk: tensors[name])
    with together(what):
        load_model(model, {**targets, **{name: given[name] for name in others if name in given}})
        if (told := casts(own, dtypes)) and rank_and_size()[0] == 0:
            logger.warning("values were cast on loading: %s", "; ".join(told))
    return missing, unexpected


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the length of a header, and the header
            return read_tensors(path)
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as tensors alone: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, no state dict")
    return loaded


def _plain_names(loaded: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    if key is not None:
        if not isinstance(loaded.get(key), Mapping):
            raise ValueError(f"there is no state dict under {key!r}; there are {', '.join(map(str, loaded))}")
        loaded = loaded[key]
    names = {name: name.replace(COMPILED, "") for name in loaded}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: plain.removeprefix("module.") for name, plain in names.items()}
    return {plain: loaded[name] for name, plain in names.items()}
