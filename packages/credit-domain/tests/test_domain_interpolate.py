"""Resampling sharded rows is torch's resampling of the whole: every mode, size, scale and partition."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from domain_reference import check_layer, partitions, randn, random_like, shard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from credit_domain.ops.interpolation.interpolation import (
    DomainParallelInterpolate,
    DomainParallelUpsample,
    interpolate,
    resampled_partition,
)
from credit_domain.ops.padding.padding_layers import DomainParallelPad
from credit_domain.ops.pixel import DomainParallelPixelShuffle, DomainParallelPixelUnshuffle
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

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


@st.composite
def layouts(draw, heights=None):
    spatial = draw(st.sampled_from([1, 2, 2, 2, 3]))
    at = draw(st.integers(0, spatial - 1))
    partition = draw(partitions(heights))
    sizes = [draw(st.integers(1, 6)) for _ in range(spatial)]
    sizes[at] = partition.rows
    return spatial, at, sizes, partition


@st.composite
def ways(draw, spatial):
    """Arguments of a resampling that torch takes."""
    mode = draw(st.sampled_from(MODES[spatial]))
    how = {"mode": mode}
    if "linear" in mode or mode == "bicubic":
        how["align_corners"] = draw(st.sampled_from([None, False, True]))
        how["antialias"] = spatial == 2 and draw(st.booleans())
    if draw(st.booleans()):
        how["size"] = tuple(draw(st.integers(1, 40)) for _ in range(spatial))
        if draw(st.integers(0, 5)) == 0:
            how["size"] = how["size"][0]
    else:
        scale = st.sampled_from([0.5, 2, 2.0, 1 / 3, 1.1]) | st.floats(0.1, 3)
        how["scale_factor"] = tuple(draw(scale) for _ in range(spatial)) if draw(st.booleans()) else draw(scale)
        how["recompute_scale_factor"] = draw(st.sampled_from([None, False, True]))
    return how


@pytest.mark.slow
@settings(max_examples=100)
@given(st.data(), layouts())
def test_resampling(data, layout):
    spatial, at, sizes, partition = layout
    draw = data.draw
    how = draw(ways(spatial))
    layer = Resample(**how)
    whole = randn(2, draw(st.integers(1, 2)), *sizes)
    if spatial > 1 and draw(st.booleans()):
        whole = whole.contiguous(memory_format=(torch.channels_last, torch.channels_last_3d)[spatial - 2])
    try:
        out = layer(whole)
    except RuntimeError:
        assume(False)  # nothing would be left
    assume(out.numel() and not (how.get("antialias") and out.shape[-1] == 1))  # refused, since torch is wrong there
    dim = at - spatial
    shard_dim = dim if draw(st.booleans()) else at + 2
    how = dict(how)
    size, mode = how.pop("size", None), how.pop("mode")

    def convert(_):
        return DomainParallelInterpolate(size, mode, shard_dim, **how)

    check_layer(layer, convert, whole, partition, dim, declare=draw(st.booleans()))


def on_ranks(whole, partition, how, dim=-2, target=None, autocast=False, degree=1):
    """Outputs and input gradients of torch on the whole, and of all ranks together."""

    def run(fn, x, factor_of):
        x = x.clone().requires_grad_(x.is_floating_point())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = fn(x)
        if not x.requires_grad:
            return out, None
        factor = factor_of(out)
        grads = torch.autograd.grad((out**degree * factor).sum(), x, create_graph=degree > 1)
        for _ in range(1, degree):
            grads = torch.autograd.grad((grads[0] ** 2).sum(), x, create_graph=True)
        return out.detach(), grads[0].detach()

    factors = []
    wanted = run(lambda x: F.interpolate(x, **how), whole, lambda out: factors.append(random_like(out)) or factors[0])
    sizes = {}

    def rank_main(rank):
        initialize_domain_parallel(partition.ranks, partition.ranks)

        def own(out):
            sizes[rank] = out.shape[dim]
            torch.distributed.barrier()
            return factors[0].narrow(dim, sum(sizes[r] for r in range(rank)), out.shape[dim])

        part = shard(whole, partition, rank, dim)
        return run(lambda x: interpolate(x, **how, partition=partition, dim=dim, target=target), part, own)

    outs, grads = zip(*run_threads(rank_main, partition.ranks), strict=True)
    return wanted, (torch.cat(outs, dim), None if grads[0] is None else torch.cat(grads, dim)), outs


def ulps(ours, theirs):
    """The largest difference, in units of the last place of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max() / torch.finfo(theirs.dtype).eps).item()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (nn.Upsample, {"scale_factor": 2}),
        (nn.Upsample, {"scale_factor": (1.5, 2.0), "mode": "bilinear", "recompute_scale_factor": True}),
        (nn.Upsample, {"size": (17, 5), "mode": "bicubic", "align_corners": True}),
        (nn.UpsamplingNearest2d, {"scale_factor": 3}),
        (nn.UpsamplingBilinear2d, {"size": (9, 8)}),
    ],
)
def test_upsample_layers(kind, how):
    partition = RowPartition((3, 1, 4))
    whole = randn(2, 2, 8, 4)
    check_layer(kind(**how), DomainParallelUpsample, whole, partition)
    check_layer(kind(**how), lambda m: DomainParallelUpsample(m, 3), whole.mT.contiguous(), partition, -1)


