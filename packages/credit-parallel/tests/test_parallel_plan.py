"""Plans of layouts against what ranks really keep and send; models by name; the commands plan, verify and layout."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from credit_domain import plan_domain_parallel
from credit_domain.blocks import GlobalMean, WindowAttention
from credit_halo.testing import run_processes
from credit_mesh.cli import main as mesh_main
from credit_parallel import parallelize
from credit_parallel.app.cli import layout_command, plan_command, verify_command
from credit_parallel.app.config import ModelConfig
from credit_parallel.app.examples.transformer import Transformer
from credit_parallel.app.examples.unet import UNet
from credit_parallel.app.models import EXAMPLES, build_model, factory, parse_options
from credit_parallel.blocks import _apply_activation_checkpointing
from credit_parallel.layout_table import size
from credit_parallel.layouts import plan_layouts
from credit_parallel.memory import step_cost

MiB = 2**20


def unet() -> nn.Module:
    return UNet(3, 2, width=8)


def transformer() -> nn.Module:
    return Transformer(3, 2, width=16, heads=(2, 4))


def conf_of(tensor: int, domain: int, **trainer):
    return {"trainer": {"parallelism": {"data": "none", "tensor": tensor, "domain": domain}, **trainer}}


def storage_of(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


class Kept:
    """What autograd keeps, each storage once, parameters and buffers left out."""

    def __init__(self, model: nn.Module) -> None:
        self.own = {storage_of(t).data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.storages = {}

    def save(self, tensor):
        storage = storage_of(tensor)
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def kept_by(model: nn.Module, x) -> int:
    kept = Kept(model)
    with saved_tensors_hooks(kept.save, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    return kept.bytes


# Memory


@pytest.mark.parametrize("make", [unet, transformer])
@pytest.mark.parametrize("shape", [(1, 3, 41, 64), (2, 3, 18, 20)])
def test_activations_of_one_rank_are_those_that_autograd_keeps(make, shape):
    model = make()
    assert step_cost(model, shape).kept == kept_by(model, torch.randn(shape))


@pytest.mark.parametrize("make", [unet, transformer])
def test_activations_that_are_kept_beside_recomputed_blocks(make):
    shape = (1, 3, 41, 64)
    cost, model = step_cost(make(), shape), make()
    within = []

    def measure(block, args):
        kept = Kept(block)
        kept.own.add(storage_of(args[0]).data_ptr())  # kept already
        with saved_tensors_hooks(kept.save, lambda tensor: tensor):
            block.forward(*args)
        within.append(kept.bytes)

    for module in model.modules():
        if getattr(module, "_fsdp2_shard", False):
            module.register_forward_pre_hook(measure)
    model(torch.randn(shape))
    model = make()
    _apply_activation_checkpointing(model)
    beside = kept_by(model, torch.randn(shape))
    assert cost.recomputed == beside + max(within)
    assert beside + sum(within) == pytest.approx(cost.kept, rel=0.01)


@pytest.mark.parametrize(
    ("make", "shape", "tensor", "domain"),
    [
        (unet, (1, 3, 41, 64), 1, 2),
        (unet, (2, 3, 181, 64), 1, 4),
        (transformer, (1, 3, 61, 64), 1, 3),
        (transformer, (1, 3, 61, 64), 2, 2),
        (transformer, (2, 3, 90, 64), 2, 1),
    ],
)
def test_activations_of_sharded_ranks_to_five_percent(make, shape, tensor, domain):
    def rank_main(rank):
        context = parallelize(make(), conf_of(tensor, domain), input_shape=shape)
        x = context.shard(torch.ones(shape))
        local = [storage_of(p).nbytes() for p in context.model.parameters()]
        return kept_by(context.model, x), sum(local)

    measured = run_processes(rank_main, tensor * domain, fork=True)
    plans = plan_layouts(make(), input_shape=shape, world=tensor * domain, batch_size=shape[0])
    planned = next(p for p in plans.layouts if (p.data, p.tensor, p.domain) == ("none", tensor, domain))
    assert planned.memory.activations == pytest.approx(max(kept for kept, _ in measured), rel=0.05)
    assert planned.memory.parameters == max(held for _, held in measured)


def test_memory_by_hand():
    """A block of 2 + 2 KiB of weights, between two layers of 1 KiB."""
    inner = nn.Sequential(*(nn.Conv2d(16, 32, 1, bias=False), nn.SiLU(), nn.Conv2d(32, 16, 1, bias=False)))
    inner._fsdp2_shard = True
    ends = [nn.Conv2d(16, 16, 1, bias=False) for _ in range(2)]
    model = nn.Sequential(ends[0], inner, ends[1])
    point = 12 * 10 * 4  # bytes of a channel
    kwargs = {"input_shape": (1, 16, 12, 10), "world": 4, "batch_size": 4}
    plans = {p.data: p for p in plan_layouts(model, **kwargs).layouts if p.dp == 4}
    ddp, fsdp2 = plans["ddp"].memory, plans["fsdp2"].memory
    assert (ddp.parameters, ddp.gradients, ddp.optimizer, ddp.gathered) == (6144, 12288, 12288, 0)
    assert (fsdp2.parameters, fsdp2.gradients, fsdp2.optimizer) == (1536, 1536, 3072)
    assert fsdp2.gathered == 2048 + 3 * 4096
    assert ddp.activations == fsdp2.activations == (16 + 16 + 32 + 32 + 16) * point
    assert ddp.fields == (16 + 2 * 16) * point
    assert ddp.total == 6144 + 2 * 12288 + 112 * point + 48 * point
    again = plan_layouts(model, **kwargs, activation_checkpoint=True, rollout=2, optimizer_states=0).layouts[0].memory
    assert again.activations == 2 * (16 + 16 + 16 + 64) * point
    assert (again.optimizer, again.fields) == (0, (16 + 4 * 16) * point)
    half = plan_layouts(model, **kwargs, amp=True).layouts[0].memory
    assert (half.parameters, half.activations) == (6144, 56 * point)
    parts = plan_layouts(model, **{**kwargs, "batch_size": 8}, accumulate=2).layouts[0].memory
    assert parts == ddp


# Bytes that are sent


@pytest.fixture
def messages(monkeypatch):
    """Bytes that a rank, which is a fork, sends in exchanges."""
    sent: Counter[str] = Counter()

    class Handler(logging.Handler):
        def emit(self, record):
            what, rank, sent_bytes = re.match(r"(.*), rank (\d+) of .*; (\d+) bytes sent", record.getMessage()).groups()
            sent[what] += int(sent_bytes)
            sent[f"rank {rank}"] += int(sent_bytes)

    logger, handler = logging.getLogger("credit_halo.trace"), Handler()
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "propagate", False)
    logger.setLevel(logging.DEBUG)
    yield lambda on: (monkeypatch.setenv("CREDIT_HALO_DEBUG", "1" if on else ""), sent)[1]
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("make", "shape", "domain"),
    [(unet, (1, 3, 41, 16), 3), (transformer, (1, 3, 61, 16), 3), (transformer, (2, 3, 33, 16), 4)],
)
def test_halos_are_those_that_ranks_send(make, shape, domain, messages):
    """Of all ranks together, in a forward, to the byte; of the busiest in a step, at most a quarter less."""

    def rank_main(rank, backward):
        context = parallelize(make(), conf_of(1, domain), input_shape=shape, check_batches=0)
        x = context.shard(torch.ones(shape))
        context.model(x)  # learns the partitions
        dist.barrier()
        messages(True)
        out = context.model(x)
        if backward:
            out.sum().backward()
        dist.barrier()
        return messages(False)[f"rank {rank}"]

    plans = plan_layouts(make(), input_shape=shape, world=domain, batch_size=shape[0])
    planned = next(p for p in plans.layouts if (p.data, p.domain) == ("none", domain))
    sent = sum(run_processes(rank_main, domain, False, fork=True))
    assert sum(layer.total_bytes for layer in planned.domain_plan.layers) * shape[0] == sent
    busiest = max(run_processes(rank_main, domain, True, fork=True))
    assert busiest <= planned.halo_bytes <= busiest / 0.75


def test_halos_are_those_of_the_domain_plan():
    shape = (1, 3, 61, 16)
    for layer_plan in plan_layouts(unet(), input_shape=shape, world=8, batch_size=4).layouts:
        if layer_plan.domain == 1:
            assert (layer_plan.halo_bytes, layer_plan.halo_messages, layer_plan.domain_plan) == (0, 0, None)
        else:
            expected = plan_domain_parallel(unet(), shape, layer_plan.domain)
            assert layer_plan.domain_plan == expected
            assert layer_plan.halo_bytes == 2 * expected.bytes * layer_plan.samples
            assert layer_plan.halo_messages == 2 * expected.messages


def test_recomputed_blocks_exchange_once_more():
    kwargs = {"input_shape": (1, 3, 61, 16), "world": 4}
    for make in (unet, transformer):
        once, again = (plan_layouts(make(), **kwargs, activation_checkpoint=on) for on in (False, True))
        for a, b in zip(once.layouts, again.layouts, strict=True):
            layers = () if a.domain_plan is None else a.domain_plan.layers
            inside = [x for x in layers if re.match(r"(encoder|decoder|middle|stages)\.", x.name)]
            assert b.halo_bytes - a.halo_bytes == sum(x.bytes for x in inside)
            assert b.halo_messages - a.halo_messages == sum(x.messages for x in inside)


@pytest.mark.parametrize("tensor", [2, 4])
def test_sums_of_tensor_parallel_ranks(tensor, messages, monkeypatch):
    """What is summed, and the rows of fused weights that change places, forward and backward, to the byte."""
    shape = (2, 3, 24, 16)
    summed: list[int] = []  # a fork has a list of its own
    original = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        summed.append(tensor.numel() * tensor.element_size() if tensor.numel() > 1 else 0)
        return original(tensor, *args, **kwargs)

    def make():
        return Transformer(3, 2, width=16, heads=(4, 4))

    def rank_main(rank):
        context = parallelize(make(), conf_of(tensor, 1), check_batches=0)
        x = torch.ones(shape)
        dist.barrier()
        summed.clear()
        messages(True)
        context.model(x).sum().backward()
        dist.barrier()
        return sum(summed), messages(False)[f"rank {rank}"]

    monkeypatch.setattr(dist, "all_reduce", counting)
    sums, sent = zip(*run_processes(rank_main, tensor, fork=True), strict=True)
    cost = step_cost(make(), shape, tensor=tensor)
    assert set(sums) == {cost.tensor_forward + cost.tensor_backward}
    assert 2 * cost.fused_sent == max(sent)
    planned = next(
        p for p in plan_layouts(make(), input_shape=shape, world=tensor, batch_size=2).layouts if p.tensor == tensor
    )
    assert planned.tensor_bytes == pytest.approx(2 * (tensor - 1) / tensor * sums[0] + 2 * cost.fused_sent, abs=1)


def test_bytes_of_gradients_and_parameters():
    """Ring formulas: 3/4 of what is gathered or scattered over four ranks, twice that of a sum."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=False))
    model[0]._fsdp2_shard = True
    block, root = 4 * 4 * 9 * 4, 4 * 4 * 4
    for batch_size, (dp, domain) in ((4, (4, 1)), (2, (2, 2)), (1, (1, 4))):
        for amp in (False, True):
            plans = plan_layouts(model, input_shape=(1, 4, 12, 6), world=4, batch_size=batch_size, amp=amp)
            found = {p.data: p.gradient_bytes for p in plans.layouts if (p.dp, p.domain) == (dp, domain)}
            gathered = (2 * block + root) // (2 if amp else 1)
            assert found["ddp"] == 1.5 * (block + root)
            assert found["fsdp2"] == 0.75 * (gathered + block + root)
            assert ("none" in found) == (dp == 1)
    thrice = plan_layouts(model, input_shape=(1, 4, 12, 6), world=4, batch_size=12, accumulate=3)
    assert thrice.layouts[1].gradient_bytes == 0.75 * (3 * (2 * block + root) + block + root)


