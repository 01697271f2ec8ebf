"""Averaging gradients over ranks while the backward runs, whichever parameters take part in it.

Torch's own reducer takes the parameters that are trained when the model is wrapped, and waits for a gradient of each in
every backward. This one also takes parameters that are unfrozen later, that are used in some steps only, or by some
ranks only. The result is that of one rank: a parameter without a gradient on some ranks counts as zeros there, and one
without a gradient on every rank keeps none.

Ranks must send the same messages, although each has other gradients. What is sent follows from what all ranks know:

- *Active* parameters lie in buckets. A bucket is sent as soon as its gradients are there, the rest at the end of the
  backward, with zeros for what is missing.
- The last bucket also says of each parameter whether this rank has a gradient. Its sum tells all ranks which have one
  anywhere. Those that are not active are then sent too, and are active until :data:`IDLE_ROUNDS` rounds without one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from credit_parallel._torch_private import after_backward, copy_all, current_backward
from credit_parallel.collectives import local_of

BUCKET_BYTES = 25 << 20
"""Size of a bucket, as in torch's DistributedDataParallel."""
IDLE_ROUNDS = 10
"""After so many reductions without a gradient on any rank, a parameter is not sent any more until it has one."""

_reducers: WeakKeyDictionary[nn.Module, GradientReducer] = WeakKeyDictionary()


def reducer_of(model: nn.Module) -> GradientReducer | None:
    """The reducer of a model, without what wraps it; None where torch or nobody averages its gradients."""
    return _reducers.get(model)


class _Sent(NamedTuple):
    """A bucket on its way."""

    indices: Sequence[int]
    flat: Tensor
    work: Any


