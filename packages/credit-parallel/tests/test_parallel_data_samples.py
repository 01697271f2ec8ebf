"""Times, samples and statistics: on one rank against plain numpy, and on many ranks against one."""

from __future__ import annotations

import json
import os
import pickle
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from credit_halo.testing import run_processes, run_threads
from credit_mesh import DomainParallelManager, RowPartition
from credit_parallel.app.config import DataConfig
from credit_parallel.app.data.forcings import Forcings
from credit_parallel.app.data.opening import open_source
from credit_parallel.app.data.rossby_haurwitz import RossbyHaurwitz
from credit_parallel.app.data.samples import Samples, lead_in_steps, sample_starts, times_between
from credit_parallel.app.data.source import Channel, Cost, Grid
from credit_parallel.app.data.statistics import Statistics, compute_statistics
from credit_parallel.app.data.times import TimeAxis

DATA = Path(os.environ.get("CREDIT_TEST_DATA") or Path(__file__).parents[4] / "shared" / "data")


class Given:
    """A source of fields in memory."""

    name = "given"

    def __init__(self, fields, *, segments=None, seconds=None, latitudes=None):
        self.fields = fields
        count, channels, height, width = fields.shape
        self.channels = tuple(Channel(f"v{c}", 500.0 if c else None) for c in range(channels))
        self.grid = Grid(
            torch.linspace(80, -70, height, dtype=torch.float64) if latitudes is None else latitudes,
            torch.arange(width, dtype=torch.float64) * 360 / width,
        )
        axis = TimeAxis.from_labels([f"t{i}" for i in range(count)])
        if seconds is not None:
            axis = TimeAxis.from_seconds(seconds, self.name)
        self.labels, self.seconds, self.step = axis.labels, axis.seconds, axis.step
        self.segments = segments or axis.segments
        self.most = 0

    def read(self, times, rows):
        self.most = max(self.most, len(times))
        return self.fields[list(times)][:, :, rows.start : rows.stop].clone()

    def cost(self, times, rows):
        needed = len(times) * len(rows)
        return Cost(needed, 3 * needed)


def given_source(seed=0, times=11, channels=2, height=7, width=4, **options):
    rng = np.random.default_rng(seed)
    fields = rng.standard_normal((times, channels, height, width)) * [[[[1.0]], [[50.0]]]] + [[[[0.0]], [[1e5]]]]
    return Given(torch.from_numpy(fields.astype(np.float32)), **options)


def whole(source):
    return range(source.grid.height)


# Times


def test_times_between():
    source = given_source(times=10, seconds=[86400.0 * i for i in range(10)])
    assert times_between(source, (0.0, 0.8)) == list(range(8))
    assert times_between(source, (0.8, 1.0)) == [8, 9]
    assert times_between(source, (0, 1)) == times_between(source, (None, None)) == list(range(10))
    assert times_between(source, ("1970-01-03", None)) == list(range(2, 10))
    assert times_between(source, ("1970-01-02T12:00", "1970-01-05T00:00:00")) == [2, 3]
    assert times_between(source, ("1970-01-03T01:00+01:00", "1970-01-04T00:00Z")) == [2]
    assert times_between(source, ("1969", "1970-02")) == list(range(10))
    for bounds, match in (
        (
            ("1980-01-01", None),
            "no times from 1980-01-01 to before None; it has 10 times, 1970-01-01T00:00 to 1970-01-10",
        ),
        ((0.5, 0.5), "no times from 0.5"),
        ((0.5, 2.0), "a fraction of all, from 0 to 1; got 2.0"),
        (("soon", None), "such as 2019-03-24 or .* got 'soon'"),
        (("1970-13", None), "'1970-13', is no date"),
        ((0.5,), "must be two"),
    ):
        with pytest.raises(ValueError, match=match):
            times_between(source, bounds)


