"""Which ranks are gone: asked through the store where the ranks met, once something has failed.

The rank on which a collective fails is often a neighbour of the dead one, or waits for a rank that waits for it. So
each process has a thread that answers calls in the store: a living process answers while it waits in a collective, and
a dead or stopped one does not.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from credit_mesh import get_domain_parallel_manager

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a living rank has to answer; it looks for calls more often than that."""

TRIES = 3
"""How often the store may fail in a row before a thread gives it up: the program has ended, or its first rank has."""

RANKS_PER_SECOND = 1000
"""How many ranks may ask the store in a second, so that large worlds do not keep it busy."""

doing: list[str] = []
"""What this rank is in, from the outermost to the innermost."""

_threads: WeakKeyDictionary[ProcessGroup, _Answers] = WeakKeyDictionary()


class _Answers:
    """The thread of one world, which answers calls until the world is destroyed."""

    def __init__(self, world: ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.period = max(0.5, self.size / RANKS_PER_SECOND)
        # The store through which the ranks met: the only way to ask who is alive once a collective has failed.
        self.store = PrefixStore("credit_halo", world.get_group_store())
        self._world = ref(world)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers to other ranks", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread in the store must not outlive the interpreter

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(2)

    def _run(self) -> None:
        store = own_connection(self.store)
        number = failures = 0
        while not self._stop.wait(self.period):
            world = self._world()
            if world is None or not dist.is_initialized() or dist.group.WORLD is not world:
                break
            del world
            try:
                while store.check([f"call/{number}"]):
                    store.set(f"call/{number}/{self.rank}", ", ".join(tuple(doing)))
                    number += 1
                failures = 0
            except RuntimeError as error:
                failures += 1
                if failures == TRIES:
                    logger.debug("no more calls are answered: %s", error)
                    break
        atexit.unregister(self.stop)


def own_connection(store: Any) -> Any:
    """A connection for one thread: a thread that waits in the store keeps the others out of its connection."""
    if not hasattr(store, "clone"):
        return store
    own = store.clone()
    own.set_timeout(timedelta(seconds=PATIENCE))  # the rank that keeps the store may be the one that is gone
    return own


def answer_roll_calls() -> None:
    """Let other ranks learn that this one is alive, from now on, until the world is destroyed.

    Without it, and before the first ``naming_missing_ranks``, a living rank is not told from a dead one.
    """
    if dist.is_available() and dist.is_initialized():
        _answers()


def _answers() -> _Answers | None:
    """The thread of the present world; None where ranks are no processes, and cannot end alone."""
    world = dist.group.WORLD
    assert world is not None
    if world not in _threads:
        if dist.get_world_size() == 1 or not {"gloo", "nccl"} & set(
            dist.get_backend_config().replace(",", ":").split(":")
        ):
            return None
        _threads[world] = _Answers(world)
    return _threads[world]


def call_the_roll() -> str:
    """Ask all ranks of the world whether they are alive; what they answer, in words. Empty where it cannot be asked."""
    answers = _answers() if dist.is_available() and dist.is_initialized() else None
    if answers is None:
        return ""
    missing = set(range(answers.size)) - {answers.rank}
    said: dict[int, str] = {answers.rank: ", ".join(doing)}
    told: set[int] = set()
    try:
        store = own_connection(answers.store)
        number = store.add("calls", 1) - 1
        store.set(f"call/{number}", str(answers.rank))
        began = time.monotonic()
        while missing and time.monotonic() - began < PATIENCE + 2 * answers.period:
            time.sleep(0.1)
            for rank in sorted(missing):
                if store.check([f"call/{number}/{rank}"]):
                    said[rank] = store.get(f"call/{number}/{rank}").decode()
                # A rank that has told what is wrong may have ended by now; it is not the one to blame.
                elif time.monotonic() - began > 3 * answers.period and store.check([f"told/{rank}"]):
                    told.add(rank)
            missing -= said.keys() | told
        store.set(f"told/{answers.rank}", "1")
    except RuntimeError as error:
        return f"the rank that keeps the store, through which ranks meet, does not answer ({_first_line(error)})"
    if missing:
        verb = "does not answer: it has" if len(missing) == 1 else "do not answer: they have"
        text = f"{_named(sorted(missing))} {verb} ended, or been stopped; {_named(sorted(said), places=False)} waited"
        return text + (f"; {_named(sorted(told), places=False)} gave up before" if told else "")
    if told:
        return f"{_named(sorted(told), places=False)} gave up before, and told why"
    where: dict[str, list[int]] = {}
    for rank, what in said.items():
        where.setdefault(what, []).append(rank)
    listed = "; ".join(
        f"{_named(sorted(ranks), places=False)} in {what!r}"
        if what
        else f"{_named(sorted(ranks), places=False)} elsewhere"
        for what, ranks in where.items()
    )
    return f"all ranks are alive, and one was late or did something else: {listed}"


def _named(ranks: Sequence[int], places: bool = True) -> str:
    """The ranks in words, with their places on the mesh where there are few."""
    manager = get_domain_parallel_manager() if places else None
    shown = []
    for rank in ranks[:8]:
        text = str(rank)
        if manager is not None and manager.world_size > rank:
            at = manager.layout.coords(rank)
            text += f" (dp {at.dp}, tp {at.tp}, domain {at.domain})"
        shown.append(text)
    rest = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{rest}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