def test_what_blocks_of_other_kinds_send_is_said_not_to_be_counted():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), GlobalMean(), nn.Flatten(0))
    with pytest.raises(ValueError, match="could not be run"):
        plan_layouts(nn.Sequential(nn.Linear(3, 3), model), input_shape=(1, 2, 8, 8), world=2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.attention = GlobalMean(), WindowAttention(2, (2, 2), 1, dilated=True)

        def forward(self, x):
            return self.attention(x + self.mean(x))

    plans = plan_layouts(Net(), input_shape=(1, 2, 8, 8), world=2)
    assert plans.notes == ("what mean send(s) is not counted", "what attention sends is not counted")
    assert "note: what mean send(s) is not counted" in str(plans)


# Which layouts, and which to take


class Branches(nn.Module):
    def forward(self, x):
        torch._check(x.ndim == 4)
        return x if x.is_meta or x.sum() > 0 else x.flip(-2)


def test_every_layout_that_fits_and_why_others_do_not():
    plans = plan_layouts(transformer(), input_shape=(1, 3, 33, 16), world=24, batch_size=12)
    found = {(p.data, p.dp, p.tensor, p.domain) for p in plans.layouts}
    sizes = {(12, 1, 2), (12, 2, 1), (6, 1, 4), (6, 2, 2), (4, 1, 6), (4, 2, 3), (3, 1, 8), (3, 2, 4), (2, 2, 6)}
    assert found == {(data, *s) for s in sizes for data in ("ddp", "fsdp2")}
    assert plans.granularity == 4
    reasons = {each.what: each.reason for each in plans.skipped}
    assert reasons["domain 12, 24"] == "33 rows in blocks of 4 are enough for 8 ranks"
    assert reasons["dp 8, 24"] == "a batch of 12 sample(s) does not divide over as many replicas"
    assert "attention.heads=2 is not divisible" in reasons["tensor 4"]
    assert "no block declares" in plan_layouts(unet(), input_shape=(1, 3, 33, 16), world=2).skipped[0].reason
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Unfold(1), nn.Unflatten(2, (8, 8)))
    kwargs = {"input_shape": (1, 3, 8, 8), "world": 2, "batch_size": 2}
    refused = plan_layouts(model, **kwargs, method="modules")
    assert [(p.dp, p.domain) for p in refused.layouts] == [(2, 1), (2, 1)]
    planned = plan_layouts(model, **kwargs, activation_checkpoint=True)
    by_rows = next(p for p in planned.layouts if p.domain == 2)
    assert [layer.kind for layer in by_rows.domain_plan.layers] == ["conv2d"]
    assert by_rows.halo_bytes == 2 * 3 * 8 * 4 * 2
    narrow = next(p for p in plan_layouts(model, **kwargs, amp=True).layouts if p.domain == 2)
    assert narrow.halo_bytes == by_rows.halo_bytes / 2
    with pytest.raises(ValueError, match="cannot be traced"):
        plan_layouts(nn.Sequential(model, Branches()), **kwargs, method="graph")
    untraced = plan_layouts(nn.Sequential(model, Branches()), **kwargs)
    assert [(p.dp, p.domain) for p in untraced.layouts] == [(2, 1), (2, 1)]
    assert any("it cannot be partitioned operation by operation either" in note for note in untraced.notes)
    assert "1 (Unfold): it has no rule" in next(each.reason for each in refused.skipped if each.what == "domain 2")


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    st.integers(1, 16),
    st.integers(8, 70),
    st.sampled_from([None, 100_000, 300_000, 1_000_000]),
    st.booleans(),
)
def test_the_rule(world, batch_size, rows, memory, amp):
    plans = plan_layouts(
        Transformer(2, 2, width=4, depths=(1,), heads=(2,)),
        input_shape=(1, 2, rows, 8),
        world=world,
        batch_size=batch_size,
        gpu_memory=memory,
        amp=amp,
    )
    for p in plans.layouts:
        assert p.dp * p.tensor * p.domain == world
        assert p.samples * p.dp == batch_size
        assert p.partition.rows == rows
        assert p.partition.ranks == p.domain
        assert p.fits == (None if memory is None else p.memory.total <= memory)
        assert p.samples % p.accumulate == 0
        assert p.bytes == p.halo_bytes + p.gradient_bytes + p.tensor_bytes
    fitting = [p for p in plans.layouts if p.fits is not False]
    assert (plans.chosen is None) == (not fitting)
    for p in fitting:
        chosen = plans.chosen
        order = [(each.tensor * each.domain, each.bytes, each.memory.total) for each in (chosen, p)]
        assert order[0] <= order[1]
    json.dumps(plans.to_dict(), allow_nan=False)
    assert str(plans).splitlines()[-1].startswith("take")