@pytest.mark.parametrize("mode", [*MODES[2], "aa-bilinear", "aa-bicubic"])
@pytest.mark.parametrize("asked", [{"size": (721, 12)}, {"scale_factor": 1.85}, {"size": (181, 3)}], ids=str)
def test_float32_as_torch_computes_it(mode, asked):
    """Coordinates of many rows are rounded in float32, and so decide more than a few units of the last place."""
    how = {"mode": mode.removeprefix("aa-"), "antialias": mode.startswith("aa"), **asked}
    whole = randn(1, 2, 361, 6, dtype=torch.float32)
    (out, grad), (ours, our_grad), _ = on_ranks(whole, RowPartition((120, 41, 200)), how)
    if "nearest" in mode:
        assert torch.equal(ours, out)
    assert ulps(ours, out) < 4
    assert ulps(our_grad, grad) < 6


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_float64_picks_the_rows_of_torch(mode):
    """Also where torch picks others in backward, since it does so in float32."""
    found = False
    for rows, scale in [(444, 1.85), (1223, 2.139), (740, 1.85), (500, 1.7)]:
        whole = randn(1, 1, rows, 1)
        (out, grad), (ours, our_grad), _ = on_ranks(
            whole, RowPartition.even(rows, 3), {"mode": mode, "scale_factor": (scale, 1.0)}
        )
        assert torch.equal(ours, out)
        torch.testing.assert_close(our_grad, grad, rtol=1e-12, atol=1e-12)
        x = whole.clone().requires_grad_()
        y = F.interpolate(x, mode=mode, scale_factor=(scale, 1.0))
        (times,) = torch.autograd.grad(y.sum(), x)
        picked = F.interpolate(torch.arange(rows, dtype=torch.float64).reshape(1, 1, rows, 1), None, (scale, 1.0), mode)
        found |= not torch.equal(torch.bincount(picked.flatten().long(), minlength=rows), times.flatten().long())
    if not found:
        pytest.skip("this version of torch picks the same rows in backward")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES[2])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, mode, autocast):
    whole = randn(1, 2, 12, 6, dtype=torch.float32).to(dtype)
    for size in [(25, 13), (5, 3)]:
        (out, grad), (ours, our_grad), _ = on_ranks(
            whole, RowPartition((5, 1, 6)), {"mode": mode, "size": size}, autocast=autocast
        )
        assert ours.dtype == out.dtype
        assert our_grad.dtype == dtype
        assert ulps(ours, out) < 2
        assert ulps(our_grad, grad) < 3


