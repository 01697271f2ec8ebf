"""Under DDP every gradient is averaged, whichever parameters take part: the numbers of one rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from credit_halo.testing import run_processes
from credit_parallel import apply_ddp, clip_grad_norm_, parallelize, sync_domain_gradients
from credit_parallel.app.config import RunConfig
from credit_parallel.reducer import IDLE_ROUNDS, reducer_of

HEIGHT, WIDTH, SAMPLES, PARTS = 9, 6, 4, 6
INNER = range(1, PARTS - 1)


class Net(nn.Module):
    """A stem, parts that a step may use or leave out, and a head."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.Conv2d(4, 4, 3, padding=1) for _ in INNER]
        self.parts = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), *inner, nn.Conv2d(4, 2, 1)])

    def forward(self, x: Tensor, used: frozenset[int]) -> Tensor:
        x = self.parts[0](x)
        for i in sorted(used):
            x = x + torch.tanh(self.parts[i](x))
        return self.parts[-1](x)


def make():
    """Drawn by a generator of its own."""
    net, generator = Net().double(), torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.3)
    return net


def make_optimizer(name, net):
    if name == "sgd":
        return torch.optim.SGD(net.parameters(), 0.1)
    return torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1, foreach=False)


def train(context, plan, name, accumulate=1, direct=False):
    """Train by a plan: for each step, which parts are frozen, and which each sample uses in each forward."""
    net, generator = context.model, torch.Generator().manual_seed(1)
    optimizer = make_optimizer(name, net)
    raw = net.module if isinstance(net, DistributedDataParallel) else net
    replicas = context.layout.dp
    replica = 0 if context.manager is None else context.manager.dp_rank
    mine = range(replica * SAMPLES // replicas, (replica + 1) * SAMPLES // replicas)
    norms, missing = [], []
    for frozen, used in plan:
        for i, part in enumerate(raw.parts):
            part.requires_grad_(i not in frozen)
        xs, ys = (torch.randn(SAMPLES, 1, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator) for _ in "xy")
        for at, sample in enumerate(mine):
            with context.accumulate(last=at == len(mine) - 1) if accumulate > 1 else context.accumulate():
                x, y = context.shard([xs[sample], ys[sample]])
                loss = context.mean((net(x, used[sample]) - y) ** 2) / len(mine)
                loss.backward()
        if direct:
            sync_domain_gradients(net, context.manager)
            norms.append(float(clip_grad_norm_(net.parameters(), 0.5)))
        else:
            context.sync_gradients()
            norms.append(float(context.clip_grad_norm_(0.5)))
        missing.append([p.grad is None for p in net.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return norms, missing, weights


def conf_of(domain, data="ddp"):
    return {"trainer": {"parallelism": {"data": data, "domain": domain}}}


def on_rank(rank, domain, cases):
    return [train(parallelize(make(), conf_of(domain), check_batches=0), *args) for args in cases]


def check(world, domain, *cases):
    """Ranks go through the cases one after another: to start them takes longer than to train."""
    expected = [train(parallelize(make(), {"trainer": {"parallelism": {}}}), *args) for args in cases]
    for results in run_processes(on_rank, world, domain, cases, fork=True):
        for args, (norms, missing, weights), (own_norms, own_missing, own_weights) in zip(
            cases, expected, results, strict=True
        ):
            near = {"rtol": 1e-12, "atol": 1e-12, "msg": lambda text, args=args: f"{text}\n{args}"}
            torch.testing.assert_close(torch.tensor(own_norms), torch.tensor(norms), **near)
            assert own_missing == missing, args
            torch.testing.assert_close(own_weights, weights, **near)


ALL = frozenset(INNER)
NONE: frozenset[int] = frozenset()
EVERY_PART = [(NONE, [ALL] * SAMPLES)]
PLANS = {
    "unfrozen": [({0, 1}, [ALL] * 4), ({0}, [ALL] * 4), (NONE, [ALL] * 4), (NONE, [ALL] * 4)],
    "frozen again": [(NONE, [ALL] * 4), ({0, 2}, [ALL] * 4), ({2}, [ALL] * 4), (NONE, [ALL] * 4)],
    "all but the head frozen": [({*range(PARTS - 1)}, [ALL] * 4), (NONE, [ALL] * 4)],
    "never used": [(NONE, [frozenset({1, 3})] * 4)] * 3,
    "used in some steps": [(NONE, [frozenset({1 + step % 4})] * 4) for step in range(6)],
    "used by one sample": [(NONE, [ALL, NONE, frozenset({2}), NONE]), (NONE, [NONE, NONE, NONE, ALL])] * 2,
    "not used for long": [(NONE, [NONE if 0 < s < IDLE_ROUNDS + 3 else ALL] * 4) for s in range(IDLE_ROUNDS + 5)],
}
LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 1), (3, 3)]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("world", "domain"), LAYOUTS)
def test_trains_like_one_rank(world, domain, name):
    check(world, domain, *((plan, name) for plan in PLANS.values()))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("world", "domain"), [(2, 1), (2, 2)])
