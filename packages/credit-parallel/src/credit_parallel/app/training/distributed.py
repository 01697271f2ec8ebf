"""Joining the ranks of a program, under torchrun or started by ``credit-parallel --ranks``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from credit_halo import answer_roll_calls, naming_missing_ranks
from credit_halo.extend import share_cores

RENDEZVOUS = "CREDIT_PARALLEL_RENDEZVOUS"
"""The file through which ranks of this machine meet; torchrun's ranks meet through ``MASTER_ADDR``."""


class Place(NamedTuple):
    """Where this process is among the ranks that were started, before they have met."""

    rank: int = 0  #: of all ranks
    world_size: int = 1  #: how many there are
    local_rank: int = 0  #: of those on this machine
    local_size: int = 1  #: how many those are


def place() -> Place:
    """What the environment says, as torchrun and the launcher of this package set it."""
    if "WORLD_SIZE" not in os.environ:
        return Place()
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Place(*(int(os.environ.get(name, default)) for name, default in names.items()))


def device_named(name: str, local_rank: int = 0) -> torch.device:
    """The device of a rank: ``cpu``, or the GPU of its number on this machine; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: If there are fewer GPUs than ranks on this machine.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(
            f"trainer.device: rank {local_rank} of this machine needs a GPU of its own, and torch sees {count}: start "
            f"{max(1, count)} ranks on it, or say device: cpu"
        )
    return torch.device("cuda", local_rank)


def left_properly(meeting: Path, rank: int) -> bool:
    """Whether a rank that met others through a file has finished together with them."""
    return _mark(meeting, rank).exists()


def _mark(meeting: Path, rank: int) -> Path:
    return meeting.with_name(f"{meeting.name}.left-{rank}")


@contextmanager
def joined(device: torch.device, timeout: float | None = None) -> Iterator[Place]:
    """Ranks that were started together, as a torch.distributed world; a single rank goes without.

    The backend is NCCL on GPUs (gloo beside it for what lies in CPU memory), and gloo on CPUs. Ranks wait ``timeout``
    seconds for each other, when they meet and in the world's group; None takes torch's default.
    """
    at = place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        share_cores(at.local_size)
    if at.world_size == 1:
        yield at
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    file = os.environ.get(RENDEZVOUS)
    patience = None if timeout is None else timedelta(seconds=timeout)
    if file:
        dist.init_process_group(
            backend, init_method=f"file://{file}", rank=at.rank, world_size=at.world_size, timeout=patience
        )
    else:
        dist.init_process_group(backend, timeout=patience)
    try:
        answer_roll_calls()
        yield at
        with naming_missing_ranks("the end"):
            dist.barrier()
    finally:
        dist.destroy_process_group()
    if file:
        _mark(Path(file), at.rank).touch()  # the launcher tells by it that the rank did not end early
