"""Ranks as processes on gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from credit_halo.testing._errors import RankError


def run_processes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 600.0,
    group_timeout: float | None = None,
    fork: bool = False,
) -> list[Any]:
    """Run ``fn(rank, *args)`` on processes that form a gloo world.

    Each process uses one thread, and meets the others through a file, so that many worlds can run at the same time.

    Args:
        fn: A function that can be pickled: at the top of a module. It finds torch.distributed initialised.
        world_size: Number of processes.
        *args: Further arguments, which can be pickled.
        timeout: Seconds after which ranks that have not finished are killed; long, since a busy machine is no mistake.
        group_timeout: Seconds after which an operation of the world's group fails; None is ``timeout``, so that a rank
            may wait for one that compiles.
        fork: Ranks are forks of this process, and begin with all that it has: any function will do, also one defined
            in another. What they change is not seen here. Nothing may have used a GPU before.

    Returns:
        What each rank returned, by rank; it must be possible to pickle it.

    Raises:
        RankError: If a rank raised, died, or took longer than ``timeout``.
    """
    context: Any
    if fork:
        context = multiprocessing.get_context("fork")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "credit_halo.testing"])
    with tempfile.TemporaryDirectory(prefix="credit-halo-ranks-") as folder:
        readers: dict[Connection, int] = {}
        processes = []
        with _left_alone() if fork else nullcontext():
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                job = (
                    rank,
                    world_size,
                    os.path.join(folder, "rendezvous"),
                    timeout if group_timeout is None else group_timeout,
                    writer,
                    fn,
                    args,
                )
                process = context.Process(target=_main, args=job, daemon=True)
                process.start()
                writer.close()  # so that a dead process is seen as the end of its pipe
                readers[reader] = rank
                processes.append(process)
        try:
            outcomes = _outcomes(readers, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(2)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures, errors = {}, {}
    for rank, process in enumerate(processes):
        ok, value, error = outcomes.get(rank, (False, None, None))
        if not ok:
            if value is None:
                died = process.exitcode not in (None, 0) and rank in outcomes
                value = f"ended with exit code {process.exitcode}" if died else f"did not finish in {timeout} s"
            failures[rank] = value
            if error is not None:
                errors[rank] = error
    if failures:
        raise RankError(failures, errors)
    return [outcomes[rank][1] for rank in range(world_size)]


@contextmanager
def _left_alone() -> Iterator[None]:
    """Inside, a fork does not collect garbage of this process.

    A process group, for one, waits at its end for threads that a fork does not have.
    """
    if gc.get_freeze_count():  # by somebody else, who knows when that ends
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


Outcome = tuple[bool, Any, "BaseException | None"]


def _outcomes(readers: dict[Connection, int], deadline: float) -> dict[int, Outcome]:
    """What each rank answered; a rank that died is in it without an answer, one that is late is not."""
    outcomes: dict[int, Outcome] = {}
    waiting = dict(readers)
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = wait(list(waiting), left)
        for reader in [reader for reader in waiting if reader in ready]:
            rank = waiting.pop(reader)
            try:
                ok, text, rest = pickle.loads(reader.recv_bytes())
                outcomes[rank] = (ok, text, None)
                outcomes[rank] = (ok, pickle.loads(rest), None) if ok else (ok, text, _error(rest))
            except EOFError:
                outcomes[rank] = (False, None, None)
    return outcomes


def _error(pickled: bytes) -> BaseException | None:
    """The exception that a rank raised, if it is of a kind that can be put together again."""
    try:
        error = pickle.loads(pickled)
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None


def _main(
    rank: int, world_size: int, rendezvous: str, group_timeout: float, writer: Connection, fn: Any, args: Any
) -> None:
    torch.set_num_threads(1)
    outcome: Outcome
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=group_timeout),
        )
        dist.barrier()  # a rank that fails at once must not break the world while others still join it
        outcome = (True, fn(rank, *args), None)
    except BaseException as error:
        outcome = (False, traceback.format_exc(), error)
    ok, value, raised = outcome
    try:
        message = (ok, None if ok else value, pickle.dumps(value if ok else raised))
    except Exception as error:  # what was returned or raised does not travel; its text does
        message = (False, f"returned what cannot be pickled: {error}" if ok else value, pickle.dumps(None))
    writer.send_bytes(pickle.dumps(message))
    writer.close()
    if dist.is_initialized() and outcome[0]:
        dist.destroy_process_group()
