"""Attention within windows of a sharded grid: shifted as in Swin, or dilated as in CrossFormer.

A dim is cut into windows whose *slots* are numbered through, window after window; a slot holds a row of the grid, or is
padding. Each rank is brought whole windows, works on them alone, and sends their rows home.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable, Sequence
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from credit_domain.blocks.block import Block, attend, step_between, worked_out
from credit_domain.engine.driver import Step, bring
from credit_domain.engine.ranks import ALONE, Domain, domain_of, normal_dim, sizes_of
from credit_mesh import DomainParallelManager, RowPartition

_N = TypeVar("_N", int, Tensor)


class _Line(NamedTuple):
    """One dim of the grid and the windows that it is cut into.

    Attributes:
        size: Rows of all ranks.
        window: Slots of a window.
        shift: Row of the first slot of the first window that is no remainder.
        kind: ``masked``: the rows before the shift are a window of their own, as the mask of Swin makes them;
            ``cyclic``: they share one with the last rows; ``dilated``: a window holds every n-th row of n windows.
        front: Padding before row 0.
        windows: Number of windows.
    """

    size: int
    window: int
    shift: int
    kind: str
    front: int
    windows: int

    @classmethod
    def of(cls, size: int, window: int, shift: int, kind: str) -> _Line:
        """Work out the padding and the number of windows."""
        front = -shift % window if kind == "masked" else 0
        return cls(size, window, shift, kind, front, -(-(size + front) // window))

    def row(self, slot: _N) -> _N:
        """The row that a slot holds; not one of the grid where it is padding."""
        if self.kind == "dilated":
            return slot % self.window * self.windows + slot // self.window
        if self.kind == "cyclic":
            return (slot + self.shift) % (self.windows * self.window)
        return slot - self.front

    def slot(self, row: int) -> int:
        """The slot that holds a row."""
        if self.kind == "dilated":
            return row % self.windows * self.window + row // self.windows
        if self.kind == "cyclic":
            return (row - self.shift) % (self.windows * self.window)
        return row + self.front

    def owner(self, window: int, source: RowPartition) -> int:
        """The rank that works on a window: that of its first row. Dilated ones are dealt out as rows are."""
        first = window * self.window
        row = first if self.kind == "dilated" else self.row(first)
        return source.owner(min(max(row, 0), self.size - 1))


class _Cut(NamedTuple):
    """A dim cut into windows.

    Attributes:
        line: The dim, and its windows.
        split: Brings this rank the slots of its windows.
        join: Brings this rank its rows back.
        padded: Whether any of its slots is padding.
    """

    line: _Line
    split: Step
    join: Step
    padded: bool

    @property
    def windows(self) -> int:
        """Number of this rank's windows."""
        return self.split.out // self.line.window

    def inside(self, device: torch.device) -> Tensor:
        """Which slots of which window hold a row: (windows, slots of one)."""
        line = self.line
        row = line.row(torch.arange(self.split.first, self.split.first + self.split.out, device=device))
        return ((row >= 0) & (row < line.size)).reshape(self.windows, line.window)


class Windows(NamedTuple):
    """What :func:`join_windows` needs to know to undo :func:`split_windows`.

    Attributes:
        inside: Which tokens are points of the grid, (n, N), and may be attended to; None where none is padding. Each
            window has one at least, and what padding itself attends to is thrown away.
        cuts: How each spatial dim is cut.
        at: Index of the sharded dim among them.
        domain: Who takes part.
    """

    inside: Tensor | None
    cuts: tuple[_Cut, ...]
    at: int
    domain: Domain
    label: str


