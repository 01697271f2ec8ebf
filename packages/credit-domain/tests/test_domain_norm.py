"""Normalisations on sharded rows are torch's of the whole: outputs, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from domain_reference import check_layer, partitions, randn, random_like, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import credit_domain.functional as DF
from credit_domain.layers import (
    DomainParallelBatchNorm1d,
    DomainParallelBatchNorm2d,
    DomainParallelBatchNorm3d,
    DomainParallelGroupNorm,
    DomainParallelInstanceNorm1d,
    DomainParallelInstanceNorm2d,
    DomainParallelInstanceNorm3d,
    DomainParallelLayerNorm,
    DomainParallelRMSNorm,
)
from credit_domain.ops.norms.moments import Normalization, combine, normalize
from credit_halo import ExchangeError
from credit_halo.testing import ThreadGroup, run_processes, run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

BATCH = {
    1: (nn.BatchNorm1d, DomainParallelBatchNorm1d),
    2: (nn.BatchNorm2d, DomainParallelBatchNorm2d),
    3: (nn.BatchNorm3d, DomainParallelBatchNorm3d),
}
INSTANCE = {
    1: (nn.InstanceNorm1d, DomainParallelInstanceNorm1d),
    2: (nn.InstanceNorm2d, DomainParallelInstanceNorm2d),
    3: (nn.InstanceNorm3d, DomainParallelInstanceNorm3d),
}
WITH_EMPTY = RowPartition((0, 3, 0, 1), allow_empty=True)


@st.composite
def layouts(draw):
    """Number of spatial dims, the sharded one counted from the last, the sizes of all, and a partition."""
    spatial = draw(st.sampled_from([1, 2, 2, 3]))
    at = draw(st.integers(0, spatial - 1))
    partition = draw(partitions() | st.just(WITH_EMPTY))
    sizes = [draw(st.integers(2, 4)) for _ in range(spatial)]
    sizes[at] = partition.rows
    return spatial, at - spatial, sizes, partition


def randomised(module):
    """Parameters and buffers other than ones and zeros."""
    for seed, tensor in enumerate([*module.parameters(), *module.buffers()]):
        if tensor.is_floating_point():
            tensor.data.copy_(random_like(tensor, seed).abs() + 0.5)
    return module


def declared(draw, partition):
    return 0 not in partition.sizes and draw(st.booleans())


@settings(max_examples=40)
@given(st.data(), layouts())
def test_group_norm(data, layout):
    draw = data.draw
    _, dim, sizes, partition = layout
    module = randomised(nn.GroupNorm(draw(st.sampled_from([1, 2, 6])), 6, 1e-3, draw(st.booleans()))).double()
    whole = randn(draw(st.integers(2, 3)), 6, *sizes) + 3
    check_layer(module, DomainParallelGroupNorm, whole, partition, dim, declare=declared(draw, partition))


@settings(max_examples=40)
@given(st.data(), layouts())
def test_batch_norm(data, layout):
    draw = data.draw
    spatial, dim, sizes, partition = layout
    kind, wrapper = BATCH[spatial]
    momentum, affine, tracked = draw(st.sampled_from([0.1, 0.5, None])), draw(st.booleans()), draw(st.booleans())
    module = randomised(kind(3, 1e-3, momentum, affine, tracked)).double().train(draw(st.booleans()))
    check_layer(
        module,
        wrapper,
        randn(2, 3, *sizes) + 3,
        partition,
        dim,
        calls=3,
        declare=declared(draw, partition),
    )


@settings(max_examples=40)
@given(st.data(), layouts())
def test_instance_norm(data, layout):
    draw = data.draw
    spatial, dim, sizes, partition = layout
    kind, wrapper = INSTANCE[spatial]
    momentum, affine, tracked = draw(st.sampled_from([0.1, 0.5, None])), draw(st.booleans()), draw(st.booleans())
    module = randomised(kind(3, 1e-3, momentum, affine, tracked)).double().train(draw(st.booleans()))
    if partition.rows == 1 and spatial == 1:  # torch refuses a single value
        module.eval()
    if partition.rows == 1 and spatial == 1 and not tracked:
        return
    whole = randn(*([] if draw(st.booleans()) else [2]), 3, *sizes) + 3
    check_layer(module, wrapper, whole, partition, dim, declare=declared(draw, partition))


@settings(max_examples=60)
@given(st.data(), layouts())
def test_layer_and_rms_norm(data, layout):
    draw = data.draw
    _, dim, sizes, partition = layout
    shape = [2, 3, *sizes]
    last = shape[-draw(st.integers(1, len(shape))) :]
    if draw(st.booleans()):
        module = nn.LayerNorm(last, 1e-3, draw(st.booleans()), draw(st.booleans()))
        wrapper = DomainParallelLayerNorm
    else:
        module = nn.RMSNorm(last, draw(st.sampled_from([None, 1e-3])), draw(st.booleans()))
        wrapper = DomainParallelRMSNorm
    shard_dim = dim if draw(st.booleans()) else dim + len(shape)
    whole = randn(*shape) + 3
    check_layer(
        randomised(module).double(),
        lambda m: wrapper(m, shard_dim),
        whole,
        partition,
        dim,
        declare=declared(draw, partition),
    )


@pytest.mark.parametrize("kind", ["group", "batch", "instance", "layer", "rms"])
def test_functions(kind):
    partition = RowPartition((3, 1, 2))
    whole, weight, bias = randn(2, 4, 6, 3) + 2, randn(4), randn(4, seed=1)
    full = [randn(6, 3), randn(6, 3, seed=1)]

    def call(of, x, **more):
        running = [torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
        if kind == "group":
            return of.group_norm(x, 2, weight, bias)
        if kind == "batch":
            return torch.cat([of.batch_norm(x, *running, weight, bias, True, 0.3).flatten()[:0], *running])
        if kind == "instance":
            return torch.cat([of.instance_norm(x, *running, weight, bias, True, 0.3).flatten()[:0], *running])
        if kind == "layer":
            return of.layer_norm(x, [6, 3], *full, **more)
        return of.rms_norm(x, [6, 3], full[0], **more)

    expected = call(F, whole)

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        for more in ({}, {"partition": partition}):
            out = call(DF, shard(whole, partition, rank), **more)
            if kind not in ("batch", "instance"):
                torch.testing.assert_close(out, shard(expected, partition, rank))
            else:
                torch.testing.assert_close(out, expected)

    run_threads(rank_main, 3)


def test_alone_it_is_torchs_own():
    x = torch.randn(2, 4, 5, 3)
    assert torch.equal(DomainParallelGroupNorm(nn.GroupNorm(2, 4))(x), nn.GroupNorm(2, 4)(x))
    assert torch.equal(DomainParallelBatchNorm2d(nn.BatchNorm2d(4))(x), nn.BatchNorm2d(4)(x))
    assert torch.equal(DomainParallelInstanceNorm2d(nn.InstanceNorm2d(4))(x), nn.InstanceNorm2d(4)(x))
    assert torch.equal(DomainParallelLayerNorm(nn.LayerNorm([5, 3]))(x), nn.LayerNorm([5, 3])(x))
    assert torch.equal(DomainParallelRMSNorm(nn.RMSNorm([5, 3]))(x), nn.RMSNorm([5, 3])(x))


def test_they_answer_for_the_modules_that_they_wrap():
    norm = nn.GroupNorm(2, 4, 1e-3)
    layer = DomainParallelGroupNorm(norm)
    assert (layer.num_groups, layer.num_channels, layer.eps, layer.affine) == (2, 4, 1e-3, True)
    assert layer.weight is norm.weight
    assert layer.bias is norm.bias
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert DomainParallelGroupNorm(nn.GroupNorm(2, 4, affine=False)).weight is None
    batch = DomainParallelBatchNorm2d(nn.BatchNorm2d(4))
    assert batch.state_dict().keys() == nn.BatchNorm2d(4).state_dict().keys()
    assert DomainParallelRMSNorm(nn.RMSNorm(4)).weight.shape == (4,)
    with pytest.raises(ValueError, match="DomainParallelBatchNorm3d wraps torch.nn.BatchNorm3d or .*; got BatchNorm2d"):
        DomainParallelBatchNorm3d(nn.BatchNorm2d(4))


# Precision


def normalised(of, kind, x):
    """Torch's or ours, of a tensor with 64 rows in all."""
    if kind == "group":
        return of.group_norm(x, 2)
    if kind == "batch":
        return of.batch_norm(x, None, None, training=True)
    return of.instance_norm(x) if kind == "instance" else of.layer_norm(x, [64, x.shape[-1]])


