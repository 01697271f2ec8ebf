"""Tuples of numbers and text as one string, which operators that torch.compile traces can carry, and back.

JSON, and not Python's own syntax: the ``ast`` of Python 3.11 counts its depth of recursion for all threads together,
and raises a SystemError now and then where ranks are threads.
"""

from __future__ import annotations

import json
from typing import Any


def as_text(value: Any) -> str:
    """A string for tuples, lists, numbers, text and None, nested as they like."""
    return json.dumps(value, separators=(",", ":"))


def from_text(text: str) -> Any:
    """What :func:`as_text` was given; lists come back as tuples."""
    return _tuples(json.loads(text))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
