"""All that these packages change of the process that they run in, outside of themselves, and do not change back.

Each change is said once in the log, with the variable of the environment that switches it off when it is ``0``: at the
level INFO on the first rank, and DEBUG on the others. ``docs/sharp-bits.md`` lists them.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

GLOO_BATCH = "CREDIT_HALO_GLOO_BATCH"
SHARE_CORES = "CREDIT_HALO_SHARE_CORES"
RECOMPILE = "CREDIT_HALO_RECOMPILE"
END_AT_ONCE = "CREDIT_HALO_END_AT_ONCE"

_said: set[str] = set()


def _allowed(variable: str) -> bool:
    return os.environ.get(variable, "1") != "0"


def _say(variable: str, what: str) -> None:
    if variable in _said:
        return
    _said.add(variable)
    initialised = dist.is_available() and dist.is_initialized()
    rank = str(dist.get_rank()) if initialised else os.environ.get("RANK", "0")
    logger.log(logging.INFO if rank == "0" else logging.DEBUG, "%s; %s=0 leaves that alone", what, variable)


_seen: WeakSet[ProcessGroup] = WeakSet()
_TASKS = Path("/proc/self/task")


def batch_gloo_threads(group: ProcessGroup) -> None:
    """Make gloo's threads in this process batch threads, the first time that a group is seen.

    gloo answers the sockets of a group in a thread named ``gloo_tcp_loop``. Where ranks compute on every core, a
    message that comes in while a rank is sending wakes that thread on the sender's core, and the scheduler of Linux may
    let it run at once. It then asks for the lock that the sender holds again and again, until its time is up, for some
    milliseconds in which neither gets anything done. As a batch thread it has the same share of the core, and is not
    let in before its turn. That takes no privilege. Where gloo does not name its threads, or there is no such policy,
    all stays as it is.
    """
    if group in _seen:
        return
    _seen.add(group)
    if _allowed(GLOO_BATCH) and _TASKS.is_dir():
        changed = sum(_make_batch(task) for task in list(_TASKS.iterdir()))
        if changed:
            _say(GLOO_BATCH, f"{changed} threads of gloo wait for their turn on the cores now (SCHED_BATCH)")


def _make_batch(task: Path) -> bool:
    thread = int(task.name)
    try:
        if not (task / "comm").read_text().startswith("gloo_tcp") or os.sched_getscheduler(thread) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):  # no such call, not allowed, or the thread has just ended
        return False
    return True


def share_cores(ranks: int) -> None:
    """Let torch compute in as many threads as this rank has cores, where some ranks share a machine.

    torch takes all cores in each process, so that ranks would take them from each other; torchrun asks for one thread.
    """
    if not _allowed(SHARE_CORES):
        return
    threads = max(1, (os.cpu_count() or 1) // ranks)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        _say(SHARE_CORES, f"torch computes in {threads} thread(s) now, a share of the cores of this machine")


def allow_recompilations(least: int) -> None:
    """Let torch.compile make so many versions of any function.

    For torch without an argument ``recompile_limit`` of ``torch.compile``, which asks that of one function.
    """
    import torch.compiler.config

    config: Any = torch.compiler.config
    if _allowed(RECOMPILE) and config.recompile_limit < least:
        config.recompile_limit = least
        _say(RECOMPILE, f"torch.compile may make {least} versions of a function now")


def end_process(status: int) -> None:
    """End a rank of a program that has written and closed all that it had, with a status.

    What is left of the threads of process groups can abort a process that takes the usual way out ("terminate called
    without an active exception"), and with it a job that has succeeded. Returns where that is switched off.
    """
    if not _allowed(END_AT_ONCE):
        return
    _say(END_AT_ONCE, "this process ends without the usual way out of Python")
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
