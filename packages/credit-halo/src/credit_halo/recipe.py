"""What a plan is made of, as text: its name, from which it can be made again.

Compiled code carries strings, and keeps them for longer than any cache keeps plans. So the name of a plan says all that
it follows from. The text is short where ranks need the same rows relative to their own, however many they are.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from credit_halo.edges import EdgeRule

Needs = tuple[range | tuple[int, ...], ...]

READABLE = 160
"""A longer text is compressed."""


def edge_text(edge: EdgeRule) -> str:
    """An edge rule as text."""
    return _short(astuple(edge))


@lru_cache(maxsize=256)
def edge_of(text: str) -> EdgeRule:
    """The edge rule of a text."""
    return EdgeRule(*json.loads(text))


def recipe_text(sizes: Sequence[int], needs: Needs, edge: EdgeRule) -> str:
    """A recipe as text.

    Args:
        sizes: Rows of each rank.
        needs: The global rows that each rank needs; written relative to the rank's own where they are a range.
        edge: What lies beyond the edges.
    """
    entries: list[Any] = []
    for need, (start, stop) in zip(needs, pairwise((0, *accumulate(sizes))), strict=True):
        if isinstance(need, range):
            entries.append(f"{need.start - start}:{need.stop - stop}:{need.step}")
        else:
            entries.append(need)
    text = _short((sizes, entries, astuple(edge)))
    return text if len(text) <= READABLE else base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def recipe_of(text: str) -> tuple[tuple[int, ...], Needs, EdgeRule]:
    """The sizes, needs and edge rule of a text that :func:`recipe_text` made."""
    plain = text if text.startswith("[") else zlib.decompress(base64.b85decode(text)).decode()
    sizes, entries, edge = json.loads(plain)
    needs: list[range | tuple[int, ...]] = []
    for entry, (start, stop) in zip(entries, pairwise((0, *accumulate(sizes))), strict=True):
        if isinstance(entry, str):
            first, end, step = map(int, entry.split(":"))
            needs.append(range(start + first, stop + end, step))
        else:
            needs.append(tuple(entry))
    return tuple(sizes), tuple(needs), EdgeRule(*edge)


def _short(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
