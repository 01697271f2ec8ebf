"""Ranks as threads of one process.

torch tests its own collectives on such ranks, with a process group that is not part of its public interface and knows
no send and receive. Those are added here; nothing outside of tests may use this module.
"""

from __future__ import annotations

# mypy: disable-error-code="attr-defined, no-untyped-call"
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from credit_halo.testing._errors import RankError

_BACKEND = "credit_threads"
_one_world_at_a_time = threading.Lock()


def run_threads(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Run ``fn(rank, *args)`` on threads that form a world of their own.

    Collectives, sends and receives, sub-groups, backward and a DeviceMesh work, on CPU tensors and on those of one GPU.

    Args:
        fn: Any callable. It finds torch.distributed initialised.
        world_size: Number of threads.
        *args: Further arguments, shared by all ranks.
        timeout: Seconds after which a rank that waits for another one fails.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: If a rank raised, or waited longer than ``timeout``.
        RuntimeError: If torch.distributed is initialised already.
    """
    if dist.is_initialized():
        raise RuntimeError("run_threads makes a world of its own: call torch.distributed.destroy_process_group() first")
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    errors: dict[int, BaseException] = {}

    with _one_world_at_a_time:
        _register()
        post = _PostOffice(timeout)
        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        world = threaded._install_threaded_pg()
        store = dist.HashStore()  # type: ignore[attr-defined,unused-ignore]
        ThreadGroup.post = post

        def rank_main(rank: int) -> None:
            dist.init_process_group(
                _BACKEND, rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=timeout)
            )
            try:
                # Backward of CUDA tensors would run in a thread of its own, which belongs to no rank.
                with torch.autograd.set_multithreading_enabled(False):
                    results[rank] = fn(rank, *args)
            except BaseException as error:
                errors[rank], failures[rank] = error, traceback.format_exc()
                post.fail(rank, error)
                threaded.ProcessLocalGroup.exception_handle(error)  # wakes ranks that wait in a collective
            finally:
                dist.destroy_process_group()

        threads = [
            threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(world_size)
        ]
        try:
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + timeout + 5
            for rank, thread in enumerate(threads):
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    failures.setdefault(rank, f"did not finish in {timeout} s")
        finally:
            del world
            threaded.ProcessLocalGroup.reset()
            threaded._uninstall_threaded_pg()
            torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if failures:
        raise RankError(failures, errors)
    return [results[rank] for rank in range(world_size)]


class _PostOffice:
    """Mail between ranks: a box for each group, sender, receiver and tag."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._changed = threading.Condition()
        self._boxes: dict[tuple[Any, ...], deque[torch.Tensor]] = {}
        self._failed: dict[int, BaseException] = {}

    def send(self, box: tuple[Any, ...], tensor: torch.Tensor) -> None:
        with self._changed:
            self._boxes.setdefault(box, deque()).append(tensor)
            self._changed.notify_all()

    def receive(self, box: tuple[Any, ...], sender: int) -> torch.Tensor:
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._boxes.get(box) or sender in self._failed, self.timeout)
            if self._boxes.get(box):
                return self._boxes[box].popleft()
        if arrived:
            raise RuntimeError(f"rank {sender} failed: {self._failed[sender]}")
        raise RuntimeError(f"timed out after {self.timeout} s")

    def fail(self, rank: int, error: BaseException) -> None:
        with self._changed:
            self._failed[rank] = error
            self._changed.notify_all()


class _Work(dist.Work):  # type: ignore[misc,unused-ignore]
    """A receive that takes its mail when it is waited for."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True


class ThreadGroup(threaded.ProcessLocalGroup):  # type: ignore[misc,unused-ignore]
    """The process group of ranks that are threads: torch's own, with send and receive, which tests may count."""

    post: _PostOffice

    def _world_rank(self, rank: int) -> int:
        return dist.get_global_rank(self, rank)

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int = 0) -> dist.Work:
        self.post.send((self.pg_name, self._rank, dst, tag), tensors[0].detach().clone())
        return _Work(lambda: None)

    def recv(self, tensors: list[torch.Tensor], src: int, tag: int = 0) -> dist.Work:
        box, sender = (self.pg_name, src, self._rank, tag), self._world_rank(src)

        def take() -> None:
            tensors[0].detach().copy_(self.post.receive(box, sender))

        return _Work(take)


def _create(store: Any, rank: int, world_size: int, timeout: timedelta) -> ThreadGroup:
    group = ThreadGroup(rank, world_size)
    distributed_c10d._store_based_barrier(rank, store, "", world_size, timeout)  # type: ignore[arg-type, unused-ignore]
    return group


def _register() -> None:
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, _create, devices=["cpu", "cuda"])
