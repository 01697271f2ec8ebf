"""Pooling of sharded rows is torch's pooling of the whole: values, gradients, and the choice among ties."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from domain_reference import check_layer, partitions, randn, random_like, shard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from credit_domain.ops.pooling import adaptive_pooling as DA
from credit_domain.ops.pooling import pooling as DP
from credit_domain.ops.pooling import pooling_layers as layers
from credit_domain.ops.pooling.adaptive_pooling import AdaptiveWindows, adaptive_window, runs_of
from credit_halo.testing import run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

INF = math.inf


def pair(kind, spatial):
    """torch's module and its counterpart."""
    name = f"{kind}{spatial}d"
    return getattr(nn, name), getattr(layers, f"DomainParallel{name}")


@st.composite
def layouts(draw, heights=None):
    """Number of spatial dims, the sharded one, the shape of the whole and a partition."""
    spatial = draw(st.sampled_from([1, 2, 2, 2, 3]))
    at = draw(st.integers(0, spatial - 1))
    partition = draw(partitions(heights))
    sizes = [draw(st.integers(3, 6)) for _ in range(spatial)]
    sizes[at] = partition.rows
    batch = [2] if draw(st.booleans()) else []
    return spatial, at - spatial, (*batch, 2, *sizes), partition


def each(draw, spatial, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(spatial))


def few_values(shape, seed, *more):
    """Many ties, and the given values among them."""
    values = torch.tensor([0.0, 1.0, 2.0, *more], dtype=torch.float64)
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(seed))]


def check_pooling(layer, wrapper, whole, dim, partition, draw, **more):
    try:
        layer(whole)
    except RuntimeError:
        assume(False)  # torch takes no such layer
    shard_dim = dim if draw(st.booleans()) else dim + wrapper.spatial + 2
    check_layer(layer, lambda m: wrapper(m, shard_dim), whole, partition, dim, declare=draw(st.booleans()), **more)


def check_choice(pool, pool_shards, whole, partition, dim, replicated=False):
    """Maxima, indices and input gradients are those of the whole, bit by bit."""
    x = whole.clone().requires_grad_()
    out, index = pool(x)
    factor = random_like(out)
    (grad,) = torch.autograd.grad((out * factor).sum() * (partition.ranks if replicated else 1), x)

    def rank_main(rank):
        initialize_domain_parallel(partition.ranks, partition.ranks)
        part = shard(whole, partition, rank, dim).clone().requires_grad_()
        own, own_index = pool_shards(part)
        counts[rank] = own.shape[dim]
        torch.distributed.barrier()
        at = sum(counts[r] for r in range(rank))
        mine = factor if replicated else factor.narrow(dim, at, own.shape[dim])
        (own_grad,) = torch.autograd.grad((own * mine).sum(), part)
        return own.detach(), own_index, own_grad

    counts = {}
    outs, indices, grads = zip(*run_threads(rank_main, partition.ranks), strict=True)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    for found, expected in ((outs, out.detach()), (indices, index)):
        for got in found if replicated else [torch.cat(found, dim)]:
            torch.testing.assert_close(got, expected, **same)
    torch.testing.assert_close(torch.cat(grads, dim), grad, rtol=1e-12, atol=1e-12, equal_nan=True)


# Windows