@pytest.mark.parametrize("mean", [0, 1000, 30000])
@pytest.mark.parametrize("kind", ["group", "batch", "instance", "layer"])
def test_a_mean_far_from_zero_costs_no_digits(kind, mean):
    """In float32, where torch on one rank is wrong by 5e-5 at 1000 and by 1e-3 at 30000."""
    partition = RowPartition((5, 40, 3, 16))
    whole = (randn(2, 4, 64, 48) + mean).float()
    factor = random_like(whole)

    def both(of, x, own):
        x = x.clone().requires_grad_()
        out = normalised(of, kind, x)
        (grad,) = torch.autograd.grad((out * own).sum(), x)
        return out.detach(), grad

    exact = both(F, whole.double(), factor.double())

    def rank_main(rank):
        initialize_domain_parallel(4, 4)
        return both(DF, shard(whole, partition, rank), shard(factor, partition, rank))

    results = run_threads(rank_main, 4)
    for at in range(2):
        ours = torch.cat([result[at] for result in results], -2)
        error = (ours - exact[at]).abs().max()
        assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["group", "batch", "instance", "layer"])
def test_half_precision_takes_statistics_in_float32(kind, dtype):
    partition = RowPartition((5, 40, 3, 16))
    whole = (randn(2, 4, 64, 8) * 2 + 30).to(dtype)

    exact = normalised(F, kind, whole.double())

    def rank_main(rank):
        initialize_domain_parallel(4, 4)
        x = shard(whole, partition, rank).clone().requires_grad_()
        out = normalised(DF, kind, x)
        out.sum().backward()
        assert out.dtype == x.grad.dtype == dtype
        return out.detach()

    out = torch.cat(run_threads(rank_main, 4), -2)
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_autocast_on_the_cpu_leaves_the_dtype():
    modules = [
        (nn.GroupNorm(2, 4), DomainParallelGroupNorm),
        (nn.BatchNorm2d(4), DomainParallelBatchNorm2d),
        (nn.InstanceNorm2d(4, affine=True), DomainParallelInstanceNorm2d),
        (nn.LayerNorm([6, 5]), DomainParallelLayerNorm),
    ]
    whole = randn(2, 4, 6, 5).bfloat16()
    partition = RowPartition((2, 1, 3))

    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        with torch.autocast("cpu", torch.bfloat16):
            for x in (whole, whole.float()):
                for module, wrapper in modules:
                    expected = shard(copy.deepcopy(module)(x), partition, rank)
                    out = wrapper(copy.deepcopy(module))(shard(x, partition, rank))
                    torch.testing.assert_close(out, expected)  # dtype too

    run_threads(rank_main, 3)


