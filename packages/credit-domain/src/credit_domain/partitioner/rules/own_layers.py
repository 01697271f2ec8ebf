"""What layers of this package do in a model that is traced: rows that one rank would read, beyond the edges too."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from credit_domain.engine.driver import bring, step_of
from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import domain_of
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import kept
from credit_domain.partitioner.rules.table import RULES, local
from credit_domain.partitioner.steps import named, partition
from credit_halo import EdgeRule
from credit_halo.extend import plans


def rows(b: Builder, x: Value, dim: int, plan: str) -> Value:
    """Each rank gets a part of them. Boundaries between ranks keep their numbers; the last rank takes what is added."""
    layout, edge = x.layout, plans[plan].edge
    others = _needed_whole(edge, x.ndim)
    if layout is not None and (layout.dim in others or (layout.dim == dim and layout.outer > 1)):
        layout = b.free(x, [dim, *others])
    if layout is None or layout.dim != dim:
        made: Value = local(b, layout, b.at(x, layout), dim, plan)
        return made
    (need,) = plans[plan].needs
    source = partition(layout.sizes)
    target = partition(kept(layout.sizes, len(need)))
    needs = tuple(need[start:stop] for start, stop in pairwise(target.offsets))
    footprint = Footprint(source, target, needs, edge)
    b.brings("halo" if isinstance(need, range) else "take", x, footprint)
    step, manager, label = step_of(footprint, b.place.rank)._replace(sizes=((), ())), b.place.manager, b.label

    def bring_rows(x: Tensor) -> Tensor:
        return bring(x, dim - x.ndim, step, domain_of(manager), label, new=True)

    return b.value(b.emit(named(bring_rows, "bring_rows"), b.at(x, layout)), layout._replace(sizes=target.sizes))


def _needed_whole(edge: EdgeRule, ndim: int) -> list[int]:
    """The other dims that an edge rule needs as a whole: across a pole longitudes, and channels that have signs."""
    if edge.kind != "pole":
        return []
    signs = [edge.channel_dim] if isinstance(edge.signs, tuple) else []
    return [dim % ndim for dim in (edge.lon_dim, *signs)]


RULES[torch.ops.credit_domain.rows.default] = rows