def test_samples_are_worked_through_in_as_few_parts_as_memory_allows():
    kwargs = {"input_shape": (1, 3, 181, 360), "world": 2, "batch_size": 16}
    whole = plan_layouts(UNet(3, 3), **kwargs).chosen
    fixed = whole.memory.total - whole.memory.activations - whole.memory.fields
    sample = (whole.memory.activations + whole.memory.fields) / 8
    for held, parts in ((8, 1), (4.5, 2), (1, 8), (0.9, 8)):
        memory = round(fixed + sample * held) + 1
        first = next(p for p in plan_layouts(UNet(3, 3), **kwargs, gpu_memory=memory).layouts if p.domain == 1)
        assert (first.data, first.accumulate, first.fits) == ("ddp", parts, held >= 1)


def test_the_reasons_in_words():
    def why(**kwargs):
        return plan_layouts(UNet(3, 3, width=64), **{"input_shape": (1, 3, 181, 360), "world": 8, **kwargs}).why

    assert "each rank has whole samples" in why(batch_size=8)
    assert "2 replica(s) are the most for 2 sample(s), so 4 ranks share one" in why(batch_size=2)
    assert "with fewer than 4 ranks for a sample each needs 261 MiB" in why(batch_size=8, gpu_memory=200 * MiB)
    none = why(batch_size=8, gpu_memory=20 * MiB)
    assert "more than 20.0 MiB; try more ranks, activation checkpointing, bfloat16 (amp), or a smaller batch" in none
    assert "no layout fits" in why(batch_size=1, world=7 * 29)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world": 0}, "world must be 1 or more; got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"input_shape": (3, 33, 16)}, r"input_shape must be that of a sample, \(1, C, H, W\)"),
        ({"input_shape": (1, 4, 33, 16)}, "UNet could not be run for its shapes alone"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_layouts(unet(), **{"input_shape": (1, 3, 33, 16), "world": 2, **arguments})


def test_a_thousand_ranks_take_seconds():
    model = UNet(70, 70, width=64, levels=3)
    start = time.process_time()
    plans = plan_layouts(model, input_shape=(1, 70, 721, 1440), world=1024, batch_size=64, gpu_memory=80 * 2**30)
    assert time.process_time() - start < 10
    assert (plans.chosen.dp, plans.chosen.domain) == (64, 16)


def test_sizes_for_people():
    shown = [size(n) for n in (0, 999, 1024, 1536, 10 * 1024, 1023.4 * 1024, 1023.6 * 1024, 3.2 * 2**40, 5000 * 2**40)]
    assert shown == ["0 B", "999 B", "1.00 KiB", "1.50 KiB", "10.0 KiB", "1023 KiB", "1.00 MiB", "3.20 TiB", "5000 TiB"]


# Models by name

SIZES = {"in_channels": 4, "out_channels": 2, "height": 33, "width": 64, "periodic": False}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(f"from torch import nn\n{text}\n")
        return name

    return write


def test_the_former_names_of_the_examples_are_read_with_a_note(caplog):
    former = EXAMPLES["unet"].replace(".app.", ".")
    assert former != EXAMPLES["unet"]
    with caplog.at_level(logging.WARNING):
        assert factory(EXAMPLES["unet"]) is factory("unet") is UNet
        assert not caplog.messages
        assert factory(former) is UNet
    assert caplog.messages == [f"the model {former} is {EXAMPLES['unet']} today: it is read all the same"]
    other = "credit_parallel.app.other:Net".replace(".app.", ".")
    with pytest.raises(ValueError, match="there is no module"):
        factory(other)


def test_models_by_name(module):
    assert isinstance(build_model(ModelConfig("unet", {"width": 16}), **SIZES), UNet)
    transformer = build_model(ModelConfig("transformer", {"depths": [1, 1, 1], "heads": [2, 2, 2]}), **SIZES)
    assert len(transformer.stages) == 3
    assert not transformer.stem.periodic
    assert build_model(ModelConfig("unet", {"periodic": True}), **SIZES).stem.periodic
    assert factory("torch.nn:Identity") is nn.Identity
    name = module(
        "mine_a",
        "class Net(nn.Conv2d):\n    def __init__(self, in_channels, out_channels, height, width, depth=1):\n"
        "        super().__init__(in_channels, out_channels, 1)\n        self.sizes = height, width, depth\n"
        "class Group:\n    @staticmethod\n    def small(out_channels, width=5, **more):\n"
        "        model = nn.Identity()\n        model.got = out_channels, width, more\n        return model",
    )
    assert build_model(ModelConfig(f"{name}:Net", {"depth": 2}), **SIZES).sizes == (33, 64, 2)
    small = build_model(ModelConfig(f"{name}:Group.small", {"colour": "red"}), **SIZES)
    assert small.got == (2, 5, {"colour": "red"})  # a width without a height is none of the grid


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "unit",
            {},
            "model must be one of unet, transformer, or package.module:factory; got 'unit'; did you mean",
        ),
        ("nowhere:Net", {}, "there is no module 'nowhere', neither installed nor in /"),
        ("torch.nowhere:Net", {}, "there is no module 'torch.nowhere'"),
        ("torch.nn:Lin", {}, "torch.nn has no 'Lin'"),
        ("mine_b:Nett", {}, "mine_b has no 'Nett'; did you mean Net?"),
        ("mine_b:number", {}, "must be a class, or a function that makes a model; got an object of int"),
        ("mine_b:model", {}, "got an object of Identity"),
        ("mine_b:text", {}, "must be a torch.nn.Module; mine_b:text returned 'net'"),
        ("mine_b:Net", {"dept": 3}, r"has no option 'dept' \(its options: depth\); did you mean depth\?"),
        ("mine_b:Net", {"depth": 3, "in_channels": 1}, r"in_channels follows from the data \(4\); got 1"),
        ("mine_b:Needs", {}, "needs the option levels and heads"),
        ("mine_b:fails", {}, "could not be made: RuntimeError: no luck"),
        ("unet", {"width": 3}, "model unet could not be made: width, levels, blocks and groups must be"),
        ("mine_c:Net", {}, "module mine_c could not be imported: ZeroDivisionError"),
        ("mine_d:Net", {}, "module mine_d could not be imported: ModuleNotFoundError: No module named 'nothing_here'"),
        ("mine_e:Net", {}, "module mine_e could not be imported: SyntaxError"),
    ],
)
def test_models_that_cannot_be_made(name, options, message, module):
    module(
        "mine_b",
        "number = 3\nmodel = nn.Identity()\ndef text(): return 'net'\ndef fails(): raise RuntimeError('no\\nluck')\n"
        "def Needs(levels, heads, width=3): return nn.Identity()\n"
        "class Net(nn.Identity):\n    def __init__(self, in_channels, depth=1): super().__init__()",
    )
    module("mine_c", "1 / 0")
    module("mine_d", "import nothing_here")
    module("mine_e", "def")
    with pytest.raises(ValueError, match=message) as raised:
        build_model(ModelConfig(name, options), **SIZES)
    assert "\n" not in str(raised.value)


