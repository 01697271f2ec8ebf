"""Known fields against the almanac, and samples that use them."""

from __future__ import annotations

import math
from datetime import datetime, timezone

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from credit_parallel.app.data.forcings import Forcings, sun
from credit_parallel.app.data.source import Grid


def seconds(*when):
    return datetime(*when, tzinfo=timezone.utc).timestamp()


def grid(latitudes=(90, 66, 23.44, 0, -23.44, -90), longitudes=range(0, 360, 45)):
    return Grid(torch.tensor(latitudes, dtype=torch.float64), torch.tensor(list(longitudes), dtype=torch.float64))


@pytest.mark.parametrize(
    ("when", "declination"),
    [  # equinoxes and solstices of the almanac
        ((2019, 3, 20, 21, 58), 0.0),
        ((2019, 6, 21, 15, 54), 23.435),
        ((2019, 9, 23, 7, 50), 0.0),
        ((2019, 12, 22, 4, 19), -23.435),
        ((1970, 3, 21, 0, 57), 0.0),
        ((2040, 6, 20, 17, 46), 23.434),
    ],
)
def test_declination_of_the_almanac(when, declination):
    assert math.degrees(sun(seconds(*when))[0]) == pytest.approx(declination, abs=0.012)


@pytest.mark.parametrize(
    ("when", "minutes"),
    [((2019, 2, 11, 12), -14.2), ((2019, 11, 3, 12), 16.4), ((2019, 4, 15, 12), -0.1), ((2020, 7, 26, 12), -6.5)],
)
def test_equation_of_time(when, minutes):
    """How much the sun is early at Greenwich at noon."""
    overhead = (math.degrees(sun(seconds(*when))[1]) + 180) % 360 - 180
    assert overhead == pytest.approx(-minutes / 4, abs=0.05)


def test_noon_at_the_equinox_solstice_and_polar_night():
    forcings = Forcings(("solar",), grid(), range(6))
    assert forcings.labels == ("cos_zenith", "cos_zenith_ahead")
    at_equinox = forcings.at(seconds(2019, 3, 20, 12, 7), 0.0)[0]  # noon by the sun at Greenwich
    assert float(at_equinox[3, 0]) == pytest.approx(1, abs=1e-4)
    assert float(at_equinox[3, 4]) == 0  # midnight
    assert float(at_equinox[3, 2]) == pytest.approx(0, abs=5e-3)  # sunset
    assert float(at_equinox[1, 0]) == pytest.approx(math.cos(math.radians(66)), abs=3e-3)
    at_solstice = forcings.at(seconds(2019, 12, 22, 12), 0.0)[0]
    assert not at_solstice[:2, 0].any() or float(at_solstice[1, 0]) < 0.02  # the circle's edge
    assert not at_solstice[0].any()  # polar night
    assert float(at_solstice[4, 0]) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(at_solstice[5], torch.full((8,), math.sin(math.radians(23.436))), atol=2e-4, rtol=0)


def test_ahead_is_the_later_time():
    forcings = Forcings(("solar",), grid(), range(6))
    now, ahead = forcings.at(1e9, 21600.0)
    assert torch.equal(ahead, forcings.at(1e9 + 21600, 0.0)[0])
    assert not torch.equal(now, ahead)


def test_position_is_the_unit_vector():
    forcings = Forcings(("position",), grid(), range(6))
    x, y, z = forcings.at(None, 0.0)
    assert forcings.labels == ("position_x", "position_y", "position_z")
    torch.testing.assert_close(x**2 + y**2 + z**2, torch.ones(6, 8))
    assert float(x[3, 0]) == 1
    assert float(y[3, 2]) == 1
    assert float(z[0, 0]) == 1
    turned = Forcings(("position",), grid(longitudes=range(360, 720, 45)), range(6)).at(None, 0.0)
    torch.testing.assert_close(torch.stack([x, y, z]), turned, atol=1e-6, rtol=0)


@given(st.integers(0, 6), st.integers(0, 6), st.floats(-1e9, 3e9), st.permutations(["solar", "position"]))
def test_rows_alone_are_those_of_the_whole(a, b, when, names):
    rows = range(min(a, b), max(a, b))
    whole, own = (Forcings(names, grid(), r).at(when, 3600.0) for r in (range(6), rows))
    assert own.dtype == torch.float32
    assert own.shape == (5, len(rows), 8)
    assert torch.equal(own, whole[:, rows.start : rows.stop])


def test_none_and_what_is_refused():
    assert Forcings((), grid(), range(2, 5)).at(None, 0.0).shape == (0, 3, 8)
    assert Forcings(("solar", "position"), grid(), range(0)).count == 5
    with pytest.raises(ValueError, match="'solar' needs times that are moments"):
        Forcings(("position", "solar"), grid(), range(6)).at(None, 0.0)
    with pytest.raises(
        ValueError, match="there is no forcing 'solr'; there are solar, position. Did you mean 'solar'?"
    ):
        Forcings(("solr",), grid(), range(6))
    with pytest.raises(ValueError, match="once each"):
        Forcings(("solar", "solar"), grid(), range(6))
