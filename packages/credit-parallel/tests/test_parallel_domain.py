"""Rows, wrappers and gradients of the domain axis, as a training program meets them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import credit_domain.manager
from credit_domain.sharding import shard_tensor
from credit_halo.testing import run_processes, run_threads
from credit_mesh import (
    DomainParallelManager,
    RowPartition,
    get_domain_parallel_manager,
    initialize_domain_parallel,
)
from credit_parallel.domain import (
    apply_domain_parallel,
    gather_spatial,
    get_domain_manager,
    get_raw_model,
    shard_lat_weights,
    shard_spatial,
    sync_domain_gradients,
    unpad_shard_interp,
)
from credit_parallel.fsdp2 import apply_fsdp2, fold_domain
from credit_parallel.mesh import build_device_mesh, get_dp_group, register_dp_group


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def whole_numbers(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double()


# Managers and wrappers


def test_the_manager_is_found_through_wrappers():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 1)
        net = nn.Sequential(nn.Linear(2, 2))
        assert get_domain_manager(net) is None
        assert get_raw_model(net) is net
        apply_domain_parallel(net, manager)
        wrapped = torch.compile(DistributedDataParallel(torch.compile(net, backend="eager")), backend="eager")
        assert get_raw_model(wrapped) is net
        assert get_domain_manager(wrapped) is manager

    run_processes(rank_main, 2, fork=True)


def test_a_stand_in_manager():
    net = apply_domain_parallel(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)), SimpleNamespace(domain_parallel_size=2))
    assert get_domain_manager(net).domain_parallel_size == 2


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 5, padding=2)
        )
        self.double()
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=10 * seed + i)

    def forward(self, x):
        return self.net(x)


ROWS = 9


def converted(rank, dp, tp, domain, whole_mesh):
    """Gradients of one step with a converted model, the mesh given whole or by its axis."""
    mesh, axes = build_device_mesh({"data": "ddp", "tensor": tp, "domain": domain}, "cpu")
    net = Net(seed=rank)
    apply_domain_parallel(net, mesh if whole_mesh else axes["domain"])
    manager = get_domain_manager(net)
    assert manager is get_domain_parallel_manager()
    assert (manager.data_parallel_size, manager.tensor_parallel_size) == (dp, tp)
    apply_domain_parallel(Net(), mesh)  # finds the manager again
    with pytest.raises(ValueError, match="is not of the mesh"):
        apply_domain_parallel(Net(), mesh, -1)
    x, own = shard_spatial(randn(1, 2, ROWS, 6), manager), shard_spatial(randn(1, 2, ROWS, 6, seed=1), manager)
    (net(x) * own).sum().mul(domain).backward()
    sync_domain_gradients(net, manager)
    return rank - rank % domain, [p.grad for p in net.parameters()]


def check_converted(results):
    for first, grads in results:
        one = Net(seed=first)  # the weights of the first domain rank
        (one(randn(1, 2, ROWS, 6)) * randn(1, 2, ROWS, 6, seed=1)).sum().backward()
        for grad, p in zip(grads, one.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("whole_mesh", [True, False])
@pytest.mark.parametrize(("dp", "tp", "domain"), [(1, 1, 4), (2, 1, 3), (1, 2, 2), (2, 2, 2)])
def test_apply_domain_parallel(dp, tp, domain, whole_mesh):
    check_converted(run_processes(converted, dp * tp * domain, dp, tp, domain, whole_mesh, fork=True))


def test_a_mesh_without_the_axis():
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        with pytest.raises(ValueError, match="the mesh must have an axis named domain"):
            apply_domain_parallel(Net(), mesh)

    run_processes(rank_main, 2, fork=True)


# Rows


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(4, 20), st.integers(1, 3), st.sampled_from([-2, -1, 2]), st.sampled_from([3, 4]))
def test_shard_and_gather(ranks, rows, granularity, dim, ndim):
    dim = dim if dim < 0 or ndim == 4 else -2
    shape = [2, 3, 5, 5][-ndim:]
    shape[dim] = rows
    if rows < ranks * granularity:
        granularity = 1
    whole = whole_numbers(*shape)

    def rank_main(rank):
        manager = initialize_domain_parallel(ranks, ranks, dim)
        manager.granularity = granularity
        part = shard_spatial(whole, manager)
        return part, gather_spatial(part, manager)

    results = run_threads(rank_main, ranks)
    assert torch.equal(torch.cat([part for part, _ in results], dim), whole)
    assert [part.shape[dim] for part, _ in results] == list(RowPartition.even(rows, ranks, granularity).sizes)
    assert all(torch.equal(gathered, whole) for _, gathered in results)


def test_without_a_manager():
    x = randn(1, 2, 6, 8)
    assert shard_spatial(x, None) is x
    assert gather_spatial(x, None) is x
    padding = SimpleNamespace(pad_NS=(1, 2), pad_WE=(3, 0))
    assert torch.equal(unpad_shard_interp(x, padding, None, 3, 5), x[..., 1:4, 3:])
    assert torch.equal(unpad_shard_interp(x, None, None, 6, 8), x)
    weights = randn(6)
    assert shard_lat_weights(weights, 6) is weights
    with pytest.raises(ValueError, match=r"the weights have 6 rows \(shape \(6,\)\), and the target, .* has 3"):
        shard_lat_weights(weights, 3)
    for size in [(4, 5), (3, 8), (6, 8)]:
        with pytest.raises(ValueError, match="leaves 3 x 5; the target is .* Nothing is resized"):
            unpad_shard_interp(x, padding, None, *size)


@st.composite
def padded(draw):
    """Ranks, a target, its padding, and any partition of the prediction."""
    ranks, rows = draw(st.integers(1, 4)), draw(st.integers(4, 12))
    north, south = draw(st.just((0, 0)) | st.tuples(st.integers(0, 9), st.integers(0, 9)))
    height = rows + north + south
    cuts = draw(st.lists(st.integers(0, height), min_size=ranks - 1, max_size=ranks - 1))
    sizes = tuple(b - a for a, b in pairwise([0, *sorted(cuts), height]))
    granularity = draw(st.sampled_from([1, 1, 2, 3]))
    return ranks, rows, (north, south), sizes, granularity if rows // granularity >= ranks else 1


@settings(max_examples=60)
@given(padded(), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from([-2, -1]), st.booleans())
def test_rows_move_to_where_the_target_has_them(case, other, dim, declare):
    ranks, rows, pads, sizes, granularity = case
    cols = 5
    cuts = {dim: pads, -3 - dim: other}
    whole = whole_numbers(1, 2, *((sum(sizes), cols + sum(other)) if dim == -2 else (cols + sum(other), sum(sizes))))
    padding = SimpleNamespace(pad_NS=list(cuts[-2]), pad_WE=list(cuts[-1]))
    height, width = (rows, cols) if dim == -2 else (cols, rows)
    cropped = whole[..., cuts[-2][0] : cuts[-2][0] + height, cuts[-1][0] : cuts[-1][0] + width]
    factor = whole_numbers(*cropped.shape, seed=1)

    def rank_main(rank):
        manager = initialize_domain_parallel(ranks, ranks, dim)
        manager.granularity = granularity
        if declare and 0 not in sizes:
            manager.granularity = 1
            manager.declare(RowPartition(sizes))
        own = RowPartition(sizes, allow_empty=True).interval(rank)
        y = whole.narrow(dim, own.start, len(own)).clone().requires_grad_()
        for _ in range(2):  # the second time nobody is asked
            out = unpad_shard_interp(y, padding, manager, height, width)
        target = shard_spatial(cropped, manager)
        (out * shard_spatial(factor, manager)).sum().backward()
        return out, target, y.grad

    results = run_threads(rank_main, ranks)
    for out, target, _ in results:
        assert torch.equal(out, target)
    x = whole.clone().requires_grad_()
    (x[..., cuts[-2][0] : cuts[-2][0] + height, cuts[-1][0] : cuts[-1][0] + width] * factor).sum().backward()
    assert torch.equal(torch.cat([grad for _, _, grad in results], dim), x.grad)


def test_a_step_with_padding():
    """Pad the full grid, shard, predict, unpad, shard the target: gradients are those of one rank."""
    north, south = 3, 1
    field, target = randn(1, 2, ROWS, 6), randn(1, 2, ROWS, 6, seed=1)
    pad = nn.ReflectionPad2d((0, 0, north, south))

    def loss(net, manager):
        y = net(shard_spatial(pad(field), manager))
        y = unpad_shard_interp(y, SimpleNamespace(pad_NS=(north, south), pad_WE=(0, 0)), manager, ROWS, 6)
        return (y * shard_spatial(target, manager)).sum()

    def rank_main(rank):
        manager = initialize_domain_parallel(4, 4)
        net = apply_domain_parallel(Net(), manager)
        for _ in range(2):
            net.zero_grad()
            loss(net, manager).mul(4).backward()
            sync_domain_gradients(net, manager)
        return [p.grad for p in net.parameters()]

    one = Net()
    loss(one, None).backward()
    for grads in run_threads(rank_main, 4):
        for grad, p in zip(grads, one.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-11)


def test_a_prediction_of_another_size_is_refused_on_all_ranks():
    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        y = torch.ones(1, 1, 3 + rank, 8)
        message = "the prediction is 12 x 8 with pad_NS=.1, 2., .* which leaves 9 x 8; the target is 10 x 8"
        with pytest.raises(ValueError, match=message):
            unpad_shard_interp(y, SimpleNamespace(pad_NS=(1, 2), pad_WE=(0, 0)), manager, 10, 8)

    run_threads(rank_main, 3)


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1), (ROWS, 4), (1, 1, ROWS, 1)])
def test_latitude_weights(shape):
    weights = randn(*shape)
    dim = -2 if len(shape) > 1 else -1

    def rank_main(rank):
        with pytest.raises(ValueError, match=f"the weights have {ROWS} rows"):
            shard_lat_weights(weights, 3)
        manager = initialize_domain_parallel(4, 4)
        target = shard_spatial(torch.ones(1, 2, ROWS, 4), manager)
        own = shard_lat_weights(weights, target.shape[-2])
        assert shard_lat_weights(own, target.shape[-2]) is own
        assert shard_lat_weights(weights, ROWS) is weights  # of a whole field
        manager.declare(RowPartition((1, 2, 2, 4)))
        declared = shard_lat_weights(weights, (1, 2, 2, 4)[rank])
        assert torch.equal(declared, shard_tensor(weights, dim, manager))
        return own

    assert torch.equal(torch.cat(run_threads(rank_main, 4), dim), weights)


def test_latitude_weights_of_another_grid_are_refused_on_all_ranks():
    def rank_main(rank):
        initialize_domain_parallel(2, 2)
        with pytest.raises(ValueError, match="on rank 1 the target has 6 rows; of 9 rows of weights this rank's are 4"):
            shard_lat_weights(randn(9), 5 + rank)
        one = torch.tensor(2.0)
        assert shard_lat_weights(one, 5) is one

    run_threads(rank_main, 2)


def test_latitude_weights_look_the_manager_up_late(monkeypatch):
    stand_in = SimpleNamespace(domain_parallel_size=2, domain_rank=1)
    monkeypatch.setattr(credit_domain.manager, "get_domain_parallel_manager", lambda: stand_in)
    weights = randn(6)
    assert torch.equal(shard_lat_weights(weights, 3), weights[3:])
    with pytest.raises(ValueError, match="the target has 2 rows; of 6 rows of weights this rank's are 3"):
        shard_lat_weights(weights, 2)
    stand_in.shard_dim = -1  # longitude
    assert shard_lat_weights(weights, 6) is weights
    with pytest.raises(ValueError, match="whose rows are not divided, has 3"):
        shard_lat_weights(weights, 3)


# Gradients


def test_gradients_that_some_ranks_lack():
    """No gradient counts as zeros, on whichever rank; gradients that nobody has stay none."""

    def rank_main(rank):
        manager = initialize_domain_parallel(4, 2)
        net = nn.ParameterList([nn.Parameter(torch.zeros(2, 3)) for _ in range(5)])
        net[4].requires_grad_(False)
        net[0].grad = whole_numbers(2, 3, seed=rank).float() * 2
        if manager.domain_rank == 0:
            net[1].grad = torch.full((2, 3), 6.0)
        else:
            net[3].grad = torch.full((2, 3), 4.0)
        sync_domain_gradients(net, manager)
        assert net[2].grad is None
        assert net[4].grad is None
        return manager.dp_rank, net[0].grad, net[1].grad, net[3].grad

    for dp, *grads in run_threads(rank_main, 4):
        expected = sum(whole_numbers(2, 3, seed=2 * dp + i).float() for i in range(2))
        assert torch.equal(grads[0], expected)
        assert torch.equal(grads[1], torch.full((2, 3), 3.0))
        assert torch.equal(grads[2], torch.full((2, 3), 2.0))


def test_messages_are_few(monkeypatch):
    calls = []  # a fork has a list of its own
    original = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10)))
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        sync_domain_gradients(net, manager)
        return calls

    assert run_processes(rank_main, 2, fork=True)[0] == [20, 120]  # who has gradients, and the gradients


def test_nothing_is_averaged_twice():
    def rank_main(rank):
        mesh, axes = build_device_mesh({"data": "fsdp2", "tensor": 1, "domain": 2}, "cpu")
        manager = initialize_domain_parallel(4, 2, mesh=mesh)
        folded = apply_fsdp2(nn.Linear(3, 3), fold_domain(mesh))
        apart = apply_fsdp2(nn.Linear(3, 3), axes["dp"])
        for net in (folded, apart):
            for p in net.parameters():
                p.grad = torch.ones_like(p) * manager.domain_rank
        before = [p.grad.to_local().clone() for p in folded.parameters()]
        for net in (folded, apart):
            sync_domain_gradients(net, manager)
            sync_domain_gradients(net, None)
        assert all(torch.equal(p.grad.to_local(), grad) for p, grad in zip(folded.parameters(), before, strict=True))
        assert all(bool((p.grad.to_local() == 0.5).all()) for p in apart.parameters())
        by_hand = nn.Linear(3, 3)
        fully_shard(by_hand, mesh=fold_domain(mesh))
        for p in by_hand.parameters():
            assert isinstance(p, DTensor)
            p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match="is sharded over ranks of the group that it is to be averaged over"):
            sync_domain_gradients(by_hand, manager)

    run_processes(rank_main, 4, fork=True)


def test_models_that_differ_are_refused_on_all_ranks():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 2)
        net = nn.Linear(2, 2 + rank)
        with pytest.raises(ValueError, match="sync_domain_gradients: the ranks disagree"):
            sync_domain_gradients(net, manager)
        sparse = nn.Embedding(4, 2, sparse=True)
        sparse(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match="gradient 0 is sparse"):
            sync_domain_gradients(sparse, manager)

    run_threads(rank_main, 2)


def test_a_domain_of_one_rank():
    def rank_main(rank):
        manager = initialize_domain_parallel(2, 1)
        net = nn.Linear(1, 1)
        net.weight.grad = torch.full((1, 1), float(rank))
        sync_domain_gradients(net, manager)
        x = randn(1, 1, 4, 4)
        assert shard_spatial(x, manager) is x
        assert gather_spatial(x, manager) is x
        return float(net.weight.grad)

    assert run_threads(rank_main, 2) == [0.0, 1.0]


# The data-parallel group


def test_the_data_parallel_group():
    assert get_dp_group() is None
    register_dp_group(None)  # as the reference's programs do on one rank
    with pytest.raises(ValueError, match="register_dp_group needs torch.distributed"):
        register_dp_group(object())

    def rank_main(rank):
        assert get_dp_group() is None
        manager = initialize_domain_parallel(4, 2)
        assert isinstance(manager, DomainParallelManager)
        assert get_dp_group() is manager.data_parallel_group
        group = dist.new_group([0, 1, 2, 3])
        register_dp_group(group)
        assert get_dp_group() is group
        register_dp_group(None)
        assert get_dp_group() is manager.data_parallel_group

    run_threads(rank_main, 4)


def test_folding_a_mesh():
    def rank_main(rank):
        whole = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("dp", "tp", "domain"))
        folded = fold_domain(whole)
        assert fold_domain(whole["dp", "tp"]).mesh_dim_names == ("dp",)
        assert fold_domain(whole["tp", "domain"]).mesh_dim_names == ("domain",)
        assert fold_domain(whole["tp"]) is None
        assert fold_domain(None) is None
        return folded.mesh.tolist()

    tp0, tp1 = [0, 1, 4, 5], [2, 3, 6, 7]
    assert run_processes(rank_main, 8, fork=True) == [tp0, tp0, tp1, tp1] * 2
