"""How long ranks wait for each other, in every group of a process."""

from __future__ import annotations

from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo._torch_private import change_timeout
from credit_halo.groups import all_groups

LONGEST = 1e8
"""The longest timeout, in seconds: three years. What torch counts in must hold it."""

_timeouts: WeakKeyDictionary[ProcessGroup, timedelta] = WeakKeyDictionary()


def as_timeout(timeout: float | timedelta, name: str = "timeout") -> timedelta:
    """A timeout from seconds.

    Raises:
        ValueError: If it is no positive time, or too long.
    """
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= LONGEST:
        raise ValueError(
            f"{name} must be a number of seconds above 0, {LONGEST:.0e} at most, or a timedelta; got {timeout!r}"
        )
    return timedelta(seconds=seconds)


def set_timeouts(timeout: float | timedelta) -> None:
    """Set how long ranks wait for each other, in each group of this process that there is by now.

    torch gives a new group its default, and not the timeout of the world. Every rank should call this at the same point
    of the program.

    Args:
        timeout: Seconds, or a timedelta.

    Raises:
        ValueError: If it is no positive time, or too long.

    Collectives:
        None.
    """
    chosen = as_timeout(timeout)
    if dist.is_available() and dist.is_initialized():
        for group in all_groups():
            if change_timeout(group, chosen):
                _timeouts[group] = chosen


def wait_for(work: dist.Work, group: ProcessGroup | None, memory: Tensor) -> bool:
    """Wait for a message between two ranks, as long as the group's timeout says.

    gloo takes the timeout of such a message from when the group was made. On GPUs a wait with a timeout would hold up
    the program until the message is there; there, torch's own watch keeps the timeout.
    """
    timeout = None if group is None else _timeouts.get(group)
    done = work.wait() if timeout is None or memory.device.type != "cpu" else work.wait(timeout)
    return done is not False
