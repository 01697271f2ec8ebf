"""What an exchange hands to the backend, and the least that it could; neither asks the plan."""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist

Pair = tuple[int, int]
"""Who sends, and to whom."""

# The methods of a group that move data, under the names of all versions of torch.
POINT_TO_POINT = ("send", "recv")
OTHERS = (
    *("recv_anysource", "allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced", "all_gather_single"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single"),
    *("alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter"),
)


class Traffic:
    """What one rank handed to the backend: (peer, bytes) of each message, and the calls of the group's methods."""

    def __init__(self):
        self.sent, self.received, self.calls = [], [], Counter()

    def answer(self):
        """The same, as plain data; calls that are no message of a batch are under "others"."""
        batched = Counter({"send": len(self.sent), "recv": len(self.received)})
        others = Counter(self.calls)
        others.subtract(batched)
        return {"sent": self.sent, "received": self.received, "others": {k: n for k, n in others.items() if n}}


@contextmanager
def recorded():
    """Record what this process hands to the backend."""
    traffic = Traffic()
    batch = dist.batch_isend_irecv

    def record_batch(ops):
        for op in ops:
            into = traffic.sent if op.op is dist.isend else traffic.received
            into.append((op.group_peer, op.tensor.numel() * op.tensor.element_size()))
        return batch(ops)

    def counted(name, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            traffic.calls[name] += 1
            return method(*args, **kwargs)

        return call

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(dist, "batch_isend_irecv", record_batch))
        for name in (*POINT_TO_POINT, *OTHERS):
            if method := getattr(dist.ProcessGroup, name, None):
                patches.enter_context(mock.patch.object(dist.ProcessGroup, name, counted(name, method)))
        yield traffic


def source_row(row: int, height: int, edge: str) -> int | None:
    """Which row of the tensor a needed row is; None where it is filled with zeros."""
    if edge == "circular":
        return row % height
    assert edge == "zeros", edge
    return row if 0 <= row < height else None


def least(sizes, needs, edge, bytes_per_row) -> dict[Pair, int]:
    """By brute force over rows, the bytes that must pass between each pair of ranks: one message, if any.

    Every distinct row that a rank needs and another one owns must travel once.
    """
    height = sum(sizes)
    owner = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    rows = {(owner[row], rank): set() for row in range(height) for rank in range(len(sizes))}
    for rank, need in enumerate(needs):
        for wanted in need:
            row = source_row(wanted, height, edge)
            if row is not None:
                rows[owner[row], rank].add(row)
    return {pair: len(found) * bytes_per_row for pair, found in rows.items() if found and pair[0] != pair[1]}


def differences(answers, expected: dict[Pair, int]) -> list[str]:
    """Where what the ranks handed to the backend, by rank, is not one message of the expected bytes for each pair."""
    sent, received = {}, {}
    found = []
    for rank, answer in enumerate(answers):
        for peer, nbytes in answer["sent"]:
            sent.setdefault((rank, peer), []).append(nbytes)
        for peer, nbytes in answer["received"]:
            received.setdefault((peer, rank), []).append(nbytes)
        if answer["others"]:
            found.append(f"rank {rank} called the group apart from its messages: {answer['others']}")
    for pair in sorted({*sent, *received, *expected}):
        wanted = [expected[pair]] if pair in expected else []
        for what, messages in (("sent", sent), ("received", received)):
            if messages.get(pair, []) != wanted:
                found.append(f"{pair[0]} to {pair[1]}: {what} {messages.get(pair, [])} bytes; least {wanted}")
    return found