@given(st.integers(1, 300), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_fractions_share_out_all_times(count, cuts):
    source = given_source(times=1)
    source.labels = [str(i) for i in range(count)]
    ends = [0.0, *sorted(cuts), 1.0]
    shared = []
    for a, b in pairwise(ends):
        if round(a * count) < round(b * count):
            shared += times_between(source, (a, b))
    assert shared == list(range(count))


def test_times_that_are_labels():
    source = given_source(times=4)
    assert times_between(source, ("t1", "t3")) == [1, 2]
    assert times_between(source, (0.5, None)) == [2, 3]
    with pytest.raises(ValueError, match="'1970-01-01' is none of its times, which are no moments .4 times, t0 to t3."):
        times_between(source, ("1970-01-01", None))


def test_lead_in_steps():
    hourly = given_source(seconds=[3600.0 * i for i in range(11)])
    assert [lead_in_steps(hourly, lead) for lead in (3, "3", "6h", "1d", "120min", "7200s", "1.5d")] == [
        *(3, 3, 6, 24, 2, 2, 36)
    ]
    for lead, match in (
        ("90min", "lead='90min' is no multiple of the 1 h between times"),
        ("30min", "no multiple"),
        ("6 weeks", "or text such as 6h"),
        ("0h", "or text such as 6h"),
        (0, "1 or more"),
        (True, "1 or more"),
        ("1.5", "or text such as"),
    ):
        with pytest.raises(ValueError, match=match):
            lead_in_steps(hourly, lead)
    with pytest.raises(
        ValueError, match="needs times that are moments .* 11 times, t0 to t10: give the lead as a number"
    ):
        lead_in_steps(given_source(), "6h")
    assert lead_in_steps(given_source(), 2) == 2


def test_irregular_times_are_told(caplog):
    axis = TimeAxis.from_seconds([0, 1, 3, 4, 7, 8], "odd")
    assert [list(segment) for segment in axis.segments] == [[0, 1], [2, 3], [4, 5]]
    assert "times are irregular" in caplog.text
    assert TimeAxis.from_seconds([0.5, 1.5], "x").labels == ("1970-01-01T00:00:00.500", "1970-01-01T00:00:01.500")
    assert TimeAxis.from_seconds([60.0], "x").step is None


# Statistics


def by_numpy(source, times, lead):
    fields = source.fields.double().numpy()
    weights = np.cos(np.deg2rad(source.grid.latitudes.numpy()))[:, None]
    pairs = [(t, t + lead) for s in source.segments for t in s if t + lead in s and {t, t + lead} <= set(times)]
    own = fields[list(times)]

    def mean(x):
        return (x * weights).mean((0, 2, 3)) / weights.mean()

    center = mean(own)
    change = np.stack([fields[b] - fields[a] for a, b in pairs])
    return center, np.sqrt(mean((own - center[:, None, None]) ** 2)), np.sqrt(mean(change**2))


def test_statistics_are_those_of_numpy():
    source = given_source(segments=[range(5), range(5, 11)])
    for times, lead in ((range(11), 1), (range(2, 9), 2), ([0, 1, 2, 6, 7, 9], 1)):
        found = compute_statistics(source, times, lead, whole(source))
        for own, expected in zip((found.mean, found.std, found.increment), by_numpy(source, times, lead), strict=True):
            assert own.dtype == torch.float64
            np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-15)


def test_statistics_are_gathered_in_blocks(monkeypatch):
    from credit_parallel.app.data import statistics

    source = given_source(times=40)
    expected = compute_statistics(source, range(40), 7, whole(source))
    assert source.most == 40
    source.most = 0
    monkeypatch.setattr(statistics, "_BLOCK", 3 * 8 * 2 * 7 * 4)  # three times
    found = compute_statistics(source, range(40), 7, whole(source))
    assert source.most == 6
    for key in ("mean", "std", "increment"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key), rtol=1e-13, atol=1e-15)


