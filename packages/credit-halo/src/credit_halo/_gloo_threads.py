"""gloo's own threads, which must not push aside the thread that computes.

gloo answers the sockets of a group in a thread named ``gloo_tcp_loop``. Where ranks compute on every core, a message
that comes in while a rank is sending wakes that thread on the sender's core, and the scheduler of Linux may let it run
at once. It then asks for the lock that the sender holds again and again, until its time is up, for some milliseconds
in which neither gets anything done. As a batch thread it has the same share of the core, and is not let in before its
turn. That takes no privilege. Where gloo does not name its threads, or there is no such policy, all stays as it is.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from weakref import WeakSet

from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

_seen: WeakSet[ProcessGroup] = WeakSet()
_TASKS = Path("/proc/self/task")


def wait_their_turn(group: ProcessGroup) -> None:
    """Make gloo's threads in this process batch threads, the first time that a group is seen.

    ``CREDIT_HALO_GLOO_BATCH=0`` in the environment leaves them alone.
    """
    if group in _seen:
        return
    _seen.add(group)
    if os.environ.get("CREDIT_HALO_GLOO_BATCH", "1") != "0" and _TASKS.is_dir():
        changed = sum(_make_batch(task) for task in list(_TASKS.iterdir()))
        if changed:
            logger.debug("%d threads of gloo wait for their turn on the cores now", changed)


def _make_batch(task: Path) -> bool:
    thread = int(task.name)
    try:
        if not (task / "comm").read_text().startswith("gloo_tcp") or os.sched_getscheduler(thread) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):  # no such call, not allowed, or the thread has just ended
        return False
    return True
