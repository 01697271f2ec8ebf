"""Tensor parallelism: outputs, input gradients and parameter gradients of one rank, or a refusal on every rank."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_blocks import CHANNELS, CONV, LINEAR, Attention, ConvMlp, Fused, InSequential, Mlp, Native, build, randn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from credit_domain import convert_to_domain_parallel
from credit_halo import all_sum
from credit_halo.testing import run_processes
from credit_mesh import initialize_domain_parallel
from credit_parallel.tensor_parallel import (
    _is_tp_sharded_param,
    apply_native_tensor_parallel,
    apply_tensor_parallel,
    supports_native_tp,
    sync_replicated_gradients,
)
from credit_parallel.tensor_parallel.gradients import CHECKED_CALLS
from credit_parallel.tensor_parallel.region import copy_to_region, sum_from_region

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}


# Reference and helpers


def results(model: nn.Module, whole: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor | None]]:
    """Output, input gradient and parameter gradients, of their logical shapes."""
    x = whole.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    (out * randn(*out.shape, seed=2).to(out.dtype)).sum().backward()
    return out.detach(), x.grad, {name: full(p.grad) for name, p in model.named_parameters()}


def full(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def mesh_of(size: int, name: str = "tp") -> DeviceMesh:
    return init_device_mesh("cpu", (size,), mesh_dim_names=(name,))


def on_ranks(size: int, fn: Callable[[int, DeviceMesh], Any]) -> list[Any]:
    return run_processes(lambda rank: fn(rank, mesh_of(size)), size, fork=True)


def check_parity(model: nn.Module, whole: Tensor, size: int, apply: Callable[..., nn.Module]) -> None:
    expected, plain = results(copy.deepcopy(model), whole), model.state_dict()

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        parallel = copy.deepcopy(model)
        assert apply(parallel, mesh) is parallel
        for _ in range(2):
            torch.testing.assert_close(results(parallel, whole), expected, **EXACT)
        sync_replicated_gradients(parallel, mesh.get_group())
        torch.testing.assert_close({n: full(p.grad) for n, p in parallel.named_parameters()}, expected[2], **EXACT)
        assert isinstance(parallel._tp_group, dist.ProcessGroup)
        state = parallel.state_dict()
        assert list(state) == list(plain)
        for name, value in state.items():
            assert value.shape == plain[name].shape
            assert torch.equal(full(value), plain[name])
            if _is_tp_sharded_param(value):
                assert value.to_local().untyped_storage().nbytes() * size == value.numel() * value.element_size()
        assert any(map(_is_tp_sharded_param, state.values()))

    on_ranks(size, rank_main)


# Parity


@settings(max_examples=15)
@given(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=3), st.sampled_from((2, 3)), st.booleans(), st.data())
def test_linear_blocks(kinds: list[type[nn.Module]], size: int, bias: bool, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(((5, CHANNELS), (2, 3, CHANNELS), (2, 1, 3, CHANNELS))))
    check_parity(build(*kinds, bias=bias), randn(*shape), size, apply_tensor_parallel)


@settings(max_examples=10)
@given(st.lists(st.sampled_from(CONV), min_size=1, max_size=2), st.sampled_from((2, 3)), st.booleans(), st.booleans())
def test_convolution_blocks(kinds: list[type[nn.Module]], size: int, bias: bool, batched: bool) -> None:
    if batched:
        check_parity(build(*kinds, bias=bias), randn(2, CHANNELS, 3, 5), size, apply_tensor_parallel)
    else:
        check_parity(build(ConvMlp, bias=bias), randn(CHANNELS, 3, 5), size, apply_tensor_parallel)


@pytest.mark.parametrize("size", [2, 3])
def test_native_plans(size: int) -> None:
    model = build(Native, Native)
    assert supports_native_tp(model)
    assert not supports_native_tp(build(Mlp))
    check_parity(model, randn(2, 3, CHANNELS), size, apply_native_tensor_parallel)


@pytest.mark.parametrize("kind", LINEAR)
def test_one_rank_without_a_mesh(kind: type[nn.Module]) -> None:
    model = build(kind)
    assert apply_tensor_parallel(model, None) is model
    assert type(model[0]) is kind

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        assert apply_tensor_parallel(model, mesh)._tp_group.size() == 1
        assert type(model[0]) is kind
        sync_replicated_gradients(model)

    on_ranks(1, rank_main)


def every_kind(rank: int) -> None:
    for kinds, shape in ((LINEAR, (2, 3, CHANNELS)), (CONV, (2, CHANNELS, 3, 5))):
        model, whole = build(*kinds), randn(*shape)
        expected = results(copy.deepcopy(model), whole)
        apply_tensor_parallel(model, mesh_of(2))
        torch.testing.assert_close(results(model, whole), expected, **EXACT)


def test_in_processes() -> None:
    run_processes(every_kind, 2)


def test_twenty_steps_of_sgd() -> None:
    model, batches = build(*LINEAR), [randn(2, 3, CHANNELS, seed=step) for step in range(20)]

    def train(net: nn.Module) -> dict[str, Tensor | None]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        for batch in batches:
            optimizer.zero_grad()
            (net(batch) * randn(2, 3, CHANNELS, seed=9)).mean().backward()
            sync_replicated_gradients(net)
            optimizer.step()
        return {name: full(p.detach()) for name, p in net.named_parameters()}

    expected = train(copy.deepcopy(model))
    moved = [not torch.allclose(expected[name], p, rtol=1e-3) for name, p in model.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        torch.testing.assert_close(train(apply_tensor_parallel(copy.deepcopy(model), mesh)), expected, **EXACT)

    on_ranks(2, rank_main)


def test_the_weights_of_the_first_rank_count_and_checkpoints_load() -> None:
    models = [build(Fused, InSequential, seed=seed) for seed in range(3)]
    first, other = copy.deepcopy(models[0]), models[2]
    expected = [results(copy.deepcopy(model), randn(3, CHANNELS)) for model in (first, other)]

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        model = models[rank]
        model.register_buffer("offset", torch.full((2,), float(rank)))
        apply_tensor_parallel(model, mesh)
        assert torch.equal(model.offset, torch.zeros(2))
        del model.offset
        torch.testing.assert_close(results(model, randn(3, CHANNELS)), expected[0], **EXACT)
        assert not model.load_state_dict(other.state_dict()).missing_keys
        torch.testing.assert_close(results(model, randn(3, CHANNELS)), expected[1], **EXACT)
        model.load_state_dict(apply_tensor_parallel(copy.deepcopy(first), mesh).state_dict())
        torch.testing.assert_close(results(model, randn(3, CHANNELS)), expected[0], **EXACT)
        with pytest.raises(RuntimeError, match=r"size mismatch for 0.to_qkv.weight"):
            model.load_state_dict({**other.state_dict(), "0.to_qkv.weight": torch.ones(3, 4)})

    on_ranks(2, rank_main)


def test_parameters_keep_what_they_were() -> None:
    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        model = build(Mlp, Attention)
        model[0].up.weight.requires_grad_(False)
        model[0].up.weight.no_decay = True
        apply_tensor_parallel(model, mesh)
        assert not model[0].up.weight.requires_grad
        assert model[0].up.weight.no_decay
        assert (model[0].up.out_features, model[1].heads, model[1].temperature.shape[0]) == (12, 3, 3)
        assert [type(block).__name__ for block in model] == ["Mlp", "Attention"]
        assert isinstance(model[0].up, nn.Linear)
        again = copy.deepcopy(model)
        torch.testing.assert_close(results(again, randn(3, CHANNELS)), results(model, randn(3, CHANNELS)))
        assert apply_tensor_parallel(model, mesh) is model, "blocks are recognised"
        assert (model[1].heads, model[0].up.weight.to_local().shape[0]) == (3, 6)

    on_ranks(2, rank_main)


def test_a_mesh_of_another_name() -> None:
    def rank_main(rank: int) -> None:
        model = apply_tensor_parallel(build(Mlp), init_device_mesh("cpu", (2,)))
        sharded = [name for name, p in model.named_parameters() if _is_tp_sharded_param(p)]
        assert sharded == ["0.up.weight", "0.up.bias", "0.down.weight"]
        with pytest.raises(ValueError, match="must be the 1-D mesh of the tp axis"):
            apply_tensor_parallel(build(Mlp), init_device_mesh("cpu", (2, 1)))

    run_processes(rank_main, 2, fork=True)


# How it works together with the rest of torch


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class WithCheckpointInside(Attention):
    """Recomputes a part of its forward when nothing of the block is running any more."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = build(*LINEAR, WithCheckpointInside)
    expected = results(copy.deepcopy(model), randn(2, 3, CHANNELS))

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        parallel = apply_tensor_parallel(copy.deepcopy(model), mesh)
        wrapped = nn.Sequential(*(Checkpointed(block, reentrant) for block in parallel))
        out, grad, grads = results(wrapped, randn(2, 3, CHANNELS))
        grads = {name.replace("inner.", ""): value for name, value in grads.items()}
        torch.testing.assert_close((out, grad, grads), expected, **EXACT)

    on_ranks(3, rank_main)