def test_weights_of_rows():
    source = given_source(height=2)
    found = compute_statistics(source, range(11), 1, range(2), weights=torch.tensor([0.0, 2.0]))
    np.testing.assert_allclose(found.mean, source.fields[:, :, 1].double().mean((0, 2)), rtol=1e-12)
    with pytest.raises(ValueError, match=r"weights must be of shape \(2,\).*got \(3,\)"):
        compute_statistics(source, range(11), 1, range(2), weights=torch.ones(3))


def on_ranks(rank, source, dp, tp, sizes, times, lead):
    world = dp * tp * len(sizes)
    manager = DomainParallelManager(world, len(sizes), tensor_parallel_size=tp)
    rows = RowPartition(sizes).interval(manager.domain_rank)
    found = compute_statistics(source, times, lead, rows, manager)
    return [getattr(found, key).tolist() for key in ("mean", "std", "increment")]


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([(1, 1, (3, 4)), (2, 1, (5, 2)), (1, 2, (1, 6)), (2, 2, (2, 3, 2)), (3, 1, (7,)), (16, 1, (7,))]),
    st.integers(1, 3),
    st.integers(0, 100),
)
def test_statistics_are_the_same_on_every_layout(layout, lead, seed):
    dp, tp, sizes = layout
    source = given_source(seed, segments=[range(5), range(5, 11)])
    alone = compute_statistics(source, range(11), lead, whole(source))
    got = run_threads(on_ranks, dp * tp * len(sizes), source, dp, tp, sizes, range(11), lead)
    assert all(one == got[0] for one in got)  # to the last bit
    for values, key in zip(got[0], ("mean", "std", "increment"), strict=True):
        np.testing.assert_allclose(values, getattr(alone, key), rtol=1e-12, atol=1e-14)


def real(name):
    pytest.importorskip("netCDF4", reason="the extra 'data' is not installed")
    if not (DATA / name).exists():
        pytest.skip(f"no {name} in {DATA} (CREDIT_TEST_DATA)")
    return str(DATA / name)


REAL = {
    "eraint_uvz.nc": ({"variables": ("u", "v", "z"), "levels": (500.0,)}, (61, 60, 60, 60)),
    "era5-t2m-uk-2019-03.nc": ({}, (9, 8, 8, 8)),
}


