"""Worlds whose other ranks are imagined: nothing is sent, and a layout of any size costs milliseconds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def world(size: int, rank: int = 0) -> Iterator[None]:
    """Be one rank of a world of this size."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