class GradientReducer:
    """Averages the gradients of a model over the ranks of a group, in each backward for which ``enabled`` returns True.

    Args:
        model: The model, without wrappers. :func:`reducer_of` finds the reducer by it.
        parameters: The parameters to average by name, frozen ones too; the same on every rank, in the same order.
        alone: Whether nothing else averages gradients of the model. Parameters that this reducer does not know are
            refused then; FSDP2 and torch's own reducer average the others.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        group: ProcessGroup,
        bucket_bytes: int = BUCKET_BYTES,
        *,
        alone: bool = True,
    ) -> None:
        self.alone = alone
        self.enabled: Callable[[], bool] = lambda: True
        self._model, self._group, self._ranks = ref(model), group, dist.get_world_size(group)
        self._bucket_bytes = bucket_bytes
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._known = {id(p) for p in self._parameters}
        self._idle = [0] * len(self._parameters)
        # Gradients arrive last layer first; the first backward tells the order for good.
        self._ordered = False
        self._order = [i for i in reversed(range(len(self._parameters))) if self._parameters[i].requires_grad]
        self._lock = threading.RLock()  # a backward has one thread for each device
        self._dirty = self._averaged = False
        self._fill()
        self._start(None)
        for i, p in enumerate(self._parameters):
            self._watch(i, p)
        _reducers[model] = self

    def follow(self, wrapper: DistributedDataParallel) -> None:
        """Average in the backwards in which a wrapper would: not within its ``no_sync``."""
        itself = ref(wrapper)  # the reducer must not keep its model alive
        self.enabled = lambda: (alive := itself()) is None or bool(alive.require_backward_grad_sync)

    def covers(self, p: Tensor) -> bool:
        """Whether this reducer averages the gradient of a parameter."""
        return id(p) in self._known

    def settle(self) -> None:
        """Average what no backward has averaged yet: on a rank whose loss reached no parameter, or after ``no_sync``.

        Collectives: none if the last backward averaged; else those of a backward.
        """
        with self._lock:
            if self._dirty or not self._averaged:
                self._average()
            self._averaged = False

    # One backward

    def _watch(self, i: int, p: Tensor) -> None:
        def arrived(_: Tensor) -> None:
            with self._lock:
                self._arrived(i)

        frozen = not p.requires_grad
        if frozen:
            p.requires_grad_(True)  # or torch takes no hook; it stays when the parameter is frozen again
        p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
        if frozen:
            p.requires_grad_(False)

    def _arrived(self, i: int) -> None:
        self._dirty = True
        if not self.enabled():
            return
        backward = current_backward()
        if backward != self._backward or i in self._arrivals:
            # Another backward has begun before the last one ended: it failed, or this one runs inside it.
            self._start(backward)
            after_backward(self._ended)
        self._arrivals[i] = len(self._arrivals)
        bucket = self._bucket_of.get(i)
        if bucket is not None:
            self._missing[bucket] -= 1
            while len(self._sent) < len(self._buckets) - 1 and not self._missing[len(self._sent)]:
                self._send(self._buckets[len(self._sent)])

    def _ended(self) -> None:
        with self._lock:
            if self._backward is not None:
                self._average()

    def _start(self, backward: int | None) -> None:
        """Forget what is on its way; gradients change only when all has arrived."""
        for sent in getattr(self, "_sent", ()):
            sent.work.wait()
        self._backward = backward
        self._arrivals: dict[int, int] = {}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[_Sent] = []

    @torch.no_grad()
    def _average(self) -> None:
        try:
            model = self._model()
            if model is not None and self.alone and not isinstance(model, FSDPModule):
                refuse_strangers(model, self.covers)
            for bucket in self._buckets[len(self._sent) : -1]:
                self._send(bucket)
            self._send(self._buckets[-1], self._marks())
            for sent in self._sent:
                sent.work.wait()
            count = len(self._parameters)
            marks: list[float] = self._sent[-1].flat[-count:].abs().tolist()
            late = [i for i in range(count) if marks[i] and i not in self._bucket_of]
            for bucket in self._divided(late):
                self._send(bucket)
                self._sent[-1].work.wait()
            for sent in self._sent:
                self._write(sent, marks)
            self._settle_order(marks, late)
            self._dirty, self._averaged = False, True
        finally:
            self._start(None)

    def _marks(self) -> Tensor:
        """For each parameter 0 without a gradient, else 1 to 2 by its place among those that arrived."""
        count = len(self._parameters)
        places = (self._arrivals.get(i, count) / count for i in range(count))
        return torch.tensor(
            [0.0 if p.grad is None else 1 + place for p, place in zip(self._parameters, places, strict=True)]
        )

    def _send(self, indices: Sequence[int], more: Tensor | None = None) -> None:
        with torch.no_grad():
            parts = [self._flat_of(i) for i in indices]
            if more is not None:
                parts.append(more.to(parts[0]) if parts else more.to(local_of(self._parameters[0]).device))
            flat = torch.cat(parts)
            if flat.dtype is torch.float16:  # whose sum may overflow where the mean does not
                flat.div_(self._ranks)
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            self._sent.append(_Sent(indices, flat, work))

    def _flat_of(self, i: int) -> Tensor:
        p, name = self._parameters[i], self._names[i]
        own, grad = local_of(p), p.grad
        if grad is None:
            return torch.zeros(own.numel(), dtype=own.dtype, device=own.device)
        if grad.layout is not torch.strided:
            raise ValueError(f"the gradient of {name} is sparse ({grad.layout}): use dense gradients (sparse=False)")
        local = local_of(grad)
        if local.shape != own.shape:
            raise ValueError(
                f"the gradient of {name} is divided otherwise than the parameter: {tuple(local.shape)} on this rank, "
                f"the parameter {tuple(own.shape)}"
            )
        return local.reshape(-1).to(own.dtype)

    def _write(self, sent: _Sent, marks: Sequence[float]) -> None:
        """Give each parameter its mean; one that no rank has a gradient of keeps none."""
        if sent.flat.dtype is not torch.float16:
            sent.flat.div_(self._ranks)
        at, places, means = 0, [], []
        for i in sent.indices:
            p = self._parameters[i]
            own = local_of(p)
            if marks[i]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                places.append(local_of(p.grad))
                means.append(sent.flat[at : at + own.numel()].view(own.shape))
            at += own.numel()
        if places:
            copy_all(places, means)

    # The buckets

    def _settle_order(self, marks: Sequence[float], late: Sequence[int]) -> None:
        for i, mark in enumerate(marks):
            self._idle[i] = 0 if mark else self._idle[i] + 1
        order = [*self._order, *late]
        if not self._ordered and any(marks):
            order.sort(key=lambda i: marks[i] or math.inf)  # sums over ranks: the same on each
            self._ordered = True
        order = [i for i in order if self._idle[i] < IDLE_ROUNDS]
        if order != self._order:
            self._order = order
            self._fill()

    def _fill(self) -> None:
        self._buckets = self._divided(self._order) or [[]]
        self._bucket_of = {i: at for at, bucket in enumerate(self._buckets) for i in bucket}

    def _divided(self, indices: Sequence[int]) -> list[list[int]]:
        """Buckets of one dtype and device each, in the order in which they are full."""
        full: list[list[int]] = []
        filling: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
        for i in indices:
            own = local_of(self._parameters[i])
            kind, size = (own.dtype, own.device), own.numel() * own.element_size()
            bucket, held = filling.pop(kind, ([], 0))
            if bucket and held + size > self._bucket_bytes:
                full.append(bucket)
                bucket, held = [], 0
            bucket.append(i)
            filling[kind] = (bucket, held + size)
        return [*full, *(bucket for bucket, _ in filling.values())]


def refuse_strangers(model: nn.Module, averaged: Callable[[Tensor], bool]) -> None:
    """Raise a ValueError that names the parameters with a gradient which nothing has averaged, if there are any."""
    strangers = [name for name, p in model.named_parameters() if p.grad is not None and not averaged(p)]
    if strangers:
        raise ValueError(
            f"no rank's gradients of {', '.join(strangers[:4])} are averaged with those of the others, because these "
            "parameters joined the model after it was wrapped: build the whole model first, then call parallelize, "
            "apply_ddp or apply_fsdp2"
        )
