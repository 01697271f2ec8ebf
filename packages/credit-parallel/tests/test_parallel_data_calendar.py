"""Times that follow one another on the calendar, and coordinates that are off by the rounding of float32."""

from __future__ import annotations

import calendar
import re
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from credit_parallel.app.config import DataConfig, RunConfig
from credit_parallel.app.data.files import FileSource
from credit_parallel.app.data.forcings import Forcings
from credit_parallel.app.data.opening import open_source
from credit_parallel.app.data.samples import Samples, lead_in_steps, sample_starts
from credit_parallel.app.data.statistics import Statistics, compute_statistics
from credit_parallel.app.data.times import TimeAxis, seconds_ahead
from credit_parallel.app.forecast import ForecastWriter, open_writer, run_forecast
from credit_parallel.app.training.experiment import check, prepare
from credit_parallel.latitudes import checked_latitudes
from credit_parallel.losses import cos_latitude_weights, latitude_weights

xr = pytest.importorskip("xarray", reason="the extra 'data' is not installed")
pytest.importorskip("netCDF4", reason="the extra 'data' is not installed")

EPOCH = datetime(1970, 1, 1)


def month(index: int) -> datetime:
    return datetime(index // 12, index % 12 + 1, 1)


def moment(index: int, place: str, months: int, extra: timedelta) -> datetime:
    """The time of a month, by plain dates."""
    start, days = month(index), calendar.monthrange(index // 12, index % 12 + 1)[1]
    if place == "start":
        return start + extra
    if place == "last day":
        return start + timedelta(days=days - 1) + extra
    if place == "30th":
        return start + timedelta(days=min(days, 30) - 1) + extra
    first = month(index - months // 2)
    return first + (month(index - months // 2 + months) - first) / 2


def in_seconds(moments) -> list[float]:
    return [(each - EPOCH).total_seconds() for each in moments]


def dataset(time, lat=None, lon=None, seed=0):
    lat = np.linspace(90, -90, 7) if lat is None else lat
    lon = np.arange(0, 360, 45.0) if lon is None else lon
    values = np.random.default_rng(seed).standard_normal((len(time), len(lat), len(lon)), np.float32)
    return xr.Dataset({"t": (("time", "lat", "lon"), values)}, {"time": time, "lat": lat, "lon": lon})


def opened(tmp_path, ds, name="a.nc"):
    ds.to_netcdf(tmp_path / name)
    return open_source(DataConfig(source=str(tmp_path / name)))


# Times


@given(
    first=st.integers(1900 * 12, 2080 * 12),
    months=st.sampled_from([1, 1, 2, 3, 4, 6, 12, 24]),
    count=st.integers(13, 40),
    place=st.sampled_from(["start", "last day", "30th", "middle"]),
    hours=st.integers(0, 23),
    days=st.integers(0, 27),
    data=st.data(),
)
def test_calendar_steps_are_one_series_and_a_gap_splits_it(first, months, count, place, hours, days, data):
    if place == "middle":
        months = {2: 1, 4: 1, 6: 3, 24: 12}.get(months, months)  # the middle of two months may lie in either
        first -= (first - 6) % 12 if months == 12 else 0  # of calendar years
    extra = timedelta(days=days if place == "start" else 0, hours=hours)
    if place == "30th" and hours == 0 and months % 12 == 0:
        place = "start"
    moments = [moment(first + i * months, place, months, extra) for i in range(count + 5)]
    axis = TimeAxis.from_seconds(in_seconds(moments[:count]), "x")
    assert axis.segments == (range(count),)
    if axis.calendar is None:  # all months have as many days
        assert len(set(np.diff(in_seconds(moments[:count])).tolist())) == 1
        return
    assert (axis.calendar.months, axis.step) == (months, None)
    at = data.draw(st.integers(0, count - 1))
    for steps in range(-at, count + 5 - at):
        ahead = axis.calendar.ahead(axis.seconds[at], steps)
        assert EPOCH + timedelta(seconds=axis.seconds[at] + ahead) == moments[at + steps]
    gone = data.draw(st.integers(1, count - 2))
    left = TimeAxis.from_seconds(in_seconds([*moments[:gone], *moments[gone + 1 : count]]), "x")
    assert left.segments == (range(gone), range(gone, count - 1))
    assert left.calendar is not None
    assert left.calendar.months == months


@given(st.sampled_from([1, 6, 24, 120, 24 * 7]), st.integers(2, 200), st.integers(0, 10**6))
def test_equal_steps_stay_equal_steps(hours, count, first):
    axis = TimeAxis.from_seconds([3600.0 * (first + i * hours) for i in range(count)], "x")
    assert (axis.step, axis.calendar, axis.segments) == (3600.0 * hours, None, (range(count),))


@pytest.mark.parametrize(
    ("starts", "then"),
    [
        (["2021-07-01", "2021-08-01"], "2021-09-01"),
        (["2020-04-01", "2020-10-01"], "2021-04-01"),
        (["2021-01-01", "2022-01-01", "2023-01-01"], "2024-01-01"),
        (["2021-04-30", "2021-06-30"], "2021-08-31"),
        (["2022-11-30", "2022-12-31", "2023-01-31"], "2023-02-28"),
        (["2021-02-28", "2022-02-28", "2023-02-28"], "2024-02-28"),
    ],
)
def test_few_times_go_on_by_the_calendar(starts, then):
    *seconds, wanted = (float(np.datetime64(text, "s").astype(np.int64)) for text in (*starts, then))
    axis = TimeAxis.from_seconds(seconds, "x")
    assert axis.segments == (range(len(starts)),)
    assert seconds[-1] + axis.calendar.ahead(seconds[-1], 1) == wanted


@pytest.mark.parametrize("freq", ["MS", "ME", "QS-DEC", "QE", "YS", "YE"])
def test_samples_of_calendar_steps(tmp_path, freq):
    time = xr.date_range("1990-01-01", periods=48, freq=freq)
    source = opened(tmp_path, dataset(time))
    assert len(sample_starts(source, lead_steps=1)) == 47
    assert len(sample_starts(source, lead_steps=1, history=2)) == 46
    assert len(sample_starts(source, lead_steps=1, steps=3)) == 45
    assert len(sample_starts(source, lead_steps=12, steps=2)) == 24
    gap = opened(tmp_path, dataset(time.delete(20)), "gap.nc")
    assert gap.segments == (range(20), range(20, 47))
    assert len(sample_starts(gap, lead_steps=1)) == 45


def test_a_month_in_each_file(tmp_path):
    ds = dataset(xr.date_range("1999-11-01", periods=6, freq="MS"))
    for i in range(6):
        ds.isel(time=[i]).to_netcdf(tmp_path / f"{i}.nc")
    source = open_source(DataConfig(source=f"{tmp_path}/*.nc"))
    assert source.segments == (range(6),)
    assert source.step is None
    assert str(source.calendar) == "1 month"


def test_leads_of_calendar_steps_are_counted_in_times(tmp_path):
    monthly = opened(tmp_path, dataset(xr.date_range("1990-01-01", periods=24, freq="MS")))
    assert [lead_in_steps(monthly, lead) for lead in (1, "2", 12)] == [1, 2, 12]
    for lead in ("6h", "30d", "744h", "31d"):
        with pytest.raises(
            ValueError, match=f"lead='{lead}' is a time, and its times are 1 month apart.*number of times"
        ):
            lead_in_steps(monthly, lead)
    daily = opened(tmp_path, dataset(xr.date_range("1990-01-01", periods=62, freq="D")), "daily.nc")
    assert lead_in_steps(daily, "744h") == 31


# Forcings and forecasts know when the target is


@pytest.fixture
def monthly(tmp_path):
    return opened(tmp_path, dataset(xr.date_range("2019-11-30", periods=18, freq="ME")))


def test_the_sun_of_the_target_is_that_of_its_month(monthly):
    statistics = Statistics(*torch.ones(3, 1))
    samples = Samples(monthly, range(7), statistics, lead_steps=2, steps=2, forcings=("solar",))
    sun = Forcings(("solar",), monthly.grid, range(7))
    for index in range(len(samples)):
        start = samples.start(index)
        for step, known in enumerate(samples[index][1]):
            a, b = (monthly.seconds[start + 2 * (step + later)] for later in (0, 1))
            assert torch.equal(known, sun.at(a, b - a))


def experiment_of(source, path, forcings):
    conf = {
        "data": {"source": path, "lead": 1, "history": 2, "forcings": forcings},
        "model": {"name": "unet", "width": 4, "levels": 1, "groups": 2},
        "trainer": {"steps": 1, "dtype": "float64", "device": "cpu"},
    }
    statistics = compute_statistics(source, range(len(source.labels)), 1, range(7), None)
    return prepare(check(RunConfig.from_dict(conf), 1, training=False), torch.device("cpu"), statistics)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_forecasts_go_on_by_months(tmp_path, monthly, suffix, monkeypatch):
    pytest.importorskip("zarr")
    experiment = experiment_of(monthly, monthly.paths[0], ["solar"])
    asked = []
    at = Forcings.at

    def seen(self, seconds, ahead):
        asked.append((seconds, ahead))
        return at(self, seconds, ahead)

    monkeypatch.setattr(Forcings, "at", seen)
    starts, steps = [2, 16], 4
    with open_writer(experiment, tmp_path / f"f{suffix}", starts, steps) as writer:
        found = run_forecast(experiment, starts, steps, writer=writer)
    assert found["lead_seconds"] is None
    assert found["scored"] == [2, 1, 1, 1]
    with xr.open_dataset(tmp_path / f"f{suffix}", engine="zarr" if suffix == ".zarr" else "netcdf4") as ds:
        assert ds.t.dims[:2] == ("forecast_reference_time", "lead_step")
        assert ds.lead_step.values.tolist() == [1, 2, 3, 4]
        wanted = [
            ["2020-02-29", "2020-03-31", "2020-04-30", "2020-05-31"],
            ["2021-04-30", "2021-05-31", "2021-06-30", "2021-07-31"],
        ]
        assert np.datetime_as_string(ds.valid_time.values, unit="D").tolist() == wanted
    targets = np.array(wanted, "datetime64[s]").astype(np.int64)
    assert [a + b for a, b in asked] == targets.flatten().tolist()


def test_valid_times_must_fit(tmp_path, monthly):
    for starts, valid in (([0.0], [[1.0]]), (["january"], [[1.0, 2.0]])):
        with pytest.raises(ValueError, match="valid must be a time for each of 1 starts"):
            ForecastWriter(tmp_path / "f.nc", monthly.channels, monthly.grid, starts, [1, 2], valid=valid)


def test_the_sun_after_a_single_time_is_refused(tmp_path):
    source = opened(tmp_path, dataset(xr.date_range("2019-11-30", periods=1, freq="ME")))
    assert seconds_ahead(source, 0, 1) is None
    conf = {
        "data": {"source": str(tmp_path / "a.nc"), "forcings": ["solar"], "train": [0, 1], "valid": None},
        "model": {"name": "unet"},
        "trainer": {"steps": 1},
    }
    with pytest.raises(ValueError, match="'solar' needs the time of the target, and the data have one time"):
        check(RunConfig.from_dict(conf), 1, training=False)


# Coordinates that were radians in float32


def rounded(degrees):
    return np.rad2deg(np.deg2rad(degrees).astype(np.float32).astype(np.float64))


@given(st.integers(2, 2000), st.booleans(), st.booleans())
def test_rounded_latitudes_are_latitudes(rows, north_first, single):
    exact = np.linspace(90, -90, rows)[:: 1 if north_first else -1].copy()
    given_ = rounded(exact).astype(np.float32) if single else rounded(exact)
    found = checked_latitudes(torch.from_numpy(given_))
    assert found[[0, -1]].tolist() == exact[[0, -1]].tolist()
    assert torch.equal(found[1:-1], torch.from_numpy(given_[1:-1]).double())
    for weights in (cos_latitude_weights, latitude_weights):
        got, wanted = weights(torch.from_numpy(given_)), weights(torch.from_numpy(exact))
        torch.testing.assert_close(got, wanted, atol=1e-7 * (rows + 1), rtol=0)  # thin rows feel it more
        assert (got >= 0).all()


@pytest.mark.parametrize("north_first", [True, False])
def test_a_file_with_rounded_latitudes(tmp_path, north_first):
    exact = np.linspace(90, -90, 13)[:: 1 if north_first else -1]
    assert np.abs(rounded(exact)).max() > 90 + 1e-6
    time = xr.date_range("2020-01-01", periods=4, freq="6h")
    source = opened(tmp_path, dataset(time, lat=rounded(exact)))
    assert source.grid.latitudes[[0, -1]].tolist() == exact[[0, -1]].tolist()
    np.testing.assert_array_equal(source.grid.latitudes[1:-1], rounded(exact)[1:-1])
    found = compute_statistics(source, range(4), 1, range(13), None)
    plain = compute_statistics(opened(tmp_path, dataset(time, lat=exact), "b.nc"), range(4), 1, range(13), None)
    torch.testing.assert_close(found.mean, plain.mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("latitudes", "told"),
    [
        ([91.0, 0.0, -90.0], "within -90 to 90 degrees; got 91 at index 0"),
        ([90.0, 0.0, -90.0002], "within -90 to 90 degrees; got -90.0002 at index 2"),
        ([90.0, np.nan, -90.0], "within -90 to 90 degrees; got nan at index 1"),
        ([90.0, 10.0, 20.0, -90.0], "10 at index 1 is followed by 20"),
        ([90.0, 10.0, 10.0, -90.0], "10 at index 1 is followed by 10"),
        ([90.0000025, 90.0, -90.0], "90 at index 0 is followed by 90"),
    ],
)
def test_wrong_latitudes_are_told_with_their_digits(tmp_path, latitudes, told):
    time = xr.date_range("2020-01-01", periods=2, freq="6h")
    with pytest.raises(ValueError, match=re.escape(told)):
        opened(tmp_path, dataset(time, lat=np.array(latitudes)))
    with pytest.raises(ValueError, match=re.escape(told)):
        latitude_weights(torch.tensor(latitudes, dtype=torch.float64))


@pytest.mark.parametrize("shift", [360.0, -1e-5, 359.99999])
def test_files_on_one_grid_but_for_rounding(tmp_path, shift):
    time, lat = xr.date_range("2020-01-01", periods=4, freq="6h"), np.linspace(90, -90, 7)
    lon = np.arange(0, 360, 45.0)
    dataset(time[:2]).to_netcdf(tmp_path / "0.nc")
    other = lon.copy()
    other[0] += shift
    dataset(time[2:], rounded(lat), other).to_netcdf(tmp_path / "1.nc")
    source = FileSource([tmp_path / "0.nc", tmp_path / "1.nc"])
    assert len(source.labels) == 4
    assert source.grid.periodic
    dataset(time[2:], lat, lon + 0.01).to_netcdf(tmp_path / "1.nc")
    with pytest.raises(ValueError, match=r"other longitudes than .*, by up to 0\.01 degrees"):
        FileSource([tmp_path / "0.nc", tmp_path / "1.nc"])


@given(st.integers(3, 1500), st.floats(-1e-5, 1e-5))
def test_rounded_longitudes_go_round(width, shift):
    from credit_parallel.app.data.source import Grid

    degrees = rounded(np.arange(width) * 360 / width) + shift
    for values in (degrees, np.where(degrees < 0, degrees + 360, degrees)):
        assert Grid(torch.zeros(1), torch.from_numpy(values)).periodic
