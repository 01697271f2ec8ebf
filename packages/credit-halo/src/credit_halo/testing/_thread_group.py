"""Groups of ranks that are threads of one process, and what they share.

Ordinary Python: a message is a copy of a tensor in a box; a collective is a meeting to which each rank brings a copy.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from credit_halo.groups import remember

BACKEND = "threads"


class Parcel:
    """A copy of a tensor on its way to other ranks."""

    def __init__(self, tensor: Tensor) -> None:
        if hasattr(tensor, "fake_mode"):  # one rank traces a model, and the others wait for it to end
            raise RuntimeError("a tensor is sent to another rank while a model is traced, which sends nothing")
        self._copy = tensor.detach().clone()
        self._ready = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def open(self) -> Tensor:
        """The copy, which nobody may write to: others read it too."""
        if self._ready is not None:  # each rank may compute on a stream of its own
            stream = torch.cuda.current_stream(self._copy.device)
            stream.wait_event(self._ready)
            self._copy.record_stream(stream)
        return self._copy


class ThreadWorld:
    """The ranks of one call of ``run_threads``.

    Args:
        size: Number of ranks.
        timeout: Seconds that a rank waits for another one.
    """

    numbers = itertools.count()

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout, self.number = size, timeout, next(self.numbers)
        self._changed = threading.Condition()
        self._boxes: dict[Hashable, deque[Parcel]] = {}
        self._meetings: dict[Hashable, dict[int, tuple[str, Any]]] = {}
        self._gone: dict[int, str] = {}

    def leave(self, rank: int, error: BaseException | None) -> None:
        """Tell those who wait for a rank, or will, that it has come to its end."""
        with self._changed:
            self._gone[rank] = f"failed: {error}" if error is not None else "ended, and took no part"
            self._changed.notify_all()

    def put(self, box: Hashable, parcel: Parcel) -> None:
        """Put a message into a box."""
        with self._changed:
            self._boxes.setdefault(box, deque()).append(parcel)
            self._changed.notify_all()

    def take(self, boxes: dict[int, Hashable], timeout: float) -> tuple[int, Parcel]:
        """Take a message out of one of the boxes, which have a sender each; and say whose it is."""

        def full() -> list[int]:
            return [sender for sender, box in boxes.items() if self._boxes.get(box)]

        def hopeless() -> list[int]:
            return [sender for sender in boxes if sender in self._gone] if self._gone.keys() >= boxes.keys() else []

        with self._changed:
            self._wait(full, hopeless, timeout)
            sender = full()[0]
            return sender, self._boxes[boxes[sender]].popleft()

    def meet(
        self, place: Hashable, rank: int, ranks: Sequence[int], what: str, value: Any, timeout: float
    ) -> list[Any]:
        """Bring a value, and take those of all ranks once all are there.

        Raises:
            RuntimeError: If a rank is gone, is not there in time, or calls it otherwise.
        """
        with self._changed:
            brought = self._meetings.setdefault(place, {})
            brought[rank] = what, value
            if len(brought) == len(ranks):
                del self._meetings[place]
                self._changed.notify_all()
            self._wait(
                lambda: len(brought) == len(ranks),
                lambda: [other for other in ranks if other in self._gone and other not in brought],
                timeout,
            )
        names = [brought[other][0] for other in ranks]
        if len(set(names)) > 1:
            listed = "; ".join(f"rank {other}: {name}" for other, name in zip(ranks, names, strict=True))
            raise RuntimeError(f"the ranks do not call the same collective: {listed}")
        return [brought[other][1] for other in ranks]

    def _wait(self, done: Callable[[], Any], hopeless: Callable[[], list[int]], timeout: float) -> None:
        self._changed.wait_for(lambda: done() or hopeless(), timeout)
        if done():
            return
        if gone := hopeless():
            raise RuntimeError(f"rank {gone[0]} {self._gone[gone[0]]}")
        raise RuntimeError(f"timed out after {timeout} s")


class ThreadGroup:
    """One rank's view of a group of ranks that are threads: what a ``ProcessGroup`` is for processes.

    Ranks are those within the group. Tests may count calls of its methods.

    Args:
        world: The world.
        ranks: Ranks of the world that are members, in order.
        me: This rank, in the world.
        number: Tells groups of the same members apart.
    """

    def __init__(self, world: ThreadWorld, ranks: Iterable[int], me: int, number: int = 0) -> None:
        self.world, self.ranks, self.timeout = world, tuple(ranks), world.timeout
        self.ended = False
        self.me, self._rank, self._calls = me, self.ranks.index(me), 0
        self._key = (self.ranks, number)
        self.group_name = f"threads {world.number}, rank {me}, group {number} of {','.join(map(str, self.ranks))}"
        remember(self)

    def __repr__(self) -> str:
        return f"ThreadGroup({self.group_name})"

    def rank(self) -> int:
        """This rank within the group."""
        return self._rank

    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def name(self) -> str:
        """Name of the backend."""
        return BACKEND

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a rank waits for others from now on."""
        self.timeout = timeout.total_seconds()

    # Messages

    def send(self, tensor: Tensor, dst: int, tag: int = 0) -> None:
        """Send a copy, without waiting for it to arrive."""
        self.world.put((self._key, self.me, self.ranks[dst], tag), Parcel(tensor))

    def recv(self, tensor: Tensor, src: int | None = None, tag: int = 0) -> int:
        """Wait for a message of a rank, or of any, and return whose it was."""
        senders = self.ranks if src is None else (self.ranks[src],)
        boxes: dict[int, Hashable] = {sender: (self._key, sender, self.me, tag) for sender in senders}
        sender, parcel = self.world.take(boxes, self.timeout)
        _fill(tensor, parcel)
        return self.ranks.index(sender)

    # Collectives

    def _meet(self, what: str, value: Any = None) -> list[Any]:
        if self.ended:
            raise RuntimeError(f"{what} on a group that has been destroyed")
        self._calls += 1
        return self.world.meet((self._key, self._calls), self.me, self.ranks, what, value, self.timeout)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self._meet("barrier")

    def all_reduce(self, tensor: Tensor, op: Any = ReduceOp.SUM) -> None:
        """Reduce in place, in the order of the ranks: the same bits on each."""
        parcels = self._meet(f"all_reduce({_said(op)}) of {_like(tensor)}", Parcel(tensor))
        tensor.detach().copy_(_reduced([parcel.open() for parcel in parcels], op))

    def reduce(self, tensor: Tensor, dst: int, op: Any = ReduceOp.SUM) -> None:
        """Reduce in place on one rank."""
        parcels = self._meet(f"reduce({_said(op)}) to {dst} of {_like(tensor)}", Parcel(tensor))
        if self._rank == dst:
            tensor.detach().copy_(_reduced([parcel.open() for parcel in parcels], op))

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Take the values of one rank."""
        mine = Parcel(tensor) if self._rank == src else None
        parcels = self._meet(f"broadcast from {src} of {_like(tensor)}", mine)
        if self._rank != src:
            _fill(tensor, parcels[src])

    def all_gather(self, tensors: Sequence[Tensor], tensor: Tensor) -> None:
        """Take the tensors of all ranks."""
        for into, parcel in zip(tensors, self._meet(f"all_gather of {tensor.dtype}", Parcel(tensor)), strict=True):
            _fill(into, parcel)

    def gather(self, tensors: Sequence[Tensor] | None, tensor: Tensor, dst: int) -> None:
        """Take the tensors of all ranks, on one rank."""
        parcels = self._meet(f"gather to {dst} of {tensor.dtype}", Parcel(tensor))
        if self._rank == dst:
            for into, parcel in zip(tensors or (), parcels, strict=True):
                _fill(into, parcel)

    def scatter(self, tensor: Tensor, tensors: Sequence[Tensor] | None, src: int) -> None:
        """Take this rank's tensor from a list on one rank."""
        mine = [Parcel(each) for each in tensors or ()] if self._rank == src else None
        _fill(tensor, self._meet(f"scatter from {src} of {tensor.dtype}", mine)[src][self._rank])

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Send a tensor to each rank, and take one from each."""
        every = self._meet("all_to_all", [Parcel(each) for each in inputs])
        for into, parcels in zip(outputs, every, strict=True):
            _fill(into, parcels[self._rank])

    def reduce_scatter(self, output: Tensor, inputs: Sequence[Tensor], op: Any = ReduceOp.SUM) -> None:
        """Reduce this rank's tensor of the lists of all ranks."""
        every = self._meet(f"reduce_scatter({_said(op)})", [Parcel(each) for each in inputs])
        output.detach().copy_(_reduced([parcels[self._rank].open() for parcels in every], op))

    def all_gather_object(self, value: Any) -> list[Any]:
        """A copy of what each rank brings, made by pickle."""
        return [pickle.loads(each) for each in self._meet("all_gather_object", pickle.dumps(value))]

    def broadcast_object(self, value: Any, src: int) -> Any:
        """A copy of what one rank brings, made by pickle."""
        mine = pickle.dumps(value) if self._rank == src else b""
        return pickle.loads(self._meet(f"broadcast_object from {src}", mine)[src])


def _fill(into: Tensor, parcel: Parcel) -> None:
    found = parcel.open()
    if into.dtype != found.dtype or into.numel() != found.numel():
        raise RuntimeError(f"expected {_like(into)}, and {_like(found)} came")
    into.detach().copy_(found.reshape(into.shape))


def _like(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "AVG": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


def _said(op: Any) -> str:
    """Name of a reduction, which torch gives as one of two classes."""
    name = next((name for name in _BINARY if op == getattr(ReduceOp, name)), None)
    if name is None:
        raise NotImplementedError(f"{op} does not work on ranks that are threads: use one of {', '.join(_BINARY)}")
    return name


def _reduced(tensors: Sequence[Tensor], op: Any) -> Tensor:
    name = _said(op)
    first, *others = tensors
    total = first.clone()
    for other in others:
        total = _BINARY[name](total, other)
    return total / len(tensors) if name == "AVG" else total
