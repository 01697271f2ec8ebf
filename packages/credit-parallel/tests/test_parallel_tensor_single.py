"""Column- and row-parallel layers one by one: outputs and gradients are those of the plain layers on one rank."""

from __future__ import annotations

import copy
import logging
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from credit_domain import convert_to_domain_parallel, gather_tensor, shard_tensor
from credit_halo.testing import run_processes
from credit_mesh import initialize_domain_parallel
from credit_parallel.mesh import build_device_mesh, get_dp_group, register_dp_group
from credit_parallel.tensor_parallel import (
    TpColConv2d,
    TpColLinear,
    TpRowConv2d,
    TpRowLinear,
    _is_tp_sharded_param,
    apply_native_tensor_parallel,
    supports_native_tp,
    sync_replicated_gradients,
)

EXACT = {"rtol": 1e-10, "atol": 1e-11}


class Pair(nn.Module):
    """A column and a row layer between layers that all ranks have."""

    def __init__(self, kind="conv", bias=True, hidden=12):
        super().__init__()
        convolve = kind == "conv"
        make = (lambda a, b: nn.Conv2d(a, b, 1, bias=bias)) if convolve else (lambda a, b: nn.Linear(a, b, bias=bias))
        self.stem = nn.Conv2d(2, 4, 3, padding=1) if convolve else nn.Linear(2, 4)
        self.up, self.down = make(4, hidden), make(hidden, 4)
        self.head = nn.Conv2d(4, 2, 3, padding=1) if convolve else nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(F.gelu(self.up(x))))


KINDS = {"conv": (TpColConv2d, TpRowConv2d), "linear": (TpColLinear, TpRowLinear)}


def build(kind="conv", bias=True, seed=0):
    """The same weights on every rank, from a generator of their own."""
    model, generator = Pair(kind, bias).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5, generator=generator)
    return model


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def divided(model, group, kind):
    column, row = KINDS[kind]
    model.up, model.down = column(model.up, group), row(model.down, group)
    return model


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def plain_name(name):
    """What the plain model calls a parameter."""
    if not name.startswith(("up.", "down.")):
        return name
    return ".".join(part for part in name.split(".") if part not in ("conv", "linear"))


def gradients(model):
    return {plain_name(name): full(p.grad) for name, p in model.named_parameters()}


