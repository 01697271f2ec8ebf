"""Checkpoints: the same curve on every layout, nothing lost when killed, nothing run when loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parallel_former_format import as_former, write_index
from test_parallel_context import Net, conf_of, data, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler as LR

from credit_halo.testing import run_processes, run_threads
from credit_parallel import parallelize
from credit_parallel.checkpoint import (
    CheckpointError,
    export_plain,
    latest,
    load_checkpoint,
    load_plain,
    save_checkpoint,
    saved_tensors,
)
from credit_parallel.checkpoint import save as save_module
from credit_parallel.checkpoint.folder_owner import OWNER
from credit_parallel.checkpoint.rank_writer import RankWriter
from credit_parallel.sampler import data_parallel_sampler

SAMPLES = 4


class Spare(Net):
    """With parameters that no loss depends on, and buffers."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(2, 1, 1, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        return super().forward(x * self.scale)


def make(seed):
    """A model with weights, and a scale, of its own."""
    model = Spare().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.scale):
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=generator) * 0.2)
    return model


def optimizer_of(name, parameters):
    if name == "sgd":
        return torch.optim.SGD(parameters, 0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, 0.01, foreach=False)


class Training:
    """A training on some layout; ``conf`` None is a program without a mesh."""

    def __init__(self, conf, name, seed):
        conf = conf or {"trainer": {"parallelism": {}}}
        conf["trainer"]["find_unused_parameters"] = True
        self.context = parallelize(make(seed), conf)
        self.optimizer = optimizer_of(name, self.context.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 5], 0.5)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.scaler.scale(torch.ones(()))  # it starts late
        self.sampler = self.context.sampler(range(80), seed=5)
        self.parts = {"scheduler": self.scheduler, "scaler": self.scaler, "sampler": self.sampler}
        self.at = 0

    def run(self, steps):
        """The losses."""
        losses = []
        for _ in range(steps):
            losses.append(self._step())
        return losses

    def _step(self):
        context, (xs, ys) = self.context, data(torch.float64)
        dp = context.layout.dp
        replica = 0 if context.manager is None else context.manager.dp_rank
        mine = slice(replica * SAMPLES // dp, (replica + 1) * SAMPLES // dp)
        x, y = context.shard([xs[self.at % 5, mine], ys[self.at % 5, mine]])
        loss = context.mean((context.model(x) - y) ** 2)
        loss.backward()
        value = context.value(loss)
        context.step(self.optimizer, max_norm=0.5)
        self.scheduler.step()
        self.scaler.update(self.scaler.get_scale() * 1.5)
        self.at += 1
        return value

    def save(self, folder, **options):
        self.sampler.set_epoch(3)
        position = self.sampler.state_dict(8 * self.at // self.context.layout.dp)
        extra = {"best": 0.1 + 0.2, "tensor": torch.arange(3), "names": ("a", None, [float("inf"), {1: True}])}
        parts = {**self.parts, "sampler": position}
        return self.context.save(folder, self.optimizer, step=self.at, **parts, extra=extra, **options)

    def load(self, folder, **options):
        loaded = self.context.load(folder, self.optimizer, **self.parts, **options)
        self.at = loaded.step
        tensor = loaded.extra.pop("tensor")
        assert torch.equal(tensor, torch.arange(3))
        assert loaded.extra == {"best": 0.1 + 0.2, "names": ("a", None, [float("inf"), {1: True}])}
        position = self.sampler.state_dict()
        assert (position["epoch"], position["used"]) == (3, 8 * self.at)
        return loaded


def segment(rank, conf, name, seed, source, target, steps):
    """Load, train, save; the losses."""
    training = Training(conf, name, seed + rank)
    if source is not None:
        loaded = training.load(source)
        assert not training.optimizer.state.get(dict(training.context.model.named_parameters()).get("spare.weight"))
        assert loaded.folder == latest(source)
    losses = training.run(steps)
    if target is not None:
        training.save(target)
        assert latest(target) is not None
    return losses


def on(layout, *args, fork=True):
    """A segment on a layout, or with None without torch.distributed."""
    if layout is None:
        return [segment(0, None, *args)]
    mode, dp, tensor, domain = layout
    return run_processes(segment, dp * tensor * domain, conf_of(mode, tensor, domain), *args, fork=fork)


@pytest.fixture(scope="module")
def curves():
    return {name: Training(None, name, 0).run(9) for name in ("sgd", "adamw")}


PAIRS = [
    (None, ("fsdp2", 2, 1, 3)),
    (("fsdp2", 2, 1, 3), None),
    (("ddp", 2, 1, 2), ("fsdp2", 1, 2, 3)),
    (("fsdp2", 1, 2, 3), ("none", 1, 1, 3)),
    (("none", 1, 2, 2), ("ddp", 4, 1, 1)),
    (("fsdp2", 4, 1, 1), ("fsdp2", 2, 2, 1)),
    (("ddp", 1, 2, 2), ("none", 1, 2, 1)),
    (("none", 1, 1, 2), ("ddp", 2, 2, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "a", "b"), [(i, *pair) for i, pair in enumerate(PAIRS)], ids=str)
def test_there_and_back(number, a, b, curves, tmp_path):
    name = ("sgd", "adamw")[number % 2]
    there, back = tmp_path / "there", tmp_path / "back"
    parts = [
        on(a, name, 0, None, there, 3),
        on(b, name, 7, there, back, 3),
        on(a, name, 9, back, None, 3),
    ]
    for at, results in enumerate(parts):
        for losses in results:
            torch.testing.assert_close(losses, curves[name][3 * at : 3 * at + 3], rtol=1e-9, atol=1e-9)


SIX = [None, ("fsdp2", 2, 1, 2), ("fsdp2", 1, 2, 3), ("ddp", 2, 2, 1), ("ddp", 1, 1, 3), ("none", 1, 2, 2)]


EXHAUSTIVE = pytest.mark.skipif(
    not os.environ.get("CREDIT_EXHAUSTIVE"), reason="takes minutes: CREDIT_EXHAUSTIVE=1 runs it, and 6 pairs run always"
)


@EXHAUSTIVE
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("a", SIX, ids=str)
def test_every_pair_of_six(a, curves, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    on(a, "adamw", 0, None, there, 3)
    for i, b in enumerate(SIX):
        for losses in on(b, "adamw", 7, there, back / str(i), 3):
            torch.testing.assert_close(losses, curves["adamw"][3:6], rtol=1e-9, atol=1e-9)
        for losses in on(a, "adamw", 9, back / str(i), None, 3):
            torch.testing.assert_close(losses, curves["adamw"][6:], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_on_processes(curves, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    on(("fsdp2", 2, 1, 2), "adamw", 0, None, there, 3, fork=False)
    on(("ddp", 1, 1, 3), "adamw", 7, there, back, 3, fork=False)
    for losses in on(("fsdp2", 1, 2, 2), "adamw", 9, back, None, 3, fork=False):
        torch.testing.assert_close(losses, curves["adamw"][6:], rtol=1e-9, atol=1e-9)


def test_every_rank_writes_its_share(tmp_path):
    on(("fsdp2", 2, 1, 2), "adamw", 0, None, tmp_path, 1)
    step = latest(tmp_path)
    sizes = [path.stat().st_size for path in sorted(step.glob("*.safetensors"))]
    assert len(sizes) == 4
    assert max(sizes) < 0.5 * sum(sizes)
    assert {path.suffix for path in step.iterdir()} == {".safetensors", ".json"}


def parts_read(rank, conf, source):
    """Numbers that this rank has read, and those of the whole model and optimizer."""
    training = Training(conf, "adamw", 50 + rank)
    training.load(source)
    return sum(read.get(rank, ())), 3 * sum(p.numel() for p in training.context.model.parameters())


read: dict[int, list[int]] = {}


def test_every_rank_reads_its_share(tmp_path, monkeypatch):
    """Of what one rank has written whole, too."""

    def recorded(tensor, start, lows, highs, box=saved_tensors._box):
        part = box(tensor, start, lows, highs)
        if dist.is_initialized():
            read.setdefault(dist.get_rank(), []).append(part.numel() / 2)  # of the source, and of the target
        return part

    on(None, "adamw", 0, None, tmp_path, 1)
    monkeypatch.setattr(saved_tensors, "_box", recorded)
    for own, total in run_processes(parts_read, 4, conf_of("fsdp2", 1, 2), tmp_path, fork=True):
        assert own < 0.4 * total


class Counter(nn.Module):
    """A model that says which step it is of."""

    def __init__(self, at=0.0, size=1000):
        super().__init__()
        self.at = nn.Parameter(torch.full((size,), float(at)))


def buffers_apart(rank, folder):
    context = parallelize(make(0), conf_of("ddp", 1, 1))
    model = context.model.module
    model.count.fill_(3 + rank)
    context.save(folder, step=1)
    model.count.fill_(-1)
    context.load(folder)
    assert model.count == 3


def test_buffers_are_those_of_the_first_rank(tmp_path):
    run_processes(buffers_apart, 3, tmp_path, fork=True)


class Remembering(Counter):
    """With state that is no tensor, or a tensor that is no parameter."""

    def __init__(self, notes):
        super().__init__()
        self.notes = notes

    def get_extra_state(self):
        return self.notes

    def set_extra_state(self, state):
        self.notes = state


@pytest.mark.parametrize("notes", [{"seen": 3, "among": (4.5, None)}, torch.arange(4), {"mean": torch.arange(4.0)}])
def test_extra_state_of_modules(notes, tmp_path):
    save_checkpoint(tmp_path, Remembering(notes), step=1)
    like = torch.zeros(4, dtype=torch.int64) if isinstance(notes, torch.Tensor) else None
    model = Remembering(like)
    load_checkpoint(tmp_path, model)
    torch.testing.assert_close(model.notes, notes, rtol=0, atol=0)
    export_plain(tmp_path, tmp_path / "out.pt")
    again = Remembering(like)
    load_plain(tmp_path / "out.pt", again)
    torch.testing.assert_close(again.notes, notes, rtol=0, atol=0)


SCHEDULERS = {
    "lambda": lambda o: LR.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: LR.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: LR.OneCycleLR(o, 0.1, total_steps=20),
    "sequential": lambda o: LR.SequentialLR(o, [LR.LinearLR(o, 0.1), LR.ExponentialLR(o, 0.9)], [3]),
    "plateau": lambda o: LR.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize(("name", "lr"), [*((name, 0.1) for name in SCHEDULERS), ("cosine", torch.tensor(0.1))])
def test_schedulers(name, lr, tmp_path):

    def made():
        model = Counter()
        optimizer = torch.optim.AdamW(model.parameters(), lr if isinstance(lr, float) else lr.clone())
        return model, optimizer, SCHEDULERS[name](optimizer)

    def steps(optimizer, scheduler, metrics):
        for metric in metrics:
            optimizer.step()
            scheduler.step(*([metric] if name == "plateau" else []))
        return [float(group["lr"]) for group in optimizer.param_groups]

    model, optimizer, scheduler = made()
    steps(optimizer, scheduler, [1.0, 2.0])
    save_checkpoint(tmp_path, model, optimizer, step=2, scheduler=scheduler)
    expected = steps(optimizer, scheduler, [3.0, 4.0])
    model, optimizer, scheduler = made()
    load_checkpoint(tmp_path, model, optimizer, scheduler=scheduler)
    assert steps(optimizer, scheduler, [3.0, 4.0]) == expected


def test_a_sampler_that_does_not_fit_changes_nothing(tmp_path):
    model, sampler = Counter(1), data_parallel_sampler(range(8))
    save_checkpoint(tmp_path, model, step=1, sampler=sampler)
    other = Counter(2)
    with pytest.raises(ValueError, match="of another order of samples: samples is 8 in the state and 9 here"):
        load_checkpoint(tmp_path, other, sampler=data_parallel_sampler(range(9)))
    assert other.at.eq(2).all()


def optimizer_states(rank, conf, source):
    """Whole states by name, as they are after a load."""
    training = Training(conf, "adamw", 50 + rank)
    training.load(source)
    names = {p: name.removeprefix("module.") for name, p in training.context.model.named_parameters()}
    state = training.optimizer.state
    assert all(isinstance(state[p]["exp_avg"], DTensor) == isinstance(p, DTensor) for p in state)
    return {names[p]: {key: whole(value) for key, value in state[p].items()} for p in state}


def test_optimizer_states_move_bit_for_bit(tmp_path):
    on(None, "adamw", 0, None, tmp_path, 2)
    expected = optimizer_states(0, None, tmp_path)
    assert len(expected) == len(list(Spare().parameters())) - 2  # the spare layer has none
    for states in run_processes(optimizer_states, 6, conf_of("fsdp2", 1, 3), tmp_path, fork=True):
        torch.testing.assert_close(states, expected, rtol=0, atol=0)


# Plain state dicts


def plain_round_trip(rank, conf, source, target):
    context = parallelize(make(3 + rank), conf)
    assert load_plain(source, context, key="model_state_dict") == ([], [])
    context.save(target, step=1)


@pytest.mark.parametrize("layout", [("fsdp2", 2, 2, 1), ("ddp", 2, 1, 2), ("none", 1, 2, 2)], ids=str)
def test_to_and_from_a_plain_state_dict(layout, tmp_path):
    plain = make(0).state_dict()
    plain["count"] += 5
    wrapped = {f"module._orig_mod.{name}": value for name, value in plain.items()}
    torch.save({"model_state_dict": wrapped, "epoch": 3}, tmp_path / "model.pt")
    mode, dp, tensor, domain = layout
    conf, steps = conf_of(mode, tensor, domain), tmp_path / "steps"
    run_processes(plain_round_trip, dp * tensor * domain, conf, tmp_path / "model.pt", steps, fork=True)
    export_plain(tmp_path / "steps", tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(out, dict(plain), rtol=0, atol=0)
    Spare().double().load_state_dict(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt", "out.pt", "steps"]


def test_a_plain_state_dict_of_another_model(tmp_path):
    state = make(0).state_dict()
    state["extra"] = state.pop("spare.bias")
    with pytest.raises(ValueError, match="missing from it: spare.bias; unexpected in it: extra"):
        load_plain(state, make(1))
    model = make(1)
    assert load_plain(state, model, strict=False) == (["spare.bias"], ["extra"])
    assert torch.equal(model.spare.weight, state["spare.weight"])
    with pytest.raises(ValueError, match="no state dict under 'ema'; there are spare"):
        load_plain({"spare": {}}, make(1), key="ema")


# Random numbers


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def draw_around(rank, conf, folder):
    context = parallelize(make(0), conf)
    context.seed(12)
    context.save(folder / "other", step=3)
    context.seed(11)
    context.save(folder, step=3)
    draw()
    context.save(folder, step=4)
    expected = draw()
    draw()
    assert context.load(folder).same_layout
    return expected, draw()


def draw_after(rank, conf, folder, wander):
    context = parallelize(make(0), conf)
    context.seed(wander)
    return [context.load(step).same_layout or draw() for step in (folder / "other", *sorted(folder.glob("step-*")))]


@pytest.mark.slow
def test_random_numbers(tmp_path):
    results = run_processes(draw_around, 2, conf_of("none", 1, 2), tmp_path)
    assert all(expected == again for expected, again in results)
    assert results[0] != results[1]
    moved = run_processes(draw_after, 3, conf_of("ddp", 1, 1), tmp_path, 1)
    assert moved == run_processes(draw_after, 3, conf_of("ddp", 1, 1), tmp_path, 2)
    drawn = [*(numbers for rank in moved for numbers in rank), *(expected for expected, _ in results)]
    assert len(set(drawn)) == 3 * 3 + 2


# Folders


def steps_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != OWNER)


def load_at(folder):
    model = Counter(-1)
    loaded = load_checkpoint(folder, model)
    assert model.at.eq(loaded.step).all()
    return loaded.step


def test_the_last_few_are_kept(tmp_path):
    assert latest(tmp_path / "nothing") is None
    for step in range(5):
        save_checkpoint(tmp_path, Counter(step), step=step, keep=2)
    assert steps_in(tmp_path) == ["step-00000003", "step-00000004"]
    save_checkpoint(tmp_path, Counter(1), step=1, keep=2)  # training went back: the last saved counts, not the highest
    assert steps_in(tmp_path) == ["step-00000001", "step-00000004"]
    assert load_at(tmp_path) == 1
    save_checkpoint(tmp_path, Counter(1), step=1, extra="again", keep=2)
    assert steps_in(tmp_path) == ["step-00000001.2", "step-00000004"]
    assert load_checkpoint(tmp_path, Counter()).extra == "again"
    save_checkpoint(tmp_path, Counter(9), step=9, keep=None)
    assert len(steps_in(tmp_path)) == 3
    assert load_at(tmp_path / "step-00000004") == 4


def two(tmp_path, form="safetensors"):
    for step in (1, 2):
        save_checkpoint(tmp_path, Counter(step), step=step)
        if form == "former":
            as_former(tmp_path / f"step-{step:08}")
    return tmp_path / "step-00000002"


def file_of(step):
    (name,) = json.loads((step / "manifest.json").read_bytes())["files"]
    return step / name


FORMATS = pytest.mark.parametrize("form", ["safetensors", "former"])


def flip(path, at=100):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    r"rank-00000\.\w+ is missing": lambda step: file_of(step).unlink(),
    r"rank-00000\.\w+ has 100 of": lambda step: os.truncate(file_of(step), 100),
    "index.json is missing": lambda step: (step / "index.json").unlink(),
    "index.json is not what was saved": lambda step: flip(step / "index.json"),
    "manifest.json is missing": lambda step: (step / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda step: os.truncate(step / "manifest.json", 30),
}


@FORMATS
@pytest.mark.parametrize("message", DAMAGES)
def test_what_is_damaged_is_refused_and_passed_over(message, form, tmp_path, caplog):
    step = two(tmp_path, form)
    DAMAGES[message](step)
    model = Counter(-1)
    with pytest.raises(CheckpointError, match=f"step-00000002 .*{message}"):
        load_checkpoint(step, model)
    assert model.at.eq(-1).all()
    assert load_at(tmp_path) == 1
    assert re.search(message, caplog.text)
    save_checkpoint(tmp_path, Counter(3), step=3, keep=1)
    assert steps_in(tmp_path) == ["step-00000002", "step-00000003"]


@FORMATS
def test_a_changed_byte(form, tmp_path):
    step = two(tmp_path, form)
    flip(file_of(step), -17)
    with pytest.raises(CheckpointError, match=r"rank-00000\.\w+ is not what was saved"):
        load_checkpoint(tmp_path, Counter())
    load_checkpoint(tmp_path, Counter(), verify=False)


def test_a_changed_header(tmp_path):
    step = two(tmp_path)
    flip(file_of(step), 9)
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="rank-00000.safetensors cannot be read for"):
            load_checkpoint(step, Counter(), verify=verify)
    assert load_at(tmp_path) == 1


@FORMATS
def test_a_folder_that_was_never_finished(form, tmp_path):
    step = two(tmp_path, form)
    partial = step.rename(step.with_name(step.name + ".partial-0123abcd"))
    with pytest.raises(CheckpointError, match="its save did not end"):
        load_checkpoint(partial, Counter())
    assert load_at(tmp_path) == 1
    save_checkpoint(tmp_path, Counter(3), step=3)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000003"]


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        load_checkpoint(tmp_path, Counter())


# Other models


def of_another_model(rank, folder):
    model = nn.Module()
    model.other, model.at = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    message = r"step-00000002 is of another model: missing from it: other; of other shapes: at is \(1000,\) there, \(3"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, model)
    with pytest.raises(ValueError, match="unexpected in it: at"):
        load_checkpoint(folder, nn.Module())
    loaded = load_checkpoint(folder, nn.Module(), strict=False)
    assert (loaded.missing, loaded.unexpected) == ([], ["at"])
    counter, sampler = Counter(), data_parallel_sampler(range(8))
    optimizer = torch.optim.SGD(counter.parameters(), 0.1)
    with pytest.raises(ValueError, match="was saved without sampler, optimizer"):
        load_checkpoint(folder, counter, optimizer, sampler=sampler)


def test_another_model_says_what_differs(tmp_path):
    two(tmp_path)
    of_another_model(0, tmp_path)


def on_one_rank_only(rank, folder):
    model = Counter(2, 999 if rank == 1 else 1000)
    with pytest.raises(ValueError, match=r"load_checkpoint: on rank 1: .* at is \(1000,\) there, \(999,\) here"):
        load_checkpoint(folder, model)
    with pytest.raises(ValueError, match=r"ranks save of steps \[0, 1, 2\]"):
        save_checkpoint(folder, Counter(), step=2 - rank)
    with pytest.raises(ValueError, match="on rank 2: extra.x is of type object"):
        save_checkpoint(folder, Counter(), step=3, extra={"x": object() if rank == 2 else 1})
    if rank == 0:
        flip(folder / "step-00000002" / "rank-00000.safetensors", -9)
    dist.barrier()
    with pytest.raises(CheckpointError, match="rank-00000.safetensors is not what was saved"):
        load_checkpoint(folder, Counter())


def test_errors_are_the_same_on_all_ranks(tmp_path):
    two(tmp_path)
    run_threads(on_one_rank_only, 3, tmp_path)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_another_optimizer(tmp_path):
    model = Counter()
    save_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1), step=1)
    other = nn.Module()
    other.at, other.more = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="is of another optimizer: the groups hold other parameters.*more"):
        load_checkpoint(tmp_path, other, torch.optim.SGD(other.parameters(), 0.1), strict=False)
    trained = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    trained.state[other.at] = {"momentum_buffer": torch.zeros(1000, dtype=torch.complex64)}
    save_checkpoint(tmp_path, other, trained, step=3)
    with pytest.raises(ValueError, match="momentum_buffer of at is complex, and the parameter is real"):
        load_checkpoint(tmp_path, other, torch.optim.SGD(other.parameters(), 0.1, momentum=0.9))
    stranger = torch.optim.SGD(Counter().parameters(), 0.1)
    with pytest.raises(ValueError, match="none of the model's"):
        save_checkpoint(tmp_path, model, stranger, step=2)


# Nothing runs


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json", "manifest.json", ".metadata", "extra.pt"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_is_never_run(name, form, tmp_path):
    step, mark = two(tmp_path / "steps"), tmp_path / "ran"
    if form == "pickle":
        (step / name).write_bytes(pickle.dumps(Bomb(mark)))
    else:
        bomb_file(tmp_path / "bomb", mark).rename(step / name)
    refused = not name.startswith((".", "extra"))  # files that are no part of it are not read at all
    for verify in (True, False):
        if refused:
            with pytest.raises(CheckpointError, match=name):
                load_checkpoint(step, Counter(), verify=verify)
        else:
            load_checkpoint(step, Counter(), verify=verify)
    with pytest.raises(ValueError, match="cannot be read as tensors alone"):
        load_plain(bomb_file(tmp_path / "plain.pt", mark), Counter())
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it would have


def bomb_file(path, mark):
    torch.save({"at": Bomb(mark)}, path)
    return path


def test_an_index_that_points_elsewhere(tmp_path):
    """Whoever wrote a checkpoint can write its checksums too."""
    step = two(tmp_path / "steps")
    index = json.loads((step / "index.json").read_bytes())
    index["tensors"]["model/at"]["chunks"][0][2] = "../step-00000001/rank-00000.safetensors"
    write_index(step, index)
    with pytest.raises(CheckpointError, match="names files that are no part of it"):
        load_checkpoint(step, Counter())
    index["tensors"]["model/at"]["chunks"] = []
    write_index(step, index)
    with pytest.raises(CheckpointError, match="do not add up"):
        load_checkpoint(step, Counter())
    index["tensors"]["model/at"].update(
        chunks=[[[0], [500], "rank-00000.safetensors"], [[500], [500], "rank-00000.safetensors"]]
    )
    write_index(step, index)
    with pytest.raises(CheckpointError, match="chunks must be in a file each"):
        load_checkpoint(step, Counter())


# Asynchronous saves


def saved_while_training_goes_on(rank, folder, trained):
    training = Training(conf_of("fsdp2", 1, 2), "adamw", rank)
    training.run(2)
    save = training.save(folder, asynchronous=True)
    assert not save.done()
    rest = training.run(3)
    trained.set()
    assert save.wait() == save.folder == latest(folder)
    assert save.done()
    again = Training(conf_of("fsdp2", 1, 2), "adamw", 9)
    again.load(folder)
    torch.testing.assert_close(again.run(3), rest, rtol=1e-12, atol=0)


def test_an_asynchronous_save_is_a_snapshot(tmp_path, monkeypatch):
    write, trained = RankWriter.write, threading.Event()

    def late(writer):
        assert trained.wait(60)
        write(writer)

    monkeypatch.setattr(RankWriter, "write", late)
    run_processes(saved_while_training_goes_on, 4, tmp_path, trained, fork=True)


def failing(rank, folder, caplog):
    save_checkpoint(folder, Counter(1), step=1)
    save = save_checkpoint(folder, Counter(2), step=2, asynchronous=True)
    with pytest.raises(CheckpointError, match="the save of step 2: .*No space left"):
        save.wait()
    with pytest.raises(CheckpointError, match="the save of step 2: .*No space left"):
        save.wait()
    save_checkpoint(folder, Counter(2), step=2, asynchronous=True)
    with pytest.raises(CheckpointError, match="save of step 2 failed: .*No space left"):  # the next save says it too
        save_checkpoint(folder, Counter(3), step=3)
    save_checkpoint(folder, Counter(4), step=4)
    return caplog.text


@pytest.mark.parametrize("bad", [0, 1])
def test_errors_of_asynchronous_saves_come_out(bad, tmp_path, monkeypatch, caplog):
    write = RankWriter.write

    def fail(writer):
        if writer.snapshot and writer.path.name == f"rank-{bad:05}.safetensors":
            raise OSError(28, "No space left on device")
        write(writer)

    monkeypatch.setattr(RankWriter, "write", fail)
    monkeypatch.setattr(save_module, "PATIENCE", 1.0)
    logs = run_processes(failing, 2, tmp_path, caplog, fork=True)
    assert steps_in(tmp_path) == ["step-00000001", "step-00000004"]
    assert any("No space left" in text for text in logs)


def silent(rank, folder):
    save = save_checkpoint(folder, Counter(1), step=1, asynchronous=True)
    with pytest.raises(CheckpointError, match="rank 1 wrote nothing for 1 s"):
        save.wait()


def test_a_rank_that_never_writes_is_not_waited_for_forever(tmp_path, monkeypatch):
    finish = save_module.Save.finish
    monkeypatch.setattr(save_module.Save, "finish", lambda save: None if save._rank else finish(save))
    monkeypatch.setattr(save_module, "PATIENCE", 1.0)
    run_processes(silent, 2, tmp_path, fork=True)
    assert steps_in(tmp_path) == []


def full_disk(rank, folder):
    with pytest.raises(CheckpointError, match="on rank 1: .*No space left"):
        save_checkpoint(folder, Counter(1), step=1)


def test_a_full_disk(tmp_path, monkeypatch):
    write = RankWriter.write_data

    def fail(writer, plan, planner):
        if writer.path.name == "rank-00001.safetensors":
            raise OSError(28, "No space left on device")
        return write(writer, plan, planner)

    monkeypatch.setattr(RankWriter, "write_data", fail)
    run_processes(full_disk, 2, tmp_path, fork=True)
    assert steps_in(tmp_path) == []


def ends_at_once(rank, folder):
    save_checkpoint(folder, Counter(5, 3_000_000), step=5, asynchronous=True)


def test_the_program_does_not_end_before_its_save(tmp_path):
    run_processes(ends_at_once, 2, tmp_path)
    deadline = time.monotonic() + 20
    while latest(tmp_path) is None and time.monotonic() < deadline:  # results come back before processes end
        time.sleep(0.05)
    model = Counter(-1, 3_000_000)
    assert load_checkpoint(tmp_path, model).step == 5
    assert model.at.eq(5).all()


# Killed


def saver(rank, size, folder, asynchronous, size_of_model):
    """Save until killed."""
    torch.set_num_threads(1)
    if size > 1:
        meet = f"file://{folder}/../meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    start = 0 if (last := latest(folder)) is None else int(last.name[5:13]) + 1
    for step in range(start, 1_000_000):
        save_checkpoint(folder, Counter(step, size_of_model), step=step, keep=2, asynchronous=asynchronous)


def kill_and_check(folder, size, asynchronous, delay):
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=saver, args=(rank, size, folder, asynchronous, 20_000)) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while latest(folder) is None and time.monotonic() < deadline and all(p.is_alive() for p in processes):
        time.sleep(0.01)
    time.sleep(delay)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    model = Counter(-1, 20_000)
    step = load_checkpoint(folder, model).step
    assert model.at.eq(step).all()
    save_checkpoint(folder, Counter(step + 1, 20_000), step=step + 1, keep=2)
    assert load_checkpoint(folder, model).step == step + 1
    assert len(steps_in(folder)) <= 2
    assert all(".partial" not in name for name in steps_in(folder))
    shutil.rmtree(folder)


def kills(count, tmp_path):
    dice = random.Random(count)
    for i in range(count):
        kill_and_check(tmp_path / str(i), 1 + i % 2, i % 4 > 1, dice.random() * 0.15)
        (tmp_path / "meet").unlink(missing_ok=True)


def test_killed_at_any_moment(tmp_path):
    kills(10, tmp_path)


def killed_at(nth, folder, asynchronous):
    """Save twice; from the second save on, be killed before the nth change of a file."""
    torch.set_num_threads(1)
    save_checkpoint(folder, Counter(0), step=0)
    left = nth

    def hook(event, args):
        nonlocal left
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if changes or (event == "open" and str(folder) in str(args[0]) and args[1] in ("wb", "xb")):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save_checkpoint(folder, Counter(1), step=1, keep=1, asynchronous=asynchronous).wait()


@EXHAUSTIVE
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_before_every_change_of_a_file(asynchronous, tmp_path):
    context = multiprocessing.get_context("forkserver")
    for nth in range(100):
        folder = tmp_path / str(nth)
        process = context.Process(target=killed_at, args=(nth, folder, asynchronous))
        process.start()
        process.join()
        step = load_at(folder)
        save_checkpoint(folder, Counter(2), step=2, keep=1)
        assert steps_in(folder) == ["step-00000002"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert step == 1
    assert nth > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_many_times(tmp_path):
    kills(40, tmp_path)
