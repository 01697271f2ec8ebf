"""Fields that are known in advance, at any time: where the sun is, and where each column of the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from credit_parallel.app.data.checks import closest
from credit_parallel.app.data.source import Grid

_LABELS = {"solar": ("cos_zenith", "cos_zenith_ahead"), "position": ("position_x", "position_y", "position_z")}


class Forcings:
    """Fields that a model is given besides the state, for this rank's rows.

    - ``solar``: the cosine of the sun's angle from the zenith, 0 at night, at the time of the input and at that of the
      target; see :func:`sun`.
    - ``position``: the unit vector (cos lat cos lon, cos lat sin lon, sin lat), which has no seam at any longitude and
      no jump at the poles.

    Args:
        names: Some of ``solar`` and ``position``, in the order of the channels.
        grid: The whole grid.
        rows: This rank's rows.

    Attributes:
        labels: A name for each channel.

    Raises:
        ValueError: If a name is unknown, or comes twice.
    """

    def __init__(self, names: Sequence[str], grid: Grid, rows: range) -> None:
        for name in names:
            if name not in _LABELS:
                known = ", ".join(_LABELS)
                raise ValueError(f"there is no forcing {name!r}; there are {known}{closest(name, _LABELS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"forcings must be named once each; got {', '.join(names)}")
        self.names = tuple(names)
        self.labels = tuple(label for name in names for label in _LABELS[name])
        # Functions of latitude and of longitude alone, of the whole grid: rows are the same whoever computes them.
        latitudes = torch.deg2rad(grid.latitudes)
        self._longitudes = torch.deg2rad(grid.longitudes)
        self._sin, self._cos = (f(latitudes)[rows.start : rows.stop, None] for f in (torch.sin, torch.cos))

    @property
    def count(self) -> int:
        """Number of channels."""
        return len(self.labels)

    def at(self, seconds: float | None, ahead: float | None) -> Tensor:
        """The fields for one step of a model.

        Args:
            seconds: Since 1970-01-01, UTC, of the input; None where the data's times are no moments.
            ahead: Seconds from there to the target; None where nothing says, as of a single time.

        Returns:
            float32 of shape (F, rows, W).

        Raises:
            ValueError: For ``solar`` without a time, or without that of the target.
        """
        fields: list[Tensor] = []
        for name in self.names:
            if name == "position":
                around = torch.ones_like(self._longitudes)
                cos, sin = torch.cos(self._longitudes), torch.sin(self._longitudes)
                fields += [self._cos * cos, self._cos * sin, self._sin * around]
            elif seconds is None:
                raise ValueError("the forcing 'solar' needs times that are moments, and those of the data are labels")
            elif ahead is None:
                raise ValueError(
                    "the forcing 'solar' needs the time of the target, and the data have one time, which does not say "
                    "how long a lead is: give data with two times or more"
                )
            else:
                fields += [self._cos_zenith(seconds), self._cos_zenith(seconds + ahead)]
        if not fields:
            return torch.empty(0, len(self._sin), len(self._longitudes))
        return torch.stack(fields).to(torch.float32)

    def _cos_zenith(self, seconds: float) -> Tensor:
        declination, overhead = sun(seconds)
        hour_angle = self._longitudes - overhead
        return (self._sin * math.sin(declination) + self._cos * math.cos(declination) * torch.cos(hour_angle)).clamp(
            min=0
        )


def sun(seconds: float) -> tuple[float, float]:
    """Where the sun is overhead: its declination, and the longitude in which it is noon, in radians.

    The Astronomical Almanac's approximation as given by Michalsky (1988), Solar Energy 40, 227-235: within 0.01 degrees
    from 1950 to 2050.

    Args:
        seconds: Since 1970-01-01, UTC.
    """
    days = seconds / 86400 - 10957.5  # since noon of 2000-01-01
    mean_longitude = 280.460 + 0.9856474 * days
    anomaly = math.radians(357.528 + 0.9856003 * days)
    ecliptic = math.radians(mean_longitude + 1.915 * math.sin(anomaly) + 0.020 * math.sin(2 * anomaly))
    obliquity = math.radians(23.439 - 0.0000004 * days)
    declination = math.asin(math.sin(obliquity) * math.sin(ecliptic))
    right_ascension = math.atan2(math.cos(obliquity) * math.sin(ecliptic), math.cos(ecliptic))
    sidereal_hours = 6.697375 + 0.0657098242 * days + seconds % 86400 / 3600  # at Greenwich
    return declination, right_ascension - math.radians(15 * sidereal_hours)
