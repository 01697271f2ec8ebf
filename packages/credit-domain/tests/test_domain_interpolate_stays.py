"""Resampling of which some sizes stay though the factor is not 1: torch computes some dims otherwise then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from domain_reference import check_layer, partitions, randn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from credit_domain.ops.interpolation.interpolation import DomainParallelInterpolate
from credit_mesh import RowPartition

MODES = {
    1: ["nearest", "nearest-exact", "linear", "area"],
    2: ["nearest", "nearest-exact", "bilinear", "bicubic", "area"],
    3: ["nearest", "nearest-exact", "trilinear", "area"],
}


class Resample(nn.Module):
    """Torch's function as a layer."""

    def __init__(self, **how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return F.interpolate(x, **self.how)


def check(whole, how, partition, dim=-2):
    layer = Resample(**how)
    rest = {name: value for name, value in how.items() if name not in ("size", "mode")}

    def convert(_):
        return DomainParallelInterpolate(how.get("size"), how["mode"], dim, **rest)

    check_layer(layer, convert, whole, partition, dim, calls=1)


@st.composite
def scales(draw, rows):
    """A factor that leaves a number of rows as it is, or takes it one or more further, or less far."""
    kind = draw(st.sampled_from(["stays", "stays", "one", "any"]))
    if kind == "any":
        return draw(st.floats(0.3, 2.5))
    more = draw(st.floats(0.01, 0.99))
    return (rows + more + (kind == "one")) / rows


@settings(max_examples=60)
@given(st.data())
def test_sizes_that_stay(data):
    draw = data.draw
    spatial = draw(st.sampled_from([1, 2, 2, 2, 3]))
    at = draw(st.integers(0, spatial - 1))
    partition = draw(partitions(st.integers(2, 12), most=3))
    sizes = [draw(st.integers(1, 10)) for _ in range(spatial)]
    sizes[at] = partition.rows
    how = {"mode": draw(st.sampled_from(MODES[spatial] + ["bicubic"] * (3 if spatial == 2 else 0)))}
    if "linear" in how["mode"] or how["mode"] == "bicubic":
        how["align_corners"] = draw(st.sampled_from([None, False, True]))
        how["antialias"] = spatial == 2 and draw(st.booleans())
    one = draw(scales(draw(st.sampled_from(sizes))))
    how["scale_factor"] = draw(st.sampled_from([one, tuple(draw(scales(n)) for n in sizes)]))
    how["recompute_scale_factor"] = draw(st.sampled_from([None, False, True]))
    whole = randn(1, 2, *sizes)
    try:
        out = F.interpolate(whole, **how)
    except RuntimeError:
        assume(False)  # nothing would be left
    assume(out.numel() and not (how.get("antialias") and out.shape[-1] == 1))  # refused, since torch is wrong there
    check(whole, how, partition, at - spatial)


@pytest.mark.parametrize("mode", MODES[2])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("corners", [None, True])
@pytest.mark.parametrize("scale", [1.1, (1.05, 1.1), (1.5, 1.1), (1.05, 2.0)])
def test_one_dim_stays(mode, antialias, corners, scale):
    """9 or 10 rows and 9 columns: each of them stays alone, both do, and neither does."""
    smooth = mode in ("bilinear", "bicubic")
    if (antialias or corners) and not smooth:
        pytest.skip("not offered by torch")
    how = {"mode": mode, "scale_factor": scale, "antialias": antialias, "align_corners": corners}
    for height in (9, 10):
        check(randn(1, 2, height, 9), how, RowPartition((height - 5, 5)))
    check(randn(1, 2, 9, 10, dtype=torch.float64), how, RowPartition((4, 6)), -1)