def test_autocast() -> None:
    model = build(*LINEAR).float()
    whole = randn(2, 3, CHANNELS).float()

    def mixed(net: nn.Module) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return results(net, whole)

    expected = mixed(copy.deepcopy(model))

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        torch.testing.assert_close(
            mixed(apply_tensor_parallel(copy.deepcopy(model), mesh)), expected, rtol=0.1, atol=0.1
        )

    on_ranks(2, rank_main)


def fsdp_over_dp(rank: int, model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, whole = copy.deepcopy(model), randn(4, 3, CHANNELS)
    expected = results(copy.deepcopy(model), whole)
    plain = model.state_dict()
    apply_tensor_parallel(model, mesh["tp"])
    for block in model:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    mine = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
    for _ in range(2):
        model.zero_grad()
        x = whole[mine].clone().requires_grad_()
        out = model(x)
        (out * randn(*whole.shape, seed=2)[mine]).sum().backward()
        sync_replicated_gradients(model)
        torch.testing.assert_close(out, expected[0][mine], **EXACT)
        torch.testing.assert_close(x.grad, expected[1][mine], **EXACT)
        grads = {name: 2 * full(p.grad) for name, p in model.named_parameters()}  # fully_shard averages over dp
        torch.testing.assert_close(grads, expected[2], **EXACT)
    sharded = {name for name, p in model.named_parameters() if _is_tp_sharded_param(p)}
    assert {"0.up.weight", "0.down.weight", "2.temperature", "3.to_qkv.bias"} <= sharded
    assert not sharded & {"0.norm.weight", "0.down.bias", "2.scale"}
    for name, value in model.state_dict().items():
        assert torch.equal(full(value), plain[name])
    with pytest.raises(ValueError, match="0.norm.weight is a DTensor: tensor parallelism comes before fully_shard"):
        apply_tensor_parallel(model, mesh["tp"])


def test_fully_shard_on_a_mesh_of_forks() -> None:
    run_processes(fsdp_over_dp, 4, build(*LINEAR), fork=True)


def compiled(rank: int, backend: str) -> None:
    model, whole = build(InSequential, Attention, Fused), randn(2, 3, CHANNELS)
    expected = results(copy.deepcopy(model), whole)
    run = torch.compile(apply_tensor_parallel(model, mesh_of(2)), fullgraph=True, backend=backend)
    for _ in range(2):
        out, grad, grads = results(run, whole)
        grads = {name.removeprefix("_orig_mod."): value for name, value in grads.items()}
        torch.testing.assert_close((out, grad, grads), expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    run_processes(compiled, 2, backend, timeout=900)


def test_with_sharded_rows() -> None:
    """Layers that were wrapped for sharded rows before: the ones behind them are what is divided."""
    model, whole = build(*CONV), randn(2, CHANNELS, 5, 6)
    expected = results(copy.deepcopy(model), whole)

    def rank_main(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "domain"))
        manager = initialize_domain_parallel(4, 2, tensor_parallel_size=2, mesh=mesh)
        parallel = convert_to_domain_parallel(copy.deepcopy(model), manager)
        apply_tensor_parallel(parallel, mesh["tp"])
        own = manager.declare(whole.shape[-2]).interval(manager.domain_rank)
        rows = slice(own.start, own.stop)
        x = whole[:, :, rows].clone().requires_grad_()
        out = parallel(x)
        (out * randn(*whole.shape, seed=2)[:, :, rows]).sum().backward()
        sync_replicated_gradients(parallel)
        torch.testing.assert_close(out, expected[0][:, :, rows], **EXACT)
        torch.testing.assert_close(x.grad, expected[1][:, :, rows], **EXACT)
        grads = {name: all_sum(full(p.grad), manager.domain_group) for name, p in parallel.named_parameters()}
        torch.testing.assert_close(grads, expected[2], **EXACT)
        assert apply_tensor_parallel(parallel, mesh["tp"]) is parallel
        parallel.load_state_dict(model.state_dict())

    run_processes(rank_main, 4, fork=True)


def test_on_the_meta_device() -> None:
    plain = build(Fused, Attention)
    expected = results(copy.deepcopy(plain), randn(3, CHANNELS))

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        model = apply_tensor_parallel(copy.deepcopy(plain).to("meta"), mesh)
        model.to_empty(device="cpu").load_state_dict(plain.state_dict())
        torch.testing.assert_close(results(model, randn(3, CHANNELS)), expected, **EXACT)

    on_ranks(2, rank_main)


# What moves


def test_layers_that_read_the_same_tensor_share_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], dist.all_reduce  # a fork has a list of its own

    def rank_main(rank: int, mesh: DeviceMesh) -> tuple[int, int]:
        model = apply_tensor_parallel(build(Attention), mesh)
        for _ in range(2):
            calls.clear()
            loss = model(randn(3, CHANNELS).requires_grad_()).sum()
            forward = len(calls)
            loss.backward()
        return forward, len(calls) - forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(dist.get_rank())
        return real(*args, **kwargs)

    monkeypatch.setattr(dist, "all_reduce", counting)
    # Forward: the output. Backward: the input, and the scale that all heads share.
    assert on_ranks(2, rank_main) == [(1, 2)] * 2


