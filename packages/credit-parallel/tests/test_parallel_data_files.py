"""Files of every kind, read in rows, against a plain read with xarray."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pickle
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from credit_mesh import RowPartition
from credit_parallel.app.config import DataConfig
from credit_parallel.app.data.files import FileSource, chunking_warning
from credit_parallel.app.data.opening import open_source
from credit_parallel.app.data.source import Cost

xr = pytest.importorskip("xarray", reason="the extra 'data' is not installed")
pytest.importorskip("netCDF4", reason="the extra 'data' is not installed")

DATA = Path(os.environ.get("CREDIT_TEST_DATA") or Path(__file__).parents[4] / "shared" / "data")
HOUR = np.timedelta64(1, "h")
ZARR_3 = not importlib.util.find_spec("zarr") or int(importlib.metadata.version("zarr").split(".")[0]) >= 3
STORE_3 = pytest.param("store3", marks=pytest.mark.skipif(not ZARR_3, reason="Zarr 2 writes format 2 alone"))


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA} (CREDIT_TEST_DATA)")
    return str(DATA / name)


def plain(path, names, **options):
    """All values as xarray reads them: (time, channel, latitude, longitude)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with xr.open_dataset(path, **options) as ds:
            arrays = [ds[name].values.astype(np.float32) for name in names]
    return torch.from_numpy(np.concatenate([a if a.ndim == 4 else a[:, None] for a in arrays], 1))


