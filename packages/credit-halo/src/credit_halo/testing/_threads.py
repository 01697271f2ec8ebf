"""Ranks as threads of one process.

See ``_thread_group.py`` for how they talk, and ``_thread_functions.py`` for how code that calls torch.distributed finds
their groups. Nothing of torch is used that is not public.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from credit_halo.testing._errors import RankError
from credit_halo.testing._thread_functions import enter, leave, replacement
from credit_halo.testing._thread_group import ThreadGroup, ThreadWorld


def run_threads(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Run ``fn(rank, *args)`` on threads that form a world of their own.

    The collectives of torch.distributed, its sends and receives, and sub-groups work there, with backward, on CPU
    tensors and on those of one GPU. What torch builds upon them does not: DeviceMesh, FSDP, DTensor,
    DistributedDataParallel and torch.compile need :func:`run_processes`. The program may have initialised
    torch.distributed: these ranks do not see its world, and other threads do not see theirs.

    Args:
        fn: Any callable. It finds torch.distributed initialised; it must call its functions by the module
            (``torch.distributed.all_reduce``), as must all that it calls.
        world_size: Number of threads.
        *args: Further arguments, shared by all ranks.
        timeout: Seconds after which a rank that waits for another one fails.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: If a rank raised, or waited longer than ``timeout``.
    """
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    errors: dict[int, BaseException] = {}
    world = ThreadWorld(world_size, timeout)

    def rank_main(rank: int) -> None:
        error: BaseException | None = None
        enter(ThreadGroup(world, range(world_size), rank))
        try:
            # Backward of CUDA tensors would run in a thread of its own, which belongs to no rank.
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = fn(rank, *args)
        except BaseException as raised:
            error = errors[rank] = raised
            failures[rank] = traceback.format_exc()
        finally:
            world.leave(rank, error)
            leave()
            replacement.end()

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        replacement.begin()  # until the last of them ends, which may be later than this
        thread.start()
    deadline = time.monotonic() + timeout + 5
    for rank, thread in enumerate(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            failures.setdefault(rank, f"did not finish in {timeout} s")
    if failures:
        raise RankError(failures, errors)
    return [results[rank] for rank in range(world_size)]