@settings(max_examples=60)
@given(st.data(), layouts())
def test_max_pool(data, layout):
    spatial, dim, shape, partition = layout
    draw = data.draw
    torch_layer, wrapper = pair("MaxPool", spatial)
    kernel, dilation = each(draw, spatial, 1, 5), each(draw, spatial, 1, 3)
    stride = draw(st.none() | st.tuples(*[st.integers(1, 6)] * spatial))
    padding = tuple(draw(st.integers(0, ((k - 1) * d + 1) // 2)) for k, d in zip(kernel, dilation, strict=True))
    layer = torch_layer(kernel, stride, padding, dilation, ceil_mode=draw(st.booleans()))
    check_pooling(layer, wrapper, randn(*shape), dim, partition, draw)


@settings(max_examples=80)
@given(st.data(), layouts(), st.integers(0, 999), st.sampled_from([(), (-INF,) * 9, (math.nan,), (INF, -INF)]))
def test_max_pool_chooses_as_torch(data, layout, seed, more):
    spatial, dim, shape, partition = layout
    draw = data.draw
    kernel, dilation, stride = each(draw, spatial, 1, 5), each(draw, spatial, 1, 3), each(draw, spatial, 1, 4)
    padding = tuple(draw(st.integers(0, ((k - 1) * d + 1) // 2)) for k, d in zip(kernel, dilation, strict=True))
    size = shape[-spatial:]
    # torch writes outside of the tensor where a window has no row at all.
    assume(all(n > (-p) % d for n, p, d in zip(size, padding, dilation, strict=True)))
    args = (kernel, stride, padding, dilation, draw(st.booleans()), True)
    name = f"max_pool{spatial}d"
    whole = few_values(shape, seed, *more)
    try:
        getattr(F, name)(whole, *args)
    except RuntimeError:
        assume(False)
    check_choice(
        lambda x: getattr(F, name)(x, *args), lambda x: getattr(DP, name)(x, *args, dim=dim), whole, partition, dim
    )


@settings(max_examples=80)
@given(st.data(), layouts())
def test_avg_pool(data, layout):
    spatial, dim, shape, partition = layout
    draw = data.draw
    torch_layer, wrapper = pair("AvgPool", spatial)
    kernel = each(draw, spatial, 1, 6)
    stride = draw(st.none() | st.tuples(*[st.integers(1, 6)] * spatial))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    more = {"ceil_mode": draw(st.booleans()), "count_include_pad": draw(st.booleans())}
    if spatial > 1:
        more["divisor_override"] = draw(st.none() | st.integers(1, 9))
    layer = torch_layer(kernel, stride, padding, **more)
    check_pooling(layer, wrapper, randn(*shape), dim, partition, draw)


@settings(max_examples=30)
@given(st.data(), layouts())
def test_lp_pool(data, layout):
    spatial, dim, shape, partition = layout
    draw = data.draw
    torch_layer, wrapper = pair("LPPool", spatial)
    kernel = each(draw, spatial, 1, 5)
    stride = draw(st.none() | st.tuples(*[st.integers(1, 6)] * spatial))
    if spatial == 1:
        kernel, stride = kernel[0], stride and stride[0]
    layer = torch_layer(draw(st.sampled_from([1, 2.0, 3.5])), kernel, stride, ceil_mode=draw(st.booleans()))
    check_pooling(layer, wrapper, randn(*shape).abs() + 0.1, dim, partition, draw)


# To a given size


def sizes_out(draw, spatial, dim, rows):
    size = [draw(st.integers(1, 7)) for _ in range(spatial)]
    size[dim] = rows
    return tuple(size)


@settings(max_examples=60)
@given(st.data(), layouts())
def test_adaptive_avg_pool(data, layout):
    spatial, dim, shape, partition = layout
    draw = data.draw
    torch_layer, wrapper = pair("AdaptiveAvgPool", spatial)
    rows = draw(st.integers(1, 30) | st.just(1) | st.just(shape[dim]))
    if spatial > 1:
        rows = draw(st.just(rows) | st.none())
    layer = torch_layer(sizes_out(draw, spatial, dim, rows))
    check_pooling(layer, wrapper, randn(*shape), dim, partition, draw, replicated=rows == 1)


@settings(max_examples=80)
@given(st.data(), layouts(), st.integers(0, 999), st.sampled_from([(), (-INF,) * 9, (math.nan,), (INF, -INF)]))
def test_adaptive_max_pool_chooses_as_torch(data, layout, seed, more):
    spatial, dim, shape, partition = layout
    draw = data.draw
    rows = draw(st.integers(1, 30) | st.just(1) | st.just(shape[dim]))
    if spatial > 1:
        rows = draw(st.just(rows) | st.none())
    size = sizes_out(draw, spatial, dim, rows)
    name = f"adaptive_max_pool{spatial}d"
    check_choice(
        lambda x: getattr(F, name)(x, size, True),
        lambda x: getattr(DA, name)(x, size, True, dim=dim),
        few_values(shape, seed, *more),
        partition,
        dim,
        rows == 1,
    )


@settings(max_examples=60)
@given(
    layouts(),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from([(), (-INF,) * 9, (math.nan,), (INF, -INF)]),
    st.booleans(),
)
def test_global_maximum_chooses_as_torch(layout, others, seed, more, indices):
    spatial, dim, shape, partition = layout
    size = [others] * spatial
    size[dim] = 1
    name = f"adaptive_max_pool{spatial}d"

    def pool(x):
        out = getattr(DA, name)(x, size, indices, dim=dim)
        return out if indices else (out, getattr(DA, name)(x.detach(), size, True, dim=dim)[1])

    whole = few_values(shape, seed, *more)
    check_choice(lambda x: getattr(F, name)(x, size, True), pool, whole, partition, dim, replicated=True)


@settings(max_examples=30)
@given(st.data(), layouts())
def test_adaptive_max_pool(data, layout):
    spatial, dim, shape, partition = layout
    draw = data.draw
    torch_layer, wrapper = pair("AdaptiveMaxPool", spatial)
    rows = draw(st.integers(1, 9))
    layer = torch_layer(sizes_out(draw, spatial, dim, rows))
    check_pooling(layer, wrapper, few_values(shape, 3), dim, partition, draw, replicated=rows == 1)


@given(partitions(), st.integers(0, 40))
def test_adaptive_rows_belong_to_the_owner_of_the_first_that_they_read(partition, rows):
    plan = AdaptiveWindows(rows).footprint(partition)
    assert plan.target.rows == rows
    for row in range(rows):
        read = adaptive_window(row, partition.rows, rows)
        assert read == range(math.floor(row * partition.rows / rows), math.ceil((row + 1) * partition.rows / rows))
        owner = partition.owner(read.start)
        assert row in plan.target.interval(owner)
        assert read.start in plan.needs[owner]
        assert read[-1] in plan.needs[owner]


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_adaptive_windows_are_pooled_in_runs(rows, out, data):
    start = data.draw(st.integers(0, out - 1))
    stop = data.draw(st.integers(start, out))
    x = torch.arange(rows, dtype=torch.float64).square()[None]
    parts = [
        F.adaptive_avg_pool1d(x[:, first : first + count], into)
        for first, count, into in runs_of(start, stop - start, rows, out)
    ]
    expected = F.adaptive_avg_pool1d(x, out)[:, start:stop]
    torch.testing.assert_close(torch.cat([*parts, x[:, :0]], 1), expected)


# A rank without rows, dtypes, and what is refused


EMPTY = {
    "max": lambda x, P: DP.max_pool2d(x, 3, 2, 1, partition=P),
    "avg": lambda x, P: DP.avg_pool2d(x, 3, 2, 1, count_include_pad=False, partition=P),
    "mean": lambda x, P: DA.adaptive_avg_pool2d(x, 1, partition=P),
    "maximum": lambda x, P: DA.adaptive_max_pool2d(x, (1, 2), partition=P),
    "some": lambda x, P: DA.adaptive_avg_pool2d(x, (3, 2), partition=P),
    "all": lambda x, P: DA.adaptive_max_pool2d(x, (None, 2), partition=P),
}
PLAIN = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "mean": lambda x: F.adaptive_avg_pool2d(x, 1),
    "maximum": lambda x: F.adaptive_max_pool2d(x, (1, 2)),
    "some": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "all": lambda x: F.adaptive_max_pool2d(x, (None, 2)),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("sizes", [(0, 4, 1), (1, 0, 4), (5, 0, 0)])
def test_ranks_without_rows(kind, sizes):
    partition = RowPartition(sizes, allow_empty=True)
    # All values are below 0, so that nothing that a rank without rows might add goes unseen.
    whole = -randn(2, 3, 5, 4).abs() - 1
    x = whole.clone().requires_grad_()
    expected = PLAIN[kind](x)
    one = kind in ("mean", "maximum")
    (expected_grad,) = torch.autograd.grad(expected.pow(2).sum() * (3 if one else 1), x)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        part = shard(whole, partition, rank).clone().requires_grad_()
        out = EMPTY[kind](part, partition)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), part)
        return out.detach(), grad

    outs, grads = zip(*run_threads(rank_main, 3), strict=True)
    for got in outs if one else [torch.cat(outs, -2)]:
        torch.testing.assert_close(got, expected.detach())
    torch.testing.assert_close(torch.cat(grads, -2), expected_grad)


CALLS = [
    (F.max_pool3d, DP.max_pool3d, (3, 2, 1)),
    (F.avg_pool2d, DP.avg_pool2d, (3, 2, 1, False, False)),
    (F.avg_pool2d, DP.avg_pool2d, (4, 3, 2, True)),
    (F.avg_pool3d, DP.avg_pool3d, (3, 2, 1, False, False)),
    (F.lp_pool2d, DP.lp_pool2d, (2.0, 3, 2, True)),
    (F.adaptive_avg_pool2d, DA.adaptive_avg_pool2d, (1,)),
    (F.adaptive_avg_pool3d, DA.adaptive_avg_pool3d, (1,)),
    (F.adaptive_avg_pool3d, DA.adaptive_avg_pool3d, ((2, 3, 2),)),
    (F.adaptive_max_pool3d, DA.adaptive_max_pool3d, ((2, 1, 2),)),
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("plain", "sharded", "args"), CALLS)
def test_low_precision_is_as_near_as_in_torch(plain, sharded, args, dtype, autocast):
    partition = RowPartition((4, 1, 6))
    whole = (randn(1, 2, *[5] * plain.__name__.endswith("3d"), 11, 6) + 3).abs().to(dtype)
    exact = plain(whole.double(), *args)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            expected = plain(whole, *args)
        except NotImplementedError:
            pytest.skip("torch does not have it")

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return sharded(shard(whole, partition, rank), *args)

    outs = run_threads(rank_main, 3)
    assert {out.dtype for out in outs} == {expected.dtype}
    got = outs[0] if exact.shape[-2] == 1 else torch.cat(outs, -2)
    ulp = torch.finfo(expected.dtype).eps * exact
    assert ((got.double() - exact).abs() <= (expected.double() - exact).abs() + 2e-6 * exact + 0.05 * ulp).all()


@pytest.mark.parametrize("name", ["max_pool1d", "max_pool2d", "max_pool3d"])
def test_maxima_of_integers(name):
    partition, nd = RowPartition((2, 1, 3)), int(name[-2])
    least = torch.iinfo(torch.int64).min
    whole = (randn(1, 1, *[4] * (nd - 1), 6) * 3).long()
    whole[..., 0] = least
    expected, index = getattr(F, name)(whole, 3, 2, 1, ceil_mode=True, return_indices=True)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        args = (shard(whole, partition, rank, -1), 3, 2, 1, 1, True)
        return getattr(DP, name)(*args, dim=-1), *getattr(DP, name)(*args, True, dim=-1)

    outs, again, indices = (torch.cat(parts, -1) for parts in zip(*run_threads(rank_main, 3), strict=True))
    assert torch.equal(outs, expected)
    assert torch.equal(again, expected)
    assert torch.equal(indices, index)


def test_a_layer_with_indices():
    partition = RowPartition((3, 2))
    whole = randn(3, 5, 4)
    expected = F.max_pool2d(whole, 2, return_indices=True), F.adaptive_max_pool2d(whole, 1, return_indices=True)

    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        part = shard(whole, partition, rank)
        window = layers.DomainParallelMaxPool2d(nn.MaxPool2d(2, return_indices=True), 2)
        one = layers.DomainParallelAdaptiveMaxPool2d(nn.AdaptiveMaxPool2d(1, return_indices=True))
        return window(part), one(part)

    results = run_threads(rank_main, 2)
    for kind, (out, index) in enumerate(expected):
        got, got_index = zip(*[result[kind] for result in results], strict=True)
        join = (lambda parts: torch.cat(parts, -2)) if kind == 0 else operator.itemgetter(1)
        assert torch.equal(join(got), out)
        assert torch.equal(join(got_index), index)


def test_a_single_rank_has_torchs_own():
    x = randn(2, 3, 8, 8)
    assert torch.equal(DP.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1))
    assert torch.equal(DP.avg_pool2d(x, 3, divisor_override=2), F.avg_pool2d(x, 3, divisor_override=2))
    assert torch.equal(DP.avg_pool1d(x[0], 3), F.avg_pool1d(x[0], 3))
    assert torch.equal(DP.lp_pool2d(x, 1, 3), F.lp_pool2d(x, 1, 3))
    assert torch.equal(DA.adaptive_avg_pool2d(x, (None, 2)), F.adaptive_avg_pool2d(x, (None, 2)))
    out, index = DA.adaptive_max_pool2d(x, 2, True)
    assert torch.equal(out.flatten(), x.flatten(2).gather(2, index.flatten(2)).flatten())


class Pools(nn.Module):
    """The common cases, one after another."""

    def __init__(self):
        super().__init__()
        self.max = layers.DomainParallelMaxPool2d(nn.MaxPool2d(3, 2, 1, return_indices=True))
        self.avg = layers.DomainParallelAvgPool2d(nn.AvgPool2d(3, 1, 1, count_include_pad=False))
        self.mean = layers.DomainParallelAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d(1))
        self.maximum = layers.DomainParallelAdaptiveMaxPool2d(nn.AdaptiveMaxPool2d(1))
        self.some = layers.DomainParallelAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d((4, 2)))

    def forward(self, x):
        out, index = self.max(x)
        return self.avg(out) * self.mean(x) * self.maximum(x), self.some(out), index


def compiled(rank):
    partition = initialize_domain_parallel(3, 3).declare(RowPartition((5, 1, 6)))
    pools = Pools()
    x = shard(randn(2, 3, 12, 6), partition, rank).clone().requires_grad_()
    results = []
    for run in (pools, torch.compile(pools, fullgraph=True, backend="aot_eager")):
        out, some, index = run(x)
        results.append((out, some, index, *torch.autograd.grad(out.cos().sum() + some.cos().sum(), x)))
    for plain, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, plain)


