"""Rossby-Haurwitz waves: exact solutions of the barotropic vorticity equation, a data set that needs no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from credit_parallel.app.data.checks import checked_number, checked_rows, checked_times, closest
from credit_parallel.app.data.source import Channel, Cost, Grid
from credit_parallel.app.data.times import TimeAxis

RADIUS = 6.37122e6
"""Of the earth, in m, as in Williamson et al. (1992)."""
OMEGA = 7.292e-5
"""Angular speed of the earth, in s-1, as there."""

_CHANNELS = {
    "u": Channel("u", units="m s-1", long_name="eastward wind"),
    "v": Channel("v", units="m s-1", long_name="northward wind"),
    "vorticity": Channel("vorticity", units="s-1", long_name="relative vorticity"),
    "streamfunction": Channel("streamfunction", units="m2 s-1", long_name="streamfunction"),
}
_START = 946684800  # 2000-01-01, in seconds since 1970


@dataclass(frozen=True)
class Wave:
    """One solution: solid-body rotation, and on it a pattern of spherical harmonics of one degree."""

    rotation: float  #: angular speed of the solid-body rotation relative to the earth, in s-1
    #: Coefficients of the orders 0 to n of the pattern's streamfunction, in m2 s-1, that multiply cos(m lon); harmonics
    #: are orthonormal over the sphere. The degree n is one less than their number.
    cosine: tuple[float, ...]
    sine: tuple[float, ...]  #: those that multiply sin(m lon); that of order 0 says nothing

    @property
    def degree(self) -> int:
        """The degree n of the pattern."""
        return len(self.cosine) - 1

    @property
    def turning(self) -> float:
        """Angular speed at which the pattern turns eastward, in s-1.

        Of the streamfunction psi = -a2 w sin(lat) + p, p of degree n, the vorticity is 2 w sin(lat) - n(n+1) p / a2. In
        d/dt vorticity + J(psi, vorticity + 2 Omega sin(lat)) = 0 the product of p with itself drops out, since its
        vorticity is a multiple of it, and dp/dt = -(w - 2 (w + Omega) / (n(n+1))) dp/dlon is left: every order turns
        at the same speed, the phase of order m at m times it.
        """
        return self.rotation - 2 * (self.rotation + OMEGA) / (self.degree * (self.degree + 1))


class RossbyHaurwitz:
    """Waves on the rotating sphere that keep their shape, known exactly at all times.

    Each trajectory is one exact solution of the barotropic vorticity equation: solid-body rotation and a random pattern
    of spherical harmonics of one degree, which turns at a speed that depends on both. It is a segment of the data;
    trajectories follow one another from 2000-01-01 on. The same seed gives the same waves at every resolution, and the
    first trajectories do not depend on how many there are.

    References: Haurwitz (1940), J. Mar. Res. 3, 254-267; Thompson (1948), J. Meteor. 5, 1-7, that these waves are exact
    on the sphere; Williamson et al. (1992), J. Comput. Phys. 102, 211-224, whose test case 6 is the wave of degree 5
    and order 4 alone. :attr:`Wave.turning` has the derivation.

    Args:
        height: Rows, from north to south.
        width: Columns, from 0 degrees eastward.
        trajectories: Number of solutions.
        times: Times of each.
        step_hours: Hours between times.
        degrees: Degrees of the patterns, taken in turn.
        pole_is_row: Whether the first and the last row lie at the poles, or half a row away from them.
        seed: Of the waves.
        variables: Some of ``u`` and ``v`` (m s-1), ``vorticity`` (s-1), ``streamfunction`` (m2 s-1).
        rotation: Range of the solid-body rotation, in s-1; 4e-6 is a westerly wind of 25 m/s at the equator.
        wind: Range of the root mean square wind of the patterns, in m s-1.

    Attributes:
        waves: The solution of each trajectory.

    Raises:
        ValueError: If an argument will not do.
    """

    name = "rossby-haurwitz"

    def __init__(
        self,
        height: int = 45,
        width: int = 90,
        *,
        trajectories: int = 8,
        times: int = 24,
        step_hours: float = 6.0,
        degrees: Sequence[int] = (4, 5, 6),
        pole_is_row: bool = False,
        seed: int = 0,
        variables: Sequence[str] = tuple(_CHANNELS),
        rotation: tuple[float, float] = (2e-6, 6e-6),
        wind: tuple[float, float] = (8.0, 16.0),
    ) -> None:
        least = {"height": 1 + bool(pole_is_row), "width": 1, "trajectories": 1, "times": 1, "seed": 0}
        given = {"height": height, "width": width, "trajectories": trajectories, "times": times, "seed": seed}
        for key, value in given.items():
            checked_number(key, value, least[key])
        if isinstance(degrees, (int, str)) or not degrees:
            raise ValueError(f"degrees must be a list of whole numbers; got {degrees!r}")
        for degree in degrees:
            checked_number("degrees", degree)
        if not _is_number(step_hours) or not step_hours > 0:
            raise ValueError(f"step_hours must be a positive number of hours; got {step_hours!r}")
        for key, ends in (("rotation", rotation), ("wind", wind)):
            pair = isinstance(ends, (list, tuple)) and len(ends) == 2 and all(map(_is_number, ends))
            if not pair or not ends[0] <= ends[1]:
                raise ValueError(f"{key} must be two numbers, the smallest and the largest; got {ends!r}")
        for variable in variables:
            if variable not in _CHANNELS:
                raise ValueError(
                    f"{self.name} has no variable {variable!r}; it has {', '.join(_CHANNELS)}"
                    f"{closest(variable, _CHANNELS)}"
                )
        if not variables or len(set(variables)) < len(variables):
            raise ValueError(f"variables must be some of {', '.join(_CHANNELS)}, each once; got {list(variables)}")
        self.channels = tuple(_CHANNELS[variable] for variable in variables)
        first, spacing = (90.0, 180 / (height - 1)) if pole_is_row else (90 - 90 / height, 180 / height)
        self.grid = Grid(
            first - spacing * torch.arange(height, dtype=torch.float64),
            torch.arange(width, dtype=torch.float64) * 360 / width,
        )
        self.waves = tuple(
            _drawn(np.random.default_rng([seed, k]), degrees[k % len(degrees)], rotation, wind)
            for k in range(trajectories)
        )
        self._step = step_hours * 3600.0
        axis = TimeAxis.from_seconds([_START + i * self._step for i in range(trajectories * times)], self.name)
        self.labels: Sequence[str] = axis.labels
        self.seconds: Sequence[float] | None = axis.seconds
        self.step: float | None = self._step
        self.segments: Sequence[range] = tuple(range(k * times, (k + 1) * times) for k in range(trajectories))

    def read(self, times: Sequence[int], rows: range) -> Tensor:
        """Fields of some times; see :class:`credit_parallel.app.data.source.Source`."""
        checked_rows(self, rows)
        out = torch.empty(len(times), len(self.channels), len(rows), self.grid.width)
        per_trajectory = len(self.segments[0])
        for i, time in enumerate(checked_times(self, times)):
            k, step = divmod(time, per_trajectory)
            fields = wave_fields(self.waves[k], self.grid, step * self._step, rows)
            for c, channel in enumerate(self.channels):
                out[i, c] = fields[channel.name]
        return out

    def cost(self, times: Sequence[int], rows: range) -> Cost:
        """Bytes that are computed; nothing is read, so nothing is read in vain."""
        computed = 4 * len(times) * len(self.channels) * len(rows) * self.grid.width
        return Cost(computed, computed)


def wave_fields(wave: Wave, grid: Grid, seconds: float, rows: range) -> dict[str, Tensor]:
    """Exact fields of a wave.

    With orthonormal associated Legendre functions cos(lat)^m q_m(sin lat), the polynomials q_m by recurrence, nothing
    is divided by the cosine of latitude, and the poles are rows like others. There u and v are the components along the
    meridian of each column.

    Args:
        seconds: Since its start.
        rows: Rows of the grid to compute.

    Returns:
        ``u``, ``v``, ``vorticity``, ``streamfunction``, each of shape (len(rows), W), float64.
    """
    n, a = wave.degree, RADIUS
    # Functions of latitude alone for all rows, so that a row is the same whichever others are asked for.
    latitudes = torch.deg2rad(grid.latitudes)
    x, cos = torch.sin(latitudes), torch.cos(latitudes)
    q = legendre(n, x)
    longitudes = torch.deg2rad(grid.longitudes) - wave.turning * seconds
    own = slice(rows.start, rows.stop)
    shape = (len(latitudes[own]), grid.width)
    pattern, eastward, northward = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for m, (cosine, sine) in enumerate(zip(wave.cosine, wave.sine, strict=True)):
        zonal = cosine * torch.cos(m * longitudes) + sine * torch.sin(m * longitudes)
        turned = m * (sine * torch.cos(m * longitudes) - cosine * torch.sin(m * longitudes))
        # d/dlat of cos^m q_m, with the derivative of q_m from q_{m+1}
        slope = cos ** (m + 1) * q[m + 1] * math.sqrt((n - m) * (n + m + 1) / (1 if m else 2))
        if m:
            slope = slope - m * x * cos ** (m - 1) * q[m]
            northward += (cos ** (m - 1) * q[m])[own, None] * turned / a
        pattern += (cos**m * q[m])[own, None] * zonal
        eastward -= slope[own, None] * zonal / a
    x, cos = x[own, None], cos[own, None]
    return {
        "u": eastward + a * wave.rotation * cos,
        "v": northward,
        "vorticity": 2 * wave.rotation * x - n * (n + 1) / a**2 * pattern,
        "streamfunction": pattern - a**2 * wave.rotation * x,
    }


def legendre(degree: int, x: Tensor) -> Tensor:
    """Orthonormal associated Legendre functions of one degree, without their factor (1 - x^2)^(m/2).

    Times that factor and cos or sin of m lon they are real spherical harmonics whose square has the integral 1 over the
    sphere (no Condon-Shortley phase). The recurrence is in the degree, at fixed order, which is stable.

    Args:
        x: Sines of latitude, of shape (H,), float64.

    Returns:
        Orders 0 to n, and zeros for n + 1, of shape (n + 2, H), float64.
    """
    out = torch.zeros(degree + 2, *x.shape, dtype=torch.float64)
    seed = math.sqrt(1 / (4 * math.pi))
    for m in range(degree + 1):
        if m:
            seed *= math.sqrt((2 * m + 1) / (2 * m) * (2 if m == 1 else 1))  # cos and sin of m > 0 have half the square
        before, here = torch.zeros_like(x), torch.full_like(x, seed)
        for k in range(m + 1, degree + 1):
            rise = math.sqrt((4 * k * k - 1) / (k * k - m * m))
            fall = math.sqrt(((k - 1) ** 2 - m * m) / (4 * (k - 1) ** 2 - 1))
            before, here = here, rise * (x * here - fall * before)
        out[m] = here
    return out


def _drawn(
    generator: np.random.Generator, degree: int, rotation: tuple[float, float], wind: tuple[float, float]
) -> Wave:
    """A random wave; its coefficients are scaled to the root mean square wind that was drawn."""
    turning, speed = generator.uniform(*rotation), generator.uniform(*wind)
    cosine, sine = generator.standard_normal(degree + 1), generator.standard_normal(degree + 1)
    sine[0] = 0.0
    # The mean of |grad p|^2 over the sphere is n(n+1)/a^2 times that of p^2.
    square = (cosine**2 + sine**2).sum() / (4 * math.pi) * degree * (degree + 1) / RADIUS**2
    scale = speed / math.sqrt(square)
    return Wave(float(turning), tuple(map(float, cosine * scale)), tuple(map(float, sine * scale)))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
