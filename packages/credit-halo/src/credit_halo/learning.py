"""Who holds which rows: what layers learn from the other ranks, once.

Ranks cannot guess a partition from their own rows. So they tell each other how many rows they hold, and remember it as
long as the declared partition and the shape of the tensor stay the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from credit_halo.agreement import agree
from credit_halo.bounded import Bounded
from credit_halo.groups import group_by_name
from credit_halo.recompute import reach

DECLARED = 64
"""How many declared partitions are remembered, and what was learned under each."""

LEARNED = 1 << 16
"""How many shapes of all layers together are remembered for a declared partition."""


class PartitionLearner:
    """What the layers of a process have learned, for each process group."""

    def __init__(self) -> None:
        self._layers = itertools.count()
        self._known: WeakKeyDictionary[ProcessGroup, Bounded[str, Bounded[Hashable, tuple[int, ...]]]]
        self._known = WeakKeyDictionary()

    def new_layer(self) -> int:
        """A number for a layer, or a copy of one, to remember by."""
        return next(self._layers)

    def known(
        self, shape: torch.Size, dim: int, group: ProcessGroup, declared: str, layer: Hashable
    ) -> tuple[int, ...] | None:
        """What :meth:`sizes` has learned for a tensor of this rank; None if it would ask the other ranks."""
        learned = self._known.get(group)
        under = None if learned is None else learned.get(declared)
        return None if under is None else under.get((layer, dim, shape))

    def sizes(
        self,
        x: Tensor,
        dim: int,
        group: ProcessGroup,
        what: str,
        *,
        declared: str = "",
        layer: Hashable = None,
    ) -> tuple[int, ...]:
        """Rows of each rank of a group.

        What was learned is remembered for each layer, declared partition and shape, so that a new declaration makes
        every rank ask again. Without a declared partition no rank can know that another's rows have changed, and all
        ask each time. All ask each time too where the caller is no layer.

        Args:
            x: This rank's rows.
            dim: The sharded dim.
            group: Whose ranks hold the others.
            what: What users call that which is about to happen; errors begin with it.
            declared: Key of the declared partition of the model's input; empty if there is none.
            layer: Number of the layer that asks; None if it is none.

        Raises:
            ValueError: On all ranks alike, if dtypes, other dims or declared partitions differ.
            ExchangeError: If a rank does not take part within the timeout of the group.

        Collectives:
            A small all-gather; none once learned.
        """
        remembers = bool(declared) and layer is not None
        known = self._known.setdefault(group, Bounded(DECLARED)).setdefault(declared, Bounded(LEARNED))
        key = (layer, dim, x.shape)
        if key in known:
            return known[key]
        shape = ["rows" if d in (dim, dim + x.ndim) else str(size) for d, size in enumerate(x.shape)]
        said = f"{what}: {str(x.dtype).removeprefix('torch.')} of shape ({', '.join(shape)}), declared partition "
        rows = agree(group, None, what, lambda: said + (declared or "none"), x.device, rows=x.shape[dim])
        assert rows is not None
        sizes = tuple(rows)
        if remembers:
            known[key] = sizes
        else:
            reach(x)  # ranks ask again where a checkpoint computes again
        return sizes


learner = PartitionLearner()
"""The one of this process; process groups tell ranks apart that are threads of it."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def learn_while_tracing(group: str, declared: str, what: str, dim: int, rows: int) -> tuple[int, ...]:
    """Rows of each rank, as a constant of the graph that torch.compile traces.

    Args:
        group: Name of the process group.
        declared: Key of the declared partition; a new declaration compiles anew.
        what: What users call that which is about to happen.
        dim: The sharded dim.
        rows: How many this rank holds.

    Collectives:
        A small all-gather, while the code is traced.
    """
    pg = group_by_name(group)
    device = torch.device("cuda" if dist.get_backend(pg) == "nccl" else "cpu")
    said = f"{what}: dim {dim} in compiled code, declared partition {declared}"
    return tuple(agree(pg, None, what, lambda: said, device, rows=rows) or ())
