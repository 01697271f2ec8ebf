"""A dict that forgets what was put in first."""

from __future__ import annotations

import threading
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


class Bounded(dict[_K, _V]):
    """A dict of at most so many entries; a further one takes the place of the oldest.

    Looking an entry up does not make it younger. What ranks have found out together is put in by all of them in the
    same order, but one rank may look up more than another: where an activation checkpoint computes again, for example.
    So all ranks forget the same.

    Entries are put in by ``bounded[key] = value`` and ``setdefault``; the other ways of a dict do not count them.

    Args:
        most: How many entries it holds.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self._lock = threading.Lock()  # ranks may be threads

    def __setitem__(self, key: _K, value: _V) -> None:
        """Put an entry in, and forget the oldest where there are too many."""
        with self._lock:
            super().__setitem__(key, value)
            if len(self) > self.most:
                del self[next(iter(self))]

    def setdefault(self, key: _K, default: _V) -> _V:
        """The value of a key, which is put in if it is not there."""
        if key not in self:
            self[key] = default
        return self[key]
