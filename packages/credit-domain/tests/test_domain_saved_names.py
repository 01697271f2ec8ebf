"""Checkpoints of the reference's converted models, and what wrappers call the layer that they wrap."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import credit_domain.layers as dl
from credit_domain import convert_to_domain_parallel
from credit_domain.model.saved_names import plain_names, with_plain_names


class Periodic(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.padding = nn.Conv2d(2, 2, 3), 1


class Block(nn.Module):
    """Names that end in conv and norm, of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.up = nn.ConvTranspose2d(2, 2, 4, 2, 1)
        self.branch = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3))
        self.spectral = torch.nn.utils.spectral_norm(nn.Conv2d(2, 2, 3, padding=1))
        self.periodic = Periodic()
        self.linear = nn.Linear(2, 2)


CUSTOM = {
    Periodic: dl.DomainParallelPeriodicConv2d,
    lambda m: isinstance(m, nn.Sequential) and isinstance(m[0], nn.ZeroPad2d): dl.DomainParallelCrossEmbedBranch,
}
LAYERS = {"conv": "conv", "up": "conv", "spectral": "conv", "norm": "norm"}


def build(convert=False):
    model = nn.Sequential(Block(), nn.Conv2d(2, 2, 3, padding=1))
    if convert:
        manager = SimpleNamespace(domain_parallel_size=2)
        model = convert_to_domain_parallel(model, manager, custom_converters=CUSTOM)
    return model


def reference_name(name):
    """What the reference calls an entry of the model above, after conversion."""
    head, _, rest = name.partition(".")
    if head == "1":
        return f"1.conv.{rest}"
    layer, _, entry = rest.partition(".")
    if layer in LAYERS:
        return f"0.{layer}.{LAYERS[layer]}.{entry}"
    return f"0.branch.conv.{entry.removeprefix('1.')}" if layer == "branch" else name


@pytest.mark.parametrize("convert", [False, True])
def test_each_entry_of_a_converted_model_of_the_reference(convert, caplog):
    source, target = build(), build(convert)
    saved = source.state_dict()
    state = type(saved)((reference_name(name), value) for name, value in saved.items())
    state._metadata = saved._metadata
    given_names = list(state)
    with caplog.at_level(logging.INFO, "credit_domain.model.saved_names"):
        if convert:
            target.load_state_dict(state)  # by the hook
        else:
            named = with_plain_names(target, state)
            assert named._metadata is saved._metadata
            target.load_state_dict(named)
    assert list(state) == given_names
    for name, value in target.state_dict().items():
        assert torch.equal(value, saved[name]), name
    changed = [name for name in saved if reference_name(name) != name]
    said = [record.getMessage() for record in caplog.records if "converted model of the reference" in record.message]
    assert len(said) == 1
    assert f"{len(changed)} names" in said[0]


def test_the_hook_below_a_wrapper_and_in_a_copy():
    source, target = build(), nn.ModuleDict({"module": copy.deepcopy(build(convert=True))})
    target.load_state_dict({f"module.{reference_name(name)}": value for name, value in source.state_dict().items()})
    for name, value in target["module"].state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@given(st.sets(st.sampled_from([*build().state_dict(), *map(reference_name, build().state_dict())])))
def test_a_name_is_changed_only_where_nothing_clashes(names):
    own = set(build().state_dict())
    for model in (build(), build(convert=True)):
        changed = plain_names(model, names)
        for name in names:
            other = next((mine for mine in own if reference_name(mine) == name), None)
            if name not in own and other is not None and other not in names:
                assert changed.pop(name) == other
        assert not changed


def test_names_of_the_model_and_of_other_layers_stay():
    model = build(convert=True)
    assert not plain_names(model, model.state_dict())
    for name in ("0.linear.conv.weight", "0.conv.norm.weight", "0.norm.conv.weight", "0.conv.conv.nothing", "x.conv.y"):
        assert not plain_names(model, [name]), name
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict({**model.state_dict(), name: torch.zeros(2)})
    both = {**model.state_dict(), "1.conv.weight": torch.zeros(2, 2, 3, 3)}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"1.conv.weight\""):
        model.load_state_dict(both)
    assert not plain_names(model, ["0.branch.conv.weight", "0.branch.1.conv.weight"])  # both mean the same


