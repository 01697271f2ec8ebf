"""Padding of a global latitude-longitude grid at its boundaries, and its removal."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from credit_domain.engine.driver import bring, step_for
from credit_domain.engine.footprint import Footprint
from credit_domain.engine.ranks import ALONE, Domain, domain_of, normal_dim, sizes_of
from credit_domain.engine.row_op import row_op
from credit_domain.ops.rearranging import Ints, crop, normal_dims, padded_to
from credit_halo import EdgeRule
from credit_mesh import DomainParallelManager, RowPartition

MODES = ("earth", "mirror")


@row_op
class PoleRows(NamedTuple):
    """Rows beyond the poles.

    Attributes:
        north: Rows before the first.
        south: Rows after the last.
        mode: ``earth`` or ``mirror``.
        pole_is_row: Whether the first and the last row lie on the poles.
        signs: Factors of what comes from across the pole.
        channel_dim: The dim that several factors belong to.
        lon_dim: The dim of longitude.
        target: Output rows of each rank; empty leaves boundaries where they are.
    """

    north: int
    south: int
    mode: str
    pole_is_row: bool
    signs: tuple[int, ...]
    channel_dim: int
    lon_dim: int
    target: tuple[int, ...]

    def footprint(self, source: RowPartition) -> Footprint:
        """See :func:`credit_domain.ops.rearranging.padded_to`."""
        signs = self.signs if len(self.signs) > 1 else self.signs[0]
        kind = "pole" if self.mode == "earth" else "reflect"
        more: dict[str, Any] = {"signs": signs, "lon_dim": self.lon_dim, "channel_dim": self.channel_dim}
        edge = EdgeRule(kind, pole_is_row=self.pole_is_row, **more)
        return padded_to(source, self.north, self.south, edge, self.target)


@row_op
class Longitudes(NamedTuple):
    """Columns around the date line, where longitude is sharded; ``turn`` is by how many places they were rolled."""

    west: int
    east: int
    turn: int
    target: tuple[int, ...]

    def footprint(self, source: RowPartition) -> Footprint:
        """See :func:`credit_domain.ops.rearranging.padded_to`."""
        plain = padded_to(source, self.west, self.east, EdgeRule("circular"), self.target)
        first, offsets = self.turn - self.west, pairwise(plain.target.offsets)
        return replace(plain, needs=tuple(range(start + first, stop + first) for start, stop in offsets))


def pad_boundary(
    x: Tensor,
    pad_lat: Ints = 0,
    pad_lon: Ints = 0,
    mode: str = "earth",
    *,
    pole_is_row: bool = False,
    signs: Ints = 1,
    channel_dim: int = 1,
    target: RowPartition | None = None,
    dim: int = -2,
    lat_dim: int = -2,
    lon_dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "pad_boundary",
) -> Tensor:
    """Pad a global grid: rows beyond the poles, and longitudes beyond the date line.

    Longitudes are circular, and padded after the rows. Row ``-i`` beyond the first pole, ``i >= 1``, is

    - ``earth``: what lies across the pole: row ``i - 1`` (row ``i`` with ``pole_is_row``), half the longitudes away;
    - ``mirror``: row ``i``, as :func:`torch.nn.functional.pad` reflects.

    Rows beyond the last pole mirror this.

    Args:
        x: This rank's part of (..., H, W).
        pad_lat: Rows to add at the first and at the last pole, or at both.
        pad_lon: Longitudes to add before the first and after the last, or on both sides.
        mode: ``earth`` or ``mirror``.
        pole_is_row: For ``earth``: the first and the last row lie on the poles, as in a 721-row grid, and are not
            repeated.
        signs: For ``earth``: factor of what comes from across the pole; -1 for vector components, or one factor for
            each entry of ``channel_dim``.
        channel_dim: The dim that a sequence of ``signs`` belongs to.
        target: Who is to own which of the padded rows (longitudes, where they are sharded). By default boundaries
            between ranks stay where they are, and the last rank takes what is added.
        dim: The sharded dim: that of latitude, that of longitude, or any other, where nobody needs anything.
        lat_dim: The dim of latitude.
        lon_dim: The dim of longitude.

    Returns:
        This rank's part of (..., north + H + south, west + W + east), in the same dtype.

    Raises:
        ValueError: On all ranks alike, if the padding reaches farther than the grid, longitudes that are to be rolled
            by half are odd in number, ``signs`` do not fit, ``target`` is one of other rows or ranks, or dims are
            wrong; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; two where longitude is sharded and rows
        are padded.
    """
    lat_pads, lon_pads = _pair("pad_lat", pad_lat, label), _pair("pad_lon", pad_lon, label)
    dim, lat, lon = _dims_of(x, dim, lat_dim, lon_dim, label)
    if mode not in MODES:
        raise ValueError(f"{label}: mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}")
    factors = _checked_signs(x, signs, channel_dim, (lat, lon), label)
    if mode == "mirror" and (pole_is_row or set(factors) != {1}):
        raise ValueError(f"{label}: pole_is_row and signs belong to mode='earth'; got mode='mirror'")
    domain = _domain_along(manager, dim, (lat, lon), target, label)
    sharded = dim if dim in (lat, lon) else lon
    sizes = sizes_of(x, sharded, domain, label, partition)
    height, width = (sum(sizes) if d == sharded else operator.index(x.shape[d]) for d in (lat, lon))
    _check_reach(height, width, lat_pads, lon_pads, mode, pole_is_row, label)
    wanted = () if target is None else target.sizes
    if sharded == lat:
        op = PoleRows(*lat_pads, mode, pole_is_row, factors, channel_dim, lon, wanted)
        step = step_for(op, sizes, domain.rank, label)
        west, east = lon_pads
        x = bring(x, lat, step, domain, label, new=not (west or east))
        if west or east:
            x = torch.cat([x.narrow(lon, width - west, west), x, x.narrow(lon, 0, east)], lon)
        return x
    north, south = lat_pads
    step = step_for(Longitudes(*lon_pads, 0, wanted), sizes, domain.rank, label)
    out = bring(x, lon, step, domain, label, new=not (north or south))
    if north or south:
        beyond = _beyond(x, lat, lat_pads, mode, pole_is_row, factors, channel_dim)
        turn = width // 2 if mode == "earth" else 0
        step = step_for(Longitudes(*lon_pads, turn, wanted), sizes, domain.rank, label)
        beyond = bring(beyond, lon, step, domain, f"{label} beyond the poles")
        out = torch.cat([beyond.narrow(lat, 0, north), out, beyond.narrow(lat, north, south)], lat)
    return out


def unpad_boundary(
    x: Tensor,
    pad_lat: Ints = 0,
    pad_lon: Ints = 0,
    *,
    target: RowPartition | None = None,
    dim: int = -2,
    lat_dim: int = -2,
    lon_dim: int = -1,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "unpad_boundary",
) -> Tensor:
    """Cut off what :func:`pad_boundary` added.

    Args:
        x: This rank's part of (..., north + H + south, west + W + east).
        pad_lat: Rows to cut off at the first and at the last pole, or at both.
        pad_lon: Longitudes to cut off before and after, or on both sides.
        target: Who is to own which of the rows that are left. By default boundaries between ranks stay where they are:
            row ``i`` belongs to the owner of row ``i`` of the input.
        dim: The sharded dim; see :func:`pad_boundary`.
        lat_dim: The dim of latitude.
        lon_dim: The dim of longitude.

    Returns:
        This rank's part of (..., H, W).

    Raises:
        ValueError: On all ranks alike, if nothing would be left, ``target`` is one of other rows or ranks, or dims are
            wrong; and as :func:`credit_halo.exchange_rows`.

    Collectives:
        One message to and from each rank within reach, forward and backward; none where nothing is cut off along the
        sharded dim and no row is to move.
    """
    dim, lat, lon = _dims_of(x, dim, lat_dim, lon_dim, label)
    _domain_along(manager, dim, (lat, lon), target, label)
    cuts = [(lat, _pair("pad_lat", pad_lat, label)), (lon, _pair("pad_lon", pad_lon, label))]
    if dim == lat:
        cuts.reverse()  # what no other rank knows of first, so that less is sent
    for d, (before, after) in cuts:
        if d == dim:
            stop = -after if after else None
            x = crop(x, before, stop, target=target, dim=d, partition=partition, manager=manager, label=label)
            continue
        left = x.shape[d] - before - after
        if left < 1:
            raise ValueError(f"{label}: cutting off {before} and {after} leaves nothing of dim {d} of {tuple(x.shape)}")
        x = x.narrow(d, before, left)
    return x if dim in (lat, lon) else x.clone()  # a new tensor, as the rows that were brought are


# Parts of the above


def _beyond(
    x: Tensor,
    lat: int,
    pads: tuple[int, int],
    mode: str,
    pole_is_row: bool,
    factors: tuple[int, ...],
    channel_dim: int,
) -> Tensor:
    """The rows beyond both poles, one after the other, of a rank that holds all rows; not yet rolled."""
    north, south = pads
    skip = 0 if mode == "earth" and not pole_is_row else 1
    top, bottom = x.narrow(lat, skip, north), x.narrow(lat, x.shape[lat] - skip - south, south)
    rows = torch.cat([top.flip(lat), bottom.flip(lat)], lat)
    if -1 not in factors:
        return rows
    shape = [len(factors) if d == channel_dim % x.ndim else 1 for d in range(x.ndim)]
    return rows * rows.new_tensor(factors).reshape(shape)


# Arguments


def _pair(name: str, pads: Ints, label: str) -> tuple[int, int]:
    pair = (pads, pads) if isinstance(pads, int) else tuple(pads)
    if len(pair) != 2 or min(pair) < 0:
        raise ValueError(f"{label}: {name} must be a number >= 0, or one for each side; got {pads}")
    return operator.index(pair[0]), operator.index(pair[1])


def _dims_of(x: Tensor, dim: int, lat_dim: int, lon_dim: int, label: str) -> tuple[int, int, int]:
    """The sharded dim, that of latitude and that of longitude, counted from the last one."""
    sharded = normal_dim(dim, x.ndim, x.ndim, label)
    lat, lon = normal_dims((lat_dim, lon_dim), x.ndim, label)
    if lat == lon:
        raise ValueError(f"{label}: lat_dim={lat_dim} and lon_dim={lon_dim} are the same dim")
    return sharded, lat, lon


def _domain_along(
    manager: DomainParallelManager | None, dim: int, padded: tuple[int, int], target: RowPartition | None, label: str
) -> Domain:
    """Who takes part: nobody else where neither latitude nor longitude is sharded."""
    if dim in padded:
        return domain_of(manager)
    if target is not None:
        raise ValueError(f"{label}: target={target} is for a sharded latitude or longitude; dim {dim} is sharded")
    return ALONE


def _check_reach(
    height: int,
    width: int,
    lat_pads: tuple[int, int],
    lon_pads: tuple[int, int],
    mode: str,
    pole_is_row: bool,
    label: str,
) -> None:
    most = height if mode == "earth" and not pole_is_row else height - 1
    if max(lat_pads) > most:
        raise ValueError(f"{label}: mode {mode!r} reaches {most} rows beyond {height} rows; got pad_lat={lat_pads}")
    if max(lon_pads) > width:
        raise ValueError(f"{label}: pad_lon={lon_pads} would wrap around {width} longitudes more than once")
    if mode == "earth" and max(lat_pads) and width % 2:
        raise ValueError(
            f"{label}: what lies across a pole is half a turn away, so the number of longitudes must be even; it is "
            f"{width}"
        )


def _checked_signs(x: Tensor, signs: Ints, channel_dim: int, padded: tuple[int, int], label: str) -> tuple[int, ...]:
    factors = (signs,) if isinstance(signs, int) else tuple(signs)
    if not set(factors) <= {1, -1} or not factors:
        raise ValueError(f"{label}: signs must be 1 or -1, or one of them for each channel; got {signs}")
    if not isinstance(signs, int):
        (channel,) = normal_dims(channel_dim, x.ndim, label)
        if channel in padded or x.shape[channel] != len(factors):
            raise ValueError(f"{label}: {len(factors)} signs do not fit channel_dim={channel_dim} of {tuple(x.shape)}")
    if -1 in factors and not x.dtype.is_signed:
        raise ValueError(f"{label}: signs of {signs} need a dtype with negative numbers; got {x.dtype}")
    return factors