def test_options_of_a_command_line():
    assert parse_options(["width=64", "heads=[4, 8]", "periodic=false", "name=a=b"]) == {
        "width": 64,
        "heads": [4, 8],
        "periodic": False,
        "name": "a=b",
    }
    for wrong in (["width"], ["=3"], ["a=1", "a=2"], ["a=[1"]):
        with pytest.raises(ValueError, match=r"name=value|is no YAML"):
            parse_options(wrong)


# The commands


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="credit-parallel")
    commands = parser.add_subparsers(required=True)
    for each in (plan_command, verify_command, layout_command):
        each.add_parser(commands)
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.run(args)


MODEL = ("--model", "unet", "--grid", "33x16", "--channels", "3", "--option", "width=8")


def test_plan_prints_what_plan_layouts_says(capsys):
    assert command("plan", *MODEL, "--out-channels", "2", "--world", "4", "--batch-size", "2", "--layers") == 0
    plans = plan_layouts(unet(), input_shape=(1, 3, 33, 16), world=4, batch_size=2)
    assert capsys.readouterr().out == f"{plans}\n\n{plans.chosen.domain_plan}\n"
    assert command("plan", *MODEL, "--world", "1", "--layers") == 0
    assert "no rows are exchanged" in capsys.readouterr().out


def test_plan_prints_json_alone(capsys):
    assert command("plan", *MODEL, "--world", "2", "--memory", "0.0001", "--amp", "--json") == 1
    read = json.loads(capsys.readouterr().out)
    assert read["chosen"] is None
    assert read["gpu_memory"] == round(0.0001 * 2**30)
    assert [p["fits"] for p in read["layouts"]] == [False] * 3
    assert command("plan", *MODEL, "--world", "2", "--activation-checkpoint", "--json") == 0
    read = json.loads(capsys.readouterr().out)
    assert read["chosen"]["partition"] == [16, 17]
    assert read["chosen"]["layers"][0]["name"] == "stem.conv"