def results(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    (out * randn(*out.shape, seed=2)).sum().backward()
    return out.detach(), x.grad


@settings(max_examples=10)
@given(st.sampled_from(list(KINDS)), st.sampled_from((1, 2, 3, 4)), st.booleans(), st.booleans())
def test_like_the_plain_layers(kind, size, bias, as_mesh):
    x = randn(2, 2, 5, 3) if kind == "conv" else randn(3, 5, 2)
    plain = build(kind, bias)
    expected = results(plain, x)

    def rank_main(rank):
        # Other ranks than the first hold other values, which do not count.
        model = build(kind, bias)
        if rank:
            with torch.no_grad():
                model.up.weight.zero_()
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        model = divided(model, mesh if as_mesh else mesh.get_group(), kind)
        torch.testing.assert_close(results(model, x), expected, **EXACT)
        sync_replicated_gradients(model, mesh.get_group())
        torch.testing.assert_close(gradients(model), {n: p.grad for n, p in plain.named_parameters()}, **EXACT)
        inner = model.up._modules[kind]
        assert isinstance(inner, nn.Conv2d if kind == "conv" else nn.Linear)
        assert inner.weight.to_local().shape[0] == 12 // size
        assert _is_tp_sharded_param(inner.weight)
        assert model.up.tp_group is mesh.get_group()
        entries = [f"up.{kind}.weight", f"up.{kind}.bias", f"down.{kind}.weight", "down.bias"]
        assert {n for n in model.state_dict() if n.startswith(("up", "down"))} == set(entries[:: 1 if bias else 2])
        # A checkpoint of whole layers loads into the slices.
        other = build(kind, bias, seed=3)
        whole = {name: other.state_dict()[plain_name(name)] for name in model.state_dict()}
        model.load_state_dict(whole)
        torch.testing.assert_close(copy.deepcopy(model)(x), other(x), **EXACT)

    run_processes(rank_main, size, fork=True)


@pytest.mark.parametrize(("size", "domain"), [(4, 2), (6, 2)])
@pytest.mark.parametrize("rows", [8, 7])
def test_together_with_domain_ranks(size, domain, rows):
    x = randn(2, 2, rows, 4)
    plain = build()
    out, grad = results(plain, x)
    weights = randn(*out.shape, seed=2)

    def rank_main(rank):
        _, submeshes = build_device_mesh({"data": "none", "tensor": size // domain, "domain": domain}, device="cpu")
        manager = initialize_domain_parallel(size, domain)
        manager.declare(rows)
        model = convert_to_domain_parallel(build(), manager)
        model = divided(model, submeshes["tp"].get_group(), "conv")
        own = shard_tensor(x, manager=manager).clone().requires_grad_()
        y = model(own)
        (y * shard_tensor(weights, manager=manager)).sum().backward()
        torch.testing.assert_close(gather_tensor(y, manager=manager), out, **EXACT)
        torch.testing.assert_close(gather_tensor(own.grad, manager=manager), grad, **EXACT)
        summed = gradients(model)
        for value in summed.values():  # each domain rank has the share of its rows
            dist.all_reduce(value, group=manager.domain_group)
        torch.testing.assert_close(summed, {n: p.grad for n, p in plain.named_parameters()}, **EXACT)

    run_processes(rank_main, size, fork=True)


REFUSED = {
    "3x3": (TpColConv2d, lambda: nn.Conv2d(4, 4, 3), "must be a 1x1 convolution"),
    "groups": (TpRowConv2d, lambda: nn.Conv2d(4, 4, 1, groups=2), "must be a 1x1 convolution"),
    "kind": (TpColLinear, lambda: nn.Conv2d(4, 4, 1), "TpColLinear of Conv2d: expected a torch.nn.Linear"),
    "out": (TpColLinear, lambda: nn.Linear(4, 3), "out_features=3 is not divisible by the tensor-parallel degree 2"),
    "in": (TpRowConv2d, lambda: nn.Conv2d(3, 4, 1), "in_channels=3 is not divisible by the tensor-parallel degree 2"),
    "norm": (TpRowLinear, lambda: torch.nn.utils.spectral_norm(nn.Linear(4, 4)), "makes its weight in a hook"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_on_all_ranks_alike(case):
    wrap, make, message = REFUSED[case]

    def rank_main(rank):
        with pytest.raises(ValueError, match=message) as raised:
            wrap(make(), dist.group.WORLD)
        with pytest.raises(ValueError, match="out_features=5"):  # where one rank alone has a mistake
            TpColLinear(nn.Linear(4, 5 if rank else 4), dist.group.WORLD)
        return str(raised.value)

    first, second = run_processes(rank_main, 2, fork=True)
    assert first == second


def test_without_torch_distributed():
    with pytest.raises(ValueError, match="TpColLinear needs torch.distributed"):
        TpColLinear(nn.Linear(2, 2), None)
    register_dp_group(None)  # as a program on one process does
    assert get_dp_group() is None


def test_a_row_layer_behind_all_channels():
    def rank_main(rank):
        row = TpRowLinear(nn.Linear(4, 2), None)
        with pytest.raises(ValueError, match="expected this rank's 2 of 4 input channels"):
            row(torch.zeros(3, 4))

    run_processes(rank_main, 2, fork=True)


# Plans


class Native(nn.Module):
    _tp_plan: ClassVar = {"up": "colwise", "down": "rowwise"}

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


NORMS = [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("both", [False, True])
def test_blocks_with_spectral_normalisation_stay_whole(norm, both, caplog):
    torch.manual_seed(0)
    plain = nn.Sequential(Native(), Native()).double()
    for block in plain[0 if both else 1 :]:
        norm(block.down)
    plain.eval()
    x = randn(3, 4)
    expected = results(copy.deepcopy(plain), x)

    def rank_main(rank):
        model = copy.deepcopy(plain)
        assert supports_native_tp(model)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        assert apply_native_tensor_parallel(model, mesh)._tp_native
        torch.testing.assert_close(results(model, x), expected, **EXACT)
        sync_replicated_gradients(model, mesh.get_group())
        assert isinstance(model[0].up.weight, DTensor) is not both
        assert not isinstance(model[1].up.weight, DTensor)
        return caplog.text

    with caplog.at_level(logging.WARNING):
        texts = run_processes(rank_main, 2, fork=True)
    assert f"{2 if both else 1} of 2 blocks that declare _tp_plan stay whole" in "".join(texts)