def test_the_two_ends_of_a_region_are_adjoint_and_differentiable_twice() -> None:
    parts = [randn(2, 3, seed=rank) for rank in range(3)]

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        name = mesh.get_group().group_name
        x = randn(2, 3, seed=5).requires_grad_()
        copied = copy_to_region(x, name, "in")
        assert torch.equal(copied, x)
        (grad,) = torch.autograd.grad((copied * parts[rank]).sum(), x)
        torch.testing.assert_close(grad, sum(parts), **EXACT)
        mine = parts[rank].clone().requires_grad_()
        summed = sum_from_region(mine, name, "out")
        torch.testing.assert_close(summed, sum(parts), **EXACT)
        (grad,) = torch.autograd.grad((summed * x.detach()).sum(), mine)
        assert torch.equal(grad, x.detach())

        def loss(t: Tensor) -> Tensor:
            return sum_from_region((copy_to_region(t, name, "in") * parts[rank]).pow(3), name, "out").sum()

        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        t = x.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(sum((t * part).pow(3) for part in parts).sum(), t, create_graph=True)
        torch.testing.assert_close(second, torch.autograd.grad(first.pow(2).sum(), t)[0], **EXACT)
        with pytest.raises(
            ValueError, match=r"new \(output\): the ranks disagree .* rank 2: float64 of shape \(1, 3\)"
        ):
            sum_from_region(mine[: 1 if rank == 2 else 2], name, "new")

    on_ranks(3, rank_main)


