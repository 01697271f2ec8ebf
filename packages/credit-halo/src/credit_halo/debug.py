"""``CREDIT_HALO_DEBUG=1``: one line for each exchange and rank."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable

from credit_halo.plan import Message

logger = logging.getLogger("credit_halo.trace")


def enabled() -> bool:
    """Whether exchanges are to be traced; looked up at each exchange, so that it can be switched on at any time."""
    return os.environ.get("CREDIT_HALO_DEBUG", "") not in ("", "0")


def trace(
    what: str,
    rank: int,
    ranks: int,
    sent: Iterable[Message],
    received: Iterable[Message],
    sent_bytes: int,
    seconds: float,
) -> None:
    """Log one exchange of this rank."""
    if not logger.handlers:  # asked for by the environment, so it must be seen without any set-up of logging
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    logger.debug(
        "%s, rank %d of %d: to %s; from %s; %d bytes sent, %.3f ms",
        *(what, rank, ranks, _peers(sent), _peers(received), sent_bytes, seconds * 1e3),
    )


def _peers(messages: Iterable[Message]) -> str:
    return ", ".join(f"{message.peer} ({len(message.rows)} rows)" for message in messages) or "nobody"