def same_on_four_ranks(run, file, layouts):
    options, sizes = REAL[file]
    source = open_source(DataConfig(source=real(file), **options))
    times = range(min(len(source.labels), 100))
    alone = compute_statistics(source, times, 1, whole(source))
    for dp in layouts:
        parts = sizes if dp == 1 else (sizes[0], sum(sizes[1:]))
        got = run(on_ranks, 4, source, dp, 1, parts, times, 1)
        assert all(one == got[0] for one in got)
        for values, key in zip(got[0], ("mean", "std", "increment"), strict=True):
            np.testing.assert_allclose(values, getattr(alone, key), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("file", REAL)
def test_statistics_of_real_files_on_four_ranks(file):
    same_on_four_ranks(run_threads, file, (1, 2))


@pytest.mark.slow
def test_statistics_of_a_real_file_on_four_processes():
    same_on_four_ranks(run_processes, "era5-t2m-uk-2019-03.nc", (2,))


def message_on_ranks(*args):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        on_ranks(*args)
    return str(caught.value)


def refused_on_ranks(match, source, *, times=range(11), lead=1, sizes=(3, 4), dp=2):
    """One message on all ranks, and the same without any others."""
    texts = run_threads(message_on_ranks, dp * len(sizes), source, dp, 1, sizes, times, lead)
    assert re.search(match, texts[0]), texts[0]
    assert texts == [texts[0]] * dp * len(sizes)
    assert "\n" not in texts[0]


def test_missing_values_are_refused_on_all_ranks():
    source = given_source(seconds=[3600.0 * i for i in range(11)])
    source.fields[7, 1, 5, 2] = torch.nan
    source.fields[9, 1, 0, 0] = torch.inf
    match = (
        "given: variable 'v1' at level 500 has 2 value.s. that are missing or not finite, first at 1970-01-01T07:00; "
    )
    refused_on_ranks(match, source)
    with pytest.raises(ValueError, match=match):
        compute_statistics(source, range(11), 1, whole(source))
    assert compute_statistics(source, range(7), 1, whole(source)).std.isfinite().all()


def test_fields_that_cannot_be_learned_are_refused_on_all_ranks():
    source = given_source()
    source.fields[:, 1] = 0.1  # whose weighted mean is not 0.1 to the last bit
    refused_on_ranks("given: v1_500 cannot be learned, constant", source)
    source = given_source()
    source.fields[:, 0] = source.fields[0, 0]
    refused_on_ranks("given: v0 cannot be learned", source)


def test_other_mistakes_are_refused_on_all_ranks():
    refused_on_ranks("no two of the times are one lead apart", given_source(), lead=11)
    refused_on_ranks(
        "rows of the domain ranks must be those of the grid, 7 in all; got 3, 3", given_source(), sizes=(3, 3)
    )
    refused_on_ranks("times are 0 to 10; got 11", given_source(), times=range(12))
    refused_on_ranks("times must be indices in increasing order", given_source(), times=[1, 1])
    refused_on_ranks("lead_steps must be a whole number, 1 or more; got 0", given_source(), lead=0)
    refused_on_ranks("there are no times", given_source(), times=[])

    class Broken(Given):
        def read(self, times, rows):
            if rows.start == 3:
                raise OSError("the disk is gone")
            return super().read(times, rows)

    refused_on_ranks("on ranks 1, 3 OSError: the disk is gone", Broken(given_source().fields))


def test_statistics_to_json_and_back():
    statistics = compute_statistics(given_source(), range(11), 1, range(7))
    content = json.loads(json.dumps(statistics.to_dict(["a", "b"])))
    again = Statistics.from_dict(content, ["a", "b"])
    for key in ("mean", "std", "increment"):
        assert torch.equal(getattr(again, key), getattr(statistics, key))
    with pytest.raises(ValueError, match="are of the channels a, b, and the data have b, a"):
        Statistics.from_dict(content, ["b", "a"])
    with pytest.raises(ValueError, match="must have mean, std, increment of 2 channels"):
        Statistics.from_dict({**content, "std": [1.0]}, ["a", "b"])
    with pytest.raises(ValueError, match="labels must name 2 channels; got a"):
        statistics.to_dict(["a"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalise_and_denormalise(dtype):
    statistics = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in ([1e5, 2.0], [50.0, 3.0], [1.0, 1.0])))
    x = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64).to(dtype)
    fields = statistics.denormalise(x)
    assert fields.dtype == dtype
    expected = x.double() * statistics.std.view(-1, 1, 1) + statistics.mean.view(-1, 1, 1)
    eps = torch.finfo(dtype).eps
    close = {torch.float64: 1e-15, torch.float32: 2e-7, torch.bfloat16: eps}[dtype]
    size = (expected.abs() + statistics.mean.view(-1, 1, 1)) / 2  # what is added, not what is left
    assert ((fields.double() - expected).abs() <= close * 2 * size).all()
    torch.testing.assert_close(
        statistics.normalise(expected.to(dtype)).double(), x.double(), rtol=4 * eps, atol=4 * eps * 1e5 / 50
    )


# Samples


def unit(source):
    one = torch.ones(len(source.channels), dtype=torch.float64)
    return Statistics(0 * one, one, one)