class Undeclared(InSequential):
    _tp_partial = ()

    def __init__(self, bias: bool = True):
        super().__init__(bias)
        self.slope = self.layers[2]
        self.layers[2] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[4](self.slope(self.layers[1](x)))


def test_an_undeclared_partial_gradient_is_found() -> None:
    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        model = apply_tensor_parallel(build(Mlp, Undeclared), mesh)
        with torch.no_grad():
            model[1].layers[4].weight.zero_()
        results(model, randn(5, CHANNELS))
        sync_replicated_gradients(model)  # there is no gradient to see yet
        with torch.no_grad():
            model[1].layers[4].weight.fill_(0.1)
        results(model, randn(5, CHANNELS))
        with pytest.raises(ValueError, match="different gradients of 1.slope.weight. If a parameter acts between"):
            sync_replicated_gradients(model, mesh.get_group())
        for _ in range(CHECKED_CALLS):
            model.zero_grad()
            sync_replicated_gradients(model)

    on_ranks(2, rank_main)


def test_nothing_opted_in(caplog: pytest.LogCaptureFixture) -> None:
    def rank_main(rank: int, mesh: DeviceMesh) -> str:
        apply_tensor_parallel(nn.Linear(2, 2), mesh)
        with pytest.raises(ValueError, match="no block of Sequential declares _tp_plan, so there is nothing to divide"):
            apply_native_tensor_parallel(build(Mlp), mesh)
        return caplog.text

    with caplog.at_level(logging.WARNING):
        texts = on_ranks(2, rank_main)
    assert "no block of Linear declares _tp_col and _tp_row: all 2 tp ranks compute the same" in "".join(texts)