def test_plan_of_a_configuration(tmp_path, capsys):
    pytest.importorskip("credit_parallel.app.data.rossby_haurwitz")
    path = tmp_path / "config.yml"
    path.write_text(
        "data: {options: {height: 33, width: 64}, history: 2}\nmodel: {name: transformer, width: 16, heads: [2, 4]}\n"
        "trainer: {steps: 1, batch_size: 8, grad_accum_steps: 2, activation_checkpoint: true, dtype: float64}\n"
    )
    assert command("plan", "-c", path, "--world", "8", "--json") == 0
    read = json.loads(capsys.readouterr().out)
    channels = read["input_shape"][1]
    assert channels % 2 == 0
    assert read["input_shape"] == [1, channels, 33, 64]
    model = Transformer(channels, channels // 2, width=16, heads=(2, 4)).double()
    expected = plan_layouts(
        model, input_shape=read["input_shape"], world=8, batch_size=8, accumulate=2, activation_checkpoint=True
    )
    assert read["layouts"] == json.loads(json.dumps(expected.to_dict()))["layouts"]
    assert {p["samples"] for p in read["layouts"]} == {2, 4, 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--world", "2"),
            "needs -c FILE, or --model, --grid and --channels; --model and --grid and",
        ),
        ((*MODEL, "--world", "0"), "world must be 1 or more"),
        ((*MODEL[:2], "--grid", "33", "--channels", "3", "--world", "2"), "--grid must be rows x columns"),
        ((*MODEL[:4], "--channels", "0", "--world", "2"), "--channels must be 1 or more"),
        ((*MODEL, "--world", "2", "--memory", "0"), "--memory must be a number of GiB above 0"),
        ((*MODEL, "--world", "2", "-c", "x.yml"), "--model, --grid, --channels: the configuration says so"),
        (("--option", "a=1", "--world", "2", "-c", "x.yml"), "--option: the configuration says so"),
        (("--world", "2", "-c", "nowhere.yml"), "nowhere.yml: No such file"),
    ],
)
def test_mistakes_of_plan(arguments, message):
    with pytest.raises(ValueError, match=message):
        command("plan", *arguments)


