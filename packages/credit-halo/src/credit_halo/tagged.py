"""Small collectives made of messages with tags, where the backend has tags.

A collective of gloo takes what its peers send for what it waits for. Where ranks differ in what they do, a shorter
message is taken without a word, and a longer one ends the process of the receiver ("terminate called"), which nobody
can catch.
A message with a tag is only taken for what it is: ranks that differ wait for each other until the group times out, and
raise. For small tensors one round of messages is also no slower than the rounds of a ring.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

MOST_BYTES = 1 << 15
"""Larger tensors travel by the backend's own collectives, which send each byte fewer times."""


def is_tagged(group: ProcessGroup, x: Tensor) -> bool:
    """Whether :func:`gather` and :func:`spread` carry a tensor; every rank with a like tensor says the same."""
    return x.device.type == "cpu" and x.numel() * x.element_size() <= MOST_BYTES and dist.get_backend(group) == "gloo"


def gather(x: Tensor, group: ProcessGroup, what: str) -> list[Tensor]:
    """The tensors of all ranks, in their order: contiguous, of the same shape and dtype on each.

    Args:
        x: This rank's tensor.
        group: The ranks.
        what: Goes into the tag with dtype and shape; the same on every rank.

    Raises:
        RuntimeError: As torch's own collectives, if a rank sends nothing of the kind within the timeout of the group.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    tag = _tag(what, x.dtype, tuple(x.shape))
    every = [x if at == rank else torch.empty_like(x) for at in range(size)]
    peers = [at for at in range(size) if at != rank]
    ops = [_op(dist.isend, x, group, tag, at) for at in peers]
    ops += [_op(dist.irecv, every[at], group, tag, at) for at in peers]
    _wait(ops)
    return every


def spread(x: Tensor, src: int, group: ProcessGroup, what: str) -> None:
    """Give every rank the tensor of one, in place; see :func:`gather`."""
    rank, tag = dist.get_rank(group), _tag(f"{what} from {src}", x.dtype, tuple(x.shape))
    if rank != src:
        _wait([_op(dist.irecv, x, group, tag, src)])
        return
    _wait([_op(dist.isend, x, group, tag, at) for at in range(dist.get_world_size(group)) if at != rank])


def _op(call: object, x: Tensor, group: ProcessGroup, tag: int, peer: int) -> dist.P2POp:
    return dist.P2POp(call, x.reshape(-1).view(torch.uint8), group=group, tag=tag, group_peer=peer)  # type: ignore[arg-type]


def _wait(ops: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(ops):
        if work.wait() is False:
            raise RuntimeError("it did not complete")


@lru_cache(maxsize=4096)
def _tag(what: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    # Those of row exchanges are below.
    return 0x8000 | zlib.crc32(repr((what, dtype, shape)).encode()) & 0x7FFF
