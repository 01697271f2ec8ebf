"""Where rows are after a view, against torch on every part."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from credit_domain.partitioner.row_layout import Rows, even, in_blocks, kept, scaled, viewed


def part_of(x: Tensor, rows: Rows, rank: int) -> Tensor:
    units = x.unflatten(rows.dim, (rows.outer, rows.units)).narrow(rows.dim + 1, rows.start(rank), rows.sizes[rank])
    return units.flatten(rows.dim, rows.dim + 1)


@st.composite
def factors(draw: st.DrawFn, number: int) -> tuple[int, ...]:
    """A shape with so many entries."""
    shape = []
    for _ in range(draw(st.integers(0, 3))):
        shape.append(draw(st.sampled_from([n for n in range(1, number + 1) if number % n == 0])))
        number //= shape[-1]
    return tuple(draw(st.permutations([*shape, number])))


@settings(max_examples=500)
@given(st.data(), st.sampled_from([24, 36, 48]))
def test_a_part_of_a_view_is_the_view_of_a_part(data: st.DataObject, number: int) -> None:
    shape, new = data.draw(factors(number)), data.draw(factors(number))
    dim = data.draw(st.integers(0, len(shape) - 1))
    outer = data.draw(st.sampled_from([n for n in range(1, shape[dim] + 1) if shape[dim] % n == 0]))
    units = shape[dim] // outer
    found = viewed(shape, Rows(dim, outer, (units,)), new)
    assume(found is not None)
    blocks = units // found.block
    cuts = sorted(data.draw(st.lists(st.integers(0, blocks), min_size=2, max_size=2)))
    sizes = tuple((b - a) * found.block for a, b in zip([0, *cuts], [*cuts, blocks], strict=True))
    rows, out = Rows(dim, outer, sizes), found.of(sizes)
    x = torch.arange(number).reshape(shape)
    for rank in range(3):
        part = part_of(x, rows, rank)
        assert tuple(part.shape) == rows.shape(shape, rank)
        assert torch.equal(part.reshape(out.shape(new, rank)), part_of(x.reshape(new), out, rank))


def test_what_is_found() -> None:
    rows = Rows(2, 1, (5, 3, 4))
    assert viewed((2, 4, 12, 16), rows, (2, 4, 192)).of(rows.sizes) == Rows(2, 1, (80, 48, 64))
    assert viewed((2, 4, 12, 16), rows, (2, 48, 16)).of(rows.sizes) == Rows(1, 4, (5, 3, 4))
    windows = viewed((2, 4, 12, 16), rows, (2, 4, 3, 4, 4, 4))
    assert (windows.block, windows.of((4, 0, 8))) == (4, Rows(2, 1, (1, 0, 2)))
    assert viewed((2, 4, 12, 16), rows, (2, 4, 8, 24)) is None, "rows are torn apart"


@settings(max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(1, 30), st.data())
def test_divisions(sizes: list[int], units: int, data: st.DataObject) -> None:
    total = sum(sizes)
    for made, wanted in ((even(units, len(sizes)), units), (scaled(sizes, units), units), (kept(sizes, units), units)):
        assert len(made) == len(sizes)
        assert sum(made) == wanted
        assert min(made) >= 0
    block = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    blocks = in_blocks(sizes, block)
    assert sum(blocks) == total
    assert all(size % block == 0 and size >= 0 for size in blocks)
    assert max(even(units, len(sizes))) - min(even(units, len(sizes))) <= 1
    assert scaled(sizes, total) == tuple(sizes) == kept(sizes, total)
    assert math.prod(sizes) == 0 or kept(sizes, total + 3) == (*sizes[:-1], sizes[-1] + 3)
