"""Files of forecasts: who writes what, what xarray reads from them, and that a failure leaves nothing behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from credit_halo.testing import RankError, run_processes, run_threads
from credit_mesh import Coords, RankLayout, RowPartition, initialize_domain_parallel
from credit_parallel.app.cli.forecast_command import add_parser
from credit_parallel.app.config import RunConfig
from credit_parallel.app.data.samples import Samples
from credit_parallel.app.data.source import Channel, Grid
from credit_parallel.app.data.statistics import Statistics
from credit_parallel.app.forecast import ForecastWriter, open_writer, run_forecast
from credit_parallel.app.forecast.contents import contents_of
from credit_parallel.app.forecast.stores import ZarrStore, chunks, store_of
from credit_parallel.app.training.experiment import Experiment, check, prepare
from credit_parallel.app.training.loop import train
from credit_parallel.checkpoint import save_checkpoint

xr = pytest.importorskip("xarray")
pytest.importorskip("netCDF4")
pytest.importorskip("zarr")

ROWS, COLUMNS = 13, 6
GRID = Grid(torch.linspace(90, -90, ROWS).double(), torch.arange(COLUMNS) * 60.0)
CHANNELS = (
    Channel("u", 200.0, "m s**-1", "hPa", "wind to the east"),
    Channel("t2m", None, "K", "", "2 metre temperature"),
    Channel("u", 850.0, "m s**-1", "hPa", "wind to the east"),
    Channel("q", 850.0, "1", "hPa"),
)
DAY = 86400.0
STARTS, LEADS = (17000 * DAY, 17000.25 * DAY, 17002 * DAY), (21600.0, 43200.0)
FIELDS = torch.randn(3, 2, 4, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def write(rank: int, path: Path, layout: RankLayout, sizes: tuple[int, ...], flush: int = 1, **options) -> None:
    at, manager, partition = layout.coords(rank), None, RowPartition(sizes)
    if torch.distributed.is_initialized():
        manager = initialize_domain_parallel(layout.world_size, layout.domain, tensor_parallel_size=layout.tp)
        manager.declare(partition)
    rows = partition.interval(at.domain)
    with ForecastWriter(path, CHANNELS, GRID, STARTS, LEADS, partition, manager, **options) as writer:
        turn = 0
        for start in range(0, len(STARTS), layout.dp):
            for lead in range(len(LEADS)):
                if start + at.dp < len(STARTS):
                    own = FIELDS[start + at.dp, lead, :, rows.start : rows.stop].clone()
                    writer.write(start + at.dp, lead, own)
                    own.zero_()  # what was taken was copied
                turn += 1
                if turn % flush == 0:
                    writer.flush()


def opened(path: Path) -> xr.Dataset:
    with xr.open_dataset(path, engine="zarr" if path.suffix == ".zarr" else "netcdf4") as file:
        return file.load()


def expected() -> dict[str, Tensor]:
    return {"u": FIELDS[:, :, [0, 2]], "t2m": FIELDS[:, :, 1], "q": FIELDS[:, :, [3]]}


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_alone_and_what_xarray_reads(tmp_path, suffix):
    path = tmp_path / "folder" / f"f{suffix}"
    write(0, path, RankLayout(), (ROWS,), attributes={"title": "run/step-1", "history": "made"}, compression=4)
    data = opened(path)
    assert list(tmp_path.glob("**/*.partial*")) == []
    for name, values in expected().items():
        np.testing.assert_array_equal(data[name].values, values)
        assert data[name].dtype == np.float32
    assert data.u.dims == ("forecast_reference_time", "lead_time", "level", "latitude", "longitude")
    assert data.t2m.dims == ("forecast_reference_time", "lead_time", "latitude", "longitude")
    assert data.q.dims[2] == "level2"
    assert data.u.attrs == {"units": "m s**-1", "long_name": "wind to the east"}
    assert data.q.attrs["long_name"] == "q"
    assert data.level.values.tolist() == [200, 850]
    assert data.level.attrs["standard_name"] == "air_pressure"
    assert data.level.attrs["positive"] == "down"
    assert data.attrs == {"Conventions": "CF-1.11", "title": "run/step-1", "history": "made"}
    reference = (np.asarray(STARTS) * 1000).astype("datetime64[ms]")
    lead = (np.asarray(LEADS) * 1000).astype("timedelta64[ms]")
    np.testing.assert_array_equal(data.forecast_reference_time, reference)
    np.testing.assert_array_equal(data.lead_time, lead)
    np.testing.assert_array_equal(data.u.valid_time, reference[:, None] + lead)
    assert data.valid_time.attrs["standard_name"] == "time"
    np.testing.assert_array_equal(data.latitude, GRID.latitudes)
    np.testing.assert_array_equal(data.longitude, GRID.longitudes)
    assert data.latitude.attrs["units"] == "degrees_north"
    assert data.longitude.attrs["units"] == "degrees_east"
    later = data.u.sel(lead_time="12h", level=850).isel(forecast_reference_time=1)
    np.testing.assert_array_equal(later, FIELDS[1, 1, 2])


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize(
    ("run", "layout", "sizes"),
    [
        (run_processes, RankLayout(domain=3), (2, 7, 4)),
        (run_processes, RankLayout(dp=2, domain=2), (9, 4)),
        (run_threads, RankLayout(), (13,)),
        (run_threads, RankLayout(domain=2), (9, 4)),
        (run_threads, RankLayout(domain=4), (5, 1, 3, 4)),
        (run_threads, RankLayout(dp=2, tp=2), (13,)),
        (run_threads, RankLayout(dp=4), (13,)),
        (run_threads, RankLayout(dp=2, tp=2, domain=2), (3, 10)),
    ],
    ids=lambda value: f"{value.dp}x{value.tp}x{value.domain}" if isinstance(value, RankLayout) else "",
)
def test_ranks_write_the_file_of_one(tmp_path, suffix, run, layout, sizes):
    path = tmp_path / f"f{suffix}"
    run(write, layout.world_size, path, layout, sizes, 2)
    write(0, tmp_path / f"one{suffix}", RankLayout(), (ROWS,))
    xr.testing.assert_identical(opened(path), opened(tmp_path / f"one{suffix}"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"f{suffix}", f"one{suffix}"])


def test_netcdf_and_zarr_say_the_same(tmp_path):
    for suffix in (".nc", ".zarr"):
        write(0, tmp_path / f"f{suffix}", RankLayout(), (ROWS,), compression=9)
    xr.testing.assert_identical(opened(tmp_path / "f.nc"), opened(tmp_path / "f.zarr"))


def test_compression_makes_files_smaller(tmp_path):
    grid = Grid(torch.linspace(90, -90, 200).double(), torch.arange(100).double())
    sizes = []
    for name, level in (("a.nc", 0), ("b.nc", 4), ("a.zarr", 0), ("b.zarr", 4)):
        with ForecastWriter(tmp_path / name, [Channel("t")], grid, [0.0], [60.0], compression=level) as writer:
            writer.write(0, 0, torch.ones(1, 200, 100))
        path = tmp_path / name
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        sizes.append(sum(file.stat().st_size for file in files))
        assert (opened(path).t == 1).all()
    assert sizes[1] < sizes[0] / 3
    assert sizes[3] < sizes[2] / 3


def test_half_hours_odd_seconds_and_16_bits(tmp_path):
    grid = Grid(torch.linspace(-45, 45, 4), torch.arange(4) * 90.0)
    with ForecastWriter(tmp_path / "f.nc", [Channel("t")], grid, [1800.0], [0.5, 60.0]) as writer:
        for lead in range(2):
            writer.write(0, lead, torch.full((1, 4, 4), 1.5 + lead, dtype=torch.bfloat16))
    data = opened(tmp_path / "f.nc")
    times = np.array(["1970-01-01T00:30:00.500", "1970-01-01T00:31:00.000"], "datetime64[ms]")
    np.testing.assert_array_equal(data.valid_time.values[0], times)
    assert data.t.values[0, :, 0, 0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_starts_without_times(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    grid = Grid(torch.linspace(-45, 45, 4), torch.arange(4) * 90.0)
    with ForecastWriter(path, [Channel("t", 500.0)], grid, ["january", "july"], [1, 2]) as writer:
        for start in range(2):
            for lead in range(2):
                writer.write(start, lead, torch.full((1, 4, 4), start + 10.0 * lead))
    data = opened(path)
    assert data.t.dims[:3] == ("start", "lead_step", "level")
    assert data.start.values.tolist() == ["january", "july"]
    assert float(data.t.sel(start="july", lead_step=2).mean()) == 11
    assert "valid_time" not in data.coords


# Two ranks never write in one place at the same time


@given(st.data())
def test_a_chunk_has_one_writer_at_a_time(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=9), label="sizes"))
    partition, layout = RowPartition(sizes), RankLayout(domain=len(sizes))
    height = chunks((5, 4, 3, partition.rows, 8), partition)[3]
    store = object.__new__(ZarrStore)
    turns = [store.turns(layout, Coords(0, 0, rank)) for rank in range(len(sizes))]
    assert {turn.turns for turn in turns} == {max(turn.mine for turn in turns) + 1}
    for turn in range(turns[0].turns):
        written: list[int] = []
        for rank in range(len(sizes)):
            if turns[rank].mine == turn:
                written += sorted({row // height for row in partition.interval(rank)})
        assert len(set(written)) == len(written)


def alternate(rank: int, path: Path, sizes: tuple[int, ...], opened_by: list[int]) -> int:
    """Returns the greatest number of ranks that write at once."""
    manager = initialize_domain_parallel(len(sizes), len(sizes))
    partition = RowPartition(sizes)
    rows, most = partition.interval(rank), [0]
    with ForecastWriter(path, CHANNELS, GRID, STARTS[:1], LEADS[:1], partition, manager) as writer:
        plain = writer._store.write

        def watched(*args) -> None:
            opened_by.append(rank)
            most[0] = max(most[0], len(opened_by))
            plain(*args)
            opened_by.remove(rank)

        writer._store.write = watched
        writer.write(0, 0, FIELDS[0, 0, :, rows.start : rows.stop])
    return most[0]


def test_netcdf_is_open_on_one_rank_at_a_time(tmp_path):
    assert run_threads(alternate, 4, tmp_path / "f.nc", (5, 1, 3, 4), []) == [1] * 4


# What goes wrong


def fails(rank: int, path: Path, layout: RankLayout, sizes: tuple[int, ...], how: str) -> str:
    at = layout.coords(rank)
    manager = initialize_domain_parallel(layout.world_size, layout.domain, tensor_parallel_size=layout.tp)
    rows = RowPartition(sizes).interval(at.domain)
    last = rank == layout.world_size - 1
    with pytest.raises(ValueError) as caught:  # noqa: PT012, PT011
        writer = ForecastWriter(path, CHANNELS, GRID, STARTS[:1], LEADS, RowPartition(sizes), manager)
        if how == "disk" and last:

            def full(*args) -> None:
                raise ValueError("no space left")

            writer._store.write = full
        with writer:
            for lead in range(len(LEADS) - (how == "missing" and last)):
                fields = FIELDS[0, lead, :, rows.start : rows.stop]
                if how == "shape" and last:
                    fields = fields[:, :-1]
                writer.write(1 if how == "index" and last else 0, 0 if how == "twice" and last else lead, fields)
            writer.flush()
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("disk", "on rank 2: no space left"),
        ("shape", "on rank 2: needs fields of shape (C, rows, W) = (4, 4, 6) .* got (4, 3, 6)"),
        ("index", "on rank 2: needs fields .* for start 0..0 and lead 0..1; got .* for start 1 and lead 0"),
        ("twice", "on rank 2: start 0, lead 0 was written before"),
        ("missing", "1 of 2 fields are missing or written twice, the first at start 0, lead 1, which 2 of 3 domain"),
    ],
)
def test_a_failure_of_one_rank_is_told_on_all_and_leaves_nothing(tmp_path, suffix, how, told):
    messages = run_threads(fails, 3, tmp_path / f"f{suffix}", RankLayout(domain=3), (2, 7, 4), how)
    assert len(set(messages)) == 1
    for part in told.split(" .* "):
        assert part in messages[0]
    assert f"f{suffix}" in messages[0]
    assert list(tmp_path.iterdir()) == []


def fails_by_itself(rank: int, path: Path) -> None:
    manager = initialize_domain_parallel(2, 2)
    with ForecastWriter(path, CHANNELS, GRID, STARTS, LEADS, RowPartition((6, 7)), manager):
        raise KeyError("in the model")


def test_an_error_of_the_program_leaves_nothing(tmp_path):
    with pytest.raises(RankError, match="in the model"):
        run_threads(fails_by_itself, 2, tmp_path / "f.zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_an_existing_file_stays_unless_it_is_to_be_overwritten(tmp_path, suffix):
    path = tmp_path / f"f{suffix}"
    write(0, path, RankLayout(), (ROWS,), attributes={"title": "first"})
    with pytest.raises(ValueError, match=f"f{suffix} is there already; choose another name"):
        write(0, path, RankLayout(), (ROWS,))
    with (
        pytest.raises(ValueError, match="6 of 6 fields are missing"),
        ForecastWriter(path, CHANNELS, GRID, STARTS, LEADS, overwrite=True),
    ):
        pass
    assert opened(path).title == "first"
    write(0, path, RankLayout(), (ROWS,), attributes={"title": "second"}, overwrite=True)
    assert opened(path).title == "second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"path": "f.grib"}, "must end in .nc (NetCDF) or .zarr"),
        ({"path": "folder/file.txt/f.nc"}, "the folder cannot be made"),
        ({"channels": ()}, "channels must be one or more, all different; got []"),
        ({"channels": (Channel("t"), Channel("t"))}, "channels must be one or more, all different; got ['t', 't']"),
        ({"channels": (Channel("t"), Channel("t", 500.0))}, "t is there with a level and without one"),
        ({"channels": (Channel("latitude"),)}, "a forecast has a coordinate latitude"),
        ({"starts": ()}, "starts must be one or more"),
        ({"leads": (3600.0, 3600.0)}, "leads must be one or more, all different"),
        ({"partition": RowPartition((12,))}, "the partition must be of the 13 rows of the grid over 1 domain ranks"),
        ({"partition": RowPartition((12, 1))}, "the partition must be of the 13 rows of the grid over 1 domain ranks"),
        ({"partition": RowPartition((13, 0), allow_empty=True)}, "would hold no rows"),
        ({"compression": 10}, "compression must be 0 to 9; got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_will_not_do(tmp_path, change, told):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.txt").touch()
    given = {"path": "f.nc", "channels": CHANNELS, "grid": GRID, "starts": STARTS, "leads": LEADS, **change}
    given["path"] = tmp_path / given["path"]
    with pytest.raises(ValueError, match=re.escape(told)):
        ForecastWriter(**given)
    assert list(tmp_path.rglob("*.nc*")) == []


def test_a_closed_writer_takes_nothing_more(tmp_path):
    grid = Grid(torch.linspace(-45, 45, 4), torch.arange(4) * 90.0)
    with ForecastWriter(tmp_path / "f.nc", [Channel("t")], grid, [0.0], [60.0]) as writer:
        writer.write(0, 0, torch.zeros(1, 4, 4))
        assert writer.close() == tmp_path / "f.nc"
    with pytest.raises(ValueError, match="is complete, or was given up"):
        writer.flush()


def test_how_much_is_held_is_the_same_on_all_ranks(tmp_path):
    def held(rank: int) -> int:
        manager = initialize_domain_parallel(3, 3)
        grid = Grid(torch.linspace(90, -90, 721).double(), torch.arange(1440) / 4)
        channels = [Channel("u", float(level)) for level in range(20)]
        with (
            pytest.raises(ValueError, match="missing"),
            ForecastWriter(
                tmp_path / "f.nc", channels, grid, [0.0], list(range(20)), RowPartition((1, 220, 500)), manager
            ) as writer,
        ):
            kept = writer.leads_held
        return kept

    assert run_threads(held, 3) == [(256 << 20) // (20 * 500 * 1440 * 4)] * 3 == [4] * 3


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "netCDF4", None)
    with pytest.raises(ValueError, match=r"netCDF4 is not installed: pip install 'credit-parallel\[data\]'"):
        store_of(Path("f.nc"))


def test_levels_of_variables():
    units = {"level_units": "hPa"}
    channels = [
        *(Channel("u", level, **units) for level in (850.0, 500.0)),
        Channel("w", 500.0, **units),
        *(Channel("v", level, **units) for level in (850.0, 500.0)),
        Channel("s", 1.0),
    ]
    made = contents_of(channels, GRID, STARTS, LEADS, {})
    assert {v.name: (v.dims[2], v.channels) for v in made.variables} == {
        "u": ("level", (0, 1)),
        "w": ("level2", (2,)),
        "v": ("level", (3, 4)),
        "s": ("level3", (5,)),
    }
    levels = {c.name: c.values.tolist() for c in made.coordinates if c.name.startswith("level")}
    assert levels == {"level": [850, 500], "level2": [500], "level3": [1]}


# Stepping a model forward


def conf_of(parallelism: dict, **data) -> dict:
    return {
        "data": {
            "options": {"height": ROWS, "width": 8, "trajectories": 2, "times": 9},
            "variables": ["u", "vorticity"],
            "history": 2,
            "lead": 2,
            "forcings": ["solar", "position"],
            **data,
        },
        "model": {"name": "unet", "width": 4, "levels": 1, "groups": 2},
        "trainer": {"parallelism": parallelism, "steps": 1, "dtype": "float64", "device": "cpu"},
    }


def experiment_of(parallelism: dict, source=None, **data) -> Experiment:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    checked = check(RunConfig.from_dict(conf_of(parallelism, **data)), world, training=False)
    if source is not None:
        checked = dataclasses.replace(checked, source=source)
    with torch.no_grad():  # a new model changes nothing
        generator = torch.Generator().manual_seed(0)
        for parameter in checked.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    statistics = Statistics(*torch.tensor([[5.0, 0.0], [12.0, 2e-5], [3.0, 5e-6]]).double())
    return prepare(checked, torch.device("cpu"), statistics)


START = [2, 3, 4, 12, 5]  # in two trajectories of 9 times; the last is followed by the truth for one lead of 2


def forecast(rank: int, path: Path, parallelism: dict, steps: int = 2) -> dict:
    experiment = experiment_of(parallelism)
    experiment.context.model.train()
    with open_writer(experiment, path, START, steps, attributes={"title": "a"}) as writer:
        found = run_forecast(experiment, START, steps, writer=writer)
    assert experiment.context.model.training
    return found


def test_forecasts_and_scores_by_hand(tmp_path):
    found = forecast(0, tmp_path / "f.nc", {}, 2)
    experiment, data = experiment_of({}), opened(tmp_path / "f.nc")
    source, statistics = experiment.checked.source, experiment.statistics
    assert found["starts"] == [source.labels[start] for start in START]
    assert found["lead_seconds"] == [12 * 3600, 24 * 3600]
    assert found["scored"] == [5, 4]  # no truth across the end of a trajectory
    times = np.asarray([source.seconds[start] for start in START]).astype("datetime64[s]")
    np.testing.assert_array_equal(data.forecast_reference_time, times)
    experiment.context.model.eval()
    options = {"lead_steps": 2, "history": 2, "forcings": ("solar", "position"), "dtype": torch.float64}
    samples = Samples(source, range(ROWS), statistics, **options)
    begun = [samples.start(index) for index in range(len(samples))]
    weights = np.cos(np.radians(source.grid.latitudes.numpy()))[:, None] * np.ones((ROWS, 8))
    scored: dict[tuple, list[float]] = {}
    for index, start in enumerate(START):
        fields, forcings = samples[begun.index(start)]
        with torch.no_grad():
            change = experiment.context.model(torch.cat([fields[0], fields[1], forcings[0]])[None])[0]
        state = statistics.denormalise(fields[1]) + change * statistics.increment.view(-1, 1, 1)
        for channel, label in enumerate(("u", "vorticity")):
            np.testing.assert_allclose(data[label][index, 0], state[channel], rtol=1e-5, atol=1e-10)
            for step in range(2):
                time = start + 2 * (step + 1)
                if time // 9 != start // 9:
                    continue
                truth, held = source.read([time, start], range(ROWS))[:, channel].double().numpy()
                mean = float(statistics.mean[channel])
                for prefix, made in (("", data[label][index, step].values), ("persistence_", held)):
                    error, p, t = made - truth, made - mean, truth - mean
                    acc = (weights * p * t).sum() / np.sqrt((weights * p * p).sum() * (weights * t * t).sum())
                    values = {"rmse": np.average(error**2, weights=weights), "acc": acc}
                    values["bias"] = np.average(error, weights=weights)
                    for name, value in values.items():
                        scored.setdefault((prefix + name, label, step), []).append(value)
    assert len(scored) == 6 * 2 * 2
    for (name, label, step), values in scored.items():
        assert len(values) == found["scored"][step]
        expected = np.sqrt(np.mean(values)) if name.endswith("rmse") else np.mean(values)
        np.testing.assert_allclose(found[name][label][step], expected, rtol=1e-4, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallelism"),
    [
        (2, {"data": "ddp", "domain": 2}),
        (3, {"data": "fsdp2", "domain": 3}),
        (4, {"data": "ddp", "domain": 2}),
        (2, {"data": "fsdp2"}),
    ],
    ids=str,
)
def test_forecasts_are_those_of_one_rank(tmp_path, ranks, parallelism):
    one = forecast(0, tmp_path / "one.nc", {}, 3)
    several = run_processes(forecast, ranks, tmp_path / "several.zarr", parallelism, 3)
    assert all(found == several[0] for found in several)
    assert several[0].keys() == one.keys()
    for name, value in one.items():
        if name in ("starts", "lead_seconds", "scored"):
            assert several[0][name] == value
        else:
            for label in value:
                np.testing.assert_allclose(several[0][name][label], value[label], rtol=1e-9, atol=1e-14)
    xr.testing.assert_allclose(opened(tmp_path / "several.zarr"), opened(tmp_path / "one.nc"), rtol=1e-6, atol=1e-11)


def test_forecasts_go_on_where_the_data_end():
    experiment = experiment_of({})
    fields: list[tuple[int, int, Tensor]] = []
    done: list[int] = []
    found = run_forecast(
        experiment, [8, 6], 2, seen=lambda start, step, x: fields.append((start, step, x)), progress=done.append
    )
    assert found["scored"] == [1, 0]
    assert found["rmse"]["u"][1] is None
    assert found["rmse"]["u"][0] > 0
    assert [(start, step) for start, step, _ in fields] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(x.shape == (2, ROWS, 8) and x.isfinite().all() for _, _, x in fields)
    assert done == [1, 2]


def without_some(rank: int, path: Path) -> str:
    experiment = experiment_of({"data": "ddp", "domain": 2})
    source, read = experiment.checked.source, experiment.checked.source.read

    def with_gaps(times, rows) -> Tensor:
        fields = read(times, rows).clone()
        if 5 in times and 0 in rows:  # on one rank
            fields[times.index(5), 0, 0] = torch.nan
        return fields

    source.read = with_gaps
    with (
        pytest.raises(ValueError, match="values are missing") as caught,
        open_writer(experiment, path, [3], 2) as writer,
    ):
        run_forecast(experiment, [3], 2, writer=writer)
    return str(caught.value)


def test_missing_values_are_told_on_all_ranks(tmp_path):
    told = run_processes(without_some, 2, tmp_path / "f.nc")
    assert told[0] == told[1]
    assert "rossby-haurwitz: values are missing at 2000-01-02T06:00" in told[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("starts", "steps", "told"),
    [
        ([], 1, "needs one start and one step or more; got 0 start(s) and 1 step(s)"),
        ([3], 0, "got 1 start(s) and 0 step(s)"),
        ([18], 1, "starts are times 0 to 17; got 18"),
        ([10], 1, "the model sees 2 time(s) before the start, and they are not there, or not without a gap"),
    ],
)
def test_starts_that_will_not_do(starts, steps, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        run_forecast(experiment_of({}), starts, steps)


def test_times_that_are_none(tmp_path):
    experiment = experiment_of({}, forcings=["position"])
    source = experiment.checked.source
    source.seconds = source.step = None
    with open_writer(experiment, tmp_path / "f.nc", [2, 3], 2) as writer:
        found = run_forecast(experiment, [2, 3], 2, writer=writer)
    data = opened(tmp_path / "f.nc")
    assert data.start.values.tolist() == found["starts"]
    assert data.lead_step.values.tolist() == [1, 2]
    assert found["lead_seconds"] is None


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a small training."""
    folder = tmp_path_factory.mktemp("run")
    conf = conf_of({}, valid=[0.5, 1.0])
    conf["trainer"] |= {"steps": 2, "rollout": 2, "batch_size": 2}
    train(check(RunConfig.from_dict({**conf, "folder": str(folder)}), 1), torch.device("cpu"))
    return folder


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    texts = ["forecast", *map(str, arguments)]
    args = parser.parse_args(texts)
    args.arguments = texts
    return args.run(args)


