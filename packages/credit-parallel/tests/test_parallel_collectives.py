"""Averages and norms of gradients are those of one rank, whatever the gradients are sharded over."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from credit_halo.testing import RankError, ThreadGroup, run_processes, run_threads
from credit_parallel import collectives
from credit_parallel.collectives import (
    all_reduce_avg,
    allreduce_grads_avg,
    broadcast_tensors,
    clip_grad_norm_,
    total_grad_norm,
)
from credit_parallel.mesh import fold_domain

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Averages


def averages(rank):
    """Whole numbers, multiples of the number of ranks: every dtype has their mean exactly."""
    ranks = dist.get_world_size()
    out = {}
    for dtype in DTYPES:
        t = whole_numbers(3, 4, seed=rank, dtype=dtype) * ranks
        same = all_reduce_avg(t)
        assert same is t
        out[dtype] = t
    strided = whole_numbers(4, 3, seed=rank).t()
    all_reduce_avg(strided)
    return out, strided


@pytest.mark.parametrize("run", [run_threads, run_processes])
def test_all_reduce_avg(run):
    results = run(averages, 3)
    for dtype in DTYPES:
        mean = sum(whole_numbers(3, 4, seed=rank, dtype=dtype) for rank in range(3))
        for result, _ in results:
            assert torch.equal(result[dtype], mean)
    mean = sum(whole_numbers(4, 3, seed=rank) for rank in range(3)).t() / 3
    for _, strided in results:
        torch.testing.assert_close(strided, mean)


def test_all_reduce_avg_alone():
    t = randn(3)
    assert all_reduce_avg(t) is t
    assert torch.equal(t, randn(3))


def test_all_reduce_avg_refuses_what_has_no_mean():
    with pytest.raises(
        ValueError, match="all_reduce_avg needs a plain floating-point or complex tensor; got torch.int64"
    ):
        all_reduce_avg(torch.ones(2, dtype=torch.int64))


def test_half_precision_means_do_not_overflow():
    def rank_main(rank):
        t = torch.full((2,), 50_000.0, dtype=torch.float16)
        return all_reduce_avg(t)

    assert all(torch.equal(t, torch.full_like(t, 50_000.0)) for t in run_threads(rank_main, 4))


def test_a_rank_outside_of_the_group():
    def rank_main(rank):
        group = dist.new_group([0, 1])
        if rank == 2:
            with pytest.raises(ValueError, match="all_reduce_avg: rank 2 is not in the group"):
                all_reduce_avg(torch.ones(2), group)

    run_threads(rank_main, 3)


KINDS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans())


@settings(max_examples=25)
@given(st.lists(st.none() | KINDS, max_size=8), st.integers(1, 4), st.sampled_from([1, 64, 200, 1 << 20]))
def test_gradients_are_averaged_in_buckets(kinds, ranks, bucket):
    def grads_of(rank):
        grads = []
        for i, kind in enumerate(kinds):
            grad = None
            if kind is not None:
                dtype, shape, transposed = kind
                grad = whole_numbers(*shape, seed=10 * i + rank, dtype=dtype) * ranks
                grad = grad.transpose(0, -1) if transposed and len(shape) > 1 else grad
            grads.append(grad)
        return grads

    def rank_main(rank):
        grads = grads_of(rank)
        allreduce_grads_avg(grads)
        return grads

    every = [grads_of(rank) for rank in range(ranks)]
    before, collectives.BUCKET_BYTES = collectives.BUCKET_BYTES, bucket
    try:
        results = run_threads(rank_main, ranks)
    finally:
        collectives.BUCKET_BYTES = before
    for i in range(len(kinds)):
        for result in results:
            if every[0][i] is None:
                assert result[i] is None
            else:
                assert torch.equal(result[i], sum(grads[i] for grads in every) / ranks)


def counting(monkeypatch, owner, name):
    """Count calls of a collective, by rank: of the group where ranks are threads, of torch.distributed elsewhere."""
    calls = {}
    original = getattr(owner, name)

    def call(*args, **kwargs):
        tensor = args[1 if owner is ThreadGroup else 0]
        rank = args[0].rank() if owner is ThreadGroup else dist.get_rank()
        calls.setdefault(rank, []).append((tensor.dtype, tensor.numel()))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_buckets_are_few_and_large(monkeypatch):
    calls = counting(monkeypatch, ThreadGroup, "all_reduce")
    monkeypatch.setattr(collectives, "BUCKET_BYTES", 4000)

    def rank_main(rank):
        allreduce_grads_avg([torch.ones(n, dtype=d) for n in (100, 300, 5000, 200) for d in DTYPES[:2]])

    run_threads(rank_main, 2)
    assert calls[0] == calls[1]
    double, single = DTYPES[:2]
    assert calls[0] == [(double, 400), (double, 5000), (double, 200), (single, 400), (single, 5000), (single, 200)]


def test_shards_are_averaged_with_the_same_shards():
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("dp", "domain"))
        whole = whole_numbers(5, 2, seed=mesh.get_local_rank("domain")) * 3
        grad = distribute_tensor(whole, mesh["dp"], [Shard(0)], src_data_rank=None)
        plain = whole.clone()
        allreduce_grads_avg([grad, plain], mesh.get_group("domain"))
        return grad.full_tensor(), plain

    mean = sum(whole_numbers(5, 2, seed=rank) for rank in range(3))
    for shard, plain in run_processes(rank_main, 6, fork=True):
        assert torch.equal(shard, mean)
        assert torch.equal(plain, mean)


def test_a_gradient_that_is_sharded_over_the_group_is_refused():
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "domain"))
        grad = distribute_tensor(torch.ones(4, 2), fold_domain(mesh), [Shard(0)])
        copies = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0), Replicate()])
        allreduce_grads_avg([copies], mesh.get_group("domain"))
        with pytest.raises(ValueError, match="gradient 1 is sharded over ranks of the group that it is to be averaged"):
            allreduce_grads_avg([copies, grad], mesh.get_group("domain"))

    run_processes(rank_main, 4, fork=True)


def test_gradients_that_cannot_be_averaged_are_refused_on_all_ranks():
    def rank_main(rank):
        sparse = torch.ones(3, 2).to_sparse() if rank == 1 else torch.ones(3, 2)
        with pytest.raises(ValueError, match="on rank 1 gradient 1 is sparse"):
            allreduce_grads_avg([torch.ones(2), sparse])
        with pytest.raises(ValueError, match="gradient 0 is of torch.int64, which has no mean"):
            allreduce_grads_avg([torch.ones(2, dtype=torch.int64)])
        with pytest.raises(ValueError, match="disagree.*rank 0: float32 \\(2,\\); rank 1: float32 \\(3,\\)"):
            allreduce_grads_avg([torch.ones(2 + rank)])
        with pytest.raises(ValueError, match="disagree"):
            allreduce_grads_avg([None if rank else torch.ones(7)])

    run_threads(rank_main, 2)


def test_broadcast():
    def rank_main(rank):
        group = dist.new_group([1, 2]) if rank else dist.new_group([1, 2]) and None
        if group is None:
            return None
        tensors = [randn(3, seed=rank), torch.tensor([rank == 1, True]), torch.tensor(rank), randn(2, 2, seed=rank).t()]
        broadcast_tensors([*tensors, torch.empty(3, device="meta")], group)
        return tensors

    _, first, second = run_threads(rank_main, 3)
    for a, b, expected in zip(
        first,
        second,
        [randn(3, seed=1), torch.tensor([True, True]), torch.tensor(1), randn(2, 2, seed=1).t()],
        strict=True,
    ):
        assert torch.equal(a, expected)
        assert torch.equal(b, expected)


# Norms

P = [1, 2, 3, 0.5, math.inf]
SHAPES = {"a.weight": (7, 6), "a.bias": (7,), "b.weight": (6, 8), "b.bias": (6,), "free": (2, 3)}


def gradient(name, dtype=torch.float64):
    return randn(*SHAPES[name], seed=sorted(SHAPES).index(name), dtype=dtype)


def unsharded(p, max_norm=None):
    """What torch does to the whole gradients."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES.values()]
    for param, name in zip(params, SHAPES, strict=True):
        param.grad = gradient(name)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm or 1e9, p)
    return norm, {name: param.grad for param, name in zip(params, SHAPES, strict=True)}