def test_accumulated(world, domain, direct):
    """Gradients of earlier parts of a batch are averaged too, where the last part has none."""
    check(world, domain, *((plan, "adamw", 2, direct) for plan in PLANS.values()))


used = st.sets(st.sampled_from(list(INNER)))
steps = st.tuples(st.sets(st.integers(0, PARTS - 2)), st.lists(used, min_size=SAMPLES, max_size=SAMPLES))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(plan=st.lists(steps, min_size=1, max_size=4), layout=st.sampled_from(LAYOUTS[:3]), parts=st.sampled_from([1, 2]))
def test_any_plan(plan, layout, parts):
    check(*layout, (plan, "adamw", parts))


# Messages


def test_nothing_more_is_sent_in_steady_state(monkeypatch):
    """One bucket a backward; and a parameter that is no longer used costs nothing after a while."""
    mine: list[int] = []  # a fork has a list of its own
    import credit_parallel.reducer as module

    original = module.dist.all_reduce

    def counting(flat, **kwargs):
        mine.append(flat.numel())
        return original(flat, **kwargs)

    monkeypatch.setattr(module.dist, "all_reduce", counting)
    plan = [(NONE, [ALL] * 4)] * 2 + [(NONE, [frozenset({1})] * 4)] * (IDLE_ROUNDS + 1)

    def rank_main(rank):
        context = parallelize(make(), conf_of(1), check_batches=0)
        count = len(list(context.model.parameters()))
        mine.clear()
        found = []
        optimizer = torch.optim.SGD(context.model.parameters(), 0.1)
        for _, used in plan:
            start = len(mine)
            x = torch.ones(1, 2, HEIGHT, WIDTH, dtype=torch.float64)
            context.model(x, used[0]).sum().backward()
            context.sync_gradients()
            optimizer.step()
            optimizer.zero_grad()
            found.append(mine[start:])
        whole = sum(p.numel() for p in context.model.parameters())
        unused = sum(p.numel() for i in (2, 3, 4) for p in context.model.module.parts[i].parameters())
        return count, whole, unused, found

    for count, whole, unused, found in run_processes(rank_main, 2, fork=True):
        assert found[:-1] == [[whole + count]] * (len(plan) - 1)
        assert found[-1] == [whole - unused + count]