# What a wrapper calls its layer

WRAPPERS = {
    "Conv1d": (dl.DomainParallelConv1d, lambda: nn.Conv1d(2, 2, 3), "conv", nn.Conv1d),
    "Conv2d": (dl.DomainParallelConv2d, lambda: nn.Conv2d(2, 2, 3), "conv", nn.Conv2d),
    "Conv3d": (dl.DomainParallelConv3d, lambda: nn.Conv3d(2, 2, 3), "conv", nn.Conv3d),
    "Transpose1d": (dl.DomainParallelConvTranspose1d, lambda: nn.ConvTranspose1d(2, 2, 3), "conv", nn.ConvTranspose1d),
    "Transpose2d": (dl.DomainParallelConvTranspose2d, lambda: nn.ConvTranspose2d(2, 2, 3), "conv", nn.ConvTranspose2d),
    "Transpose3d": (dl.DomainParallelConvTranspose3d, lambda: nn.ConvTranspose3d(2, 2, 3), "conv", nn.ConvTranspose3d),
    "Periodic": (dl.DomainParallelPeriodicConv2d, Periodic, "conv", nn.Conv2d),
    "Branch": (
        *(dl.DomainParallelCrossEmbedBranch, lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3))),
        *("conv", nn.Conv2d),
    ),
    "GroupNorm": (dl.DomainParallelGroupNorm, lambda: nn.GroupNorm(1, 2), "norm", nn.GroupNorm),
    "BatchNorm2d": (dl.DomainParallelBatchNorm2d, lambda: nn.BatchNorm2d(2), "norm", nn.BatchNorm2d),
    "InstanceNorm2d": (
        *(dl.DomainParallelInstanceNorm2d, lambda: nn.InstanceNorm2d(2, affine=True)),
        *("norm", nn.InstanceNorm2d),
    ),
    "LayerNorm": (dl.DomainParallelLayerNorm, lambda: nn.LayerNorm(2), "norm", nn.LayerNorm),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_what_a_wrapper_calls_its_layer_is_a_plain_one(case):
    wrap, make, child, kind = WRAPPERS[case]
    module = make()
    names = [name for name, _ in module.named_modules()]
    parameters, keys = dict(module.named_parameters()), list(module.state_dict())
    layer = wrap(module)
    inner = getattr(layer, child)
    assert isinstance(inner, kind)
    assert [name for name, _ in layer.named_modules()] == names
    assert list(layer.state_dict()) == keys
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert inner.weight is layer.weight
    new = nn.Parameter(torch.full_like(inner.weight, 2.0))
    inner.weight = new
    assert layer.weight is new
    assert any(p is new for p in layer.parameters())
    inner.requires_grad_(False)
    assert not any(p.requires_grad for p in layer.parameters())
    again = nn.Parameter(torch.ones_like(new))
    if case not in ("Periodic", "Branch"):  # whose weight is one of a child
        layer.weight = again
        assert inner.weight is again
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 2, *[4] * {"1d": 1, "3d": 3}.get(case[-2:], 2))
    layer(x[..., :2] if case == "LayerNorm" else x)
    assert calls == ([1] if case in ("Periodic", "Branch") else []) or layer._forward_hooks is inner._forward_hooks
    with pytest.raises(ValueError, match=f"{child} cannot be replaced"):
        setattr(layer, child, make())


@pytest.mark.parametrize(("name", "value"), [("eps", 0.5), ("num_groups", 1)])
def test_what_is_set_on_a_wrapper_is_what_it_computes_with(name, value):
    plain = nn.GroupNorm(2, 4)
    layer = dl.DomainParallelGroupNorm(copy.deepcopy(plain))
    for each in (plain, layer):
        setattr(each, name, value)
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(layer(x), plain(x))
    assert getattr(layer.norm, name) == value
    assert name not in vars(layer)