def sharded_params(placed, dtype=torch.float64):
    """Parameters with gradients, each on the mesh and with the placements given for it; None is a plain one."""
    params = {}
    for name in SHAPES:
        whole = gradient(name, dtype)
        if placed[name] is None:
            params[name] = nn.Parameter(torch.zeros_like(whole))
            params[name].grad = whole.clone()
        else:
            mesh, placements = placed[name]
            grad = distribute_tensor(whole, mesh, placements)
            params[name] = nn.Parameter(torch.zeros_like(grad))
            params[name].grad = grad
    return params


def places(order):
    """Places for the parameters: dp x domain, tp alone, dp and tp in either order, replicated, and plain."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=order)

    def axes(*names):
        return mesh[tuple(sorted(names, key=order.index))]

    return {
        "a.weight": (axes("dp", "domain")._flatten("flat"), [Shard(0)]),
        "a.bias": (mesh["tp"], [Shard(0)]),
        "b.weight": (axes("dp", "tp"), [Shard(1), Shard(0)]),
        "b.bias": None,
        "free": (mesh["dp"], [Replicate()]),
    }


@pytest.mark.parametrize("order", [("dp", "tp", "domain"), ("tp", "domain", "dp"), ("domain", "dp", "tp")])
def test_norms_on_mixed_meshes(order, monkeypatch):
    calls = counting(monkeypatch, dist, "all_reduce")

    def rank_main(rank):
        params = sharded_params(places(order))
        norms = {}
        for p in P:
            calls[rank] = []
            norms[p] = total_grad_norm([param.grad for param in params.values()], p)
            assert len(calls[rank]) == 3  # dp x domain, tp, dp: not one for each parameter
        clipped = clip_grad_norm_(params.values(), 0.5)
        grads = {
            name: param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
            for name, param in params.items()
        }
        return norms, clipped, grads

    results = run_processes(rank_main, 8, fork=True)
    for p in P:
        expected, _ = unsharded(p)
        for norms, _, _ in results:
            assert type(norms[p]) is torch.Tensor
            torch.testing.assert_close(norms[p], expected, rtol=1e-12, atol=0)
            assert torch.equal(norms[p], results[0][0][p])
    norm, grads = unsharded(2, 0.5)
    for _, clipped, scaled in results:
        torch.testing.assert_close(clipped, norm, rtol=1e-12, atol=0)
        for name in SHAPES:
            torch.testing.assert_close(scaled[name], grads[name], rtol=1e-12, atol=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(8, 6, dtype=torch.float64)
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=i)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def clipped_after_training(rank, p):
    """fully_shard over dp x domain, beside weights that are divided over tp, in the order of the mesh's axes."""
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "tp", "domain"))
    net = Net()
    tp = {"a.weight": 0, "a.bias": 0, "b.weight": 1}
    for name, dim in tp.items():
        layer = net.get_submodule(name[0])
        whole = distribute_tensor(layer.get_parameter(name[2:]).detach(), mesh["tp"], [Shard(dim)])
        layer.register_parameter(name[2:], nn.Parameter(whole))
    fully_shard(net, mesh=fold_domain(mesh))
    for name, param in net.named_parameters():
        whole = randn(*param.shape, seed=len(name))
        local = distribute_tensor(whole, mesh["tp"], [Shard(tp[name]) if name in tp else Replicate()]).to_local()
        part = local.chunk(4, 0)
        at = mesh.get_local_rank("dp") * 2 + mesh.get_local_rank("domain")
        mine = part[at] if at < len(part) else local[:0]
        param.grad = DTensor.from_local(
            mine.clone(), param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
        )
        assert torch.equal(param.grad.full_tensor(), whole)
    norm = clip_grad_norm_(net.parameters(), 1.0, p)
    return norm, {name: param.grad.full_tensor() for name, param in net.named_parameters()}


