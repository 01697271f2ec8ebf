"""What the tests of this package share: random partitions, and an exchange written down row by row."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from credit_halo import EdgeRule
from credit_mesh import RowPartition

EDGES = ("zeros", "constant", "reflect", "replicate", "circular", "pole", "pole on a row")


def edge_rule(name: str) -> EdgeRule:
    if name == "constant":
        return EdgeRule("constant", value=7.0)
    if name == "pole":
        return EdgeRule("pole", signs=-1)
    if name == "pole on a row":
        return EdgeRule("pole", pole_is_row=True, signs=(1, -1))
    return EdgeRule(name)


def reach(name: str, height: int) -> int:
    """How far beyond an edge a rule can be asked for; a little more than the height where there is no limit."""
    return {"reflect": height - 1, "pole": height, "pole on a row": height - 1}.get(name, height + 3)


@st.composite
def partitions(draw: st.DrawFn, least: int = 1, most: int = 6, empty: bool = False) -> RowPartition:
    ranks = draw(st.integers(least, most))
    sizes = draw(st.lists(st.integers(0 if empty else 1, 5), min_size=ranks, max_size=ranks).filter(any))
    return RowPartition(tuple(sizes), allow_empty=True)


@st.composite
def other_partitions(draw: st.DrawFn, source: RowPartition) -> RowPartition:
    """Another partition of the same rows over the same ranks."""
    cut = st.integers(0, source.rows)
    cuts = draw(st.lists(cut, min_size=source.ranks - 1, max_size=source.ranks - 1).map(sorted))
    return RowPartition(tuple(b - a for a, b in pairwise([0, *cuts, source.rows])), allow_empty=True)


def source_row(row: int, height: int, name: str) -> tuple[int | None, bool]:
    """The row of the tensor that stands at a row beyond the edges, and whether a pole lies between; by definition."""
    if 0 <= row < height:
        return row, False
    if name in ("zeros", "constant"):
        return None, False
    if name == "circular":
        return row % height, False
    if name == "replicate":
        return (0 if row < 0 else height - 1), False
    beyond = -row if row < 0 else row - (height - 1)  # 1 for the first row beyond the edge
    inward = beyond - 1 if name == "pole" else beyond
    return (inward if row < 0 else height - 1 - inward), name.startswith("pole")


def padded_rows(x: Tensor, rows: list[int], name: str) -> Tensor:
    """The needed rows of a whole tensor (B, C, H, W), one after the other."""
    rule = edge_rule(name)
    out = []
    for row in rows:
        source, crossed = source_row(row, x.shape[2], name)
        if source is None:
            out.append(torch.full_like(x[:, :, 0], rule.value))
            continue
        line = x[:, :, source]
        if crossed:
            line = torch.cat([line[..., line.shape[-1] // 2 :], line[..., : line.shape[-1] // 2]], dim=-1)
            signs = rule.signs if isinstance(rule.signs, tuple) else (rule.signs,) * x.shape[1]
            line = torch.stack([line[:, c] * sign for c, sign in enumerate(signs)], dim=1)
        out.append(line)
    return torch.stack(out, dim=2) if out else x[:, :, :0]


def whole_numbers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).double()


def shard(x: Tensor, partition: RowPartition, rank: int, dim: int = 2) -> Tensor:
    own = partition.interval(rank)
    return x.narrow(dim, own.start, len(own))