def test_buckets_are_sent_before_the_backward_ends():
    """With small buckets all but the last are on their way while the backward still runs."""

    def rank_main(rank):
        net = make()
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        wrapped = apply_ddp(net, mesh, bucket_cap_mb=1e-3)
        x = torch.randn(1, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        x.requires_grad_()
        early = []
        x.register_hook(lambda g: early.append(len(reducer_of(net)._sent)))  # the last gradient but that of the stem
        wrapped(x, ALL).square().mean().backward()
        return early, len(reducer_of(net)._buckets), [p.grad.clone() for p in net.parameters()]

    (early, buckets, first), (_, _, second) = run_processes(rank_main, 2, fork=True)
    assert buckets > 3
    assert early[0] >= buckets - 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# What goes wrong


def test_a_backward_that_failed_leaves_nothing_behind():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of memory")

    def rank_main(rank):
        net = make()
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        wrapped = apply_ddp(net, mesh, bucket_cap_mb=1e-3)
        x = torch.randn(2, 1, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        hidden = net.parts[1](Fails.apply(net.parts[0](x[rank])))
        with pytest.raises(RuntimeError, match="out of memory"):
            wrapped.module.parts[-1](hidden).sum().backward()
        net.zero_grad()
        wrapped(x[rank], NONE).square().mean().backward()
        return [None if p.grad is None else p.grad.clone() for p in net.parameters()]

    plain = make()
    x = torch.randn(2, 1, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    plain(x[:, 0], NONE).square().mean().backward()
    for grads in run_processes(rank_main, 2, fork=True):
        for grad, p in zip(grads, plain.parameters(), strict=True):
            assert (grad is None) == (p.grad is None)
            if grad is not None:
                torch.testing.assert_close(grad, p.grad, rtol=1e-12, atol=1e-12)


def test_a_rank_whose_loss_reaches_no_parameter():
    """Its gradients count as zeros once it synchronises."""

    def rank_main(rank):
        context = parallelize(make(), conf_of(1), check_batches=0)
        x = torch.ones(1, 2, HEIGHT, WIDTH, dtype=torch.float64, requires_grad=True)
        out = context.model(x, NONE)
        (out.sum() if rank == 0 else x.sum()).backward()
        context.sync_gradients()
        return [None if p.grad is None else p.grad.clone() for p in context.model.parameters()]

    plain = make()
    plain(torch.ones(1, 2, HEIGHT, WIDTH, dtype=torch.float64), NONE).sum().backward()
    for grads in run_processes(rank_main, 2, timeout=60, fork=True):
        for grad, p in zip(grads, plain.parameters(), strict=True):
            assert (grad is None) == (p.grad is None)
            if grad is not None:
                torch.testing.assert_close(2 * grad, p.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
def test_parameters_that_join_later_are_refused_by_name(data):
    def rank_main(rank):
        context = parallelize(make(), conf_of(1, data), check_batches=0)
        raw = context.model.module if data == "ddp" else context.model
        raw.extra = nn.Conv2d(2, 2, 1).double()
        x = torch.ones(1, 2, HEIGHT, WIDTH, dtype=torch.float64)

        def step():
            raw.extra(context.model(x, NONE)).sum().backward()
            context.step(torch.optim.SGD(context.model.parameters(), 0.1))

        with pytest.raises(
            ValueError, match=r"extra\.weight, extra\.bias are .* joined the model after it was wrapped"
        ):
            step()

    run_processes(rank_main, 2, fork=True)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        for name in ("scale", "shift"):
            self.register_buffer(name, torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)) * self.scale) * self.shift


def test_several_forwards_before_a_backward_with_buffers():
    """A rollout: buffers are those of the first rank in each forward, and stay as they were kept for the backward."""

    def rank_main(rank):
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        net = Buffered()
        wrapped = apply_ddp(net, mesh)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            out = wrapped(wrapped(torch.randn(1, 2, 4, 4, generator=generator)))
            out.square().mean().backward()
        net.eval()
        with torch.no_grad():
            wrapped(torch.ones(1, 2, 4, 4))
        return net.norm.running_mean.clone(), net.conv.weight.grad.clone()

    (means, grads), (others, theirs) = run_processes(rank_main, 2, fork=True)
    assert torch.equal(means, others)
    assert torch.equal(grads, theirs)


def test_what_ddp_does_not_do_is_refused_by_name():
    def rank_main(rank):
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        with pytest.raises(ValueError, match="mixed_precision"):
            apply_ddp(make(), mesh, mixed_precision=True)
        with pytest.raises(ValueError, match="bucket_cap_mb must be a positive number"):
            apply_ddp(make(), mesh, bucket_cap_mb=0)
        with pytest.raises(ValueError, match="find_unused_parameters must be true or false"):
            apply_ddp(make(), mesh, {"trainer": {"find_unused_parameters": "yes"}})
        with pytest.raises(ValueError, match="1 has sparse gradients"):
            apply_ddp(nn.Sequential(nn.Linear(2, 2), nn.Embedding(3, 2, sparse=True)), mesh)
        wrapped = apply_ddp(make(), mesh, find_unused_parameters=True, static_graph=True)
        assert isinstance(wrapped, DistributedDataParallel)
        with pytest.raises(ValueError, match="register_comm_hook"):
            wrapped.register_comm_hook(None, None)

    run_processes(rank_main, 2, fork=True)


def test_find_unused_parameters_is_a_known_key():
    config = RunConfig.from_dict({"trainer": {"steps": 1, "find_unused_parameters": True}})
    assert config.trainer.find_unused_parameters
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"trainer\.find_unused_parameters must be"):
        RunConfig.from_dict({"trainer": {"steps": 1, "find_unused_parameters": "yes"}})