# Gradients


def of_ranks(fn, partition, *tensors):
    """What ``fn`` of this rank's parts returns, put together."""

    def rank_main(rank):
        initialize_domain_parallel(partition.ranks, partition.ranks)
        return fn(*(shard(tensor, partition, rank).clone() for tensor in tensors))

    return [torch.cat(parts, -2) for parts in zip(*run_threads(rank_main, partition.ranks), strict=True)]


@pytest.mark.parametrize("kind", ["group", "batch", "instance", "layer", "rms"])
@pytest.mark.parametrize("partition", [RowPartition((3, 1, 2)), RowPartition((2, 0, 4), allow_empty=True)])
def test_double_backward(kind, partition):
    whole, factor, second = randn(2, 4, 6, 3), randn(2, 4, 6, 3, seed=1), randn(2, 4, 6, 3, seed=2)
    weight, affine = randn(4, seed=3).abs(), randn(6, 3, seed=4).abs()

    def twice(of):
        def fn(x, own, other):
            w, a = weight.clone().requires_grad_(), affine.clone().requires_grad_()
            x.requires_grad_()
            own.requires_grad_()
            if kind == "group":
                out = of.group_norm(x, 2, w, w)
            elif kind == "batch":
                out = of.batch_norm(x, None, None, w, w, True)
            elif kind == "instance":
                out = of.instance_norm(x, weight=w, bias=w)
            elif kind == "layer":
                out = of.layer_norm(x, [6, 3], a, a)
            else:
                out = of.rms_norm(x, [6, 3], a)
            parameter = a if kind in ("layer", "rms") else w
            first = torch.autograd.grad(out, (x, parameter), own, create_graph=True)
            loss = (first[0].square() * other).sum() + (out * other).sum()
            grads = torch.autograd.grad(loss, (x, own, parameter))
            rows = [g[..., None, :].expand(*g.shape[:-1], x.shape[-2], -1) for g in (first[1].detach(), grads[2])]
            return first[0].detach(), *grads[:2], *rows

        return fn

    expected = twice(F)(whole.clone(), factor.clone(), second)
    ours = of_ranks(twice(DF), partition, whole, factor, second)
    for got, want in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(ours[3:], expected[3:], strict=True):  # parameters: each rank's share, repeated for its rows
        if 0 not in partition.sizes:
            torch.testing.assert_close(sum(got[..., at, :] for at in partition.offsets[:-1]), want[..., 0, :])


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    partition = RowPartition((3, 1, 2))
    module = nn.Sequential(
        randomised(nn.GroupNorm(2, 4)), nn.GELU(), randomised(nn.LayerNorm([6, 3])), nn.GELU(), nn.InstanceNorm2d(4)
    ).double()

    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    def convert(m):
        parts = list(m)
        wrapped = [DomainParallelGroupNorm(parts[0]), parts[1], DomainParallelLayerNorm(parts[2]), parts[3]]
        return Checkpointed(*wrapped, DomainParallelInstanceNorm2d(parts[4]))

    check_layer(module, convert, randn(2, 4, 6, 3), partition)


