"""What a file of forecasts contains: dimensions, coordinates and variables, by the CF conventions, in any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from credit_parallel.app.data.dims import PRESSURE_UNITS
from credit_parallel.app.data.source import Channel, Grid


class Coordinate(NamedTuple):
    """A coordinate variable."""

    name: str
    dims: tuple[str, ...]  #: its own name for a coordinate of a dimension
    values: Any  #: int64, float64 or text
    attributes: dict[str, Any]  #: by the CF conventions


class Variable(NamedTuple):
    """A float32 variable with the channels of one name."""

    name: str
    dims: tuple[str, ...]  #: start, lead, a level where there are levels, latitude, longitude
    channels: tuple[int, ...]  #: in the order of its levels
    attributes: dict[str, Any]  #: by the CF conventions


@dataclass(frozen=True)
class Contents:
    """All of a file."""

    coordinates: tuple[Coordinate, ...]
    variables: tuple[Variable, ...]
    attributes: dict[str, str]  #: of the file itself

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each dimension."""
        return {c.name: len(c.values) for c in self.coordinates if c.dims == (c.name,)}

    def shape(self, variable: Variable) -> tuple[int, ...]:
        """Shape of a variable."""
        return tuple(self.sizes[dim] for dim in variable.dims)


def contents_of(
    channels: Sequence[Channel],
    grid: Grid,
    starts: Sequence[float] | Sequence[str],
    leads: Sequence[float],
    attributes: Mapping[str, str],
    valid: Sequence[Sequence[float]] | None = None,
) -> Contents:
    """Arrange channels as variables, those of one name along a level, and times as CF has them.

    The arguments, and the errors, are those of :class:`credit_parallel.app.forecast.writer.ForecastWriter`.
    """
    for what, values in (("channels", [c.label for c in channels]), ("starts", starts), ("leads", leads)):
        if not len(values) or len(set(values)) < len(values):
            raise ValueError(f"{what} must be one or more, all different; got {list(values)}")
    labelled = isinstance(starts[0], str)
    if valid is not None:
        got = np.shape(valid)
        if labelled or got != (len(starts), len(leads)):
            raise ValueError(
                f"valid must be a time for each of {len(starts)} starts, which are times, and {len(leads)} leads; got "
                f"shape {got}{' for labels' if labelled else ''}"
            )
    times = _labels(starts, leads) if labelled else _times(starts, leads, valid)
    first = tuple(c.name for c in times[:2])
    place = (
        Coordinate("latitude", ("latitude",), *_degrees(grid.latitudes, "latitude", "north", "Y")),
        Coordinate("longitude", ("longitude",), *_degrees(grid.longitudes, "longitude", "east", "X")),
    )
    levels: dict[tuple[Any, ...], Coordinate] = {}
    variables = []
    for name in dict.fromkeys(c.name for c in channels):
        mine = tuple(at for at, c in enumerate(channels) if c.name == name)
        dims = first
        if channels[mine[0]].level is not None or len(mine) > 1:
            dims = (*first, _level([channels[at] for at in mine], levels).name)
        told = channels[mine[0]]
        found = {"units": told.units, "long_name": told.long_name or name}
        if not labelled:
            found["coordinates"] = "valid_time"
        variables.append(Variable(name, (*dims, "latitude", "longitude"), mine, found))
    coordinates = (*times, *levels.values(), *place)
    taken = {c.name for c in coordinates} & {v.name for v in variables}
    if taken:
        raise ValueError(f"a forecast has a coordinate {', '.join(sorted(taken))}; a variable needs another name")
    return Contents(coordinates, tuple(variables), {"Conventions": "CF-1.11", **attributes})


def _times(
    starts: Sequence[Any], leads: Sequence[float], known: Sequence[Sequence[float]] | None
) -> tuple[Coordinate, ...]:
    begin, ahead = np.asarray(starts, np.float64), np.asarray(leads, np.float64)
    at = ("forecast_reference_time", "lead_time" if known is None else "lead_step")
    since = {"calendar": "proleptic_gregorian"}
    values, unit = _in_hours(begin)
    reference = {
        "standard_name": "forecast_reference_time",
        "long_name": "initial time of the forecast",
        "units": f"{unit} since 1970-01-01 00:00:00",
        **since,
    }
    later, later_unit = _in_hours(ahead)
    # `dtype` is what xarray writes for time differences, and asks for to read them as such.
    period = {
        "standard_name": "forecast_period",
        "long_name": "time since the initial time",
        "units": later_unit,
        "dtype": "timedelta64[ns]",
    }
    valid, valid_unit = _in_hours(begin[:, None] + ahead if known is None else np.asarray(known, np.float64))
    of = {
        "standard_name": "time",
        "long_name": "time that the forecast is for",
        "units": f"{valid_unit} since 1970-01-01 00:00:00",
        **since,
    }
    return (
        Coordinate(at[0], at[:1], values, reference),
        Coordinate(at[1], at[1:], later, period) if known is None else _steps(leads),
        Coordinate("valid_time", at, valid, of),
    )


def _labels(starts: Sequence[Any], leads: Sequence[float]) -> tuple[Coordinate, ...]:
    return (
        Coordinate("start", ("start",), np.asarray(starts, np.str_), {"long_name": "initial state of the forecast"}),
        _steps(leads),
    )


def _steps(leads: Sequence[float]) -> Coordinate:
    found = {"long_name": "steps from the initial state", "units": "1"}
    return Coordinate("lead_step", ("lead_step",), np.asarray(leads), found)


def _in_hours(seconds: Any) -> tuple[Any, str]:
    """Whole hours where they are, otherwise seconds; int64 where these are whole."""
    if (seconds % 3600 == 0).all():
        return (seconds // 3600).astype(np.int64), "hours"
    whole = (seconds == np.floor(seconds)).all()
    return (seconds.astype(np.int64) if whole else seconds), "seconds"


def _degrees(values: Any, name: str, direction: str, axis: str) -> tuple[Any, dict[str, str]]:
    found = {"standard_name": name, "long_name": name, "units": f"degrees_{direction}", "axis": axis}
    return values.to("cpu").double().numpy(), found


def _level(channels: Sequence[Channel], levels: dict[tuple[Any, ...], Coordinate]) -> Coordinate:
    """The vertical coordinate of the channels of a variable; variables with other levels have another one."""
    values, units = [c.level for c in channels], channels[0].level_units
    if None in values:
        raise ValueError(
            f"{channels[0].name} is there with a level and without one; give one of them another name in the data"
        )
    key = (units, *values)
    if key not in levels:
        found = {"long_name": "level", "units": units or "1", "axis": "Z"}
        if units.lower() in PRESSURE_UNITS:
            found |= {"standard_name": "air_pressure", "long_name": "pressure", "positive": "down"}
        name = f"level{len(levels) + 1}" if levels else "level"
        levels[key] = Coordinate(name, (name,), np.asarray(values, np.float64), found)
    return levels[key]
