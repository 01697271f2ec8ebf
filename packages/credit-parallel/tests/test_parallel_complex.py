"""Models with complex weights train, are clipped, saved and loaded on every layout, with the numbers of one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit_domain.casts import cast_module
from credit_halo.testing import run_processes
from credit_parallel import apply_fsdp2, parallelize
from credit_parallel.app.cli.verify_command import _fill_zeros
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import Reporter, check, train
from credit_parallel.checkpoint import export_plain, load_plain
from credit_parallel.fsdp2 import (
    _build_mp_policy,
    fsdp2_load_optimizer_state_dict,
    fsdp2_load_state_dict,
    fsdp2_optimizer_state_dict,
    fsdp2_state_dict,
)

HEIGHT, WIDTH, SAMPLES, MODES = 11, 8, 4, 3


class Block(nn.Module):
    """Fourier modes along longitude, and a convolution beside them, as in an FNO."""

    _fsdp2_shard = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.modes = nn.Parameter(torch.randn(channels, channels, MODES, dtype=torch.complex64) * 0.2)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        f = torch.einsum("bchm,cdm->bdhm", torch.fft.rfft(x)[..., :MODES], self.modes)
        return x + torch.tanh(torch.fft.irfft(f, n=x.shape[-1]) + self.conv(x))


class Net(nn.Module):
    def __init__(self, in_channels: int = 2, out_channels: int = 2) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv2d(in_channels, 4, 1), nn.Conv2d(4, out_channels, 1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.turn = nn.Parameter(torch.ones(4, 1, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.blocks(self.lift(x)) * self.turn).real)


def make(rank=0):
    net, generator = cast_module(Net(), torch.float64), torch.Generator().manual_seed(rank)
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.3)
    return net


def conf_of(data, domain):
    return {"trainer": {"parallelism": {"data": data, "domain": domain}}}


def optimizer_of(context, name):
    if name == "sgd":
        return torch.optim.SGD(context.model.parameters(), 0.1, momentum=0.9)
    return torch.optim.AdamW(context.model.parameters(), 0.02, foreach=False)


def steps(context, optimizer, first, last, accumulate=False):
    """Norms before clipping, and the weights."""
    generator, norms = torch.Generator().manual_seed(1), []
    replica = 0 if context.manager is None else context.manager.dp_rank
    count = SAMPLES // context.layout.dp
    for step in range(last):
        xs, ys = (torch.randn(SAMPLES, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=generator) for _ in "xy")
        if step < first:
            continue
        mine = torch.arange(replica * count, (replica + 1) * count)
        parts = mine.split(1 if accumulate else count)
        for i, part in enumerate(parts):
            with context.accumulate(last=i == len(parts) - 1):
                x, y = context.shard([xs[part], ys[part]])
                (context.mean((context.model(x) - y) ** 2) / len(parts)).backward()
        norms.append(float(context.step(optimizer, 0.3)))
    return norms, weights_of(context.model)


def weights_of(model):
    return {n.removeprefix("module."): whole(p).detach().clone() for n, p in model.named_parameters()}


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def same(found, expected):
    (norms, weights), (own, wanted) = found, expected
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(own), rtol=1e-12, atol=1e-12)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-11, atol=1e-12)
        assert weights[name].dtype == value.dtype


def rank_main(rank, data, domain, name, accumulate):
    context = parallelize(make(rank), conf_of(data, domain), check_batches=0)
    return steps(context, optimizer_of(context, name), 0, 4, accumulate)


@pytest.fixture(scope="module")
def expected():
    found = {}
    for name in ("sgd", "adamw"):
        context = parallelize(make(), conf_of("none", 1))
        found[name] = steps(context, optimizer_of(context, name), 0, 4)
    return found


LAYOUTS = [
    ("none", 2, 2),
    ("ddp", 2, 2),
    ("ddp", 4, 2),
    ("ddp", 2, 1),
    ("fsdp2", 2, 2),
    ("fsdp2", 4, 2),
    ("fsdp2", 2, 1),
]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("data", "world", "domain"), LAYOUTS)
def test_trains_like_one_rank(data, world, domain, name, expected):
    accumulate = data != "none" and world == 2
    for found in run_processes(rank_main, world, data, domain, name, accumulate, fork=True):
        same(found, expected[name])


def saved_by(rank, data, domain, folder):
    context = parallelize(make(rank), conf_of(data, domain), check_batches=0)
    optimizer = optimizer_of(context, "adamw")
    steps(context, optimizer, 0, 2)
    context.save(folder, optimizer, step=2)


def loaded_by(rank, data, domain, folder):
    context = parallelize(make(7), conf_of(data, domain), check_batches=0)
    optimizer = optimizer_of(context, "adamw")
    context.load(folder, optimizer)
    return steps(context, optimizer, 2, 4)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (("ddp", 2, 2), ("fsdp2", 2, 1)),
        (("fsdp2", 4, 2), ("ddp", 2, 1)),
        (("fsdp2", 2, 2), ("none", 2, 2)),
        (("none", 2, 2), ("fsdp2", 4, 2)),
    ],
    ids=str,
)
def test_checkpoints_move_between_layouts(there, here, tmp_path, expected):
    run_processes(saved_by, there[1], there[0], there[2], tmp_path, fork=True)
    norms, weights = expected["adamw"]
    for found in run_processes(loaded_by, here[1], here[0], here[2], tmp_path, fork=True):
        same(found, (norms[2:], weights))
    same(loaded_by(0, "none", 1, tmp_path), (norms[2:], weights))
    export_plain(tmp_path, tmp_path / "plain.pt")
    plain, own = Net(), cast_module(Net(), torch.float64)
    for model in (plain, own):
        load_plain(tmp_path / "plain.pt", model)
    torch.testing.assert_close(plain.turn, own.turn.to(torch.complex64))
    assert not torch.equal(own.turn.imag, torch.zeros_like(own.turn.imag))


def state_dicts(rank, data):
    context = parallelize(make(rank), conf_of(data, 1), check_batches=0)
    optimizer = optimizer_of(context, "adamw")
    steps(context, optimizer, 0, 2)
    state, opt = fsdp2_state_dict(context.model), fsdp2_optimizer_state_dict(context.model, optimizer)
    other = parallelize(make(5), conf_of(data, 1), check_batches=0)
    optimizer = optimizer_of(other, "adamw")
    fsdp2_load_state_dict(other.model, state)
    fsdp2_load_optimizer_state_dict(other.model, optimizer, opt)
    return steps(other, optimizer, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["fsdp2", "ddp"])
def test_whole_state_dicts(data, expected):
    norms, weights = expected["adamw"]
    for found in run_processes(state_dicts, 2, data):
        same(found, (norms[2:], weights))


def test_complex_parameters_of_an_axis_to_replicate_and_one_to_shard():
    """Two axes: their gradients are averaged over both."""

    def rank_main(rank):
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        net = apply_fsdp2(make(rank), mesh)
        x = torch.randn(4, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        net(x[rank, None]).square().mean().backward()
        return {name: whole(p.grad).clone() for name, p in net.named_parameters()}

    plain = make()
    x = torch.randn(4, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain(x).square().mean().backward()
    for grads in run_processes(rank_main, 4, fork=True):
        for name, p in plain.named_parameters():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-11, atol=1e-12)


# The trainer


class Losses(Reporter):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, record):
        self.losses.append(record["loss"])


def curve(rank, folder, dtype, parallelism):
    conf = {
        "folder": str(folder),
        "data": {"options": {"height": HEIGHT, "width": WIDTH, "times": 12}},
        "model": {"name": "test_parallel_complex:Net"},
        "trainer": {"steps": 3, "batch_size": 2, "dtype": dtype, "parallelism": parallelism, "device": "cpu"},
    }
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    reporter = Losses()
    outcome = train(check(RunConfig.from_dict(conf), world), torch.device("cpu"), reporter)
    assert outcome.finished
    return reporter.losses


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_trainer(dtype, tmp_path):
    """From a configuration: complex weights stay complex, and losses do not depend on the layout."""
    alone = curve(0, tmp_path / "alone", dtype, {"data": "none"})
    assert len(alone) == 3
    for data in ("ddp", "fsdp2"):
        losses = run_processes(curve, 2, tmp_path / data, dtype, {"data": data, "domain": 2})[0]
        tolerance = 1e-11 if dtype == "float64" else 1e-4
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=tolerance, atol=tolerance)
    export_plain(tmp_path / "ddp" / "checkpoints", tmp_path / "plain.pt")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert state["turn"].dtype == (torch.complex128 if dtype == "float64" else torch.complex64)


def test_zeros_of_complex_weights_are_filled_with_complex_numbers():
    net = make()
    nn.init.zeros_(net.turn)
    assert _fill_zeros(net) == ["turn"]
    assert net.turn.imag.abs().min() > 0


# FSDP2 with several dtypes


def test_several_dtypes_in_one_unit_are_refused_by_name():
    def rank_main(rank):
        mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        net = make()
        net.blocks[1].conv.bias.data = net.blocks[1].conv.bias.data.float()
        names = r"blocks\.1 has blocks\.1\.conv\.weight \(float64\) and blocks\.1\.conv\.bias \(float32\)"
        with pytest.raises(ValueError, match=names):
            apply_fsdp2(net, mesh)
        net = make()
        net.head.float()
        with pytest.raises(ValueError, match=r"Net has lift\.weight \(float64\) and head\.weight \(float32\)"):
            apply_fsdp2(net, mesh)
        net = make()
        net.blocks[0].conv.float()  # of one dtype, in a block of its own
        apply_fsdp2(net, mesh)

    run_processes(rank_main, 2, fork=True)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("bfloat16", "BFloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16), torch.bfloat16),
        (("float16", "Half", "half", "fp16", "torch.float16", "torch.half"), torch.float16),
        (("float32", "Float", "float", "FP32", "torch.float32"), torch.float32),
        (("float64", "Double", "double", "torch.float64"), torch.float64),
    ],
)
def test_spellings_of_dtypes(names, dtype):
    for name in names:
        policy = _build_mp_policy({"trainer": {"fsdp2_mp_policy": {"param_dtype": name, "reduce_dtype": name}}})
        assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, dtype, None)
    with pytest.raises(ValueError, match=r"fsdp2_mp_policy\.param_dtype must be one of bfloat16"):
        _build_mp_policy({"fsdp2_mp_policy": {"param_dtype": "complex64"}})