def test_what_no_layer_does():
    """Integers, more than one derivative, the layout in memory, and rows that are not numbers."""
    partition = RowPartition((4, 0, 3), allow_empty=True)
    (out, _), (ours, _), _ = on_ranks(
        (randn(2, 3, 7, 4) * 50).abs().to(torch.uint8), partition, {"size": (15, 3), "mode": "nearest"}
    )
    assert torch.equal(ours, out)
    whole = randn(2, 3, 7, 4)
    for mode in ("bicubic", "nearest", "area"):
        (_, grad), (_, our_grad), _ = on_ranks(whole, partition, {"size": (15, 3), "mode": mode}, degree=3)
        torch.testing.assert_close(our_grad, grad, rtol=1e-9, atol=1e-9)
    last = whole.contiguous(memory_format=torch.channels_last)
    _, _, outs = on_ranks(last, partition, {"size": (15, 3), "mode": "bilinear"})
    assert outs[0].is_contiguous(memory_format=torch.channels_last)
    whole[:, :, 3] = torch.nan
    for mode in MODES[2]:
        for size in [(7, 4), (14, 8), (13, 5), (4, 2)]:
            for corners in (False, True) if mode in ("bilinear", "bicubic") else (None,):
                how = {"size": size, "mode": mode, "align_corners": corners}
                (out, _), (ours, _), _ = on_ranks(whole, partition, how)
                assert torch.equal(ours.isnan(), out.isnan()), how


@pytest.mark.parametrize(
    ("declared", "source", "rows", "target"),
    [
        ((5, 3, 4), (5, 3, 4), 12, (5, 3, 4)),
        ((5, 3, 4), (2, 6, 4), 12, (2, 6, 4)),  # stays, though the model's input is divided otherwise
        ((5, 3, 4), (3, 2, 3), 12, (5, 3, 4)),  # back to the grid of the input
        ((5, 3, 4), (5, 3, 6), 12, (5, 3, 4)),  # cropped to it
        ((5, 3, 4), (1, 1, 3), 6, (3, 1, 2)),  # to a level of the model
        ((5, 3, 4), (1, 0, 1), 4, (2, 1, 1)),
        ((5, 3, 4), (2, 1, 2), 14, (6, 3, 5)),  # upsampling by 3, but for a row
        (None, (2, 1, 2), 10, (4, 2, 4)),
        (None, (2, 1, 2), 9, (4, 2, 3)),
        (None, (4, 1, 4), 5, (2, 1, 2)),
        (None, (4, 2, 3), 3, (2, 0, 1)),
        (None, (4, 4, 4), 18, (6, 6, 6)),
        (None, (4, 4, 4), 9, (3, 3, 3)),
        (None, (4, 4, 5), 25, (8, 8, 9)),
        (None, (20, 20, 20), 41, (14, 14, 13)),
    ],
)
def test_who_owns_the_output(declared, source, rows, target):
    partition = RowPartition(source, allow_empty=True)
    model = None if declared is None else RowPartition(declared)
    assert resampled_partition(partition, rows, model).sizes == target

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        if declared is not None:
            manager.declare(model)
        out = interpolate(torch.ones(1, 1, source[rank], 2), size=(rows, 2), mode="bilinear")
        assert torch.equal(out, torch.ones(1, 1, target[rank], 2))

    run_threads(rank_main, 3)


@given(partitions(), st.integers(1, 60), st.none() | st.integers(0, 5))
def test_all_output_rows_have_an_owner(partition, rows, seed):
    model = None if seed is None else RowPartition(tuple(1 + (seed * r) % 7 for r in range(partition.ranks)))
    out = resampled_partition(partition, rows, model)
    assert out.rows == rows
    assert out.ranks == partition.ranks