def test_only_input_and_statistics_are_kept_for_the_backward():
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        x = randn(2, 4, 8, 8).requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            DomainParallelGroupNorm(nn.GroupNorm(2, 4).double())(x)
        big = [tensor for tensor in saved if tensor.numel() >= x.numel()]
        assert [tensor.data_ptr() for tensor in big] == [x.data_ptr()]

    run_threads(rank_main, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(layout):
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        x = randn(2, 4, 3, 5).contiguous(memory_format=layout)
        for layer in (nn.GroupNorm(2, 4), nn.BatchNorm2d(4)):
            wrap = DomainParallelGroupNorm if isinstance(layer, nn.GroupNorm) else DomainParallelBatchNorm2d
            assert wrap(layer.double())(x).is_contiguous(memory_format=layout)

    run_threads(rank_main, 2)


def test_parameters_alone_need_no_message_backward(monkeypatch):
    calls = []
    original = ThreadGroup.all_reduce
    monkeypatch.setattr(ThreadGroup, "all_reduce", lambda *args: calls.append(1) or original(*args))

    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        layer = DomainParallelGroupNorm(nn.GroupNorm(2, 4))
        for needed in (False, True):
            dist.barrier()
            calls.clear()
            dist.barrier()
            layer(torch.randn(2, 4, 3, 5).requires_grad_(needed)).sum().backward()
            dist.barrier()
            assert len(calls) == 2 * needed

    run_threads(rank_main, 2)


# Refusals


def test_a_single_value_is_refused_by_its_global_count():
    partition = RowPartition((1, 1))

    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        two = torch.randn(1, 4, 1, 1)  # a row on each rank, two in all
        for layer in (
            DomainParallelBatchNorm2d(nn.BatchNorm2d(4)),
            DomainParallelInstanceNorm2d(nn.InstanceNorm2d(4)),
            DomainParallelGroupNorm(nn.GroupNorm(4, 4)),
        ):
            assert layer(two).shape == two.shape
            one = two[:, :, : 1 - rank]
            message = r"norm: Expected more than 1 (value per channel|spatial element) when training, got one on all"
            layer.__dict__["label"] = "norm"
            with pytest.raises(ValueError, match=message):
                layer(one)
        assert DomainParallelGroupNorm(nn.GroupNorm(4, 4))(torch.randn(2, 4, 1 - rank, 1)).shape[2] == 1 - rank

    run_threads(rank_main, partition.ranks)


def test_mistakes_are_named():
    def rank_main(rank):
        initialize_domain_parallel(3, 3)
        x = torch.randn(2, 4, 3, 2)
        layer = DomainParallelLayerNorm(nn.LayerNorm([10, 2]), label="block.norm")
        with pytest.raises(ValueError, match=r"block.norm: normalized_shape=\(10, 2\) .* those are \(9, 2\), with the"):
            layer(x)
        with pytest.raises(ValueError, match=r"rms: normalized_shape=\(9, 3\) .* those are \(9, 2\)"):
            DF.rms_norm(x, [9, 3], label="rms")
        with pytest.raises(ValueError, match=r"layer: weight and bias must have shape \(9, 2\); got \(3, 2\)"):
            DF.layer_norm(x, [9, 2], torch.ones(3, 2), label="layer")
        with pytest.raises(ValueError, match="group: 4 channels cannot be divided into 3 groups"):
            DF.group_norm(x, 3, label="group")
        with pytest.raises(ValueError, match=r"weight and bias must have one entry for each of 4 channels; .* \(1,\)"):
            DF.group_norm(x, 2, torch.ones(1))
        with pytest.raises(ValueError, match=r"running statistics must have one entry for each of 4 channels"):
            DF.batch_norm(x, torch.zeros(1), torch.ones(1), training=True)
        with pytest.raises(ValueError, match=r"expected a tensor \(B, C, ...\) with rows"):
            DF.batch_norm(x[:, :, 0, 0], None, None, training=True)
        with pytest.raises(ValueError, match=r"expected \(B, C, ...\) with 1 spatial dims; got \(2, 4\)"):
            DomainParallelBatchNorm1d(nn.BatchNorm1d(4))(x[:, :, 0, 0])
        with pytest.raises(ValueError, match=r"expected \(B, C, ...\) or \(C, ...\) with 1 spatial dims"):
            DomainParallelInstanceNorm1d(nn.InstanceNorm1d(4))(x)
        with pytest.raises(ValueError, match="int: expected a floating-point tensor; got torch.int64"):
            DF.group_norm(x.long(), 2, label="int")
        with pytest.raises(ValueError, match=r"norm1: the ranks disagree .*rank 0, 1: .*float32.*; rank 2: .*float64"):
            DF.group_norm(x.to(torch.float64 if rank == 2 else torch.float32), 2, label="norm1")
        with pytest.raises(ValueError, match=r"norm2: .*rank 0: .* of shape \(2, 2, 1, 1, 1\); rank 1, 2: .*\(1, 2,"):
            DF.group_norm(x[rank > 0 :], 2, label="norm2")
        with pytest.raises(ValueError, match=r"norm3: .*rank 0, 2: .* without gradient.*; rank 1: .* with gradient"):
            DF.group_norm(x.clone().requires_grad_(rank == 1), 2, label="norm3")

    run_threads(rank_main, 3)


def dies(rank):
    initialize_domain_parallel(2, 2)
    x = torch.randn(1, 2, 3, 4)
    DF.group_norm(x, 2)
    if rank == 0:
        with pytest.raises(ExchangeError, match="group_norm failed on rank 0 of 2 while statistics were gathered"):
            DF.group_norm(x, 2)
        with pytest.raises(ExchangeError, match="group_norm was not started"):
            DF.group_norm(x, 2)


def test_a_dead_peer_is_an_error():
    run_processes(dies, 2)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3), (2, 4, 0, 3)])
