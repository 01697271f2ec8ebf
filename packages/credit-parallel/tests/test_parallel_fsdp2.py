"""FSDP2 and DDP: gradients, state dicts and settings on any mesh are those of one rank."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from credit_domain.layers import DomainParallelConv2d
from credit_halo.testing import run_processes
from credit_mesh import RowPartition, initialize_domain_parallel
from credit_parallel.collectives import clip_grad_norm_
from credit_parallel.ddp import apply_ddp
from credit_parallel.domain import sync_domain_gradients
from credit_parallel.fsdp2 import (
    _apply_activation_checkpointing,
    _build_mp_policy,
    _has_fsdp2_shard,
    apply_fsdp2,
    fold_domain,
    fsdp2_is_applied,
    fsdp2_load_optimizer_state_dict,
    fsdp2_load_state_dict,
    fsdp2_optimizer_state_dict,
    fsdp2_state_dict,
)
from credit_parallel.mesh import build_device_mesh

ROWS = 7


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


class Transformer(nn.Module):
    """A block by its name."""

    calls = 0

    def __init__(self, domain):
        super().__init__()
        conv = nn.Conv2d(3, 3, (3, 1), padding=(1, 0), dtype=torch.float64)
        self.conv = DomainParallelConv2d(conv) if domain else conv
        self.up, self.down = nn.Linear(5, 6, dtype=torch.float64), nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, x, scale=1.0):
        if not torch.compiler.is_compiling():
            type(self).calls += 1
        return x + scale * self.down(torch.tanh(self.up(self.conv(x))))


class Stage(nn.Module):
    """A block by its attribute."""

    _fsdp2_shard = True

    def __init__(self, domain):
        super().__init__()
        self.inner = Transformer(domain)

    def forward(self, x):
        return torch.sin(self.inner(x, scale=0.5))


class Net(nn.Module):
    def __init__(self, domain=False, seed=0):
        super().__init__()
        self.first, self.stage, self.second = Transformer(domain), Stage(domain), Transformer(domain)
        self.head = nn.Linear(5, 5, dtype=torch.float64)
        self.unused = nn.Linear(2, 2, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=100 * seed + i) / 2
        self.seen += seed

    def forward(self, x):
        return self.head(self.second(self.stage(self.first(x))))


def divide(net, mesh):
    """Divide the two linear layers of each block over tp: a stand-in for tensor parallelism, storage only.

    Parameters are whole while they are used, and each rank keeps its part of the gradient.
    """
    for block in (net.first, net.stage.inner, net.second):
        for layer, name, dim in ((block.up, "weight", 0), (block.up, "bias", 0), (block.down, "weight", 1)):
            whole = distribute_tensor(layer.get_parameter(name).detach(), mesh, [Shard(dim)])
            layer.register_parameter(name, nn.Parameter(whole))
            layer.__class__ = type("Divided", (type(layer),), {"forward": whole_linear})


def whole_linear(layer, x):
    def whole(p):
        return p.full_tensor(grad_placements=[Replicate()]) if isinstance(p, DTensor) else p

    return nn.functional.linear(x, whole(layer.weight), whole(layer.bias))


def factor(samples):
    return randn(samples, 3, ROWS, 5, seed=77)


def reference(samples, conf=None, net=None, dtype=torch.float64):
    """Gradients of one rank, whose loss is the mean over samples."""
    net = Net() if net is None else net
    x = randn(samples, 3, ROWS, 5, seed=9).requires_grad_()
    (net(x) * factor(samples)).sum().div(samples).backward()
    return net


def whole_of(t):
    return t.full_tensor().clone() if isinstance(t, DTensor) else t.clone()


def layout(dp, tp, domain, data, device="cpu"):
    """The mesh of a layout, the rows of this rank, and its sample."""
    mesh, axes = build_device_mesh({"data": data, "tensor": tp, "domain": domain}, device)
    manager = None
    rows = slice(None)
    if domain > 1:
        manager = initialize_domain_parallel(dist.get_world_size(), domain, tensor_parallel_size=tp, mesh=mesh)
        partition = RowPartition.even(ROWS, domain)
        manager.declare(partition)
        own = partition.interval(manager.domain_rank)
        rows = slice(own.start, own.stop)
    return mesh, axes, manager, rows, (axes["dp"].get_local_rank() if "dp" in axes else 0)


def train(rank, dp, tp, domain, data, fold, conf, seeds=(0, 0), steps=1):
    """One backward on a layout: gradients by name, whole, and the norm that clipping sees."""
    mesh, axes, manager, rows, sample = layout(dp, tp, domain, data)
    net = Net(domain > 1, seed=seeds[min(rank, 1)])
    if tp > 1:
        divide(net, axes["tp"])
    axis = fold_domain(mesh) if fold else axes.get("dp")
    wrapped = apply_fsdp2(net, axis, conf) if data == "fsdp2" else apply_ddp(net, axis, conf)
    x = randn(dp, 3, ROWS, 5, seed=9)[sample : sample + 1, :, rows]
    own = factor(dp)[sample : sample + 1, :, rows]
    for _ in range(steps):
        net.zero_grad()
        (wrapped(x) * own).sum().mul(domain).backward()
        sync_domain_gradients(wrapped, manager)
    grads = {name: None if p.grad is None else whole_of(p.grad) for name, p in net.named_parameters()}
    return grads, clip_grad_norm_(net.parameters(), 1.0), {name: p.shape for name, p in net.state_dict().items()}


def check(results, dp, rtol=1e-10):
    net = reference(dp)
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    for grads, clipped, shapes in results:
        assert shapes == {name: value.shape for name, value in net.state_dict().items()}
        for name, p in net.named_parameters():
            if p.grad is None:
                assert grads[name] is None or not grads[name].any()
            else:
                torch.testing.assert_close(
                    grads[name], p.grad, rtol=rtol, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
                )
        torch.testing.assert_close(clipped, norm, rtol=rtol, atol=0)


CHECKPOINTED = {"trainer": {"activation_checkpoint": True}}
LAYOUTS = [
    # dp, tp, domain, fold
    (2, 1, 1, False),
    (4, 1, 1, False),
    (1, 1, 3, True),
    (2, 1, 3, True),
    (2, 1, 2, False),
    (2, 2, 1, False),
    (1, 2, 3, True),
    (2, 2, 2, True),
    (2, 2, 2, False),
]


@pytest.mark.parametrize("conf", [None, CHECKPOINTED])
@pytest.mark.parametrize(("dp", "tp", "domain", "fold"), LAYOUTS)
def test_gradients_of_fsdp2(dp, tp, domain, fold, conf):
    check(run_processes(train, dp * tp * domain, dp, tp, domain, "fsdp2", fold, conf, fork=True), dp)


@pytest.mark.parametrize(("dp", "tp", "domain", "fold"), LAYOUTS)
def test_gradients_of_ddp(dp, tp, domain, fold):
    conf = {"trainer": {"find_unused_parameters": True}}
    check(run_processes(train, dp * tp * domain, dp, tp, domain, "ddp", fold, conf, fork=True), dp)


@pytest.mark.parametrize(
    ("world", "args"),
    [
        (2, (2, 1, 1, "fsdp2", False, None)),
        (4, (4, 1, 1, "fsdp2", False, None)),
        (4, (1, 2, 2, "fsdp2", True, CHECKPOINTED)),
        (4, (2, 2, 1, "ddp", False, {"find_unused_parameters": True})),
    ],
)
def test_gradients_on_processes(world, args):
    check(run_processes(train, world, *args), args[0])


def test_ranks_start_with_the_weights_of_the_first():
    check(run_processes(train, 4, 2, 1, 2, "fsdp2", True, None, (0, 1), fork=True), 2)
    check(run_processes(train, 2, 2, 1, 1, "ddp", False, {"find_unused_parameters": True}, (0, 1), fork=True), 2)


def test_gradients_of_a_step_after_others():
    check(run_processes(train, 6, 2, 1, 3, "fsdp2", True, CHECKPOINTED, (0, 0), 3, fork=True), 2)


def accumulated_in_float32(rank):
    net = apply_fsdp2(Net().float(), None)
    x, own = randn(3, 3, ROWS, 5, seed=9).float()[rank, None], factor(3).float()[rank, None]
    for _ in range(2):
        (net(x) * own).sum().backward()
    return {name: whole_of(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def test_float32_gradients_add_up():
    """fully_shard averages float32 in another way than float64."""
    net = reference(3)
    for grads in run_processes(accumulated_in_float32, 3):
        for name, grad in grads.items():
            torch.testing.assert_close(grad.double(), 2 * net.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


# Blocks


def test_blocks_are_sharded_and_the_rest():
    def rank_main(rank):
        net = apply_fsdp2(Net(), None, {"trainer": {"fsdp2_blocks": ["head"]}})
        assert fsdp2_is_applied(net)
        return {name for name, module in net.named_modules() if isinstance(module, FSDPModule)}

    assert run_processes(rank_main, 2, fork=True)[0] == {"", "first", "stage", "stage.inner", "second", "head"}
    assert not fsdp2_is_applied(Net())


def test_who_opts_in():
    assert _has_fsdp2_shard(Stage(False))
    assert not _has_fsdp2_shard(Transformer(False))
    linear = nn.Linear(1, 1)
    linear._fsdp2_shard = True
    assert _has_fsdp2_shard(linear)


class Several(nn.Module):
    """Returns views, in containers."""

    _fsdp2_shard = True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 10, dtype=torch.float64)
        for i, p in enumerate(self.parameters()):
            p.data = randn(*p.shape, seed=i)

    def forward(self, x):
        x = torch.sin(self.linear(x))
        return {"parts": [x[..., :5], (x[..., 5:], "text")]}


class AddsInPlace(Net):
    """Writes to what its blocks return."""

    def __init__(self):
        super().__init__()
        self.several = Several()

    def forward(self, x):
        parts = self.several(self.first(x))["parts"]
        first, (second, _) = parts
        first += second
        second *= 2
        x = self.head(first + second)
        x += 1
        x = self.second(x)
        x += first
        return self.head(x)


def test_operations_in_place_on_what_blocks_return():
    conf = {"fsdp2_blocks": ["head"]}

    def rank_main(rank):
        net = apply_fsdp2(AddsInPlace(), None, conf)
        out = net(randn(2, 3, ROWS, 5, seed=9))
        out *= 1
        (out * factor(2)).sum().div(2).backward()
        return {name: whole_of(p.grad) for name, p in net.named_parameters() if p.grad is not None}

    net = reference(2, net=AddsInPlace())
    for grads in run_processes(rank_main, 2, fork=True):
        assert "several.linear.weight" in grads
        for name, grad in grads.items():
            torch.testing.assert_close(grad, net.get_parameter(name).grad, rtol=1e-10, atol=1e-11)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Transformer(False), Transformer(False)
        self.b.up.weight = self.a.up.weight


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = Stage(False)
        self.again = nn.ModuleList([self.stage.inner])


def test_what_is_refused():
    with pytest.raises(ValueError, match="apply_fsdp2 needs torch.distributed"):
        apply_fsdp2(Net(), None)

    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "tp", "domain"))
        with pytest.raises(ValueError, match="names no module or class of the model: Tranformer, tail"):
            apply_fsdp2(Net(), mesh["dp"], {"fsdp2_blocks": ["head", "Tranformer", "tail"]})
        with pytest.raises(ValueError, match="must be a list of class names"):
            apply_fsdp2(Net(), mesh["dp"], {"fsdp2_blocks": "head"})
        with pytest.raises(ValueError, match="takes the dp axis, fold_domain"):
            apply_fsdp2(Net(), mesh)
        with pytest.raises(ValueError, match="a.up.weight and b.up.weight are one and the same, in different blocks"):
            apply_fsdp2(Tied(), mesh["dp"])
        with pytest.raises(ValueError, match="activation_checkpoint must be true or false; got 'no'"):
            apply_fsdp2(Net(), mesh["dp"], {"activation_checkpoint": "no"})
        divided = Net()
        divide(divided, mesh["tp"])
        with pytest.raises(ValueError, match="are divided over .* which shares ranks with"):
            apply_fsdp2(divided, mesh["dp", "tp"]._flatten("both"))
        net = apply_fsdp2(Net(), mesh["dp"])
        with pytest.raises(ValueError, match="is sharded, or wrapped by DDP, already"):
            apply_fsdp2(net, mesh["dp"])
        with pytest.raises(ValueError, match="is sharded by FSDP2, or wrapped by DDP, already"):
            apply_ddp(net, mesh["dp"])
        with pytest.raises(ValueError, match="must be applied before fully_shard"):
            _apply_activation_checkpointing(net)
        apply_fsdp2(Shared(), mesh["dp"])  # one parameter under two names, in one block

    run_processes(rank_main, 4, fork=True)


def test_a_mesh_of_some_of_the_domain_ranks_is_refused():
    def rank_main(rank):
        initialize_domain_parallel(4, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "half"))
        with pytest.raises(ValueError, match="spans 2 of the 4 domain ranks"):
            apply_fsdp2(Net(), mesh["half"])

    run_processes(rank_main, 4, fork=True)


def test_replicate_over_one_axis_and_shard_over_another():
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        net = apply_fsdp2(Net(seed=rank), mesh)
        (net(randn(4, 3, ROWS, 5, seed=9)[rank, None]) * factor(4)[rank, None]).sum().backward()
        grads = {name: whole_of(p.grad) if p.grad is not None else None for name, p in net.named_parameters()}
        return grads, clip_grad_norm_(net.parameters(), 1.0), {n: p.shape for n, p in net.state_dict().items()}

    check(run_processes(rank_main, 4, fork=True), 4)


@pytest.mark.parametrize(("tp", "domain"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_the_default_mesh_is_all_but_tp(tp, domain):
    def rank_main(rank):
        _, axes, _, _, _ = layout(4 // (tp * domain), tp, domain, "fsdp2")
        net = Net(domain > 1)
        if tp > 1:
            divide(net, axes["tp"])
        apply_fsdp2(net, None)
        assert net._fsdp2_folds_domain is (domain > 1)
        weight = net.head.weight
        return weight.device_mesh.size(), torch.equal(weight.full_tensor(), Net().head.weight)

    assert run_processes(rank_main, 4, fork=True) == [(4 // tp, True)] * 4


def test_memory_of_parameters_is_divided():
    def rank_main(rank):
        net = apply_fsdp2(Net(), None)
        return sum(p.to_local().numel() for p in net.parameters())

    assert sum(run_processes(rank_main, 4, fork=True)) == sum(p.numel() for p in Net().parameters())


def test_channels_last_parameters_are_taken():
    def rank_main(rank):
        net = Net().to(memory_format=torch.channels_last)
        net.first.conv.weight.data = net.first.conv.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
        apply_fsdp2(net, None)
        return torch.equal(net.first.conv.weight.full_tensor(), Net().first.conv.weight)

    assert all(run_processes(rank_main, 2, fork=True))


# Mixed precision


def test_mixed_precision_policies():
    assert _build_mp_policy(None) == MixedPrecisionPolicy()
    assert _build_mp_policy({"trainer": {"amp": False}}) == MixedPrecisionPolicy()
    amp = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    assert _build_mp_policy({"trainer": {"amp": True}}) == amp
    explicit = {
        "param_dtype": "bf16",
        "reduce_dtype": "torch.float32",
        "output_dtype": None,
        "cast_forward_inputs": False,
    }
    assert _build_mp_policy({"amp": True, "fsdp2_mp_policy": explicit}) == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    assert _build_mp_policy({"fsdp2_mp_policy": {"output_dtype": torch.float16}}).output_dtype is torch.float16
    for wrong, message in [
        ({"param_dtype": "int8"}, "fsdp2_mp_policy.param_dtype must be one of bfloat16"),
        ({"param_type": "bf16"}, "must be a mapping of some of param_dtype"),
        ("bf16", "must be a mapping of some of"),
        ({"cast_forward_inputs": "yes"}, "cast_forward_inputs must be true or false"),
    ]:
        with pytest.raises(ValueError, match=message):
            _build_mp_policy({"trainer": {"fsdp2_mp_policy": wrong}})
    with pytest.raises(ValueError, match="conf must be a mapping with a trainer section"):
        _build_mp_policy("bf16")


class Spy(nn.Module):
    """Notes the dtypes that it computes in."""

    _fsdp2_shard = True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.seen = x.dtype, self.linear.weight.dtype
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize(
    ("trainer", "inside", "outside"),
    [
        ({}, torch.float32, torch.float32),
        ({"amp": True}, torch.bfloat16, torch.float32),
        ({"fsdp2_mp_policy": {"param_dtype": "bfloat16"}}, torch.bfloat16, torch.bfloat16),
        ({"amp": True, "activation_checkpoint": True}, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_precision(trainer, inside, outside):
    def rank_main(rank):
        net = nn.Sequential(Spy(), Spy())
        for i, p in enumerate(net.parameters()):
            p.data = randn(*p.shape, seed=i, dtype=torch.float32)
        apply_fsdp2(net, None, {"trainer": trainer})
        out = net(randn(2, 4, dtype=torch.float32))
        out.float().sum().backward()
        assert net[0].seen == net[1].seen == (inside, inside)
        assert out.dtype is outside
        assert all(p.dtype is p.grad.dtype is torch.float32 for p in net.parameters())
        return net[0].linear.weight.grad.full_tensor()

    one = nn.Sequential(Spy(), Spy())
    for i, p in enumerate(one.parameters()):
        p.data = randn(*p.shape, seed=i, dtype=torch.float32)
    one(randn(2, 4, dtype=torch.float32)).sum().backward()
    rtol = 1e-5 if inside is torch.float32 else 0.1
    for grad in run_processes(rank_main, 2, fork=True):
        torch.testing.assert_close(grad, one[0].linear.weight.grad, rtol=rtol, atol=rtol)


# Activation checkpointing


def test_blocks_are_recomputed_once():
    kept, recomputed = Net(), Net()
    assert _apply_activation_checkpointing(recomputed) is recomputed
    _apply_activation_checkpointing(recomputed)  # again changes nothing
    assert list(recomputed.state_dict()) == list(kept.state_dict())
    assert [name for name, _ in recomputed.named_modules()] == [name for name, _ in kept.named_modules()]
    copied = copy.deepcopy(recomputed)
    for p in copied.parameters():
        p.data.zero_()
    calls = []
    for net in (kept, recomputed):
        Transformer.calls = 0
        reference(2, net=net)
        calls.append(Transformer.calls)
    assert calls == [3, 6]
    for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True):
        assert a.grad is None if b.grad is None else torch.equal(a.grad, b.grad)
    assert not copied(randn(1, 3, ROWS, 5)).any()  # a copy has its own parameters
    Transformer.calls = 0
    with torch.no_grad():
        assert torch.equal(recomputed(randn(1, 3, ROWS, 5)), kept(randn(1, 3, ROWS, 5)))


def test_recomputation_goes_on_to_the_end():
    """Where it stopped when it has all that it needs, ranks might not all reach an exchange."""

    class Tail(nn.Module):
        _fsdp2_shard = True
        ends = 0

        def forward(self, x):
            x = torch.sin(x) + 1
            self.ends += 1
            return x

    net = _apply_activation_checkpointing(nn.Sequential(Tail()))
    net(randn(2).requires_grad_()).sum().backward()
    assert net[0].ends == 2


def test_random_numbers_are_drawn_again():
    class Dropping(nn.Module):
        _fsdp2_shard = True

        def forward(self, x):
            return nn.functional.dropout(torch.sin(x), 0.5)

    net = nn.Sequential(Dropping())
    x = randn(100).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        out = net(x)
        out.sum().backward()
        expected = x.grad.clone()
        x.grad = None
        _apply_activation_checkpointing(net)
        torch.manual_seed(3)
        assert torch.equal(net(x), out)
        torch.manual_seed(3)
        net(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_no_block_to_recompute(caplog):
    with caplog.at_level(logging.WARNING):
        _apply_activation_checkpointing(nn.Sequential(nn.Linear(1, 1)))
    assert "activation checkpointing found no block in Sequential" in caplog.text


def compiled(rank):
    """Blocks that exchange rows are recomputed in code that torch.compile was asked for."""
    _, _, manager, rows, _ = layout(1, 1, 2, "ddp")
    net = _apply_activation_checkpointing(Net(True))
    net._domain_parallel_manager = manager
    fast = torch.compile(net, backend="aot_eager")
    (fast(randn(1, 3, ROWS, 5, seed=9)[..., rows, :]) * factor(1)[..., rows, :]).sum().mul(2).backward()
    sync_domain_gradients(fast, manager)
    return {name: p.grad for name, p in net.named_parameters()}


def test_recomputation_in_compiled_models():
    one = reference(1)
    for grads in run_processes(compiled, 2):
        for name, p in one.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-12)


# State dicts


def optimised(net, wd=0.1):
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": wd}, {"params": rest, "lr": 1e-2}], lr=2e-2)


def one_rank(steps):
    net = Net()
    opt = optimised(net)
    for step in range(steps):
        opt.zero_grad()
        (net(randn(2, 3, ROWS, 5, seed=step)) * factor(2)).sum().div(2).backward()
        opt.step()
    return net, opt


def resumed(rank, kind, model_state, opt_state):
    """Load the state of one rank after two steps, save it again, and make the third step."""
    dp, tp, domain = {"fsdp2": (2, 1, 1), "folded": (1, 2, 2), "ddp": (2, 1, 1), "tp": (2, 2, 1)}[kind]
    mesh, axes, manager, rows, sample = layout(dp, tp, domain, "ddp" if kind == "ddp" else "fsdp2")
    net = Net(domain > 1, seed=5)
    if tp > 1:
        divide(net, axes["tp"])
    conf = {"find_unused_parameters": True}
    wrapped = apply_ddp(net, axes["dp"], conf) if kind == "ddp" else apply_fsdp2(net, fold_domain(mesh))
    opt = optimised(net)
    assert fsdp2_optimizer_state_dict(wrapped, opt) == ({} if rank else {**fresh(net, opt)})
    assert not opt.state  # asking changes nothing
    fsdp2_load_state_dict(wrapped, model_state if rank == 0 else {})
    fsdp2_load_optimizer_state_dict(wrapped, opt, opt_state if rank == 0 else {})
    saved = fsdp2_state_dict(wrapped), fsdp2_optimizer_state_dict(wrapped, opt)
    x, own = randn(2, 3, ROWS, 5, seed=2), factor(2)
    part = slice(sample, sample + 1) if dp == 2 else slice(None)
    (wrapped(x[part, :, rows]) * own[part, :, rows]).sum().mul(domain * dp / 2).backward()
    sync_domain_gradients(wrapped, manager)
    opt.step()
    return *saved, fsdp2_state_dict(wrapped), fsdp2_optimizer_state_dict(wrapped, opt)


def fresh(net, opt):
    names = {p: name for name, p in net.named_parameters()}
    return {"state": {}, "param_groups": [{**g, "params": [names[p] for p in g["params"]]} for g in opt.param_groups]}


def same(a, b, close):
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key], close)
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, close)
    elif isinstance(a, torch.Tensor):
        assert a.device.type == "cpu"
        torch.testing.assert_close(a, b, rtol=1e-9 if close else 0, atol=1e-12 if close else 0)
    else:
        assert a == b


@pytest.mark.parametrize("kind", ["fsdp2", "folded", "ddp", "tp"])
def test_state_dicts_move_between_layouts(kind):
    net, opt = one_rank(2)
    before = fsdp2_state_dict(net), fsdp2_optimizer_state_dict(net, opt)
    assert "unused.weight" not in before[1]["state"]
    assert "unused.weight" in before[1]["param_groups"][0]["params"]
    net3, opt3 = one_rank(3)
    after = fsdp2_state_dict(net3), fsdp2_optimizer_state_dict(net3, opt3)
    results = run_processes(resumed, 4 if kind in ("folded", "tp") else 2, kind, *before)
    assert all(state == {} for result in results[1:] for state in result)
    for i, (mine, expected) in enumerate(zip(results[0], (*before, *after), strict=True)):
        same(mine, expected, close=i > 1)


def test_state_dicts_on_one_rank():
    net, opt = one_rank(2)
    states = fsdp2_state_dict(net), fsdp2_optimizer_state_dict(net, opt)
    compiled = torch.compile(Net(seed=4), backend="eager")
    other = optimised(compiled)
    fsdp2_load_state_dict(compiled, states[0])
    fsdp2_load_optimizer_state_dict(compiled, other, states[1])
    same(fsdp2_state_dict(compiled), states[0], close=False)
    same(fsdp2_optimizer_state_dict(compiled, other), states[1], close=False)
    for p in net.parameters():
        p.data.zero_()
    assert states[0]["head.weight"].any()  # a state dict has memory of its own


def loads_what_does_not_fit(rank):
    net = apply_fsdp2(Net(), None)
    opt = optimised(net)
    first, rest = dict(Net().state_dict()), {}
    del first["head.weight"]
    first["tail"] = torch.ones(1)
    first["head.bias"] = torch.ones(3)
    message = (
        "fsdp2_load_state_dict: head.weight is missing; tail is unknown; "
        "head.bias is of shape \\(3,\\), the model's of \\(5,\\)"
    )
    with pytest.raises(ValueError, match=message):
        fsdp2_load_state_dict(net, first if rank == 0 else rest)
    one, other = one_rank(1)
    whole = optimizer_state_of(one, other) if rank == 0 else {}
    if rank == 0:
        whole["state"]["tail"] = {}
        whole["state"]["head.bias"]["exp_avg"] = torch.ones(2)
        whole["param_groups"][1]["params"].remove("head.bias")
    message = (
        "fsdp2_load_optimizer_state_dict: the groups hold other parameters: .* not in both: head.bias; "
        "exp_avg of head.bias is of shape \\(2,\\), the parameter of \\(5,\\); there is a state of tail, which"
    )
    with pytest.raises(ValueError, match=message):
        fsdp2_load_optimizer_state_dict(net, opt, whole)
    with pytest.raises(ValueError, match="16 of the optimizer's 26 parameters are none|make the optimizer after"):
        fsdp2_optimizer_state_dict(net, torch.optim.SGD(Net().parameters(), lr=0.1))
    opt.state[net.head.weight] = {"rows": torch.ones(3)}
    with pytest.raises(ValueError, match="AdamW keeps rows of head.weight, which is sharded, as a plain Tensor"):
        fsdp2_optimizer_state_dict(net, opt)


def optimizer_state_of(net, opt):
    names = {p: name for name, p in net.named_parameters()}
    return {
        "state": {names[p]: dict(values) for p, values in opt.state.items()},
        "param_groups": [{**g, "params": [names[p] for p in g["params"]]} for g in opt.param_groups],
    }


def test_states_that_do_not_fit_are_refused_on_all_ranks():
    run_processes(loads_what_does_not_fit, 2)


# DDP


def test_ddp_leaves_a_model_alone_that_needs_nothing(caplog):
    assert isinstance(apply_ddp(Net(), None), Net)

    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        frozen = Net(seed=rank).requires_grad_(False)
        assert apply_ddp(frozen, mesh) is frozen
        return frozen.state_dict()

    for state in run_processes(rank_main, 2, fork=True):
        same(dict(state), dict(Net(seed=0).state_dict()), close=False)


def test_ddp_without_sync_then_with():
    def rank_main(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        net = Net()
        divide(net, mesh["tp"])
        wrapped = apply_ddp(net, mesh["dp"], find_unused_parameters=True)
        assert isinstance(wrapped, DistributedDataParallel)
        at = mesh.get_local_rank("dp")
        x, own = randn(2, 3, ROWS, 5, seed=9)[at, None], factor(2)[at, None]
        with wrapped.no_sync():
            (wrapped(x) * own).sum().backward()
        alone = {name: whole_of(p.grad) for name, p in net.named_parameters() if p.grad is not None}
        (wrapped(x) * own).sum().backward()
        return at, alone, {name: whole_of(p.grad) for name, p in net.named_parameters() if p.grad is not None}

    both = reference(2)
    for at, alone, grads in run_processes(rank_main, 4, fork=True):
        own = Net()
        (own(randn(2, 3, ROWS, 5, seed=9)[at, None]) * factor(2)[at, None]).sum().backward()
        assert any("weight" in name for name in grads)
        for name in grads:
            torch.testing.assert_close(alone[name], own.get_parameter(name).grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(grads[name], 2 * both.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


def test_buffers_of_a_folded_domain_stay_those_of_the_rank():
    def rank_main(rank):
        mesh, axes, manager, _, _ = layout(2, 1, 2, "ddp")
        folded, apart = Net(True), Net(True)
        folded.seen += manager.domain_rank + 10 * manager.dp_rank
        apart.seen += manager.domain_rank + 10 * manager.dp_rank
        wrapped = apply_ddp(folded, fold_domain(mesh))
        apply_ddp(apart, axes["dp"])
        sharded = Net(True)
        sharded.seen += manager.domain_rank + 10 * manager.dp_rank
        apply_fsdp2(sharded, fold_domain(mesh))
        assert not wrapped.broadcast_buffers
        return {float(net.seen[0]) for net in (folded, apart, sharded)}

    assert run_processes(rank_main, 4, fork=True) == [{0.0}, {1.0}, {0.0}, {1.0}]
