"""Which dims of a file are latitude, longitude, level and time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from credit_parallel.app.data.checks import closest, some
from credit_parallel.app.data.source import Channel, Grid
from credit_parallel.app.data.times import TimeAxis
from credit_parallel.latitudes import check_order, checked_latitudes

Dataset: TypeAlias = Any
Variable: TypeAlias = Any

_LATITUDE = ("latitude", "lat", "nav_lat")
_LONGITUDE = ("longitude", "lon", "nav_lon")
_NORTH = ("degrees_north", "degree_north", "degrees_n", "degree_n", "degreesn", "degreen")
_EAST = ("degrees_east", "degree_east", "degrees_e", "degree_e", "degreese", "degreee")
_VERTICAL = (
    *("level", "levels", "lev", "plev", "pressure", "pressure_level", "model_level", "height", "altitude", "depth"),
    *("isobaricinhpa", "isobaricinpa", "hybrid", "generalvertical", "heightaboveground", "depthbelowlandlayer"),
)
_VERTICAL_STANDARD = ("air_pressure", "model_level_number", "height", "altitude", "depth")
PRESSURE_UNITS = ("hpa", "pa", "mbar", "mb", "millibar", "millibars", "pascal", "pascals")
_TIME = ("valid_time", "time")
_CALENDARS = ("standard", "gregorian", "proleptic_gregorian")


@dataclass(frozen=True)
class Field:
    """A variable of a file, and the channels that it becomes."""

    name: str  #: of the variable
    dims: tuple[str, ...]  #: its dims that matter, as the file orders them; the others have one element
    latitude: str  #: name of its dim of latitude
    longitude: str  #: of longitude
    time: str | None  #: of time; None where each file is one time
    vertical: str | None  #: of the vertical; None for none
    #: Indices of the levels that are wanted, in the order of the channels; one 0 where there is no vertical.
    levels: tuple[int, ...]
    channels: tuple[Channel, ...]  #: a channel for each


def fields_of(ds: Dataset, name: str, variables: Sequence[str], levels: Sequence[float]) -> tuple[Field, ...]:
    """The fields of a file that are asked for; a ValueError says which are missing or cannot be read together."""
    for what, items in (("variables", variables), ("levels", levels)):
        if len(set(items)) < len(items):
            raise ValueError(f"{name}: {what} must be named once each; got {some(items)}")
    there = [str(variable) for variable in ds.data_vars]
    for variable in variables:
        if variable not in there:
            raise ValueError(
                f"{name} has no variable {variable!r}; it has {some(there) or 'none'}{closest(variable, there)}"
            )
    if not variables:
        # Sorted, since a store lists its variables in any order, and another one on another machine.
        variables = sorted(variable for variable in there if _is_field(ds, variable))
    if not variables:
        raise ValueError(f"{name}: no variable lies on a grid of latitudes and longitudes. {_grid_problem(ds)}")
    fields = tuple(_field(ds, name, variable, levels) for variable in variables)
    first = fields[0]
    for field in fields[1:]:
        if (field.latitude, field.longitude) != (first.latitude, first.longitude):
            raise ValueError(
                f"{name}: variables must be on one grid, and {first.name} is on ({first.latitude}, {first.longitude}), "
                f"{field.name} on ({field.latitude}, {field.longitude}); name variables of one grid"
            )
        if field.time != first.time:
            raise ValueError(
                f"{name}: variables must share their times, and {first.name} has {first.time or 'one time'}, "
                f"{field.name} {field.time or 'one time'}; name variables of one kind"
            )
    if levels and not any(field.vertical for field in fields):
        asked = some(f"{level:g}" for level in levels)
        raise ValueError(f"{name}: levels={asked}, and none of {some(field.name for field in fields)} has levels")
    return fields


def grid_of(ds: Dataset, name: str, field: Field) -> Grid:
    """The grid of a field; a ValueError refuses latitudes that are not degrees in order."""
    latitudes, longitudes = (
        torch.from_numpy(np.array(_values_along(ds, dim, is_coordinate), dtype=np.float64))
        for dim, is_coordinate in ((field.latitude, _is_latitude), (field.longitude, _is_longitude))
    )
    try:
        latitudes = checked_latitudes(latitudes)
        check_order(latitudes)
    except ValueError as error:
        raise ValueError(
            f"{name}: {field.latitude} must be degrees within -90 to 90, northward or southward: {error}"
        ) from None
    if not bool(torch.isfinite(longitudes).all()):
        raise ValueError(f"{name}: {field.longitude} has values that are no numbers")
    return Grid(latitudes, longitudes)


def time_axis_of(ds: Dataset, name: str, field: Field) -> TimeAxis:
    """The times of a file, along the time dim of a field; a ValueError refuses other calendars than the real one."""
    values = _time_values(ds, field.time)
    if values is None:
        assert field.time is not None
        size = ds.sizes[field.time]
        named = np.asarray(ds[field.time].values) if field.time in ds.coords else np.arange(size)
        return TimeAxis.from_labels([str(value) for value in named.tolist()])
    if values.dtype == object:  # cftime, which xarray takes where a calendar or a year does not fit datetime64
        calendar = getattr(values[0], "calendar", "")
        if calendar not in _CALENDARS:
            raise ValueError(
                f"{name}: times have the calendar {calendar!r}; convert them first with xarray's "
                "Dataset.convert_calendar('standard')"
            )
        values = np.array([np.datetime64(value.isoformat(), "us") for value in values])
    if np.isnat(values).any():
        raise ValueError(f"{name}: {int(np.isnat(values).sum())} of {len(values)} times are missing")
    return TimeAxis.from_seconds(values.astype("datetime64[us]").astype(np.int64) / 1e6, name)


def _field(ds: Dataset, name: str, variable: str, levels: Sequence[float]) -> Field:
    array = ds[variable]
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: variable {variable!r} is of {array.dtype}, not of numbers")
    latitude, longitude = _grid_dims(ds, array)
    if latitude is None or longitude is None:
        raise ValueError(f"{name}: variable {variable!r} has the dims {_dims(array)}. {_grid_problem(ds, array)}")
    left = [str(dim) for dim in array.dims if dim not in (latitude, longitude)]
    vertical = next((dim for dim in left if _is_vertical(ds, dim)), None)
    left = [dim for dim in left if dim != vertical]
    time = _time_dim(ds, left)
    others = [dim for dim in left if dim != time and ds.sizes[dim] > 1]
    if others:
        raise ValueError(
            f"{name}: variable {variable!r} has the dims {_dims(array)}; beside latitude, longitude, "
            f"{f'level ({vertical}), ' if vertical else ''}time ({time or 'none'}) no more are understood, and "
            f"{some(others)} is left: select one element of it first, for example with xarray's Dataset.isel"
        )
    if time is None and _time_values(ds, None) is None:
        raise ValueError(
            f"{name}: variable {variable!r} has the dims {_dims(array)}, none of which is time, and the file has no "
            "coordinate 'time' that says when it is"
        )
    indices, values = _levels(ds, name, variable, vertical, levels)
    units = str(ds[vertical].attrs.get("units", "")) if vertical in ds.coords else ""
    text = {key: str(array.attrs.get(key, "")) for key in ("units", "long_name")}
    return Field(
        variable,
        tuple(str(dim) for dim in array.dims if dim in (latitude, longitude, vertical, time)),
        latitude,
        longitude,
        time,
        vertical,
        indices,
        tuple(Channel(variable, value, text["units"], units, text["long_name"]) for value in values),
    )


def _levels(
    ds: Dataset, name: str, variable: str, vertical: str | None, wanted: Sequence[float]
) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """Indices and values of the levels of a variable that are wanted."""
    if vertical is None:
        return (0,), (None,)
    there = np.asarray(ds[vertical].values if vertical in ds.coords else np.arange(ds.sizes[vertical]), np.float64)
    if not wanted:
        return tuple(range(len(there))), tuple(there.tolist())
    indices = []
    for level in wanted:
        near = np.flatnonzero(np.isclose(there, level, rtol=1e-5, atol=1e-6))
        if len(near) != 1:
            raise ValueError(
                f"{name}: variable {variable!r} has no level {level:g}; {vertical} has "
                f"{some(f'{value:g}' for value in there)}"
            )
        indices.append(int(near[0]))
    return tuple(indices), tuple(there[indices].tolist())


# What a coordinate is


def _is_field(ds: Dataset, variable: str) -> bool:
    """Whether a variable that nobody named is taken: of numbers, on the grid, and changing with time."""
    array = ds[variable]
    latitude, longitude = _grid_dims(ds, array)
    if array.dtype.kind not in "fiu" or latitude is None or longitude is None:
        return False
    left = [str(dim) for dim in array.dims if dim not in (latitude, longitude) and not _is_vertical(ds, str(dim))]
    any_time = any(_time_dim(ds, [str(dim)]) for other in ds.data_vars for dim in ds[other].dims)
    return _time_dim(ds, left) is not None or not any_time


def _grid_dims(ds: Dataset, array: Variable) -> tuple[str | None, str | None]:
    found = [
        next((str(dim) for dim in array.dims if any(is_coordinate(c) for c in _along(ds, str(dim)))), None)
        for is_coordinate in (_is_latitude, _is_longitude)
    ]
    return (found[0], found[1]) if found[0] != found[1] else (None, None)


def _along(ds: Dataset, dim: str) -> Iterator[Variable]:
    """1-D coordinates along a dim, its own first."""
    if dim in ds.coords:
        yield ds[dim]
    yield from (c for key, c in ds.coords.items() if c.dims == (dim,) and key != dim)


def _values_along(ds: Dataset, dim: str, is_coordinate: Any) -> Any:
    return next(c for c in _along(ds, dim) if is_coordinate(c)).values


def _text(c: Variable, key: str) -> str:
    return str(c.attrs.get(key, "")).strip().lower()


def _is_latitude(c: Variable) -> bool:
    return _is_horizontal(c, "latitude", _LATITUDE, _NORTH)


def _is_longitude(c: Variable) -> bool:
    return _is_horizontal(c, "longitude", _LONGITUDE, _EAST)


def _is_horizontal(c: Variable, standard: str, names: tuple[str, ...], units: tuple[str, ...]) -> bool:
    said = _text(c, "standard_name")
    if said.startswith("grid_"):  # of a rotated pole: not the latitude
        return False
    return said == standard or _text(c, "units") in units or str(c.name).lower() in names


def _is_vertical(ds: Dataset, dim: str) -> bool:
    if dim not in ds.coords:
        return dim.lower() in _VERTICAL
    c = ds[dim]
    return (
        dim.lower() in _VERTICAL
        or _text(c, "axis") == "z"
        or "positive" in c.attrs
        or _text(c, "standard_name") in _VERTICAL_STANDARD
        or _text(c, "units") in PRESSURE_UNITS
    )


def _is_moments(c: Variable) -> bool:
    return c.dtype.kind == "M" or (c.dtype == object and c.size > 0 and hasattr(c.values.flat[0], "calendar"))


def _time_dim(ds: Dataset, left: Sequence[str]) -> str | None:
    """Which of the dims that are left is time: one with moments, or else the only one."""
    moments = [dim for dim in left if any(_is_moments(c) for c in _along(ds, dim))]
    if moments:
        return max(moments, key=lambda dim: (ds.sizes[dim] > 1, dim in _TIME))
    longer = [dim for dim in left if ds.sizes[dim] > 1]
    named = [dim for dim in left if dim in _TIME]
    return longer[0] if len(longer) == 1 else named[0] if named else None


def _time_values(ds: Dataset, dim: str | None) -> Any:
    """Moments along a dim, or that of a file which is one time; None for none."""
    candidates: Mapping[Hashable, Variable] = {
        key: c for key, c in ds.coords.items() if c.dims == (() if dim is None else (dim,)) and _is_moments(c)
    }
    # Of forecasts, `time` is when they began and `valid_time` what they are of.
    for key in ("valid_time", dim, "time", *candidates):
        if key in candidates:
            return np.atleast_1d(candidates[key].values)
    return None


def _dims(array: Variable) -> str:
    return "(" + ", ".join(f"{dim}: {size}" for dim, size in array.sizes.items()) + ")"


def _grid_problem(ds: Dataset, array: Variable | None = None) -> str:
    """Why there is no grid of latitudes and longitudes."""
    for key in ds.variables:
        c = ds[key]
        if _is_latitude(c) and c.ndim == 2:
            return (
                f"Its latitudes ({key}) have the dims {_dims(c)}, a curvilinear grid: rows must be circles of "
                "latitude, so regrid it to regular latitudes and longitudes first"
            )
    for dim in () if array is None else array.dims:
        if any(_is_latitude(c) for c in _along(ds, str(dim))) and any(_is_longitude(c) for c in _along(ds, str(dim))):
            return f"Its points lie along one dim ({dim}): regrid it to regular latitudes and longitudes first"
    found = [_grid_dims(ds, a) for a in ([array] if array is not None else ds.data_vars.values())]
    missing = [kind for i, kind in enumerate(("latitude", "longitude")) if not any(pair[i] for pair in found)]
    dims = some(f"{dim}: {size}" for dim, size in (ds if array is None else array).sizes.items())
    return (
        f"No dim of {' or '.join(missing) or 'latitude and longitude'} is among them ({dims}): it needs a 1-D "
        "coordinate named latitude or lat, with units degrees_north, or with standard_name latitude, and the same of "
        "longitude"
    )
