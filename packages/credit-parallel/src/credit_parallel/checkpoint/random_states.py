"""Random generators in a checkpoint: continued on the same layout, seeded anew on another."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import random
import sys
from typing import Any

import torch
from torch import Tensor

from credit_mesh import RankLayout
from credit_parallel.checkpoint.strict_reader import CheckpointError
from credit_parallel.seeds import seed_ranks


def rng_state() -> Tensor:
    """The states of python's, numpy's (if it is imported) and torch's generators, as bytes of JSON."""
    numpy = sys.modules.get("numpy")
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state().tolist()}
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call, unused-ignore]
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return torch.frombuffer(bytearray(json.dumps(states).encode()), dtype=torch.uint8)


def read_rng_state(packed: Tensor, where: str) -> dict[str, Any]:
    """What :func:`rng_state` returned, tried on generators of no consequence; ``where`` is the checkpoint."""
    try:
        states = json.loads(bytes(packed.tolist()))
        version, keys, gauss = states["python"]
        found: dict[str, Any] = {"python": (version, tuple(keys), gauss)}
        random.Random().setstate(found["python"])
        found["torch"] = torch.tensor(states["torch"], dtype=torch.uint8)
        torch.Generator().set_state(found["torch"])
        if "numpy" in states:
            with contextlib.suppress(ImportError):
                found["numpy"] = tuple(states["numpy"])
                importlib.import_module("numpy").random.RandomState().set_state(found["numpy"])
        if "cuda" in states:
            found["cuda"] = torch.tensor(states["cuda"], dtype=torch.uint8)
            if torch.cuda.is_available():
                torch.Generator("cuda").set_state(found["cuda"])
    except Exception as error:
        raise CheckpointError(
            f"{where} is damaged: its state of random generators makes no sense ({error!r})"
        ) from None
    return found


def set_rng_state(states: dict[str, Any]) -> None:
    """Go on where :func:`rng_state` was taken; generators that this process does not have are left out."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states:
        with contextlib.suppress(ImportError):
            importlib.import_module("numpy").random.set_state(states["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def reseed(seed: int, step: int, layout: RankLayout, domain_alike: bool) -> None:
    """Seed the ranks of another layout than the one that was saved; the same for the same checkpoint."""
    digest = hashlib.sha256(f"{seed} at step {step}".encode()).digest()
    seed_ranks(int.from_bytes(digest[:7], "big"), layout, domain_alike=domain_alike)