WRONG = """
import torch
class Net(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 2, 3, padding=1)
        self.last = nn.Parameter(torch.zeros(1))
    def forward(self, x, y=None):
        x = self.conv(x) if y is None else self.conv(x) + y.mean()
        return x + self.last * x.roll(1, -2)
def unfold():
    return nn.Unfold(3)
"""


MODULES = ("--partition", "modules")


def test_verify_by_exit_status(capsys, module):
    name = module("mine_f", WRONG)
    assert command("verify", "unet", "--shape", "1,3,33,8", "--ranks", 2, 3, "--option", "width=8") == 0
    out = capsys.readouterr().out
    assert out.count("exact on") == 2
    assert "NOT" not in out
    assert "head.conv.weight" not in out.split("note:")[0]
    assert command("verify", f"{name}:Net", "--shape", "1x3x33x8", "--ranks", "2", *MODULES) == 1
    out = capsys.readouterr().out  # also though what rolls rows is multiplied by zero at first
    assert "NOT exact on 2 ranks" in out
    assert "torch.roll" in out or "Tensor.roll" in out
    assert "note: 1 parameter(s), zero throughout, were given random values: last" in out
    assert command("verify", f"{name}:Net", "--shape", "1x3x33x8", "--ranks", "2") == 0
    out = capsys.readouterr().out
    assert "note: partitioned operation by operation" in out
    assert "by its modules: first difference (forward): the model itself (Net)" in out
    assert command("verify", f"{name}:unfold", "--shape", "1,3,33,8", *MODULES) == 1
    out = capsys.readouterr().out
    assert "refused on 2 ranks: 1 modules may mix rows" in out
    assert "refused on 4 ranks: as before" in out