def split_windows(
    x: Tensor,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    cyclic: Sequence[bool] | None = None,
    dilated: bool = False,
    dim: int = -2,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "split_windows",
    layer: Hashable = None,
) -> tuple[Tensor, Windows]:
    """Cut a sharded grid into windows; each comes out whole, on the rank that owns its first row.

    A dim that its window does not divide is padded at its end, and the padding masked.

    Args:
        x: This rank's rows: (B, C, H, W), or (B, C, T, H, W), or (B, C, L).
        window: Size of a window along each spatial dim.
        shift: How far windows are shifted along each: as if the padded grid were rolled by so much towards row 0.
        cyclic: Along which dims the rolled grid is one without end. Along the others, rows that the roll brought
            together do not see each other, as by the mask of Swin. None: along longitude, the last dim, alone.
        dilated: A window holds rows ``r, r + n, r + 2n, ...``, where ``n`` is the number of windows, in place of
            consecutive ones; likewise along the other dims.

    Returns:
        The tokens of this rank's windows, (B, n, N, C), perhaps of none, and what :func:`join_windows` needs.

    Raises:
        ValueError: On all ranks alike, if ``dim`` is no spatial dim, there is not one window or shift for each, or a
            shift is not smaller than its window; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where boundaries between ranks are
        boundaries of windows.
    """
    nd = x.ndim - 2
    dim = normal_dim(dim, x.ndim, nd, label)
    at, domain = dim + nd, domain_of(manager)
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    windows, shifts = _each(window, nd), _each(shift, nd)
    rolls = (*[False] * (nd - 1), True) if cyclic is None else tuple(cyclic)
    fit = len(windows) == len(shifts) == len(rolls) == nd
    if not fit or not all(0 <= s < w for s, w in zip(shifts, windows, strict=True)) or (dilated and any(shifts)):
        raise ValueError(
            f"{label}: expected a window and a smaller shift for each of {nd} spatial dims (no shift where dilated); "
            f"got window={window}, shift={shift}, cyclic={cyclic}, dilated={dilated}"
        )
    found: dict[int, _Cut] = {}
    for d in sorted(range(nd), key=lambda d: d != at):  # the sharded dim first, while the others are not padded
        rows, rank = (sizes, domain.rank) if d == at else ((operator.index(x.shape[2 + d]),), 0)
        kind = "dilated" if dilated else "cyclic" if rolls[d] else "masked"
        found[d] = _cut(rows, rank, windows[d], shifts[d], kind)
        x = bring(x, d - nd, found[d].split, domain if d == at else ALONE, label)
    cuts = tuple(found[d] for d in range(nd))
    tokens = x.reshape(*x.shape[:2], *(part for cut in cuts for part in (cut.windows, cut.line.window)))
    tokens = tokens.permute(0, *range(2, 2 * nd + 2, 2), *range(3, 2 * nd + 2, 2), 1)
    count = prod([cut.windows for cut in cuts])
    tokens = tokens.reshape(x.shape[0], count, prod(windows), x.shape[1])
    return tokens, Windows(_inside(cuts, x.device), cuts, at, domain, label)


def join_windows(tokens: Tensor, layout: Windows) -> Tensor:
    """Put the tokens (B, n, N, C) of :func:`split_windows` back: this rank's rows, (B, C, H, W), of any channels.

    Collectives are those of :func:`split_windows`, which returned ``layout``.
    """
    cuts, nd = layout.cuts, len(layout.cuts)
    windows, sizes = [cut.windows for cut in cuts], [cut.line.window for cut in cuts]
    batch, channels = tokens.shape[0], tokens.shape[-1]
    x = tokens.reshape(batch, *windows, *sizes, channels)
    x = x.permute(0, 2 * nd + 1, *(part for d in range(1, nd + 1) for part in (d, nd + d)))
    x = x.reshape(batch, channels, *(cut.split.out for cut in cuts))
    for d in sorted(range(nd), key=lambda d: d == layout.at):
        x = bring(x, d - nd, cuts[d].join, layout.domain if d == layout.at else ALONE, layout.label)
    return x


def _each(value: int | Sequence[int], nd: int) -> tuple[int, ...]:
    values = (value,) * nd if isinstance(value, int) else value
    return tuple(operator.index(each) for each in values)  # torch.compile may have symbols for them