# Refusals


def block(columns: Any = "up", rows: Any = "down", out: int = 12, inner: int | None = None, **more: Any) -> nn.Module:
    """An MLP that declares what is given."""
    model = Mlp()
    model.up, model.down = nn.Linear(CHANNELS, out), nn.Linear(out if inner is None else inner, CHANNELS)
    for name, value in {"_tp_col": columns, "_tp_row": rows, **more}.items():
        setattr(model, name, value)
    return model


def with_layer(name: str, layer: nn.Module, **more: Any) -> nn.Module:
    model = block(**more)
    setattr(model, name, layer)
    return model


def between(*modules: nn.Module, **declared: Any) -> nn.Module:
    model = nn.Module()
    model.net = nn.Sequential(nn.Linear(CHANNELS, 12), *modules, nn.Linear(12, CHANNELS))
    for name, value in {"_tp_col": "net.0", "_tp_row": f"net.{1 + len(modules)}", **declared}.items():
        setattr(model, name, value)
    return model


def raises(block: Any, size: int) -> None:
    raise ValueError(f"heads must divide by {size}")


def tied() -> nn.Module:
    model = nn.Sequential(block(), nn.Linear(CHANNELS, 12))
    model[1].weight = model[0].up.weight
    return model


def nested() -> nn.Module:
    model = nn.Module()
    model.inner, model._tp_col, model._tp_row = block(), "inner.up", "inner.down"
    return model