@settings(deadline=None)
@given(st.data())
def test_samples_lie_within_their_times_and_one_segment(data):
    source = given_source(times=12, segments=[range(5), range(5, 6), range(6, 12)])
    lead, history, steps = (data.draw(st.integers(1, 3)) for _ in range(3))
    times = data.draw(st.none() | st.sets(st.integers(0, 11)))
    samples = Samples(source, range(2, 5), unit(source), lead_steps=lead, history=history, steps=steps, times=times)
    expected = []
    for newest in range(12):
        used = [newest + k * lead for k in range(1 - history, steps + 1)]
        within = any(all(t in segment for t in used) for segment in source.segments)
        if within and (times is None or set(used) <= times):
            expected.append(used)
    assert [samples.start(i) for i in range(len(samples))] == [used[history - 1] for used in expected]
    for i, used in enumerate(expected):
        fields, forcings = samples[i]
        assert torch.equal(fields, source.fields[used][:, :, 2:5])
        assert forcings.shape == (steps, 0, 3, 4)
    assert samples.cost() == Cost(*(n * len(expected) * (history + steps) * 3 for n in (1, 3)))
    assert samples.cost([0] if expected else []).needed == (history + steps) * 3 * bool(expected)
    assert sample_starts(source, times=times, lead_steps=lead, history=history, steps=steps) == samples._starts


def test_fields_are_normalised_and_forcings_are_of_each_step():
    source = RossbyHaurwitz(9, 8, trajectories=2, times=7)
    statistics = compute_statistics(source, range(14), 2, range(9))
    rows = range(4, 9)
    samples = Samples(
        source, rows, statistics, lead_steps=2, history=2, steps=2, forcings=("solar", "position"), dtype=torch.float64
    )
    assert [samples.start(i) for i in range(len(samples))] == [2, 9]
    fields, forcings = samples[1]
    assert fields.dtype == forcings.dtype == torch.float64
    assert fields.shape == (4, 4, 5, 8)
    assert torch.equal(fields, statistics.normalise(source.read([7, 9, 11, 13], rows).double()))
    assert forcings.shape == (2, 5, 5, 8)
    known = Forcings(("solar", "position"), source.grid, rows)
    for step, time in enumerate((9, 11)):
        assert torch.equal(forcings[step].float(), known.at(source.seconds[time], 43200.0))


def test_samples_of_real_hours():
    source = open_source(DataConfig(source=real("era5-t2m-uk-2019-03.nc")))
    lead = lead_in_steps(source, "6h")
    train = times_between(source, ("2019-03-01", "2019-03-24"))
    assert (lead, len(train), source.labels[train[-1]]) == (6, 23 * 24, "2019-03-23T23:00")
    statistics = compute_statistics(source, train, lead, range(33))
    assert 270 < float(statistics.mean[0]) < 290
    assert 0.5 < float(statistics.increment[0]) < float(statistics.std[0]) < 10
    samples = Samples(source, range(8), statistics, lead_steps=lead, history=2, steps=2, times=train)
    assert len(samples) == 23 * 24 - 18
    again = pickle.loads(pickle.dumps(samples))
    loader = DataLoader(again, 2, num_workers=1, multiprocessing_context="forkserver")
    for (fields, _), i in zip(loader, (0, 2), strict=False):
        assert torch.equal(fields, torch.stack([samples[i][0], samples[i + 1][0]]))
    raw = statistics.denormalise(samples[0][0])
    torch.testing.assert_close(raw, source.read([0, 6, 12, 18], range(8)), rtol=1e-6, atol=0)


def test_samples_that_will_not_do():
    source = given_source()
    with pytest.raises(ValueError, match="'solar' needs times that are moments"):
        Samples(source, range(7), unit(source), lead_steps=1, forcings=("solar",))
    with pytest.raises(ValueError, match="given has 2 channels, and statistics are of 1"):
        Samples(source, range(7), Statistics(*[torch.ones(1)] * 3), lead_steps=1)
    with pytest.raises(ValueError, match=r"rows must be a range within 0 to 7; got range\(5, 8\)"):
        Samples(source, range(5, 8), unit(source), lead_steps=1)
    with pytest.raises(ValueError, match="history must be a whole number, 1 or more; got 0"):
        Samples(source, range(7), unit(source), lead_steps=1, history=0)
    with pytest.raises(ValueError, match="times are 0 to 10; got 11"):
        Samples(source, range(7), unit(source), lead_steps=1, times=[11])
    samples = Samples(source, range(7), unit(source), lead_steps=1)
    assert len(list(samples)) == len(samples) == 10
    with pytest.raises(IndexError):
        samples[10]
