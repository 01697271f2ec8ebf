"""Rossby-Haurwitz waves against the equation that they solve, and against published and independent formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import sph_harm_y

from credit_parallel.app.config import DataConfig
from credit_parallel.app.data.opening import open_source
from credit_parallel.app.data.rossby_haurwitz import OMEGA, RADIUS, RossbyHaurwitz, Wave, legendre, wave_fields
from credit_parallel.app.data.source import Cost, Grid

ALL = ("u", "v", "vorticity", "streamfunction")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def fields_at(wave, latitude, longitude, seconds):
    grid = Grid(double(latitude), double(longitude))
    return {name: float(field) for name, field in wave_fields(wave, grid, seconds, range(1)).items()}


@pytest.mark.parametrize("degree", [1, 4, 5, 60])
def test_harmonics_are_those_of_scipy(degree):
    latitudes, longitude = double(-90, -71.5, -3, 0, 12.25, 60, 89, 90).deg2rad(), 0.7
    own = legendre(degree, torch.sin(latitudes))
    assert own.shape == (degree + 2, len(latitudes))
    assert not own[-1].any()
    for m in range(degree + 1):
        theirs = torch.from_numpy(sph_harm_y(degree, m, math.pi / 2 - latitudes.numpy(), longitude).real)
        theirs *= (-1) ** m * (math.sqrt(2) if m else 1)
        ours = own[m] * torch.cos(latitudes) ** m * math.cos(m * longitude)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def residual(wave, latitude, longitude, seconds, h):
    """Of d/dt vorticity + u/(a cos) d/dlon vorticity + v/a d/dlat (vorticity + f), by differences of width h."""
    degrees = math.degrees(h)

    def at(north=0.0, east=0.0, later=0.0):
        return fields_at(wave, latitude + north, longitude + east, seconds + later)

    def slope(**step):
        ahead = at(**step)["vorticity"] - at(**{key: -value for key, value in step.items()})["vorticity"]
        return ahead / 2

    here, cos = at(), math.cos(math.radians(latitude))
    planetary = 2 * OMEGA * cos
    terms = (
        slope(later=h / OMEGA) / (h / OMEGA),
        here["u"] / (RADIUS * cos) * slope(east=degrees) / h,
        here["v"] / RADIUS * (slope(north=degrees) / h + planetary),
    )
    return abs(sum(terms)) / max(map(abs, terms))


@pytest.mark.parametrize("k", range(3))
def test_waves_solve_the_barotropic_vorticity_equation(k):
    wave = RossbyHaurwitz(trajectories=3, seed=5).waves[k]
    for point in ((-47.3, 20.0, 9e4), (11.0, 200.0, 0.0), (78.0, 300.0, 4e5)):
        coarse, fine = (residual(wave, *point, h) for h in (0.02, 0.002))
        assert fine < 1e-4
        assert fine < coarse / 50  # of second order: a hundredth


def test_a_wrong_speed_is_seen():
    class Stuck(Wave):
        turning = 1.1 * RossbyHaurwitz(seed=5).waves[0].turning

    wave = RossbyHaurwitz(seed=5).waves[0]
    assert residual(Stuck(wave.rotation, wave.cosine, wave.sine), 11.0, 200.0, 0.0, 0.002) > 1e-2


@pytest.mark.parametrize("k", range(3))
def test_winds_and_vorticity_belong_to_the_streamfunction(k):
    wave = RossbyHaurwitz(trajectories=3).waves[k]
    h = 1e-4
    degrees = math.degrees(h)
    for latitude, longitude in ((33.0, 10.0), (-80.0, 100.0), (0.0, 359.0)):
        phi = math.radians(latitude)

        def at(north=0, east=0, latitude=latitude, longitude=longitude):
            return fields_at(wave, latitude + north * degrees, longitude + east * degrees, 1e5)

        here, n, s, e, w = at(), at(1), at(-1), at(0, 1), at(0, -1)
        psi = "streamfunction"
        assert here["u"] == pytest.approx(-(n[psi] - s[psi]) / (2 * h * RADIUS), rel=1e-5, abs=1e-4)
        assert here["v"] == pytest.approx((e[psi] - w[psi]) / (2 * h * RADIUS * math.cos(phi)), rel=1e-5, abs=1e-4)
        around = (e["v"] - w["v"]) / (2 * h * math.cos(phi))
        across = (n["u"] * math.cos(phi + h) - s["u"] * math.cos(phi - h)) / (2 * h * math.cos(phi))
        assert here["vorticity"] == pytest.approx((around - across) / RADIUS, rel=1e-5, abs=1e-10)


def test_the_wave_of_williamson_et_al():
    """Test case 6: psi = -a2 w sin + a2 K cos^R sin cos(R lon), with its u, v, vorticity and angular speed."""
    w = K = 7.848e-6
    R = 4
    latitudes, longitudes = torch.linspace(-90, 90, 37, dtype=torch.float64), double(0, 13, 45, 200, 359)
    unit = float(legendre(R + 1, double(0.5))[R] / 0.5)  # the polynomial of order R is a multiple of x
    wave = Wave(w, (*[0.0] * R, RADIUS**2 * K / unit, 0.0), (0.0,) * (R + 2))
    speed = (R * (3 + R) * w - 2 * OMEGA) / ((1 + R) * (2 + R))
    assert wave.turning == pytest.approx(speed, rel=1e-12)
    seconds = 3 * 86400.0
    sin, cos = torch.sin(latitudes.deg2rad())[:, None], torch.cos(latitudes.deg2rad())[:, None]
    phase = R * (longitudes.deg2rad() - speed * seconds)
    expected = {
        "u": RADIUS * w * cos + RADIUS * K * cos ** (R - 1) * (R * sin**2 - cos**2) * torch.cos(phase),
        "v": -RADIUS * K * R * cos ** (R - 1) * sin * torch.sin(phase),
        "vorticity": 2 * w * sin - K * sin * cos**R * (R**2 + 3 * R + 2) * torch.cos(phase),
        "streamfunction": -(RADIUS**2) * w * sin + RADIUS**2 * K * cos**R * sin * torch.cos(phase),
    }
    got = wave_fields(wave, Grid(latitudes, longitudes), seconds, range(37))
    for name in ALL:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-10, atol=1e-12 * float(expected[name].abs().max())
        )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 23), st.integers(1, 17), st.booleans(), st.integers(0, 5), st.data(), st.permutations(ALL).map(tuple)
)
def test_rows_alone_are_those_of_the_whole(height, width, pole_is_row, seed, data, variables):
    source = RossbyHaurwitz(
        height, width, trajectories=2, times=3, pole_is_row=pole_is_row, seed=seed, variables=variables
    )
    start = data.draw(st.integers(0, height - 1))
    rows = range(start, data.draw(st.integers(start + 1, height)))
    times = data.draw(st.lists(st.integers(0, 5), max_size=4))
    whole = source.read(times, range(height))
    assert whole.dtype == torch.float32
    assert whole.shape == (len(times), 4, height, width)
    assert torch.equal(source.read(times, rows), whole[:, :, rows.start : rows.stop])
    assert source.cost(times, rows) == Cost(*[4 * len(times) * 4 * len(rows) * width] * 2)


def test_rows_at_the_poles_are_the_limits_of_their_neighbours():
    source = RossbyHaurwitz(19, 36, pole_is_row=True)
    near = Grid(double(90 - 1e-7, 90), source.grid.longitudes)
    for wave in source.waves:
        fields = wave_fields(wave, near, 0.0, range(2))
        for name, field in fields.items():
            assert field.isfinite().all()
            torch.testing.assert_close(field[0], field[1], rtol=1e-6, atol=1e-6 * float(field.abs().max()), msg=name)
        # a scalar has one value at the pole; a wind blows in one direction, whose components turn with the meridian
        for name in ("vorticity", "streamfunction"):
            assert float(fields[name][1].std()) < 1e-9 * abs(float(fields[name][1].mean()))
        speed = torch.hypot(fields["u"][1], fields["v"][1])
        torch.testing.assert_close(speed, speed[:1].expand_as(speed), rtol=1e-9, atol=0)
        assert float(speed[0]) > 1e-3


def test_winds_are_like_those_of_the_atmosphere():
    source = RossbyHaurwitz(seed=3)
    fields = source.read(range(0, 192, 24), range(45)).double()
    weights = torch.cos(source.grid.latitudes.deg2rad())[:, None]
    solid = torch.tensor([wave.rotation for wave in source.waves])[:, None, None] * RADIUS * weights
    winds = (((fields[:, 0] - solid) ** 2 + fields[:, 1] ** 2) * weights).mean((1, 2)) / weights.mean()
    assert ((winds.sqrt() > 7.9) & (winds.sqrt() < 16.1)).all()
    assert (fields[:, :2].abs().amax((1, 2, 3)) < 120).all()


def test_seeds_resolutions_and_numbers_of_trajectories():
    one, same, other = RossbyHaurwitz(seed=1), RossbyHaurwitz(9, 12, seed=1, trajectories=3), RossbyHaurwitz(seed=2)
    assert one.waves[:3] == same.waves
    assert one.waves[0] != other.waves[0]
    assert [wave.degree for wave in one.waves] == [4, 5, 6, 4, 5, 6, 4, 5]
    assert torch.equal(one.read([30], range(45)), RossbyHaurwitz(seed=1).read([30], range(45)))


def test_times_and_segments():
    source = RossbyHaurwitz(6, 8, trajectories=3, times=4, step_hours=1.5)
    assert source.segments == (range(4), range(4, 8), range(8, 12))
    assert source.step == 5400
    assert source.labels[:3] == ("2000-01-01T00:00", "2000-01-01T01:30", "2000-01-01T03:00")
    assert source.seconds[1] - source.seconds[0] == 5400
    assert source.grid.periodic
    assert [channel.label for channel in source.channels] == list(ALL)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"height": 0}, "height must be a whole number, 1 or more; got 0"),
        ({"height": 1, "pole_is_row": True}, "height must be a whole number, 2 or more"),
        ({"degrees": 5}, "degrees must be a list"),
        ({"degrees": [0]}, "degrees must be a whole number, 1 or more; got 0"),
        ({"degrees": []}, "degrees must be a list"),
        ({"step_hours": -1}, "step_hours must be a positive"),
        ({"rotation": [2, 1]}, "rotation must be two numbers"),
        ({"wind": 3}, "wind must be two numbers"),
        ({"variables": ("w",)}, "has no variable 'w'; it has u, v, vorticity, streamfunction"),
        ({"variables": ("u", "u")}, "each once"),
        ({"trajectories": 2.0}, "trajectories must be a whole number"),
    ],
)
def test_arguments_that_will_not_do(options, match):
    with pytest.raises(ValueError, match=match):
        RossbyHaurwitz(**options)


def test_reading_what_is_not_there():
    source = RossbyHaurwitz(6, 8)
    with pytest.raises(ValueError, match=r"rows must be a range within 0 to 6; got range\(3, 7\)"):
        source.read([0], range(3, 7))
    with pytest.raises(ValueError, match="times are 0 to 191; got 192"):
        source.read([192], range(6))


def test_opened_from_a_configuration():
    source = open_source(DataConfig(variables=("v", "u"), options={"height": 6, "width": 8, "degrees": [3]}))
    assert isinstance(source, RossbyHaurwitz)
    assert [channel.name for channel in source.channels] == ["v", "u"]
    assert source.waves[0].degree == 3
    with pytest.raises(ValueError, match="data.options.hieght: .* no such option; .*Did you mean 'height'?"):
        open_source(DataConfig(options={"hieght": 6}))
    with pytest.raises(ValueError, match="has no levels"):
        open_source(DataConfig(levels=(500.0,)))