def test_the_command_writes_draws_and_tells(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "f.nc", tmp_path / "f.png"
    assert command(trained, "--steps", 1, "--out", out, "--plot", plot, "--field", "vorticity", "--compression", 1) == 0
    text = capsys.readouterr().out
    assert re.search(r"^5 forecast\(s\) from 2000-01-03T18:00 to 2000-01-04T18:00$", text, re.MULTILINE)
    assert re.search(r"^ +vorticity +12 h +[\d.e-]+ +[\d.e-]+ +[\d.e-]+ +[\d.-]+ +5$", text, re.MULTILINE)
    assert text.endswith(f"wrote {out}\nwrote {plot}\n")
    assert plot.read_bytes()[:4] == b"\x89PNG"
    data = opened(out)
    assert (data.sizes["forecast_reference_time"], data.sizes["lead_time"]) == (5, 1)
    assert data.title == f"Forecasts by {trained}, step-00000002"
    assert data.source == "unet, trained for 2 steps, from rossby-haurwitz"
    assert "credit-parallel" in data.history


def test_the_command_tells_programs(trained, tmp_path, capsys):
    starts = ["2000-01-01T12:00", "2000-01-02", "2000-01-03T00"]
    given = [trained, "--start", *starts, "--steps", 4, "--json", "--quiet", "--out", tmp_path / "f.zarr"]
    assert command(*given) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["starts"] == ["2000-01-01T12:00", "2000-01-02T00:00", "2000-01-03T00:00"]
    assert found["lead_seconds"] == [43200, 86400, 129600, 172800]
    assert found["scored"] == [2, 2, 1, 0]
    assert found["rmse"]["u"][3] is None
    assert found["checkpoint"].endswith("step-00000002")
    # a checkpoint itself, every second start, and other data
    assert command(found["checkpoint"], "--start", *starts, "--every", 2, "--json", "--data", "rossby-haurwitz") == 0
    other = json.loads(capsys.readouterr().out)
    assert other["starts"] == [found["starts"][0], found["starts"][2]]


@pytest.mark.slow
def test_the_command_on_several_ranks(trained, tmp_path):
    pytest.importorskip("matplotlib")
    base = [sys.executable, "-m", "credit_parallel", "forecast", str(trained), "--json", "--quiet"]
    starts = ["--start", "2000-01-01T12:00", "2000-01-02", "2000-01-04"]
    scores = []
    for ranks, extra in ((1, []), (3, ["--domain", "3", "--plot", "f.png"]), (4, ["--domain", "2", "--plot", "g.png"])):
        done = subprocess.run(
            [*base, *starts, "--ranks", str(ranks), "--out", f"{ranks}.nc", *extra],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(done.stdout))
    assert (tmp_path / "f.png").exists()
    assert (tmp_path / "g.png").exists()
    one = opened(tmp_path / "1.nc").drop_attrs(deep=False)
    for ranks, found in ((3, scores[1]), (4, scores[2])):
        xr.testing.assert_allclose(opened(tmp_path / f"{ranks}.nc").drop_attrs(deep=False), one, rtol=1e-6, atol=1e-11)
        for name in ("rmse", "acc", "persistence_rmse"):
            for label, values in scores[0][name].items():
                np.testing.assert_allclose(found[name][label], values, rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "f.grib"], "must end in .nc (NetCDF) or .zarr"),
        (["--ranks", "0"], "--ranks and --every must be 1 or more; got 0 and 1"),
        (["--steps", "0"], "--steps must be 1 or more; got 0"),
        (["--steps", "9"], "no validation time of rossby-haurwitz is followed by the truth for 9 step(s)"),
        (["--start", "2000-01-33"], "--start 2000-01-33: rossby-haurwitz has no such time; it has 2000-01-01T00:00 to"),
        (["--start", "2000-01-01"], "the model sees 2 time(s) before the start, and they are not there"),
        (
            ["--plot", "f.png", "--field", "vortic"],
            "--field vortic: there is none; there are u, vorticity.",
        ),
        (["--plot", "f.png", "--start", "2000-01-05T06:00"], "--plot: rossby-haurwitz has no truth after"),
        (["--ranks", "3", "--domain", "2"], "3 rank(s) do not divide into groups of tensor x domain = 1 x 2: say"),
        (["--data", "nowhere.nc"], "no such file: nowhere.nc"),
    ],
)
def test_mistakes_of_the_command(trained, arguments, told):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=re.escape(told)):
        command(trained, *arguments)


def test_folders_without_a_training(tmp_path):
    with pytest.raises(ValueError, match="is no folder of a training, nor one of its checkpoints"):
        command(tmp_path / "none")
    with pytest.raises(ValueError, match="there is no complete checkpoint in"):
        command(tmp_path)
    save_checkpoint(tmp_path, torch.nn.Linear(1, 1), step=1)
    with pytest.raises(ValueError, match="was not saved by credit-parallel train: it has no configuration"):
        command(tmp_path)
