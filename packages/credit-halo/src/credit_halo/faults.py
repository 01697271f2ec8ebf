"""What goes wrong between ranks: the error, and groups that a failed exchange has left unusable."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.distributed import ProcessGroup


class ExchangeError(RuntimeError):
    """A peer died, stalled or took another turn while rows were under way.

    The group that it happened on takes no further exchange: a late message could be taken for a later one.
    Destroy it and make a new one, or end the job.
    """


_broken: WeakKeyDictionary[ProcessGroup, str] = WeakKeyDictionary()


def break_group(group: ProcessGroup, message: str) -> ExchangeError:
    """Remember that an exchange failed on a group, and return the error to raise."""
    _broken.setdefault(group, message)
    return ExchangeError(message)


def refuse_broken(group: ProcessGroup, what: object) -> None:
    """Raise if an earlier exchange failed on this group."""
    if group in _broken:
        raise ExchangeError(
            f"{what} was not started, since an earlier exchange failed on its group: {_broken[group]}. Rows of that "
            "one may still be under way; destroy the group and make a new one"
        )
