"""What goes wrong between ranks: the error, and groups that a failed exchange has left unusable."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from credit_halo.roll_call import answer_roll_calls, call_the_roll, doing


class ExchangeError(RuntimeError):
    """A peer died, stalled or took another turn while rows, or anything else that ranks send, were under way.

    The message names the ranks that do not answer. The group that it happened on takes no further exchange: a late
    message could be taken for a later one. Destroy it and make a new one, or end the job.
    """


_broken: WeakKeyDictionary[ProcessGroup, str] = WeakKeyDictionary()


def break_group(group: ProcessGroup, message: str) -> ExchangeError:
    """Remember that an exchange failed on a group, and return the error to raise, which names the missing ranks."""
    verdict = call_the_roll()
    message = f"{message}; {verdict}" if verdict else message
    _broken.setdefault(group, message)
    return ExchangeError(message)


def refuse_broken(group: ProcessGroup, what: object) -> None:
    """Raise if an earlier exchange failed on this group."""
    if group in _broken:
        raise ExchangeError(
            f"{what} was not started, since an earlier exchange failed on its group: {_broken[group]}. Rows of that "
            "one may still be under way; destroy the group and make a new one"
        )


@contextmanager
def naming_missing_ranks(what: str) -> Iterator[None]:
    """Around collectives: if one fails because a rank has ended or does not answer, the error says which rank it is.

    It may be nested; the error tells all that this rank was in. It is a decorator too.

    Args:
        what: What the ranks do together, such as ``"saving a checkpoint"``.

    Raises:
        ExchangeError: In place of the error of torch.distributed. Other errors pass as they are.

    Collectives:
        None. After a failure it asks the ranks through the store where they met, which takes some seconds.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    answer_roll_calls()
    doing.append(what)
    began = time.monotonic()
    try:
        yield
    except ExchangeError:
        raise
    except RuntimeError as error:
        if not between_ranks(error):
            raise
        where = f"rank {dist.get_rank()} of {dist.get_world_size()}, {', '.join(doing)}"
        seconds = time.monotonic() - began
        verdict = call_the_roll()
        raise ExchangeError(f"{where}: {verdict + '. ' if verdict else ''}After {seconds:.0f} s: {error}") from error
    finally:
        doing.pop()


_SIGNS = re.compile(r"gloo|nccl|timed? ?out|socket|connection (was )?(closed|reset|refused)|broken pipe", re.IGNORECASE)


def between_ranks(error: BaseException) -> bool:
    """Whether an error comes from what carries messages; gloo raises a plain RuntimeError."""
    if isinstance(error, (ExchangeError, dist.DistError)):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return _SIGNS.search(str(error)) is not None
