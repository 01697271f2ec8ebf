"""What layers of this package do in a model that is traced: rows that one rank would read, beyond the edges too."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from credit_domain.engine.driver import bring, step_of
from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import domain_of
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.row_layout import Rows, kept
from credit_domain.partitioner.rules.table import RULES, local
from credit_domain.partitioner.steps import named, partition
from credit_halo import EdgeRule
from credit_halo.extend import plans


def rows(b: Builder, x: Value, dim: int, plan: str) -> Value:
    """Each rank gets a part of them: boundaries keep their numbers where rows do, and are even where they do not."""
    layout, edge = x.layout, plans[plan].edge
    others = _needed_whole(edge, x.ndim)
    if layout is not None and (layout.dim in others or (layout.dim == dim and layout.outer > 1)):
        layout = b.free(x, [dim, *others])
    if layout is None or layout.dim != dim:
        made: Value = local(b, layout, b.at(x, layout), dim, plan)
        return made
    (need,) = plans[plan].needs
    source = partition(layout.sizes)
    target = partition(_sizes(layout, need))
    needs = tuple(need[start:stop] for start, stop in pairwise(target.offsets))
    footprint = Footprint(source, target, needs, edge)
    b.brings("halo" if isinstance(need, range) else "take", x, footprint)
    step, domain, label = step_of(footprint, b.place.rank)._replace(sizes=((), ())), domain_of(b.place.manager), b.label

    def bring_rows(x: Tensor) -> Tensor:
        return bring(x, dim - x.ndim, step, domain, label, new=True)

    return b.value(b.emit(named(bring_rows, "bring_rows"), b.at(x, layout)), layout._replace(sizes=target.sizes))


def _needed_whole(edge: EdgeRule, ndim: int) -> list[int]:
    """The other dims that an edge rule needs as a whole: across a pole longitudes, and channels that have signs."""
    if edge.kind != "pole":
        return []
    signs = [edge.channel_dim] if isinstance(edge.signs, tuple) else []
    return [dim % ndim for dim in (edge.lon_dim, *signs)]


def _sizes(layout: Rows, need: range | tuple[int, ...]) -> tuple[int, ...]:
    """Rows of each rank: a rank keeps its own of a halo, and with them what lies beyond an edge that it has."""
    if not isinstance(need, range) or need.step != 1:
        return kept(layout.sizes, len(need))
    cuts = [0, *(min(max(cut - need.start, 0), len(need)) for cut in list(accumulate(layout.sizes))[:-1]), len(need)]
    return tuple(b - a for a, b in pairwise(cuts))


RULES[torch.ops.credit_domain.rows.default] = rows