def old_style(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "column size": (lambda: block(out=9), "0.up: out_features=9 is not divisible by the tensor-parallel degree 2"),
    "row size": (lambda: block(out=9), "0.down: in_features=9 is not divisible by the tensor-parallel degree 2"),
    "part": (
        lambda: block(out=12, inner=6, _tp_parts={"up": (9, 3)}),
        "0.up: out_features=12, in parts of 9, 3, is not divisible by the tensor-parallel degree 2",
    ),
    "no such path": (lambda: block("mlp.up"), "0 has no module 'mlp.up' (the column-parallel layer); it has norm, up"),
    "no row": (lambda: block(rows=None), "0: both _tp_col and _tp_row must be a path, or a tuple"),
    "no path": (lambda: block(columns=(3,)), "0: both _tp_col and _tp_row must be a path"),
    "named twice": (lambda: block(rows="up"), "0.up (Linear) is named twice"),
    "other layer": (
        lambda: with_layer("up", nn.Conv1d(CHANNELS, 12, 1)),
        "0.up (Conv1d) must be a torch.nn.Linear or a 1x1 torch.nn.Conv2d itself",
    ),
    "kernel": (
        lambda: with_layer("up", nn.Conv2d(CHANNELS, 12, 3, padding=1)),
        "0.up (Conv2d) must be a 1x1 convolution with stride 1, groups 1 and padding 0; got kernel_size=(3, 3)",
    ),
    "stride": (lambda: with_layer("up", nn.Conv2d(CHANNELS, 12, 1, stride=2)), "got kernel_size=(1, 1), stride=(2, 2)"),
    "spectral norm": (
        lambda: with_layer("up", parametrizations.spectral_norm(nn.Linear(CHANNELS, 12))),
        "0.up (ParametrizedLinear) has a parametrisation (SpectralNorm), which needs the whole weight",
    ),
    "old spectral norm": (
        lambda: with_layer("down", nn.utils.spectral_norm(nn.Linear(12, CHANNELS))),
        "0.down (Linear) makes its weight in a hook (SpectralNorm), which needs the whole weight",
    ),
    "weight norm": (
        lambda: with_layer("down", old_style(nn.Linear(12, CHANNELS))),
        "0.down (Linear) makes its weight in a hook (WeightNorm)",
    ),
    "fused by size": (
        lambda: block(out=24, inner=12),
        "0.up has out_features=24, and its row-parallel layer 12: declare what it consists of, by _tp_parts = "
        "{'up': 3} for equal parts (3: q, k and v; 2: the halves of a GLU)",
    ),
    "fused by name": (
        lambda: with_layer("to_kv", nn.Linear(CHANNELS, 12), columns="to_kv"),
        "0.to_kv is a fused projection by its name: declare what it consists of, by _tp_parts = {'to_kv': 3}",
    ),
    "row by size": (lambda: block(out=12, inner=24), "0.down has in_features=24, and its column-parallel layer 12"),
    "parts do not add up": (
        lambda: block(_tp_parts={"up": (8, 8)}),
        "0.up: out_features=12 does not consist of _tp_parts=(8, 8)",
    ),
    "parts of what": (lambda: block(_tp_parts={"qkv": 3}), "0: _tp_parts names 'qkv', which is none of its divided"),
    "heads": (lambda: with_attribute("heads", 3, _tp_heads="heads"), "0.heads=3 is not divisible by the tensor-par"),
    "heads of what": (lambda: block(_tp_heads="norm"), "0.norm: _tp_heads must name integers; got LayerNorm"),
    "undeclared heads": (
        lambda: with_attribute("num_heads", 4),
        "0 has num_heads=4, and a rank only its share of the heads: declare _tp_heads = 'num_heads' to have it "
        "divided, or _tp_heads = () if forward does not use it",
    ),
    "shard": (lambda: block(_tp_shard={"norm.weight": 1}), "0.norm.weight: dim 1 of (4,) is not divisible by"),
    "shard of what": (lambda: block(_tp_shard={"scale": 0}), "0.scale: _tp_shard must name parameters, and none of"),
    "partial of what": (lambda: block(_tp_partial="up.bias"), "0.up.bias: _tp_partial must name parameters, and none"),
    "constraint raised": (lambda: block(_tp_constraints=raises), "0: heads must divide by 2"),
    "constraint text": (lambda: block(_tp_constraints=lambda *_: "too narrow"), "0: too narrow"),
    "constraint texts": (lambda: block(_tp_constraints=lambda *_: ["odd", "even"]), "0: odd\n  0: even"),
    "constraint false": (lambda: block(_tp_constraints=lambda *_: False), "0: its _tp_constraints do not hold"),
    "norm between": (lambda: between(nn.LayerNorm(12)), "0.net.1 (LayerNorm), between the column- and the row-par"),
    "groups between": (
        lambda: between(nn.Sequential(nn.GELU(), nn.GroupNorm(2, 12, affine=False))),
        "0.net.1.1 (GroupNorm), between the column- and the row-parallel layer, needs its num_groups declared in _tp_h",
    ),
    "softmax between": (lambda: between(nn.Softmax(-1)), "0.net.1 (Softmax), between the column- and the row-parallel"),
    "slope between": (lambda: between(nn.PReLU()), "needs weight declared, in _tp_shard or in _tp_partial"),
    "tied": (tied, "0.0.up.weight and 0.1.weight are the same parameter, which cannot be divided in one"),
    "nested": (nested, "0.inner.up.weight is declared by 0 and by 0.inner"),
}