@pytest.mark.slow
def test_compiled_pooling_is_the_same():
    run_processes(compiled, 3, timeout=900)


def test_it_answers_for_the_module_that_it_wraps():
    pool = nn.MaxPool2d(3, 2, 1)
    layer = layers.DomainParallelMaxPool2d(pool)
    assert layer.pool is pool
    assert layer.kernel_size == 3
    assert layer.shard_dim == -2
    assert "kernel_size=3" in repr(layer)
    assert layer.halo_width == 1
    assert layers.DomainParallelMaxPool2d(nn.MaxPool2d(3, dilation=2)).halo_width == 2
    assert layers.DomainParallelAvgPool1d(nn.AvgPool1d(4, 1)).halo_width == 3
    assert layers.DomainParallelLPPool3d(nn.LPPool3d(2, 2)).halo_width == 0
    assert layers.DomainParallelAdaptiveAvgPool1d(nn.AdaptiveAvgPool1d(1)).shard_dim == -1
    assert layers.DomainParallelAvgPool3d(nn.AvgPool3d(2), 3).shard_dim == 3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="DomainParallelAvgPool2d wraps torch.nn.AvgPool2d; got MaxPool2d"):
        layers.DomainParallelAvgPool2d(nn.MaxPool2d(2))
    with pytest.raises(ValueError, match="shard_dim=1 is no spatial dim of MaxPool2d"):
        layers.DomainParallelMaxPool2d(nn.MaxPool2d(2), 1)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = torch.ones(1, 1, 2, 9)
        with pytest.raises(ValueError, match="pool1: the window spans 9 rows, more than 6 rows with padding 1 have"):
            layers.DomainParallelMaxPool2d(nn.MaxPool2d(9, padding=1), label="pool1")(x)
        with pytest.raises(ValueError, match="avg_pool2d: .* padding from 0 to half .* kernel 2, .* padding 2"):
            DP.avg_pool2d(x, 2, padding=2)
        with pytest.raises(ValueError, match="max_pool2d: .* at least 1.* stride 0"):
            DP.max_pool2d(x, 2, (0, 2))
        with pytest.raises(ValueError, match="pool2: a floating-point tensor is needed; got torch.int64"):
            DP.avg_pool2d(x.long(), 2, label="pool2")
        with pytest.raises(ValueError, match="adaptive_max_pool2d: .* 0 rows or more; got -1"):
            DA.adaptive_max_pool2d(x, (-1, 2))

    run_threads(rank_main, 3)
