"""Boundary padding of a sharded grid is that of the whole: both modes, both sharded dims, any partition in and out."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from domain_cases import any_partition, check
from domain_reference import randn, shard
from hypothesis import given, settings
from hypothesis import strategies as st

from credit_domain.ops.padding import boundary
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel


def padded(x, pad_lat, pad_lon, mode, pole_is_row=False, signs=1):
    """What a single rank does with a tensor (..., H, W), of which signs are for (..., C, T, H, W)."""
    north, south = pad_lat
    height = x.shape[-2]
    if mode == "earth":
        across = x.roll(x.shape[-1] // 2, -1)
        if signs != 1:
            across = across * (signs if isinstance(signs, int) else torch.tensor(signs).view(-1, 1, 1, 1))
        skip = 1 if pole_is_row else 0
        top = across[..., skip : skip + north, :].flip(-2)
        bottom = across[..., height - skip - south : height - skip, :].flip(-2)
    else:
        top, bottom = x[..., 1 : 1 + north, :].flip(-2), x[..., height - 1 - south : height - 1, :].flip(-2)
    x = torch.cat([top, x, bottom], -2)
    return F.pad(x.reshape(1, -1, *x.shape[-2:]), (*pad_lon, 0, 0), mode="circular").unflatten(1, x.shape[:-2])[0]


def target_of(draw, rows, ranks):
    cuts = draw(st.lists(st.integers(0, rows), min_size=ranks - 1, max_size=ranks - 1))
    return RowPartition(tuple(b - a for a, b in pairwise([0, *sorted(cuts), rows])), allow_empty=True)


@st.composite
def grids(draw):
    """A grid with its latitude, its longitude or its levels sharded, and paddings that it can take."""
    partition, declare = draw(any_partition())
    dim = draw(st.sampled_from([-2, -2, -1, -1, -3]))
    mode = draw(st.sampled_from(["earth", "earth", "mirror"]))
    pole_is_row = mode == "earth" and draw(st.booleans())
    sizes = [2, 3, draw(st.integers(1, 4)), draw(st.integers(1, 7)), 2 * draw(st.integers(1, 4))]
    sizes[dim] = partition.rows
    if mode == "earth" and sizes[-1] % 2:
        sizes[-1] += 1
        partition = RowPartition((*partition.sizes[:-1], partition.sizes[-1] + 1), allow_empty=True)
    most = sizes[-2] if mode == "earth" and not pole_is_row else sizes[-2] - 1
    lat, lon = st.integers(0, most), st.integers(0, sizes[-1])
    pads = (draw(lat), draw(lat)), (draw(lon), draw(lon))
    signs = draw(st.sampled_from([1, -1, (1, -1, -1)])) if mode == "earth" else 1
    return randn(*sizes), partition, dim, declare, pads, mode, pole_is_row, signs


@settings(max_examples=80)
@given(st.data(), grids())
def test_padding(data, grid):
    whole, partition, dim, declare, pads, mode, pole_is_row, signs = grid
    target = None
    if dim != -3:
        target = partition.strided(1, partition.rows + sum(pads[dim + 2]))
        if explicit := data.draw(st.booleans()):
            target = target_of(data.draw, target.rows, partition.ranks)
    counted = dim if data.draw(st.booleans()) else dim + 5
    check(
        lambda x: padded(x, *pads, mode, pole_is_row, signs),
        lambda x: boundary.pad_boundary(
            *(x, *pads, mode),
            pole_is_row=pole_is_row,
            signs=signs,
            target=target if target is not None and explicit else None,
            dim=counted,
        ),
        *(whole, partition, dim),
        target=partition if target is None else target,
        declare=declare,
    )


@settings(max_examples=50)
@given(st.data(), grids())
def test_unpadding_undoes_it(data, grid):
    whole, partition, dim, declare, pads, mode, pole_is_row, signs = grid
    between = source = None
    if dim != -3 and data.draw(st.booleans()):
        between = target_of(data.draw, partition.rows + sum(pads[dim + 2]), partition.ranks)
        source = partition

    def sharded(x):
        x = boundary.pad_boundary(x, *pads, mode, pole_is_row=pole_is_row, signs=signs, target=between, dim=dim)
        return boundary.unpad_boundary(x, *pads, target=source, dim=dim, partition=between).sin()

    check(torch.sin, sharded, whole, partition, dim, target=partition, declare=declare)


@settings(max_examples=30)
@given(st.data(), grids())
def test_unpadding_alone(data, grid):
    whole, partition, dim, declare, pads, *_ = grid
    pads = tuple(
        (min(before, n - 1), max(0, min(after, n - 1 - before)))
        for (before, after), n in zip(pads, whole.shape[-2:], strict=True)
    )
    (north, south), (west, east) = pads
    check(
        lambda x: x[..., north : x.shape[-2] - south, west : x.shape[-1] - east],
        lambda x: boundary.unpad_boundary(x, *pads, dim=dim),
        *(whole, partition, dim),
        declare=declare,
    )


def test_other_orders_of_dims():
    """(B, W, H, C) with one number for both sides, and channels last in the tensor."""
    whole, partition = randn(2, 6, 5, 2), RowPartition((2, 1, 2))
    expected = padded(whole.permute(0, 3, 2, 1)[:, :, None], (2, 2), (1, 1), "earth", signs=(1, -1))[:, :, 0]

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        own = shard(whole, partition, rank, 2)
        more = {"signs": (1, -1), "channel_dim": -1, "dim": 2, "lat_dim": 2, "lon_dim": 1}
        return boundary.pad_boundary(own, 2, 1, **more)

    torch.testing.assert_close(torch.cat(run_threads(rank_main, 3), 2).permute(0, 3, 2, 1), expected)


def test_one_rank_and_other_dtypes():
    whole = torch.arange(2 * 5 * 6).reshape(1, 2, 5, 6).to(torch.uint8)
    expected = padded(whole, (2, 0), (0, 1), "earth")
    assert torch.equal(boundary.pad_boundary(whole, (2, 0), (0, 1)), expected)
    last = whole.to(memory_format=torch.channels_last)
    assert boundary.pad_boundary(last, 1).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(boundary.unpad_boundary(expected, (2, 0), (0, 1)), whole)


def test_mistakes_are_named():
    partition = RowPartition((3, 1, 2))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = shard(randn(1, 2, 6, 8), partition, rank)
        pad, unpad = boundary.pad_boundary, boundary.unpad_boundary

        def refused(text, function, *args, **more):
            with pytest.raises(ValueError, match=re.escape(text)):
                function(*args, **more)

        refused("pad_boundary: mode must be one of 'earth', 'mirror'; got 'sea'", pad, x, 1, 1, "sea")
        refused("pad_boundary: pad_lat must be a number >= 0, or one for each side; got -1", pad, x, -1)
        refused(
            "pad_boundary: pad_lon must be a number >= 0, or one for each side; got (1, 2, 3)", pad, x, 1, (1, 2, 3)
        )
        refused("pad1: mode 'earth' reaches 6 rows beyond 6 rows; got pad_lat=", pad, x, 7, label="pad1")
        refused("pad_boundary: mode 'earth' reaches 5 rows beyond 6 rows", pad, x, 6, pole_is_row=True)
        refused("pad_boundary: mode 'mirror' reaches 5 rows beyond 6 rows", pad, x, 6, 0, "mirror")
        refused("pad_boundary: pad_lon=(9, 9) would wrap around 8 longitudes more than once", pad, x, 0, 9)
        refused("the number of longitudes must be even; it is 7", pad, x[..., :7], 1)
        refused("signs must be 1 or -1, or one of them for each channel; got 2", pad, x, 1, signs=2)
        refused("3 signs do not fit channel_dim=1 of", pad, x, 1, signs=(1, -1, 1))
        refused("8 signs do not fit channel_dim=-1 of", pad, x, 1, signs=(1,) * 8, channel_dim=-1)
        refused("signs of -1 need a dtype with negative numbers; got torch.uint8", pad, x.to(torch.uint8), 1, signs=-1)
        refused("pole_is_row and signs belong to mode='earth'", pad, x, 1, 0, "mirror", signs=-1)
        refused("lat_dim=-2 and lon_dim=2 are the same dim", pad, x, 1, lon_dim=2)
        refused("pad_boundary: cannot move rows from RowPartition(8 rows", pad, x, 1, target=partition)
        refused("is for a sharded latitude or longitude; dim -3", pad, x, 1, target=partition, dim=1)
        refused("unpad_boundary: cannot keep the rows [3, 3) of 6 rows", unpad, x, 3)
        refused("cutting off 4 and 4 leaves nothing of dim -1", unpad, x, 0, 4)
        wide = shard(randn(1, 2, 7, 6).mT.contiguous(), RowPartition((3, 1, 3)), rank, -1)
        refused("must be even; it is 7", pad, wide, 1, dim=-1)

    run_threads(rank_main, 3)
