"""Pictures: that they are there, say what they show, and show it in the right places."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from credit_mesh import RankLayout, RowPartition
from credit_parallel.app.data.source import Channel, Grid
from credit_parallel.app.plots import plot_forecast, plot_layout, plot_losses
from credit_parallel.app.plots.figures import apart, folded

pytest.importorskip("matplotlib")

DATA = Path(os.environ.get("CREDIT_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
WIND = Channel("u", 500.0, "m s**-1", "hPa", "wind to the east")


def is_png(path: Path, figure) -> bool:
    """A PNG of 1000 pixels' width, with more than one colour."""
    pixels = np.asarray(figure.canvas.buffer_rgba())
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and pixels.shape[1] == 1000 and pixels.std() > 0


def texts_that_collide(figure) -> list[tuple[str, str]]:
    """Texts that are drawn on top of each other, or beyond the picture."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for axes in figure.findobj(lambda artist: hasattr(artist, "get_major_ticks")):
        low, high = sorted(axes.get_view_interval())
        ticks = [*axes.get_major_ticks(), *axes.get_minor_ticks()]
        outside = [tick for tick in ticks if not low <= tick.get_loc() <= high]
        hidden |= {label for tick in outside for label in (tick.label1, tick.label2)}
    drawn = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in drawn]
    width, height = figure.canvas.get_width_height()
    found = [(t, "the edge") for t, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > width + 1 or b.y1 > height + 1]
    for i, (first, a) in enumerate(boxes):
        for second, b in boxes[i + 1 :]:
            if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 3:
                found.append((first, second))
    return found


def same_twice(path: Path, draw) -> bool:
    draw()
    first = path.read_bytes()
    draw()
    return path.read_bytes() == first


# Losses


def test_losses_and_their_difference(tmp_path):
    path = tmp_path / "folder" / "loss.png"
    several = [2.0, 1.0, 0.5, 0.125]
    one = [2.0, 1.0 + 1e-7, 0.5 - 2e-7, 0.125]
    figure = plot_losses(path, {"4 ranks": several, "1 rank": one}, tolerance=1e-5)
    above, below = figure.axes
    assert is_png(path, figure)
    assert [line.get_ydata().tolist() for line in above.lines] == [several, one]
    assert above.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["4 ranks", "1 rank"]
    assert above.get_yscale() == below.get_yscale() == "log"
    np.testing.assert_allclose(below.lines[0].get_ydata(), [np.nan, 1e-7, 2e-7, np.nan], rtol=1e-6)
    assert below.lines[1].get_xdata().tolist() == [1, 4]  # equal, marked where a logarithm has no place
    assert below.get_title() == "Difference from 4 ranks: 2e-07 at most"
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss (normalised units)", "absolute difference")
    assert below.get_xlabel() == "step of the optimizer"
    assert {text.get_text() for text in below.get_legend().get_texts()} == {"equal, bit for bit", "tolerance 1e-05"}
    assert texts_that_collide(figure) == []


def test_losses_that_are_equal_few_negative_or_cut_off(tmp_path):
    path = tmp_path / "loss.png"
    equal = plot_losses(path, {"a": [1.0, 0.9], "b": [1.0, 0.9]})
    assert equal.axes[1].get_title() == "Difference from a: none"
    assert equal.axes[0].get_yscale() == equal.axes[1].get_yscale() == "linear"
    (alone,) = plot_losses(path, {"a": [1.0, 2.0, -5.0]}, steps=[10, 20, 30], title="b").axes
    assert alone.get_title() == "b"
    assert alone.lines[0].get_xdata().tolist() == [10, 20, 30]
    assert alone.get_yscale() == "linear"
    shorter = plot_losses(path, {"a": [3.0, 2.0, 1.0], "b": [3.5], "c": [3.0, float("nan")]}).axes[1]
    assert shorter.get_title() == "Difference from a: 0.5 at most"
    assert [len(line.get_xdata()) for line in shorter.lines[:1]] == [1]
    assert plot_losses(path, {"a": [1.0], "b": [float("inf")]}).axes[1].get_title() == "Difference from a: inf at most"


@pytest.mark.parametrize(
    ("curves", "steps", "told"),
    [
        ({}, None, "the longest of 0 curve(s) has 0 losses"),
        ({"a": []}, None, "the longest of 1 curve(s) has 0 losses"),
        ({"a": [1.0, 2.0]}, [1], "has 2 losses, and there are 1 steps"),
    ],
)
def test_no_losses(tmp_path, curves, steps, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        plot_losses(tmp_path / "loss.png", curves, steps=steps)
    assert told in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# Maps


def earth(rows: int = 13, columns: int = 24, south_first: bool = False) -> tuple[Grid, torch.Tensor]:
    latitudes = torch.linspace(90, -90, rows).double()
    grid = Grid(latitudes.flip(0) if south_first else latitudes, torch.arange(columns) * 360.0 / columns)
    return grid, torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def seams_of(axes) -> list[float]:
    (lines,) = [c for c in axes.collections if c.get_label() == "seams"]
    return [float(segment[0, 1]) for segment in lines.get_segments()]


@pytest.mark.parametrize("south_first", [False, True])
def test_forecast_on_a_map(tmp_path, south_first):
    grid, truth = earth(south_first=south_first)
    forecast = truth * 1.5
    path = tmp_path / "forecast.png"
    figure = plot_forecast(path, truth, forecast, grid, WIND, RowPartition((5, 1, 7)))
    maps, bars = figure.axes[:3], figure.axes[3:6]
    assert is_png(path, figure)
    assert figure.get_suptitle() == "wind to the east at 500 hPa"
    weights = np.cos(np.radians(grid.latitudes.numpy()))
    rmse = np.sqrt(np.average((truth.numpy() ** 2 / 4).mean(1), weights=weights))
    titles = ["truth", "forecast", f"error (forecast − truth), RMSE {rmse:.3g} m s$^{{-1}}$"]
    assert [axes.get_title() for axes in maps] == titles
    assert [bar.get_ylabel() for bar in bars] == ["u_500 (m s$^{-1}$)"] * 3
    assert [axes.get_ylabel() for axes in maps] == ["latitude (°N)"] * 3
    assert maps[2].get_xlabel() == "longitude (°E)"
    meshes = [axes.collections[0] for axes in maps]
    for mesh, field in zip(meshes, (truth, forecast, forecast - truth), strict=True):
        np.testing.assert_allclose(mesh.get_array().reshape(13, 24), field, rtol=1e-6)
    assert meshes[0].get_clim() == meshes[1].get_clim() == (truth.min(), truth.max())
    low, high = meshes[2].get_clim()
    assert -low == high == pytest.approx(float((truth / 2).abs().max()))
    for axes in maps:  # the first row after a seam is halfway to the last one before it
        lat = grid.latitudes
        assert seams_of(axes) == pytest.approx([float(lat[4] + lat[5]) / 2, float(lat[5] + lat[6]) / 2])
        assert axes.get_ylim() == (-90, 90)  # cells at a pole end there, and north is up
    assert texts_that_collide(figure) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16, 60])
def test_no_text_on_another_on_maps(tmp_path, ranks):
    grid, truth = earth(rows=61, columns=120)
    partition = RowPartition.even(61, ranks)
    figure = plot_forecast(tmp_path / "f.png", truth, truth, grid, WIND, partition, title="24 h from 2019-03-24")
    assert texts_that_collide(figure) == []
    numbers = [t.get_text() for a in figure.axes[0].child_axes for t in a.get_yticklabels()]
    assert numbers == ([str(rank) for rank in range(ranks)] if 1 < ranks <= 16 else numbers)
    assert len(numbers) == (0 if ranks == 1 else len(numbers))


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_a_tall_region_is_drawn_side_by_side(tmp_path, ranks):
    grid = Grid(torch.linspace(58, 50, 33).double(), torch.linspace(-10, 2, 49).double())
    truth = torch.randn(33, 49, generator=torch.Generator().manual_seed(0))
    truth[:3] = float("nan")
    partition = RowPartition.even(33, ranks)
    figure = plot_forecast(tmp_path / "f.png", truth, truth + 1, grid, Channel("t2m", None, "K"), partition)
    assert figure.get_suptitle() == "t2m"
    places = [axes.get_position() for axes in figure.axes[:3]]
    assert places[0].x1 < places[1].x0 < places[1].x1 < places[2].x0
    assert figure.axes[2].get_title().endswith("RMSE 1 K")
    assert figure.axes[0].get_aspect() == pytest.approx(1 / np.cos(np.radians(54)))
    assert texts_that_collide(figure) == []


def test_longitudes_that_cross_zero_and_a_field_of_one_value(tmp_path):
    grid = Grid(torch.linspace(-40, 40, 9).double(), torch.tensor([350.0, 355.0, 0.0, 5.0]))
    field = torch.zeros(9, 4)
    figure = plot_forecast(tmp_path / "f.png", field, field, grid, Channel("x"))
    assert figure.axes[0].get_xlim() == (347.5, 367.5)
    assert figure.axes[0].collections[0].get_clim() == (-0.5, 0.5)


def test_fields_that_do_not_fit(tmp_path):
    grid, truth = earth()
    with pytest.raises(ValueError, match=r"must be of shape .* \(13, 24\).* got \(13, 24\) and \(12, 24\)"):
        plot_forecast(tmp_path / "f.png", truth, truth[1:], grid, WIND)
    with pytest.raises(ValueError, match="the partition must be of the 13 rows of the grid; got"):
        plot_forecast(tmp_path / "f.png", truth, truth, grid, WIND, RowPartition((6, 6)))


@pytest.mark.skipif(not (DATA / "eraint_uvz.nc").exists(), reason="the real fields are not here (CREDIT_TEST_DATA)")
def test_a_real_field(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(DATA / "eraint_uvz.nc") as file:
        file.set_auto_mask(False)
        truth = torch.tensor(file["u"][0, 1])
        grid = Grid(torch.tensor(file["latitude"][:]).double(), torch.tensor(file["longitude"][:]).double())
    figure = plot_forecast(tmp_path / "f.png", truth, truth + 1, grid, WIND, RowPartition.even(241, 4))
    assert is_png(tmp_path / "f.png", figure)
    assert seams_of(figure.axes[1]) == pytest.approx([44.625, -0.375, -45.375])
    assert texts_that_collide(figure) == []


# The layout


def patches(axes, kind: str) -> dict[int, list[tuple[float, float, float, float]]]:
    """Left, top, width and height of the drawn rows or halos, by rank."""
    found: dict[int, list[tuple[float, float, float, float]]] = {}
    for patch in axes.patches:
        if (patch.get_gid() or "").startswith(kind):
            found.setdefault(int(patch.get_gid().split()[-1]), []).append(
                (*patch.get_xy(), patch.get_width(), patch.get_height())
            )
    return found


def test_who_owns_which_rows(tmp_path):
    path = tmp_path / "layout.png"
    partition = RowPartition((20, 50, 30))
    latitudes = torch.linspace(90, -90, 100)
    figure = plot_layout(path, RankLayout(2, 2, 3), partition, halo=(4, 5), latitudes=latitudes)
    rows, mesh = figure.axes
    assert is_png(path, figure)
    assert figure.get_suptitle() == "12 ranks: dp 2 × tp 2 × domain 3"
    assert (rows.get_xlabel(), rows.get_ylabel(), rows.get_ylim()) == ("domain rank", "row", (100, 0))
    assert patches(rows, "rows of") == {0: [(0, 0, 1, 20)], 1: [(1, 20, 1, 50)], 2: [(2, 70, 1, 30)]}
    assert patches(rows, "halo of") == {0: [(0, 20, 1, 5)], 1: [(1, 20, 1, -4), (1, 70, 1, 5)], 2: [(2, 70, 1, -4)]}
    named = [text.get_text() for text in rows.texts]
    assert named == ["rank 0: rows 0–19 (20)", "rank 1: rows 20–69 (50)", "rank 2: rows 70–99 (30)"]
    assert rows.child_axes[0].get_ylabel() == "latitude (°N)"
    assert [text.get_text() for text in rows.get_legend().get_texts()] == [
        "rows that a rank owns",
        "halo: copies of others' rows, 4 before and 5 after",
    ]
    cells = {(t.get_position()[0], t.get_position()[1]): int(t.get_text()) for t in mesh.texts}
    expected = {
        (column + 0.5, domain + 0.5): RankLayout(2, 2, 3).rank(column // 2, column % 2, domain)
        for column in range(4)
        for domain in range(3)
    }
    assert cells == expected
    assert [label.get_text() for label in mesh.get_xticklabels()] == [
        "dp 0\ntp 0",
        "dp 0\ntp 1",
        "dp 1\ntp 0",
        "dp 1\ntp 1",
    ]
    assert texts_that_collide(figure) == []


def test_a_halo_reaches_no_further_than_the_rows(tmp_path):
    figure = plot_layout(tmp_path / "f.png", RankLayout(domain=3), RowPartition((2, 3, 2)), halo=(9, 9))
    halos = patches(figure.axes[0], "halo of")
    assert halos == {0: [(0, 2, 1, 5)], 1: [(1, 2, 1, -2), (1, 5, 1, 2)], 2: [(2, 5, 1, -5)]}


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (RankLayout(), (33,)),
        (RankLayout(domain=2), (17, 16)),
        (RankLayout(2, 1, 2), (23, 22)),
        (RankLayout(domain=4), (1, 1, 200, 3)),
        (RankLayout(1, 2, 8), RowPartition.even(241, 8).sizes),
        (RankLayout(16), (721,)),
        (RankLayout(4, 2, 16), RowPartition.even(721, 16, 8).sizes),
        (RankLayout(32, 4, 40), RowPartition.even(721, 40).sizes),
        (RankLayout(8, 1, 128), RowPartition.even(721, 128).sizes),
    ],
    ids=str,
)
def test_no_text_on_another_in_layouts(tmp_path, layout, sizes):
    latitudes = torch.linspace(90, -90, sum(sizes))
    figure = plot_layout(tmp_path / "f.png", layout, RowPartition(sizes), halo=(1, 2), latitudes=latitudes)
    assert texts_that_collide(figure) == []


def test_layouts_that_do_not_fit(tmp_path):
    partition = RowPartition((5, 5))
    with pytest.raises(ValueError, match="must be of the 3 domain ranks of the layout; got"):
        plot_layout(tmp_path / "f.png", RankLayout(domain=3), partition)
    with pytest.raises(ValueError, match=r"latitudes must be those of all 10 rows; got \(9,\)"):
        plot_layout(tmp_path / "f.png", RankLayout(domain=2), partition, latitudes=torch.zeros(9))
    with pytest.raises(ValueError, match=r"halo must be two numbers of rows, 0 or more; got \(-1, 0\)"):
        plot_layout(tmp_path / "f.png", RankLayout(domain=2), partition, halo=(-1, 0))


# All


def test_pictures_are_the_same_each_time(tmp_path):
    grid, truth = earth()
    path, partition = tmp_path / "f.png", RowPartition((6, 7))
    assert same_twice(path, lambda: plot_losses(path, {"a": [1.0, 2.0], "b": [1.0, 2.5]}))
    assert same_twice(path, lambda: plot_forecast(path, truth, truth + 1, grid, WIND, partition))
    assert same_twice(path, lambda: plot_layout(path, RankLayout(domain=2), partition, halo=(1, 1)))


def test_the_state_of_pyplot_is_left_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    plot_losses(tmp_path / "f.png", {"a": [1.0, 2.0]})
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_matplotlib_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib is not installed: pip install 'credit-parallel\[plot\]'"):
        plot_losses(tmp_path / "f.png", {"a": [1.0]})


def test_what_is_left_out():
    assert folded(3, 4) == [0, 1, 2]
    assert folded(9, 4) == [0, 1, None, 8]
    assert len(folded(1024, 16)) == 16
    assert apart([0, 1, 2, 2.5, 4], 1.5) == [0, 2, 4]