def test_explicit_target():
    whole = randn(1, 2, 10, 4)
    for target in [RowPartition((1, 12, 8)), RowPartition((0, 21, 0), allow_empty=True)]:
        for mode in ("bilinear", "nearest"):
            (out, grad), (ours, our_grad), outs = on_ranks(
                whole, RowPartition((4, 4, 2)), {"size": (21, 4), "mode": mode}, target=target
            )
            assert [part.shape[2] for part in outs] == list(target.sizes)
            torch.testing.assert_close(ours, out, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(our_grad, grad, rtol=1e-12, atol=1e-12)
    moved = RowPartition((2, 2, 6))
    (out, _), (ours, _), outs = on_ranks(whole, RowPartition((4, 4, 2)), {"size": (10, 4)}, target=moved)
    assert torch.equal(ours, out)
    assert [part.shape[2] for part in outs] == [2, 2, 6]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"size": (4, 4), "mode": "linear"}, "up1: torch refuses"),
        ({"size": (4, 4), "mode": "nearest", "align_corners": True}, "up1: torch refuses .*align_corners"),
        ({"size": (4, 4, 4)}, "up1: torch refuses"),
        ({}, "up1: torch refuses .*either size or scale_factor"),
        ({"size": 4, "scale_factor": 2.0}, "up1: torch refuses .*only one of size or scale_factor"),
        ({"scale_factor": 0.01, "mode": "area"}, "up1: torch refuses .*nothing would be left"),
        ({"scale_factor": 0.01}, "up1: torch refuses"),
        ({"size": (5, 1), "mode": "bilinear", "antialias": True}, "up1: antialias=True to a single column"),
        ({"size": (5, 4), "dim": 1}, "up1: the sharded dim must be one of the last 2"),
        ({"size": (5, 4), "target": RowPartition((5, 1))}, "up1: target=.* does not divide 5 output rows over 2 ranks"),
        ({"size": (5, 4), "target": RowPartition((5,))}, "up1: target=.* does not divide 5 output rows over 2 ranks"),
    ],
)
def test_mistakes_are_named(how, message):
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        with pytest.raises(ValueError, match=message):
            interpolate(torch.ones(1, 1, 3 + rank, 4), **how, label="up1")

    run_threads(rank_main, 2)


def test_more_mistakes():
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        with pytest.raises(ValueError, match="mode 'bilinear' averages rows, which torch.uint8 cannot hold"):
            interpolate(torch.ones(1, 1, 3, 4, dtype=torch.uint8), size=(6, 8), mode="bilinear")
        with pytest.raises(ValueError, match=r"expected \(B, C, L\), .* got shape \(3, 4\)"):
            interpolate(torch.ones(3, 4), size=(6, 8))

    run_threads(rank_main, 2)
    with pytest.raises(ValueError, match="DomainParallelUpsample wraps torch.nn.Upsample; got Conv2d"):
        DomainParallelUpsample(nn.Conv2d(1, 1, 1))


def test_layers_as_modules():
    layer = DomainParallelInterpolate((8, 6), align_corners=True, label="final")
    assert (layer.size, layer.mode, layer.shard_dim, layer.halo_exchange) == ((8, 6), "bilinear", -2, None)
    x = randn(1, 1, 4, 4)
    wanted = F.interpolate(x, (8, 6), mode="bilinear", align_corners=True)
    assert torch.equal(layer(x), wanted)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), wanted)
    assert copied._layer != layer._layer
    assert "size=(8, 6), mode='bilinear', shard_dim=-2" in repr(layer)
    assert "scale_factor=2.0" in repr(DomainParallelInterpolate(None, scale_factor=2.0))
    upsample = DomainParallelUpsample(nn.Upsample(scale_factor=2))
    assert upsample.scale_factor == 2.0
    assert torch.equal(upsample(x), upsample.wrapped(x))


def compiled_main(rank):
    manager = initialize_domain_parallel(2, 2)
    net = nn.Sequential(
        DomainParallelInterpolate((9, 5), "bicubic"),
        DomainParallelUpsample(nn.Upsample(scale_factor=1.7)),
        DomainParallelInterpolate((6, 4), antialias=True),
        DomainParallelPad(nn.ConstantPad2d((1, 1, 2, 1), 1.5)),
        DomainParallelPad(nn.CircularPad2d((0, 0, 1, -1))),
        DomainParallelPixelUnshuffle(nn.PixelUnshuffle(3), -2),
        DomainParallelPixelShuffle(nn.PixelShuffle(3)),
    )
    torch._dynamo.config.recompile_limit = 16
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for partition in (RowPartition((3, 4)), RowPartition((5, 2))):
        manager.declare(partition)
        x = randn(2, 2, partition.sizes[rank], 4, seed=rank).requires_grad_()
        wanted, out = net(x), compiled(x)
        torch.testing.assert_close(out, wanted)
        ours, theirs = (torch.autograd.grad(each.cos().sum(), x)[0] for each in (out, wanted))
        torch.testing.assert_close(ours, theirs)
    return True


@pytest.mark.slow
def test_compiled():
    assert run_processes(compiled_main, 2) == [True, True]