def made(times=10, height=9, width=6, levels=(200, 500, 850), *, seed=0, start="2001-03-01T00", step=6):
    """A file's content: u on levels, t2m without."""
    rng = np.random.default_rng(seed)
    coords = {
        "time": np.datetime64(start, "ns") + np.arange(times) * step * HOUR,
        "level": ("level", np.array(levels), {"units": "hPa"}),
        "latitude": ("latitude", np.linspace(80, -80, height), {"units": "degrees_north"}),
        "longitude": ("longitude", np.arange(width) * 360 / width, {"units": "degrees_east"}),
    }
    u = rng.standard_normal((times, len(levels), height, width), np.float32)
    t2m = rng.standard_normal((times, height, width), np.float32) + 280
    data = {
        "u": (("time", "level", "latitude", "longitude"), u, {"units": "m s-1", "long_name": "eastward wind"}),
        "t2m": (("time", "latitude", "longitude"), t2m, {"units": "K"}),
    }
    return xr.Dataset(data, coords)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same content in every kind of file."""
    folder, ds = tmp_path_factory.mktemp("files"), made()
    packed = {"dtype": "int16", "scale_factor": 1e-3, "add_offset": 280.0, "_FillValue": -32767}
    ds.to_netcdf(
        folder / "chunked.nc",
        encoding={
            "u": {"chunksizes": (4, 1, 4, 6), "zlib": True},
            "t2m": {"chunksizes": (3, 4, 6), "zlib": True, **packed},
        },
    )
    ds.to_netcdf(folder / "plain.nc")
    ds.to_netcdf(folder / "classic.nc", format="NETCDF3_64BIT")
    pytest.importorskip("zarr")
    for form in (2, 3) if ZARR_3 else (2,):
        encoding = {"u": {"chunks": (4, 2, 4, 6)}, "t2m": {"chunks": (3, 4, 3)}}
        ds.to_zarr(folder / f"store{form}", zarr_format=form, encoding=encoding, consolidated=form == 2)
    return folder


KINDS = ("chunked.nc", "plain.nc", "classic.nc", "store2", STORE_3)


def drawn(data, source):
    start = data.draw(st.integers(0, source.grid.height))
    rows = range(start, data.draw(st.integers(start, source.grid.height)))
    return data.draw(st.lists(st.integers(0, len(source.labels) - 1), max_size=6)), rows


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_rows_and_times_are_those_of_a_plain_read(files, kind, data):
    path = str(files / kind)
    source = FileSource([path], ["u", "t2m"])
    times, rows = drawn(data, source)
    whole = plain(path, ["u", "t2m"], engine="zarr" if "store" in kind else None)
    got = source.read(times, rows)
    assert got.dtype == torch.float32
    assert torch.equal(got, whole[times][:, :, rows.start : rows.stop])


def test_what_a_file_says_of_itself(files):
    source = FileSource([str(files / "chunked.nc")])
    assert [channel.label for channel in source.channels] == ["t2m", "u_200", "u_500", "u_850"]
    assert source.channels[1] == ("u", 200.0, "m s-1", "hPa", "eastward wind")
    assert source.channels[0][:3] == ("t2m", None, "K")
    assert (source.grid.height, source.grid.width, source.grid.periodic) == (9, 6, True)
    assert source.labels[:2] == ("2001-03-01T00:00", "2001-03-01T06:00")
    assert source.seconds[0] == 983404800
    assert source.step == 21600
    assert source.segments == (range(10),)


def test_variables_and_levels_come_in_the_order_of_the_configuration(files):
    path = str(files / "chunked.nc")
    source = open_source(DataConfig(source=path, variables=("t2m", "u"), levels=(850.0, 200.0)))
    assert [channel.label for channel in source.channels] == ["t2m", "u_850", "u_200"]
    whole = plain(path, ["u", "t2m"])
    assert torch.equal(source.read([3, 4], range(2, 9)), whole[3:5][:, [3, 2, 0], 2:9])


def test_missing_values_are_nan(tmp_path):
    ds = made()
    ds["t2m"][2, 3, 4] = np.nan
    ds.to_netcdf(tmp_path / "a.nc", encoding={"t2m": {"dtype": "int16", "scale_factor": 0.01, "_FillValue": -1}})
    field = FileSource([tmp_path / "a.nc"], ["t2m"]).read([2], range(9))[0, 0]
    assert field.isnan().nonzero().tolist() == [[3, 4]]


# Real files


def test_era_interim(recwarn):
    path = real("eraint_uvz.nc")
    source = open_source(DataConfig(source=path, variables=("u", "z"), levels=(500.0, 850.0)))
    assert [channel.label for channel in source.channels] == ["u_500", "u_850", "z_500", "z_850"]
    assert source.labels == ("1", "7")
    assert source.seconds is None
    assert source.step is None
    assert source.segments == (range(2),)
    assert source.grid.latitudes[[0, -1]].tolist() == [90, -90]
    assert source.grid.periodic
    whole = plain(path, ["u", "z"])[:, [1, 2, 4, 5]]
    for rows in (range(241), range(61), range(61, 121), range(240, 241)):
        assert torch.equal(source.read([1, 0], rows), whole[[1, 0]][:, :, rows.start : rows.stop])
    own = 2 * 4 * 61 * 480 * 2  # int16
    assert source.cost([0, 1], range(61)) == Cost(own, own)
    assert chunking_warning(source, RowPartition.even(241, 4)) is None
    assert [str(w.message) for w in recwarn.list] == []


def test_era5():
    path = real("era5-t2m-uk-2019-03.nc")
    source = open_source(DataConfig(source=path))
    assert [channel.label for channel in source.channels] == ["t2m"]
    assert (source.labels[0], source.labels[-1], source.step) == ("2019-03-01T00:00", "2019-03-31T23:00", 3600)
    assert not source.grid.periodic
    times, whole = [0, 6, 7, 8, 700], plain(path, ["t2m"])
    assert torch.equal(source.read(times, range(8, 17)), whole[times][:, :, 8:17])
    assert source.cost([5], range(8)) == Cost(8 * 49 * 4, 24 * 33 * 49 * 4)
    assert source.cost([23, 24], range(33)) == Cost(2 * 33 * 49 * 4, 48 * 33 * 49 * 4)
    text = chunking_warning(source, RowPartition.even(33, 4))
    assert "ranks read 96.0 times the bytes" in text
    assert "time 24 x latitude 33 x longitude 49" in text


# Kinds of dims


def test_dims_in_any_order_and_under_other_names(tmp_path):
    ds = made().transpose("longitude", "level", "latitude", "time")
    ds = ds.rename(latitude="y", longitude="x", level="plev", time="when")
    ds.to_netcdf(tmp_path / "a.nc")
    source = FileSource([tmp_path / "a.nc"])
    expected = made()
    assert [channel.label for channel in source.channels] == ["t2m", "u_200", "u_500", "u_850"]
    got = source.read([1, 2, 5], range(3, 7))
    np.testing.assert_array_equal(got[:, 1:], expected.u.values[[1, 2, 5], :, 3:7])
    np.testing.assert_array_equal(got[:, 0], expected.t2m.values[[1, 2, 5], 3:7])


def test_latitudes_from_south_to_north(tmp_path):
    made().isel(latitude=slice(None, None, -1)).to_netcdf(tmp_path / "a.nc")
    source = FileSource([tmp_path / "a.nc"], ["t2m"])
    assert source.grid.latitudes.diff().gt(0).all()
    np.testing.assert_array_equal(source.read([0], range(2))[0, 0], made().t2m.values[0, ::-1][:2])


def test_dims_of_one_element_and_names_of_months(tmp_path):
    ds = made(times=12).rename(time="month").assign_coords(month=np.arange(1, 13)).expand_dims(number=[0])
    ds.to_netcdf(tmp_path / "a.nc")
    source = FileSource([tmp_path / "a.nc"], ["t2m"])
    assert source.labels == tuple(map(str, range(1, 13)))
    assert source.seconds is None
    np.testing.assert_array_equal(source.read([4], range(9))[0, 0], made(times=12).t2m.values[4])


def test_fields_that_do_not_change_are_taken_only_where_they_are_named(tmp_path):
    ds = made().assign(orography=made().t2m[0].drop_vars("time"), count=("time", np.arange(10)))
    ds.to_netcdf(tmp_path / "a.nc")
    assert [channel.label for channel in FileSource([tmp_path / "a.nc"]).channels] == ["t2m", "u_200", "u_500", "u_850"]
    with pytest.raises(ValueError, match="'orography' has the dims .* none of which is time"):
        FileSource([tmp_path / "a.nc"], ["orography"])


def test_times_with_gaps_make_segments(tmp_path):
    made(times=12).isel(time=[0, 1, 2, 5, 6, 9, 10, 11]).to_netcdf(tmp_path / "a.nc")
    source = FileSource([tmp_path / "a.nc"], ["t2m"])
    assert source.segments == (range(3), range(3, 5), range(5, 8))
    assert source.step == 21600


def test_one_file_for_each_time(tmp_path):
    for i in range(4):
        made().isel(time=i).to_netcdf(tmp_path / f"{'badc'[i]}.nc")
    source = open_source(DataConfig(source=str(tmp_path / "*.nc"), variables=("u",), levels=(500.0,)))
    assert [Path(path).stem for path in source.paths] == ["b", "a", "d", "c"]  # in the order of time
    assert source.segments == (range(4),)
    np.testing.assert_array_equal(source.read([3, 0, 1], range(4))[:, 0], made().u.values[[3, 0, 1], 1, :4])


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_several_files_are_one_along_time(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parts")
    whole, cuts = made(times=12), [0, 5, 6, 12]
    for k in range(3):
        part = whole.isel(time=slice(cuts[k], cuts[k + 1]))
        part.to_netcdf(folder / f"{k}.nc", encoding={"t2m": {"chunksizes": (1, k + 2, 6)}})
    source = open_source(DataConfig(source=str(folder / "*.nc"), variables=("t2m",)))
    assert source.segments == (range(12),)
    times, rows = drawn(data, source)
    np.testing.assert_array_equal(source.read(times, rows)[:, 0], whole.t2m.values[times][:, rows.start : rows.stop])
    needed = len(times) * len(rows) * 24
    assert source.cost(times, rows).needed == needed
    assert needed <= source.cost(times, rows).read


def test_a_store_of_xarrays_tutorial(monkeypatch):
    path = real("eraint_uvz.nc")
    asked = []

    def fetch(name, **options):
        asked.append(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return xr.open_dataset(path)

    monkeypatch.setattr(xr.tutorial, "open_dataset", fetch)
    source = open_source(DataConfig(source="tutorial:eraint_uvz", variables=("u",)))
    assert source.read([0], range(2)).shape == (1, 3, 2, 480)
    assert asked == ["eraint_uvz"]
    assert source.name == "tutorial:eraint_uvz"

    def fail(name, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(xr.tutorial, "open_dataset", fail)
    with pytest.raises(ValueError, match="tutorial:nothing cannot be fetched: OSError: Name or .*needs a network"):
        open_source(DataConfig(source="tutorial:nothing"))


def test_grib(tmp_path):
    pytest.importorskip("cfgrib", reason="the extra 'grib' is not installed")
    eccodes = pytest.importorskip("eccodes")
    fields = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).round(3)
    with (tmp_path / "a.bin").open("wb") as stream:
        for time, level in np.ndindex(3, 2):
            message = eccodes.codes_grib_new_from_samples("regular_ll_pl_grib2")
            keys = {
                **{"Ni": 8, "Nj": 5, "iDirectionIncrementInDegrees": 45, "jDirectionIncrementInDegrees": 40},
                **{"latitudeOfFirstGridPointInDegrees": 80, "latitudeOfLastGridPointInDegrees": -80},
                **{"longitudeOfFirstGridPointInDegrees": 0, "longitudeOfLastGridPointInDegrees": 315},
                **{"dataDate": 20190301, "dataTime": 600 * time, "level": (500, 850)[level]},
                **{"shortName": "t", "bitsPerValue": 24},
            }
            for key, value in keys.items():
                eccodes.codes_set(message, key, value)
            eccodes.codes_set_values(message, fields[time, level].ravel())
            eccodes.codes_write(message, stream)
            eccodes.codes_release(message)
    source = open_source(
        DataConfig(source=str(tmp_path / "a.bin"), levels=(850.0, 500.0), options={"backend_kwargs": {"indexpath": ""}})
    )
    assert [channel.label for channel in source.channels] == ["t_850", "t_500"]
    assert source.labels == ("2019-03-01T00:00", "2019-03-01T06:00", "2019-03-01T12:00")
    np.testing.assert_allclose(source.read([1, 2], range(1, 4)), fields[1:, ::-1, 1:4], atol=1e-5)
    assert source.cost([1, 2], range(1, 4)) == Cost(2 * 2 * 3 * 8 * 4, 2 * 2 * 5 * 8 * 4)  # messages are whole fields
    assert "drop_encoding().to_zarr" in chunking_warning(source, RowPartition.even(5, 2))


# Processes


class Rows(Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source.labels)

    def __getitem__(self, i):
        return self.source.read([i], range(2, 5))


@pytest.mark.parametrize("kind", ["chunked.nc", STORE_3])
@pytest.mark.parametrize("start", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_of_a_loader_open_the_files_themselves(files, kind, start):
    source = FileSource([str(files / kind)])
    source.read([0], range(1))  # open here too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, with threads around
        loader = DataLoader(Rows(source), 5, num_workers=2, multiprocessing_context=start)
        got = torch.cat(list(loader))[:, 0]
    assert torch.equal(got, source.read(range(10), range(2, 5)))


def test_pickled_sources_are_closed(files):
    source = FileSource([str(files / "chunked.nc")])
    before = source.read([1], range(9))
    text = pickle.dumps(source)
    assert len(text) < 5000
    assert torch.equal(pickle.loads(text).read([1], range(9)), before)


# What is read


def test_zarr_reads_the_chunks_that_are_counted(files, monkeypatch):
    """Chunks that the store is asked for, against the cost."""
    zarr = pytest.importorskip("zarr", minversion="3")
    source = FileSource([str(files / "store3")], ["t2m", "u"], [850, 200])
    source.read([0], range(1))  # opened, its coordinates read
    asked = []
    get = zarr.storage.LocalStore.get

    async def counting(self, key, *args, **kwargs):
        asked.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", counting)
    sizes = {"t2m": ((10, 9, 6), (3, 4, 3)), "u": ((10, 3, 9, 6), (4, 2, 4, 6))}
    for times, rows in (([0], range(4)), ([2, 3, 4, 9], range(3, 5)), ([5, 1], range(9)), ([7], range(8, 9))):
        asked.clear()
        source.read(times, rows)
        read = 0
        for key in asked:
            name, _, *index = key.split("/")
            size, chunk = sizes[name]
            read += 4 * int(np.prod([min(c, s - int(i) * c) for i, c, s in zip(index, chunk, size, strict=True)]))
        assert source.cost(times, rows) == Cost(len(times) * 3 * len(rows) * 6 * 4, read)


def test_netcdf_counts_chunks_as_stored(files):
    source = FileSource([str(files / "chunked.nc")])
    u, t2m = 4 * 1 * 4 * 6 * 4, 3 * 4 * 6 * 2  # float32; packed in int16
    assert source.cost([1], range(3)) == Cost(3 * 3 * 6 * 4 + 3 * 6 * 2, 3 * u + t2m)
    assert source.cost([2, 3], range(3, 5)).read == 3 * 2 * u + 2 * 2 * t2m
    assert source.cost([3, 4], range(3, 4)).read == 3 * 2 * u + t2m
    assert source.cost([], range(3)) == source.cost([1], range(0)) == Cost(0, 0)


@pytest.mark.parametrize("kind", ["plain.nc", "classic.nc"])
def test_files_without_chunks_are_read_in_place(files, kind):
    source = FileSource([str(files / kind)])
    own = 2 * 4 * 3 * 6 * 4
    assert source.cost([1, 2], range(3)) == Cost(own, own)
    assert chunking_warning(source, RowPartition.even(9, 4)) is None


@pytest.mark.parametrize("kind", ["chunked.nc", STORE_3])
def test_the_rewriting_that_a_warning_proposes_ends_it(files, kind, tmp_path, monkeypatch):
    source = FileSource([str(files / kind)])
    partition = RowPartition((4, 2, 2, 1))
    text = chunking_warning(source, partition)
    assert "\n" not in text
    monkeypatch.chdir(tmp_path)
    command = text[text.index("xarray.open_dataset") :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eval(command, {"xarray": xr})
    (path,) = tmp_path.iterdir()
    again = FileSource([str(path)])
    assert chunking_warning(again, partition, most=1.26) is None
    assert torch.equal(again.read(range(10), range(9)), source.read(range(10), range(9)))


def test_one_rank_with_chunks_of_one_time_is_fine(tmp_path):
    made().to_netcdf(tmp_path / "a.nc", encoding={"u": {"chunksizes": (1, 3, 9, 6)}, "t2m": {"chunksizes": (1, 9, 6)}})
    source = FileSource([tmp_path / "a.nc"])
    assert chunking_warning(source, RowPartition.even(9, 1)) is None
    assert "ranks read 4.0 times" in chunking_warning(source, RowPartition.even(9, 4))


# What is refused


def refused(match, path, variables=(), levels=(), options=None):
    with pytest.raises(ValueError, match=match) as caught:
        open_source(DataConfig(str(path), tuple(variables), tuple(levels), options=options or {}))
    assert "\n" not in str(caught.value)


def test_what_is_not_there(files, tmp_path):
    refused("no such file: nothing.nc; without a file, data.source: rossby-haurwitz", "nothing.nc")
    refused(r"no file matches .*none-\*.nc", tmp_path / "none-*.nc")
    path = files / "chunked.nc"
    refused("has no variable 't2'; it has u, t2m. Did you mean 't2m'?", path, ["t2"])
    refused("'u' has no level 300; level has 200, 500, 850", path, ["u"], [300.0])
    refused("levels=500, and none of t2m has levels", path, ["t2m"], [500.0])
    refused("variables must be named once each", path, ["u", "u"])
    refused("levels must be named once each", path, ["u"], [500.0, 500.0])


def test_files_that_cannot_be_read(files, tmp_path):
    (tmp_path / "junk.nc").write_text("hello, world")
    (tmp_path / "cut.nc").write_bytes((files / "chunked.nc").read_bytes()[:1000])
    refused("junk.nc cannot be opened: it is no NetCDF, GRIB or Zarr", tmp_path / "junk.nc")
    refused("cut.nc .NetCDF-4. cannot be opened", tmp_path / "cut.nc")
    refused("is a folder and no Zarr store; name its files with a pattern", tmp_path)
    refused("does not take them all", files / "chunked.nc", options={"enigne": "netcdf4"})
    refused("without dask; leave it out", files / "chunked.nc", options={"chunks": {}})
    monkey = tmp_path / "a.grib"
    monkey.write_bytes(b"GRIB" + bytes(100))
    refused("a.grib .GRIB. (cannot be opened|is GRIB)", monkey)


def test_readers_that_are_not_installed(files, monkeypatch, tmp_path):
    from credit_parallel.app.data import backend

    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    refused(
        r"chunked.nc is NetCDF-4: pip install 'credit-parallel\[data\]', which brings netCDF4", files / "chunked.nc"
    )
    refused(r"store2 is Zarr: pip install 'credit-parallel\[data\]', which brings zarr", files / "store2")
    (tmp_path / "a").write_bytes(b"GRIB")
    refused(r"is GRIB: pip install 'credit-parallel\[grib\]', which brings cfgrib", tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    refused(r"needs xarray: pip install 'credit-parallel\[data\]'", files / "chunked.nc")


def saved(tmp_path, ds, **options):
    ds.to_netcdf(tmp_path / "a.nc", **options)
    return tmp_path / "a.nc"


def test_grids_that_will_not_do(tmp_path):
    ds = made().drop_vars("u")
    refused(
        "No dim of latitude is among them .*lines: 9.*degrees_north",
        saved(tmp_path, ds.rename(latitude="lines").drop_vars("lines")),
        ["t2m"],
    )
    refused("no variable lies on a grid", tmp_path / "a.nc")
    curved = ds.rename(latitude="y", longitude="x").drop_vars(["x", "y"])
    curved = curved.assign_coords(lat=(("y", "x"), np.zeros((9, 6))), lon=(("y", "x"), np.zeros((9, 6))))
    refused(r"latitudes \(lat\) have the dims \(y: 9, x: 6\), a curvilinear grid", saved(tmp_path, curved), ["t2m"])
    refused("a curvilinear grid", tmp_path / "a.nc")
    points = xr.Dataset(
        {"t": (("time", "cell"), np.zeros((2, 5)))}, {"lat": ("cell", np.zeros(5)), "lon": ("cell", np.zeros(5))}
    )
    refused("lie along one dim .cell.", saved(tmp_path, points), ["t"])
    two = ds.assign(w=made(height=5).t2m.rename(latitude="lat").variable).assign_coords(lat=np.arange(5.0))
    refused(
        r"must be on one grid, and t2m is on \(latitude, longitude\), w on \(lat, longitude\)", saved(tmp_path, two)
    )
    refused("must be degrees within -90 to 90", saved(tmp_path, ds.assign_coords(latitude=ds.latitude * 2)))
    refused("must be degrees within -90 to 90", saved(tmp_path, ds.isel(latitude=[0, 2, 1])))
    text = xr.Dataset({"t2m": (ds.t2m.dims, np.full(ds.t2m.shape, "a"))}, ds.coords)
    refused("'t2m' is of .*, not of numbers", saved(tmp_path, text), ["t2m"])


def test_times_that_will_not_do(tmp_path):
    ds = made().drop_vars("u")
    refused(
        "times must increase, and 2001-03-01T12:00 is followed by 2001-03-01T06:00",
        saved(tmp_path, ds.isel(time=[0, 2, 1])),
    )
    refused(
        "times must increase, and 2001-03-01T00:00 is followed by 2001-03-01T00:00",
        saved(tmp_path, ds.isel(time=[0, 0])),
    )
    refused("none of which is time", saved(tmp_path, ds.isel(time=0, drop=True)), ["t2m"])
    refused("has no times", saved(tmp_path, ds.isel(time=[])))
    refused("'number' is left|number is left", saved(tmp_path, ds.expand_dims(number=[0, 1])), ["t2m"])
    calendar = ds.convert_calendar("360_day", align_on="date")
    refused("calendar '360_day'; convert them first", saved(tmp_path, calendar))


def test_files_that_do_not_match(tmp_path):
    one, two = made(times=4), made(times=4, start="2001-03-02T00")
    one.to_netcdf(tmp_path / "1.nc")
    pattern = tmp_path / "*.nc"

    def second(ds, match):
        ds.to_netcdf(tmp_path / "2.nc")
        refused(match, pattern)

    second(made(times=4, start="2001-03-01T18"), "2.nc begins at 2001-03-01T18:00, and .*1.nc ends at 2001-03-01T18:00")
    second(two.drop_vars("u"), "2.nc has the fields t2m, and .*1.nc t2m, u_200")
    second(two.assign_coords(longitude=two.longitude + 1), "2.nc has other longitudes than")
    second(two.isel(latitude=slice(1, None)), "2.nc has other latitudes than")
    two["t2m"].attrs["units"] = "degC"
    second(two, "2.nc has the units .*degC")


def test_a_file_that_goes_bad_is_named(files, tmp_path):
    content = bytearray((files / "chunked.nc").read_bytes())
    path = tmp_path / "a.nc"
    path.write_bytes(content)
    source = FileSource([path], ["u"])
    for start in range(6000, len(content) - 100, 50):
        content[start : start + 25] = bytes(25)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.nc.*cannot be (read|opened)"):
        source.read(range(10), range(9))


def test_nothing_goes_to_the_network(monkeypatch, files):
    monkeypatch.setattr(socket, "socket", None)
    FileSource([str(files / "plain.nc")]).read([0], range(3))