def check_clipped(results, p):
    net = Net()
    for name, param in net.named_parameters():
        param.grad = randn(*param.shape, seed=len(name))
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, p)
    for clipped, grads in results:
        torch.testing.assert_close(clipped, norm, rtol=1e-12, atol=0)
        assert torch.equal(clipped, results[0][0])
        for name, param in net.named_parameters():
            torch.testing.assert_close(grads[name], param.grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("p", [1, 2, 2.5, math.inf])
def test_clip_where_torch_does_not(p):
    check_clipped(run_processes(clipped_after_training, 8, p, fork=True), p)


def test_clip_alone_does_what_torch_does():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for max_norm in (0.1, 100.0):
            ours, theirs = ([nn.Parameter(torch.zeros(3, 2, dtype=dtype)) for _ in range(3)] for _ in range(2))
            for i in range(2):  # the third has no gradient
                ours[i].grad, theirs[i].grad = randn(3, 2, seed=i).to(dtype), randn(3, 2, seed=i).to(dtype)
            norm, expected = clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            torch.testing.assert_close(norm.to(dtype), expected)
            for a, b in zip(ours[:2], theirs[:2], strict=True):
                torch.testing.assert_close(a.grad, b.grad)
    single = nn.Parameter(torch.zeros(2))
    single.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_(single, 1.0) == 5.0
    torch.testing.assert_close(single.grad, torch.tensor([0.6, 0.8]))
    assert clip_grad_norm_([], 1.0) == 0.0
    assert clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0.0


def test_low_precision_norms_are_not_rounded():
    grads = [torch.full((1000,), 0.1, dtype=torch.bfloat16) for _ in range(1000)]
    expected = float(grads[0][0]) * 1000.0
    assert float(total_grad_norm(grads)) == pytest.approx(expected, rel=1e-6)
    assert float(total_grad_norm([g.half() for g in grads], 1)) == pytest.approx(expected * 1000, rel=1e-6)


def test_a_parameter_without_a_gradient_on_some_ranks():
    """Ranks take part in the same sums all the same."""

    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        param = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        if rank:
            param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
        return clip_grad_norm_([param], 1.0)

    norms = run_processes(rank_main, 2, fork=True)
    assert norms == [pytest.approx(math.sqrt(2))] * 2


def test_sums_that_are_still_to_come():
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        part = torch.tensor([3.0, 1.0]) if mesh.get_local_rank("tp") else torch.tensor([0.0, 3.0])
        grad = DTensor.from_local(part, mesh, [Replicate(), Partial()])
        return total_grad_norm([grad])

    assert run_processes(rank_main, 4, fork=True) == [5.0] * 4


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite(p, bad):
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "domain"))
        sharded = nn.Parameter(distribute_tensor(torch.zeros(4), mesh["dp"], [Shard(0)]))
        sharded.grad = distribute_tensor(torch.ones(4), mesh["dp"], [Shard(0)])
        if rank == 2:
            sharded.grad.to_local()[0] = bad
        plain = nn.Parameter(torch.zeros(2))
        plain.grad = torch.ones(2)
        norm = total_grad_norm([sharded.grad, plain.grad], p)
        if rank in (0, 2):  # which share the parameter
            assert not torch.isfinite(norm)
        with pytest.raises(RuntimeError, match="no finite norm .* those of rank 2 are infinite"):
            clip_grad_norm_([sharded, plain], 1.0, p, error_if_nonfinite=True)
        assert torch.equal(plain.grad, torch.ones(2))
        return torch.isnan(norm)

    nan = run_processes(rank_main, 4, fork=True)
    assert nan[0] == nan[2] == math.isnan(bad)


def test_finite_gradients_pass():
    def rank_main(rank):
        return clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0, error_if_nonfinite=True)

    assert run_threads(rank_main, 2) == [0.0] * 2
    with pytest.raises(RuntimeError, match="no finite norm"):
        total_grad_norm([torch.tensor([math.nan])], error_if_nonfinite=True)


def test_norms_that_are_none():
    for p in (0, -1, math.nan, -math.inf):
        with pytest.raises(ValueError, match="norm_type must be positive"):
            total_grad_norm([torch.ones(2)], p)
    with pytest.raises(ValueError, match="gradient 1 is sparse"):
        total_grad_norm([torch.ones(2), torch.ones(2).to_sparse()])


def test_the_test_can_fail():
    """A norm that takes shards for whole gradients is found out."""

    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        local = distribute_tensor(gradient("a.weight"), mesh, [Shard(0)]).to_local()
        assert torch.allclose(total_grad_norm([local]), gradient("a.weight").norm())

    with pytest.raises(RankError) as raised:
        run_processes(rank_main, 2, fork=True)
    assert {type(error) for error in raised.value.errors.values()} == {AssertionError}