def test_verify_prints_json_alone(capsys, module):
    name = module("mine_g", WRONG)
    shapes = ("--shape", "1,3,33,8", "--shape", "1,2,33,8")
    assert command("verify", f"{name}:Net", *shapes, "--ranks", 2, "--json", *MODULES) == 1
    read = json.loads(capsys.readouterr().out)
    assert read["reports"][0]["difference"]["module"] == ""
    assert read["zeros_filled"] == ["last"]
    assert command("verify", "transformer", "--shape", "1,3,33,8", "--ranks", 2, "--option", "width=8", "--json") == 0
    read = json.loads(capsys.readouterr().out)
    assert read["ok"]
    assert read["reports"][0]["partition"] == [16, 17]
    assert command("verify", f"{name}:unfold", "--shape", "1,3,33,8", "--ranks", 2, "--json", *MODULES) == 1
    assert "Unfold" in json.loads(capsys.readouterr().out)["reports"][0]["refused"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unet", "--shape", "1,3"), "--shape must be positive numbers"),
        (("unet", "--shape", "1,3,0,4"), "--shape must be positive numbers"),
        (("unet", "--shape", "1,3,33,8", "--ranks", "0"), "--ranks must be 1 or more; got 0"),
        (
            ("torch.nn:Linear", "--shape", "1,3,33,8", "--option", "in_features=5", "--option", "out_features=2"),
            r"the model cannot be run on one rank with \(1, 3, 33, 8\): RuntimeError",
        ),
    ],
)
def test_mistakes_of_verify(arguments, message):
    with pytest.raises(ValueError, match=message):
        command("verify", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("8", "--domain", "4", "--height", "41", "--granularity", "4"),
        ("8", "--tensor", "2", "--rank", "3"),
        ("128", "--domain", "2", "--all", "--json"),
    ],
)
def test_layout_prints_what_credit_mesh_does(arguments, capsys):
    assert command("layout", *arguments) == 0
    shown = capsys.readouterr().out
    assert mesh_main(arguments) == 0
    assert shown == capsys.readouterr().out