def test_nothing_is_normalised_to_nothing(shape):
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        for layer in (
            DomainParallelGroupNorm(nn.GroupNorm(2, 4)),
            DomainParallelBatchNorm2d(nn.BatchNorm2d(4)),
            DomainParallelInstanceNorm2d(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        ):
            x = torch.randn(shape).requires_grad_()
            layer(x).sum().backward()
            assert x.grad.shape == shape
            assert torch.equal(layer.weight.grad, torch.zeros(4))
            if not isinstance(layer, DomainParallelGroupNorm):
                assert torch.equal(layer.running_var, torch.ones(4))

    run_threads(rank_main, 2)


# SyncBatchNorm


def test_sync_batch_norm_is_over_its_own_group():
    """Two data-parallel ranks of two domain ranks each: the statistics are those of all samples."""
    partition = RowPartition((3, 2))
    whole = randn(4, 3, 5, 4)
    factor = random_like(whole)
    reference = randomised(nn.BatchNorm2d(3)).double()
    initial = copy.deepcopy(reference)
    x = whole.clone().requires_grad_()
    out = reference(x)
    (out * factor).sum().backward()

    def rank_main(rank):
        manager = initialize_domain_parallel(4, 2)
        group = dist.new_group(list(range(4))) if rank < 4 else None
        for process_group in (None, group):
            sync = nn.SyncBatchNorm(3, process_group=process_group).double()
            sync.load_state_dict(initial.state_dict())
            layer = DomainParallelBatchNorm2d(sync)
            sample = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
            own = shard(whole[sample], partition, manager.domain_rank).clone().requires_grad_()
            result = layer(own)
            (result * shard(factor[sample], partition, manager.domain_rank)).sum().backward()
            torch.testing.assert_close(result, shard(out[sample], partition, manager.domain_rank))
            torch.testing.assert_close(own.grad, shard(x.grad[sample], partition, manager.domain_rank))
            torch.testing.assert_close(layer.running_var, reference.running_var)
            torch.testing.assert_close(layer.running_mean, reference.running_mean)
            layer.eval()
            torch.testing.assert_close(layer(own), reference.eval()(x)[sample].narrow(-2, 3 * (rank % 2), 3 - rank % 2))
            reference.train()
        other = [dist.new_group([first, first + 2]) for first in (0, 1)][rank % 2]
        with pytest.raises(ValueError, match="the process_group of SyncBatchNorm holds ranks .*, and not all of the"):
            DomainParallelBatchNorm2d(nn.SyncBatchNorm(3, process_group=other).double())(own)
        return layer.weight.grad

    total = sum(run_threads(rank_main, 4))
    torch.testing.assert_close(total, reference.weight.grad)


# Compiled


def compiled(rank, backend, dynamic):
    manager = initialize_domain_parallel(3, 3)
    net = nn.Sequential(
        DomainParallelGroupNorm(nn.GroupNorm(2, 4)),
        nn.GELU(),
        DomainParallelBatchNorm2d(nn.BatchNorm2d(4, momentum=None)),
    )
    if backend != "inductor":  # which takes its time
        net.append(DomainParallelLayerNorm(nn.LayerNorm([9, 5])))
    if not (dynamic or backend == "inductor"):
        net.append(DomainParallelInstanceNorm2d(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)))
        net.append(DomainParallelRMSNorm(nn.RMSNorm([4, 9, 5])))
        net.append(DomainParallelBatchNorm2d(nn.SyncBatchNorm(4)))
    randomised(net.double())
    other = copy.deepcopy(net)
    run = torch.compile(other, fullgraph=True, backend=backend, dynamic=dynamic)
    for sizes, batch in [((3, 1, 5), 2), ((3, 2, 4), 3)][: 1 if backend == "inductor" else 2]:
        manager.declare(RowPartition(sizes))
        results = []
        for model, fn in ((net, net), (other, run)):
            for _ in range(2):
                x = shard(randn(batch, 4, 9, 5), RowPartition(sizes), rank).clone().requires_grad_()
                out = fn(x)
            grads = torch.autograd.grad((out * out.detach().cos()).sum(), [x, *model.parameters()])
            results.append((out, *grads, *model.buffers()))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    if backend == "inductor":
        return
    net.eval()
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x))
    single = torch.compile(DF.group_norm, fullgraph=True, backend=backend, dynamic=dynamic)
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training, got one on all ranks"):
        single(torch.randn(1, 2, rank == 1, 1), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "dynamic"), [("aot_eager", None), ("aot_eager", True), ("inductor", None)], ids=str
)
def test_compiled_equals_eager(backend, dynamic):
    run_processes(compiled, 3, backend, dynamic, timeout=900)


# The operator


def test_operator_passes_torchs_own_check():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        local = torch.stack([randn(3), randn(3).square()]).requires_grad_()
        args = (local, 2 + rank, manager.domain_group.group_name, "norm", "float64", "")
        torch.library.opcheck(combine, args, test_utils=("test_schema", "test_faketensor"))

    run_threads(rank_main, 2)


def test_the_statistics_are_alike_to_the_last_bit():
    partition = RowPartition((3, 5, 1, 4))
    whole = randn(2, 4, 13, 7)

    def rank_main(rank):
        manager = initialize_domain_parallel(4, 4)
        how = Normalization((0, 2, 3), 1e-5, manager.domain_group.group_name, "norm")
        return normalize(shard(whole, partition, rank), None, None, how)[1]

    stats = run_threads(rank_main, 4)
    assert all(torch.equal(stats[0], other) for other in stats)
    var, mean = torch.var_mean(whole, (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(stats[0], torch.stack([torch.full_like(mean, 2 * 13 * 7), mean, var]))
