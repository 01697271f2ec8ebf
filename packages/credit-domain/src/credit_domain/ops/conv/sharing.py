"""Layers that read the same tensor share one exchange.

A multi-kernel embedding convolves one tensor with kernels of several widths. The first time, each convolution brings
its own halo, and it is remembered which layers read the tensor after which. From then on the first of them, the
leader, brings the widest halo, and the others take their rows from it; backward, autograd adds up the gradients of the
halo on their way to the leader, which sends them home at once.

What is remembered, and whether two tensors are the same, follows from what the program does, which is the same on every
rank. A layer that finds nothing that fits brings its own halo. The converter tells layers that read alone, such as
those behind one another in a Sequential, so that they do not look for others (:func:`tell_lone_readers`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from credit_domain._torch_private import version_of
from credit_domain.ops.conv.borders import Borders, Reach
from credit_halo import EdgeRule, plan_rows
from credit_mesh import RowPartition

_MOST = 8
"""How many tensors are remembered at a time; those of a model with more branches bring their own halos."""


class Reader(NamedTuple):
    """A layer, and how it reads: what must be the same for a halo to be of use to another one.

    Attributes:
        layer: The number of the layer.
        source: Who holds which rows.
        edge: What lies beyond the edges.
        dim: The sharded dim, negative.
        dtype: What is read, after a conversion by autocast.
        gradient: Whether the tensor requires one.
    """

    layer: int
    source: RowPartition
    edge: EdgeRule
    dim: int
    dtype: torch.dtype
    gradient: bool

    def reads_like(self, other: Reader) -> bool:
        """Whether another layer reads in the same way."""
        return self[1:] == other[1:]


@dataclass
class Shared:
    """A tensor that a leader has read.

    Attributes:
        leader: Who read it first.
        tensor: Weak, so that it is not kept alive.
        version: How often it had been changed in place.
        reach: How many rows beyond its own each rank was brought.
        plan: Key of the plan that brings them.
        halo: Those of this rank; None once nobody waits for them, or they were used in a backward.
        waiting: Who is to take rows from it.
    """

    leader: Reader
    tensor: ref[Tensor]
    version: int
    reach: Reach
    plan: str
    halo: Tensor | None = None
    waiting: set[Reader] = field(default_factory=set)

    def take(self, reader: Reader, borders: Borders, rank: int) -> Tensor | None:
        """The rows that a layer reads; None if they are not all here."""
        halo, fits = self.halo, _widest([self.reach, borders.reach]) == self.reach
        due = reader in self.waiting
        self.waiting.discard(reader)
        if not self.waiting:
            self.halo = None
        if halo is None or not (due and fits):
            return None
        return halo.narrow(reader.dim, *within(self.reach[rank], borders.reach[rank]))


def within(wide: tuple[int, int], narrow: tuple[int, int]) -> tuple[int, int]:
    """Where the rows of a narrow halo are in a wide one: the first, and how many."""
    return wide[0] - narrow[0], sum(narrow)


class _Tensors:
    """What the layers of one group have read."""

    def __init__(self) -> None:
        self.followers: dict[Reader, dict[Reader, Reach]] = {}
        self.recent: list[Shared] = []

    def find(self, x: Tensor, reader: Reader) -> Shared | None:
        """Who has read a tensor before this reader, in the same way."""
        for shared in self.recent:
            if shared.tensor() is x and shared.version == version_of(x) and shared.leader.reads_like(reader):
                return shared
        return None

    def follow(self, shared: Shared, reader: Reader, borders: Borders, rank: int) -> Tensor | None:
        self.followers.setdefault(shared.leader, {})[reader] = borders.reach
        return shared.take(reader, borders, rank)

    def lead(self, x: Tensor, reader: Reader, borders: Borders, rank: int) -> Shared:
        followers = self.followers.get(reader, {})
        for shared in self.recent:
            if shared.leader == reader:  # who did not come for its rows the last time is not waited for
                for absent in shared.waiting:
                    followers.pop(absent, None)
        self.recent = [shared for shared in self.recent if shared.leader != reader][1 - _MOST :]
        reach = _widest([borders.reach, *followers.values()])
        plan = _plan(reader.source, reach, rank, reader.edge) if reach != borders.reach else borders.plan
        shared = Shared(reader, ref(x), version_of(x), reach, plan, waiting=set(followers))
        self.recent.append(shared)
        return shared


_tensors: WeakKeyDictionary[ProcessGroup, _Tensors] = WeakKeyDictionary()


def share(x: Tensor, reader: Reader, borders: Borders, group: ProcessGroup, rank: int) -> Shared | Tensor | None:
    """How a layer gets its halo.

    Args:
        x: The tensor as the layer was called with it.
        reader: The layer, and how it reads.
        borders: What it needs.
        group: Whose ranks take part.
        rank: This rank.

    Returns:
        The halo, if another layer has brought it; if the layer is to bring it for others too, what it is to bring, and
        where to leave it; None if it is to bring its own.
    """
    if x.is_inference():  # nothing tells whether such a tensor was changed
        return None
    tensors = _tensors.setdefault(group, _Tensors())
    shared = tensors.find(x, reader)
    if shared is not None and shared.leader != reader:
        return tensors.follow(shared, reader, borders, rank)
    shared = tensors.lead(x, reader, borders, rank)
    return shared if shared.waiting else None


def _widest(reaches: list[Reach]) -> Reach:
    ranks = zip(*reaches, strict=True)
    return tuple((max(above for above, _ in each), max(below for _, below in each)) for each in ranks)


@lru_cache(maxsize=4096)
def _plan(source: RowPartition, reach: Reach, rank: int, edge: EdgeRule) -> str:
    needs = []
    for (start, stop), (above, below) in zip(pairwise(source.offsets), reach, strict=True):
        needs.append((*range(start - above, start), *range(stop, stop + below)))
    return plan_rows(source, needs, rank=rank, edge=edge).key


# What the converter sees


def tell_lone_readers(model: nn.Module) -> None:
    """Set ``may_share`` of each layer that has it: false where no other layer can be called with the same tensor.

    What a Sequential is called with goes to its first child. What becomes of it, and what a module with code of its own
    does with its tensors, is not known: any of its children may be called with any of them.
    """
    _readers(model)


def _readers(module: nn.Module) -> set[nn.Module]:
    """The layers that may be called with what a module is called with."""
    if hasattr(type(module), "may_share"):
        module.__dict__["may_share"] = False
        return {module}
    found = [_readers(child) for child in module.children()]
    if type(module) is nn.Sequential:
        behind = next((at for at, child in enumerate(module) if not isinstance(child, nn.Identity)), len(found))
        readers, rest = set().union(*found[: behind + 1]), found[behind + 1 :]
        for alone in rest:  # what comes before makes a new tensor
            _tell(alone)
        _tell(readers)
        return readers
    readers = set().union(*found)
    _tell(readers)
    return readers


def _tell(readers: set[nn.Module]) -> None:
    if len(readers) > 1:
        for layer in readers:
            layer.__dict__["may_share"] = True