def with_attribute(name: str, value: Any, **more: Any) -> nn.Module:
    model = block(**more)
    setattr(model, name, value)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    models = [nn.Sequential(make(), Mlp()) for _ in range(2)]

    def rank_main(rank: int, mesh: DeviceMesh) -> str:
        mine = models[rank]
        with pytest.raises(ValueError, match="this model cannot be made tensor-parallel") as raised:
            apply_tensor_parallel(mine, mesh)
        assert not any(isinstance(p, DTensor) for p in mine.parameters()), "nothing is changed"
        assert not hasattr(mine, "_tp_group")
        assert type(mine[1].up) is nn.Linear
        return str(raised.value)

    first, second = on_ranks(2, rank_main)
    assert first == second
    assert message in first


def test_declared_as_one_part() -> None:
    """What looks fused and is not."""
    model = block(out=24, inner=12, _tp_parts={"up": 1, "down": 1}, heads=3, _tp_heads=())

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        apply_tensor_parallel(copy.deepcopy(model), mesh)

    on_ranks(2, rank_main)


def test_refused_plans() -> None:
    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        model = build(Native)
        model[0]._tp_plan = {"to_q": "colwise", "to_out": "sequence"}
        with pytest.raises(ValueError, match="0: _tp_plan must call each layer 'colwise' or 'rowwise', and at least"):
            apply_native_tensor_parallel(model, mesh)
        model = build(ConvMlp)
        model[0]._tp_plan = {"proj_up": "colwise", "proj_out": "rowwise"}
        with pytest.raises(ValueError, match=r"0.proj_up \(Conv2d\) must be a torch.nn.Linear, in a _tp_plan"):
            apply_native_tensor_parallel(model, mesh)

    on_ranks(2, rank_main)


def test_ranks_with_different_models_are_all_told() -> None:
    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        with pytest.raises(
            ValueError, match=r"tensor parallelism: the ranks disagree(.|\n)*rank 0, 1: (.|\n)*rank 2: "
        ):
            apply_tensor_parallel(build(Mlp, bias=rank != 2), mesh)
        with pytest.raises(ValueError, match="the ranks disagree"):
            apply_tensor_parallel(build(Mlp) if rank else nn.Linear(2, 2), mesh)

    on_ranks(3, rank_main)


def test_a_row_layer_that_gets_all_channels() -> None:
    class Wrong(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).repeat(1, 2))

    def rank_main(rank: int, mesh: DeviceMesh) -> None:
        model = apply_tensor_parallel(nn.Sequential(Wrong()), mesh)
        with pytest.raises(ValueError, match="0.down: expected this rank's 6 of 12 input channels; got 12 in"):
            model(torch.ones(2, CHANNELS))

    on_ranks(2, rank_main)
