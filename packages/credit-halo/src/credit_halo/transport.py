"""Carrying messages between ranks: at most one for each peer and direction, started at once, waited for later."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo import debug
from credit_halo.faults import break_group, refuse_broken
from credit_halo.plan import ExchangePlan, Message
from credit_halo.rows import collect_for, pack
from credit_halo.timeouts import wait_for


@dataclass
class InFlight:
    """Messages under way.

    Attributes:
        received: For each message of the plan that comes in, the tensor that it fills; valid after :meth:`wait`.
        buffer: The flat tensor that those are parts of.
    """

    label: str
    plan: ExchangePlan
    group: ProcessGroup | None
    adjoint: bool
    buffer: Tensor
    received: list[Tensor]
    kept: list[Tensor]
    works: list[tuple[str, dist.Work]] = field(default_factory=list)
    started: float = 0.0

    def __str__(self) -> str:
        return f"exchange {self.label!r} ({'backward' if self.adjoint else 'forward'}, {self.plan.partition})"

    def wait(self) -> list[Tensor]:
        """Wait until all messages have arrived and left; returns what was received.

        Raises:
            ExchangeError: If a peer died or did not answer within the timeout of the group.
        """
        for whom, work in self.works:
            try:
                done = wait_for(work, self.group, self.buffer)
            except RuntimeError as error:
                self._fail(whom, error)
            if not done:
                self._fail(whom, RuntimeError("it did not complete"))
        if debug.enabled():
            sent, received = directions(self.plan, self.adjoint)
            seconds = time.perf_counter() - self.started
            nbytes = sum(tensor.numel() * tensor.element_size() for tensor in self.kept)
            debug.trace(str(self), self.plan.rank, self.plan.ranks, sent, received, nbytes, seconds)
        self.works, self.kept = [], []
        return self.received

    def _fail(self, whom: str, error: RuntimeError) -> None:
        assert self.group is not None
        message = f"{self} failed on rank {self.plan.rank} of {self.plan.ranks} while waiting {whom}: {error}"
        raise break_group(self.group, message) from error


def directions(plan: ExchangePlan, adjoint: bool) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages that leave and those that come in; the adjoint sends back what the exchange brought."""
    return (plan.recvs, plan.sends) if adjoint else (plan.sends, plan.recvs)


def start(
    x: Tensor,
    dim: int,
    plan: ExchangePlan,
    group: ProcessGroup | None,
    label: str,
    *,
    adjoint: bool,
    own_memory: bool = False,
) -> InFlight:
    """Send what others need of ``x`` and make ready for what this rank needs of theirs; waits for nothing.

    Args:
        x: This rank's rows, or, for the adjoint, the gradient of what it needed.
        dim: The sharded dim, counted from the first.
        plan: This rank's plan.
        group: The domain group; None for a single rank.
        label: What users call this exchange.
        adjoint: Whether gradients are sent home.
        own_memory: Copy also what could be sent from the memory of ``x``, which then may change at once.
    """
    outgoing, incoming = directions(plan, adjoint)
    others = [x.shape[d] for d in range(x.ndim) if d != dim]
    size = prod(others)
    counts = [len(message.rows) * size for message in incoming]
    # At least one element, since memory is what tells exchanges under way apart; room for either direction, since a
    # gradient must have the shape of what it is the gradient of.
    most = max(plan.sent_rows, plan.received_rows) * size
    buffer = torch.zeros(max(1, most), dtype=x.dtype, device=x.device)  # anomaly mode looks into it
    received, offset = [], 0
    for message, count in zip(incoming, counts, strict=True):
        shape = list(x.shape)
        shape[dim] = len(message.rows)
        received.append(buffer[offset : offset + count].view(shape))
        offset += count
    flight = InFlight(label, plan, group, adjoint, buffer, received, [], started=time.perf_counter())
    if group is not None:
        debug.compare(group, lambda: f"{flight}, plan {plan.digest}, {x.dtype}, other dims {tuple(others)}", x.device)
    if not (incoming or outgoing) or size == 0:
        return flight
    assert group is not None
    refuse_broken(group, flight)
    # Backends that look at tags then never match rows of one exchange to another's.
    tag = _tag(plan.digest, label, adjoint, x.dtype, tuple(others))
    ops, names = [], []
    for message in outgoing:
        rows = collect_for(message, x, dim, plan) if adjoint else pack(x, dim, message.rows)
        if own_memory and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            rows = rows.clone()
        flight.kept.append(rows)
        ops.append(dist.P2POp(dist.isend, as_bytes(rows), group=group, tag=tag, group_peer=message.peer))
        names.append(f"to send to rank {message.peer}")
    for message, into in zip(incoming, received, strict=True):
        ops.append(dist.P2POp(dist.irecv, as_bytes(into), group=group, tag=tag, group_peer=message.peer))
        names.append(f"for rank {message.peer}")
    try:
        works = dist.batch_isend_irecv(ops)
    except RuntimeError as error:
        text = f"{flight} failed on rank {plan.rank} of {plan.ranks} before it could wait {', '.join(names)}: {error}"
        raise break_group(group, text) from error
    if len(works) == len(names):
        flight.works = list(zip(names, works, strict=True))
        flight.works.sort(key=lambda named: named[0].startswith("to"))  # stalled peers show where one waits for them
    else:  # a backend that takes the batch as one
        flight.works = [(" and ".join(names), work) for work in works]
    return flight


@lru_cache(maxsize=4096)
def _tag(digest: str, label: str, adjoint: bool, dtype: torch.dtype, others: tuple[int, ...]) -> int:
    return zlib.crc32(repr((digest, label, adjoint, dtype, others)).encode()) & 0x7FFF


def as_bytes(rows: Tensor) -> Tensor:
    """The memory of a contiguous tensor as bytes, which every backend carries, whatever the dtype."""
    return rows.reshape(-1).view(torch.uint8)