def test_layout_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "layout.png"
    arguments = ("layout", "4", "--domain", "2", "--height", "9", "--json")
    assert command(*arguments, "--plot", path, "--halo", "2") == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(capsys.readouterr().out)["height"] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("4", "--domain", "3"), "world_size=4 is not divisible"),
        (("4", "--domain", "4", "--height", "3"), "without rows"),
        (("4", "--rank", "4"), r"rank must be in 0\.\.3; got 4"),
        (("4", "--plot", "x.png"), "with --height"),
    ],
)
def test_mistakes_of_layout(arguments, message):
    with pytest.raises(ValueError, match=message):
        command("layout", *arguments)


def test_help_teaches(capsys):
    for name in ("plan", "verify", "layout"):
        with pytest.raises(SystemExit):
            command(name, "--help")
        assert f"credit-parallel {name} " in capsys.readouterr().out.split("Examples:")[1]


def test_a_layout_plan_is_plain(capsys):
    plans = plan_layouts(unet(), input_shape=(1, 3, 33, 16), world=2)
    assert replace(plans.layouts[0], domain_plan=None) == plans.layouts[0]
    assert plans.layouts[0].name == "none, dp 1 x tensor 1 x domain 2"


DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("page", ["models.md", "planning.md"])
def test_the_docs_show_what_the_commands_print(page, module, capsys):
    """Every command of the page, on its own models; rounding errors differ from machine to machine."""

    def plain(text):
        return re.sub(r"\d\.\de[+-]\d\d  \(.*\)", "ERROR", text)

    text = (DOCS / page).read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        module("my_models" if "class Net" in code else "my_pads", code)
    shown = re.findall(r"```console\n\$ credit-parallel (.*?)\n(.*?)```", text, re.DOTALL)
    assert len(shown) > 1
    for line, output in shown:
        command(*shlex.split(line))
        assert plain(capsys.readouterr().out) == plain(output)