@worked_out
def _cut(sizes: tuple[int, ...], rank: int, window: int, shift: int, kind: str) -> _Cut:
    source = RowPartition(sizes, allow_empty=True)
    line = _Line.of(source.rows, window, shift, kind)
    held = Counter(line.owner(k, source) for k in range(line.windows))
    slots = RowPartition(tuple(held[r] * window for r in range(source.ranks)), allow_empty=True)
    rows_of = [tuple(line.row(slot) for slot in slots.interval(r)) for r in range(source.ranks)]
    slots_of = [tuple(line.slot(row) for row in source.interval(r)) for r in range(source.ranks)]
    padded = any(not 0 <= row < line.size for row in rows_of[rank])
    split, join = step_between(source, slots, rows_of, rank), step_between(slots, source, slots_of, rank)
    return _Cut(line, split, join, padded)


def _inside(cuts: tuple[_Cut, ...], device: torch.device) -> Tensor | None:
    if not any(cut.padded for cut in cuts):
        return None
    inside = torch.ones(1, 1, dtype=torch.bool, device=device)
    for cut in cuts:
        both = inside[:, None, :, None] & cut.inside(device)[None, :, None, :]
        inside = both.reshape(both.shape[0] * both.shape[1], both.shape[2] * both.shape[3])
    return inside


class WindowAttention(Block):
    """Multi-head attention within the windows of :func:`split_windows`, on this rank's rows (B, C, H, W).

    Parameters have the names of Swin's ``WindowAttention``, and with them its table of a bias for each head and each
    offset between two tokens.

    Args:
        channels: C.
        window: Size of a window along each spatial dim; it, ``shift``, ``cyclic`` and ``dilated`` are those of
            :func:`split_windows`.
        heads: Number of heads, which must divide C.
        qkv_bias: Whether queries, keys and values have a bias.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        channels: int,
        window: Sequence[int],
        heads: int,
        shift: int | Sequence[int] = 0,
        *,
        cyclic: Sequence[bool] | None = None,
        dilated: bool = False,
        qkv_bias: bool = True,
        dim: int = -2,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(dim, manager=manager, label=label)
        if channels % heads:
            raise ValueError(f"{self.label}: {heads} heads do not divide {channels} channels")
        self.window, self.shift, self.heads = tuple(window), shift, heads
        self.cyclic, self.dilated = cyclic, dilated
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        offsets = prod(2 * size - 1 for size in self.window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_positions(self.window))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows; returns this rank's rows. See :func:`split_windows` for errors and collectives."""
        settings = {"cyclic": self.cyclic, "dilated": self.dilated, "dim": self.dim, **self.sharding}
        tokens, layout = split_windows(x, self.window, self.shift, **settings)
        B, n, N, _ = tokens.shape
        qkv = self.qkv(tokens)
        each = qkv.shape[-1] // (3 * self.heads)  # channels of a head; a tensor-parallel rank has some of the heads
        query, key, value = qkv.reshape(B * n, N, 3, self.heads, each).permute(2, 0, 3, 1, 4).unbind()
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.reshape(N, N, self.heads).permute(2, 0, 1)
        if layout.inside is not None:
            bias = bias.masked_fill(~layout.inside[:, None, None], float("-inf")).repeat(B, 1, 1, 1)
        out = attend(query, key, value, bias)
        return join_windows(self.proj(out.transpose(1, 2).reshape(B, n, N, self.heads * each)), layout)


def relative_positions(window: Sequence[int]) -> Tensor:
    """For each two tokens of a window, (N, N), the number of the offset from the second to the first."""
    tokens = torch.cartesian_prod(*map(torch.arange, window)).reshape(-1, len(window))
    offsets = tokens[:, None] - tokens[None] + torch.tensor(window) - 1
    strides = [prod(2 * size - 1 for size in window[d + 1 :]) for d in range(len(window))]
    return (offsets * torch.tensor(strides)).sum(-1)
