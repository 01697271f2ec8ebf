"""Random programs for the partitioner: operators drawn one after another, each fitting the shape that came before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
Draw = Callable[[st.SearchStrategy[Any]], Any]
MOST = 6000
"""Entries of a value at most."""


class Graph(nn.Module):
    """Steps one after another; what some of them gave before is used again."""

    def __init__(self, steps: list[tuple[str, Any]]) -> None:
        super().__init__()
        self.steps = steps
        self.tables = nn.ParameterList()
        self.weight = nn.Parameter(torch.randn(1, dtype=torch.float64))

    def table(self, *shape: int) -> int:
        draw = torch.Generator().manual_seed(len(self.tables))
        size = max(1, math.prod(shape[1:]))
        self.tables.append(torch.randn(*shape, dtype=torch.float64, generator=draw) / size**0.5)
        return len(self.tables) - 1

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        kept = x
        for name, step in self.steps:
            if name == "keep":
                kept = x
            elif name == "again":
                x = step(x, kept)
            else:
                x = step(x)
        return x


def dims(draw: Draw, x: Tensor, least: int = 1) -> int:
    able = [d for d in range(x.ndim) if x.shape[d] >= least]
    return draw(st.sampled_from(able)) if able else 0


def dividers(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


def pointwise(draw: Draw, x: Tensor, graph: Graph) -> Step:
    return draw(st.sampled_from([torch.tanh, F.gelu, lambda x: x * 0.5 + 1, lambda x: torch.where(x > 0, x, x * 0.1)]))


def times_table(draw: Draw, x: Tensor, graph: Graph) -> Step:
    least = draw(st.integers(0, x.ndim - 1))
    at = graph.table(*[size if draw(st.booleans()) else 1 for size in x.shape[least:]])
    return lambda x: x + graph.tables[at]


def reduce(draw: Draw, x: Tensor, graph: Graph) -> Step:
    along = draw(st.sets(st.integers(0, x.ndim - 1), min_size=1))
    op = draw(st.sampled_from(["mean", "amax", "var", "sum", "logsumexp"]))
    if op == "var":
        return lambda x: x / (1 + x.var(tuple(along), keepdim=True, correction=0))
    return lambda x: x - getattr(x, op)(tuple(along), keepdim=True) / 4


def along(draw: Draw, x: Tensor, graph: Graph) -> Step:
    dim, op = (
        dims(draw, x),
        draw(st.sampled_from(["softmax", "cumsum", "sort", "flip", "roll", "log_softmax", "normalize"])),
    )
    if op == "sort":
        return lambda x: x.sort(dim)[0]
    if op == "roll":
        shift = draw(st.integers(-5, 5))
        return lambda x: torch.roll(x, shift, dim)
    if op == "normalize":
        return lambda x: F.normalize(x, dim=dim)
    return lambda x: getattr(x, op)(dim)


def pieces(draw: Draw, x: Tensor, graph: Graph) -> Step:
    dim = dims(draw, x, 2)
    size = x.shape[dim]
    kind = draw(st.sampled_from(["slice", "step", "swap", "table", "double", "put"]))
    first = draw(st.integers(0, max(0, size - 2)))
    last = draw(st.integers(first + 1, size))
    cut = [slice(None)] * x.ndim
    if kind == "slice":
        cut[dim] = slice(first, last)
        return lambda x: x[tuple(cut)]
    if kind == "step":
        cut[dim] = slice(draw(st.integers(0, 1)), None, draw(st.integers(2, 3)))
        return lambda x: x[tuple(cut)]
    if kind == "swap":
        return lambda x: torch.cat([x.narrow(dim, last, size - last), x.narrow(dim, 0, last)], dim)
    if kind == "table":
        rows = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
        return lambda x: x.index_select(dim, rows)
    if kind == "double":
        return lambda x: torch.cat([x, x.flip(dim) * 0.5], dim)
    cut[dim] = slice(first, last)

    def put(x: Tensor) -> Tensor:
        y = x.clone()
        y[tuple(cut)] = x.flip(dim)[tuple(cut)] * 2
        return y

    return put


def reshape(draw: Draw, x: Tensor, graph: Graph) -> Step:
    kind = draw(st.sampled_from(["permute", "merge", "split", "windows"]))
    if kind == "permute":
        order = draw(st.permutations(range(x.ndim)))
        return lambda x: x.permute(order)
    if kind == "merge" and x.ndim > 2:
        dim = draw(st.integers(0, x.ndim - 2))
        return lambda x: x.flatten(dim, dim + 1)
    able = [d for d in range(x.ndim) if dividers(x.shape[d])]
    if not able or x.ndim > 5:
        return lambda x: x.unsqueeze(0).squeeze(0)
    dim = draw(st.sampled_from(able))
    inner = draw(st.sampled_from(dividers(x.shape[dim])))
    if kind == "windows" and x.ndim > 2:
        other = (dim + 1) % x.ndim
        return lambda x: x.unflatten(dim, (-1, inner)).transpose(dim + 1, other + (other > dim)).contiguous()
    return lambda x: x.reshape(*x.shape[:dim], x.shape[dim] // inner, inner, *x.shape[dim + 1 :])


def product(draw: Draw, x: Tensor, graph: Graph) -> Step:
    dim = dims(draw, x)
    kind = draw(st.sampled_from(["linear", "gram", "attention", "batch"]))
    if kind == "linear":
        at = graph.table(draw(st.integers(1, 7)), x.shape[dim])
        return lambda x: F.linear(x.movedim(dim, -1), graph.tables[at]).movedim(-1, dim)
    if kind == "batch" and x.ndim > 2:
        other = draw(st.integers(0, x.ndim - 1).filter(lambda d: d != dim))
        at = graph.table(draw(st.integers(1, 5)), x.shape[dim], x.shape[other])
        word = "abcdef"[: x.ndim]
        out = word.replace(word[dim], "z")
        return lambda x: torch.einsum(f"{word},z{word[dim]}{word[other]}->{out}", x, graph.tables[at])
    if x.ndim < 3:
        return torch.tanh
    if kind == "gram":
        return lambda x: (x @ x.transpose(-1, -2)).softmax(-1) @ x
    return lambda x: F.scaled_dot_product_attention(x, x, x * 2)


def spectral(draw: Draw, x: Tensor, graph: Graph) -> Step:
    dim, other = dims(draw, x), dims(draw, x)
    size = x.shape[dim]
    if dim == other or draw(st.booleans()):
        return lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=dim) * 0.5, n=size, dim=dim)
    sizes = (x.shape[other], size)
    return lambda x: torch.fft.irfft2(torch.fft.rfft2(x, dim=(other, dim)), s=sizes, dim=(other, dim))


def grid(draw: Draw, x: Tensor, graph: Graph) -> Step:
    """What takes samples, channels, rows and columns."""
    if x.ndim != 4 or min(x.shape) < 1:
        return torch.tanh
    _b, c, h, w = x.shape
    kind = draw(
        st.sampled_from(["conv", "pool", "pad", "interpolate", "group", "layer", "unfold", "transposed", "shuffle"])
    )
    kernel = draw(st.integers(1, max(1, min(3, h, w))))
    stride = draw(st.integers(1, 2))
    if kind == "conv":
        at = graph.table(draw(st.integers(1, 4)), c, kernel, kernel)
        padding = draw(st.integers(0, 2))
        return lambda x: F.conv2d(x, graph.tables[at], None, stride, padding)
    if kind == "transposed":
        at = graph.table(c, draw(st.integers(1, 3)), kernel, kernel)
        return lambda x: F.conv_transpose2d(x, graph.tables[at], None, min(stride, kernel))
    if kind == "pool":
        op = draw(st.sampled_from([F.max_pool2d, F.avg_pool2d]))
        return lambda x: op(x, kernel, stride, kernel // 2)
    if kind == "pad":
        mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
        most = 2 if mode in ("constant", "replicate") else min(2, h - 1, w - 1)
        amounts = [draw(st.integers(0, max(0, most))) for _ in range(4)]
        return lambda x: F.pad(x, amounts, mode)
    if kind == "interpolate":
        size, mode = (
            (draw(st.integers(1, 9)), draw(st.integers(1, 9))),
            draw(st.sampled_from(["nearest", "bilinear", "bicubic"])),
        )
        return lambda x: F.interpolate(x, size=size, mode=mode)
    if kind == "group":
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
        return lambda x: F.group_norm(x, groups, eps=0.1) if x[0].numel() > groups else x
    if kind == "layer":
        return lambda x: F.layer_norm(x, x.shape[1:], eps=0.1)
    if kind == "unfold":
        return lambda x: F.unfold(x, kernel, padding=kernel // 2, stride=stride)
    if c % 4 == 0:
        return lambda x: F.pixel_shuffle(x, 2)
    return (lambda x: F.pixel_unshuffle(x, 2)) if h % 2 == w % 2 == 0 else torch.tanh


KINDS = (pointwise, times_table, reduce, along, pieces, reshape, product, spectral, grid, grid)


@st.composite
def graphs(draw: Draw) -> tuple[Graph, Tensor, str]:
    """A program, its input, and what it does in words."""
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(2, 4)),
        draw(st.integers(4, 12)),
        draw(st.sampled_from([4, 6, 8])),
    )
    whole = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    graph = Graph([])
    x = kept = whole
    words = []
    for _ in range(draw(st.integers(3, 10))):
        kind = draw(st.sampled_from(KINDS))
        tables = len(graph.tables)
        step = kind(draw, x, graph)
        try:
            made = step(x)
        except (RuntimeError, ValueError):  # torch refuses this shape
            made = None
        if made is None or not 0 < made.numel() <= MOST or not made.isfinite().all() or made.abs().max() > 1e3:
            graph.tables = nn.ParameterList(list(graph.tables)[:tables])
            continue
        graph.steps.append((kind.__name__, step))
        words.append(f"{kind.__name__} -> {list(made.shape)}")
        x = made
        choice = draw(st.integers(0, 5))
        if choice == 0:
            graph.steps.append(("keep", None))
            kept = x
        elif choice == 1 and kept.shape == x.shape:
            graph.steps.append(("again", lambda x, kept: x + kept))
            x = x + kept
            words.append("again")
    return graph, whole, "; ".join(words)
