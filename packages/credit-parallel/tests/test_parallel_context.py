"""One call, every layout: the same gradients and the same loss curve as one rank."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit_halo.testing import run_processes
from credit_mesh import ParallelismConfig
from credit_parallel import ParallelContext, parallelize
from credit_parallel.domain import is_partitioned

HEIGHT, WIDTH, SAMPLES = 13, 6, 4


class Mixer(nn.Module):
    """A tensor-parallel pair of 1x1 convolutions."""

    _tp_col, _tp_row = "up", "down"
    _fsdp2_shard = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), nn.GroupNorm(2, 4))
        self.mixers = nn.Sequential(Mixer(4), Mixer(4))
        self.down = nn.Conv2d(4, 4, (3, 4), 2, 1)
        self.up = nn.ConvTranspose2d(4, 4, (3, 4), 2, 1)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixers(self.stem(x))
        return self.head(torch.cat([x, self.up(F.gelu(self.down(x)))], 1))


def make(dtype, rank=0):
    """The same weights on rank 0 of every run, others elsewhere."""
    model = Net().to(dtype)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.2)
    return model


def data(dtype):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(5, SAMPLES, 2, HEIGHT, WIDTH, dtype=dtype, generator=generator) for _ in range(2)]


def optimizer_of(name, parameters):
    if name == "sgd":
        return torch.optim.SGD(parameters, 0.05, momentum=0.9)
    return torch.optim.AdamW(parameters, 0.01, foreach=False)


def train(context: ParallelContext, dtype, name: str, steps: int, weights: Tensor | None = None):
    """Losses of each step, and the gradients of the first."""
    optimizer = optimizer_of(name, context.model.parameters())
    xs, ys = data(dtype)
    dp = context.layout.dp
    replica = 0 if context.manager is None else context.manager.dp_rank
    losses, gradients = [], {}
    for step in range(steps):
        mine = slice(replica * SAMPLES // dp, (replica + 1) * SAMPLES // dp)
        batch = context.shard({"x": xs[step % 5, mine], "y": ys[step % 5, mine]})
        loss = context.mean((context.model(batch["x"]) - batch["y"]) ** 2, weights=weights)
        loss.backward()
        losses.append(context.value(loss))
        if step == 0:
            context.sync_gradients()
            gradients = {n: whole(p.grad) for n, p in context.model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        else:
            context.step(optimizer, max_norm=0.5)
    return losses, {n.removeprefix("module."): g for n, g in gradients.items()}


def whole(grad):
    return (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach().clone()


def reference(dtype, name, steps, weights=None):
    return train(parallelize(make(dtype), {"trainer": {"parallelism": {}}}), dtype, name, steps, weights)


def conf_of(mode, tensor, domain, **trainer):
    return {"trainer": {"parallelism": {"data": mode, "tensor": tensor, "domain": domain}, **trainer}}


def rank_main(rank, conf, dtype, name, steps, weights=None):
    return train(parallelize(make(dtype, rank), conf), dtype, name, steps, weights)


LAYOUTS = [
    (mode, dp, tensor, domain)
    for mode in ("none", "ddp", "fsdp2")
    for tensor in (1, 2)
    for domain in (1, 2, 3)
    for dp in ((1,) if mode == "none" else (1, 2, 4))
    if 1 < dp * tensor * domain <= 6
]


def compare(results, expected, tolerance):
    losses, gradients = expected
    for own_losses, own_gradients in results:
        torch.testing.assert_close(torch.tensor(own_losses), torch.tensor(losses), rtol=tolerance, atol=tolerance)
        assert set(own_gradients) == set(gradients)
        for name, gradient in gradients.items():
            scale = gradient.abs().max().clamp(min=1e-3)
            error = (own_gradients[name] - gradient).abs().max() / scale
            assert error < tolerance, f"{name}: {error}"


@pytest.fixture(scope="module")
def expected():
    return {name: reference(torch.float64, name, 20) for name in ("sgd", "adamw")}


@pytest.mark.parametrize(("mode", "dp", "tensor", "domain"), LAYOUTS, ids=str)
def test_every_layout_trains_like_one_rank(mode, dp, tensor, domain, expected):
    """Gradients of the first step and the losses of 20, by SGD, to which a wrong scale shows, or by AdamW."""
    name = "adamw" if (dp + tensor + domain) % 2 else "sgd"
    conf = conf_of(mode, tensor, domain)
    results = run_processes(rank_main, dp * tensor * domain, conf, torch.float64, name, 20, timeout=200, fork=True)
    compare(results, expected[name], 1e-9)


PARTITIONED = [(mode, dp, tensor, domain) for mode, dp, tensor, domain in LAYOUTS if domain > 1]


def partitioned_main(rank, conf, dtype, name, steps):
    context = parallelize(make(dtype, rank), conf, input_shape=(SAMPLES, 2, HEIGHT, WIDTH))
    assert is_partitioned(context.model)
    return train(context, dtype, name, steps)


@pytest.mark.parametrize(("mode", "dp", "tensor", "domain"), PARTITIONED, ids=str)
def test_a_partitioned_model_trains_like_one_rank(mode, dp, tensor, domain, expected):
    """The same model, operation by operation: its rows, its channels, its replicas, and every other one recomputed."""
    again = (dp + tensor + domain) % 2 == 0
    conf = conf_of(mode, tensor, domain, activation_checkpoint=again)
    conf["trainer"]["parallelism"]["partition"] = "graph"
    results = run_processes(
        partitioned_main, dp * tensor * domain, conf, torch.float64, "sgd", 6, timeout=200, fork=True
    )
    losses, gradients = expected["sgd"]
    compare(results, (losses[:6], gradients), 1e-9)


@pytest.mark.parametrize(("mode", "dp", "tensor", "domain"), [("fsdp2", 2, 1, 3), ("ddp", 1, 2, 2)])
def test_float32(mode, dp, tensor, domain):
    expected = reference(torch.float32, "sgd", 20)
    conf = conf_of(mode, tensor, domain)
    results = run_processes(rank_main, dp * tensor * domain, conf, torch.float32, "sgd", 20, fork=True)
    compare(results, expected, 1e-4)


@dataclass(frozen=True)
class Trainer:
    parallelism: ParallelismConfig
    timeout: float = 30.0
    activation_checkpoint: object = True


def test_a_section_with_types_is_that_of_yaml():
    config = ParallelismConfig("ddp", 1, 1)
    context = parallelize(make(torch.float64), Trainer(config))
    assert context.config is config
    assert context.timeout == timedelta(seconds=30)
    assert isinstance(context.model.mixers[0].forward, functools.partial)  # recomputed
    with pytest.raises(ValueError, match="activation_checkpoint must be true or false; got 'no'"):
        parallelize(make(torch.float64), Trainer(config, activation_checkpoint="no"))
    with pytest.raises(ValueError, match=r"4 ranks or more"):
        parallelize(make(torch.float64), Trainer(ParallelismConfig("ddp", 2, 2)))


def test_latitude_weights_and_activation_checkpointing():
    weights = torch.linspace(0.2, 1.8, HEIGHT, dtype=torch.float64) ** 2
    expected = reference(torch.float64, "sgd", 5, weights)
    conf = conf_of("fsdp2", 1, 3, activation_checkpoint=True)
    compare(run_processes(rank_main, 6, conf, torch.float64, "sgd", 5, weights, fork=True), expected, 1e-9)


def accumulated(rank, conf, parts):
    context = parallelize(make(torch.float64, rank), conf)
    xs, ys = data(torch.float64)
    dp_rank = 0 if context.manager is None else context.manager.dp_rank
    each = SAMPLES // context.layout.dp
    for part in range(parts):
        mine = slice(dp_rank * each + part * each // parts, dp_rank * each + (part + 1) * each // parts)
        with context.accumulate(last=part == parts - 1):
            batch = context.shard([xs[0, mine], ys[0, mine]])
            loss = context.mean((context.model(batch[0]) - batch[1]) ** 2) / parts
            loss.backward()
    context.sync_gradients()
    return [], {n.removeprefix("module."): whole(p.grad) for n, p in context.model.named_parameters()}


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "none"])
def test_accumulation(mode):
    expected = accumulated(0, conf_of("none", 1, 1), 1)
    ranks = 4 if mode != "none" else 2
    compare(run_processes(accumulated, ranks, conf_of(mode, 1, 2), 2, fork=True), expected, 1e-9)


@pytest.mark.parametrize(("mode", "reduction"), [("ddp", "all_reduce"), ("fsdp2", "reduce_scatter")])
def test_accumulation_sends_no_gradients_before_the_last(mode, reduction, monkeypatch):
    sent = 0

    def counting(original):
        def counted(*args, **kwargs):
            nonlocal sent
            sent += any(isinstance(value, Tensor) and value.numel() > 1 for value in (*args, *kwargs.values()))
            return original(*args, **kwargs)

        return counted

    for name in [name for name in dir(dist) if name.startswith(reduction)]:  # FSDP2 has called several, over the years
        monkeypatch.setattr(dist, name, counting(getattr(dist, name)))

    def rank_main(rank):
        context = parallelize(make(torch.float64), conf_of(mode, 1, 1), check_batches=0)
        counts = []
        for last in (False, False, True):
            start = sent
            with context.accumulate(last=last):
                context.model(torch.ones(1, 2, HEIGHT, WIDTH, dtype=torch.float64)).sum().backward()
            counts.append(sent - start)
        return counts

    for *before, at_last in run_processes(rank_main, 2, fork=True):
        assert before == [0, 0]
        assert at_last > 0


def violated(rank):
    context = parallelize(Net(), conf_of("ddp", 1, 2))
    batch = {"x": torch.full((1, 2, HEIGHT, WIDTH), float(rank))}  # as a sampler of the global rank would
    with pytest.raises(ValueError, match="rank=dp_rank, num_replicas=dp_size"):
        context.shard(batch)


def test_a_sampler_of_the_global_rank_is_caught_on_all_ranks():
    run_processes(violated, 4, fork=True)


def not_finite(rank):
    context = parallelize(Net(), conf_of("none", 1, 2))
    optimizer = torch.optim.SGD(context.model.parameters(), 0.1)
    before = [p.detach().clone() for p in context.model.parameters()]
    x = torch.zeros(1, 2, HEIGHT, WIDTH)
    x[0, 0, HEIGHT - 1, 0] = float("nan")  # seen by the last rank alone
    loss = context.mean(context.model(context.shard(x)) ** 2)
    assert not context.check_finite(loss)
    loss.backward()
    with pytest.raises(ValueError, match="the norm of the gradients is not finite"):
        context.step(optimizer, 1.0)
    assert all(torch.equal(p, q) for p, q in zip(context.model.parameters(), before, strict=True))


def test_what_is_not_finite_is_seen_by_all():
    run_processes(not_finite, 2, fork=True)


def memory(rank, conf):
    model = Net()
    total = sum(p.numel() for p in model.parameters())
    context = parallelize(model, conf)
    parameters = list(context.model.parameters())
    return total, sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


def test_parameters_are_divided_over_data_and_domain():
    results = run_processes(memory, 6, conf_of("fsdp2", 1, 3), fork=True)
    total, _ = results[0]
    assert sum(own for _, own in results) == total
    assert max(own for _, own in results) < total / 2  # small layers do not divide evenly
    _, own = run_processes(memory, 4, conf_of("none", 2, 2), fork=True)[0]
    pairs = 2 * (4 * 16 + 16 + 16 * 4)  # the columns, their biases and the rows of two mixers
    assert own == total - pairs // 2


def test_one_rank_without_torch_distributed():
    context = parallelize(Net(), {"trainer": {"parallelism": {"data": "fsdp2"}}})
    assert isinstance(context, ParallelContext)
    x = torch.randn(2, 2, HEIGHT, WIDTH)
    assert context.shard(x) is x
    assert context.gather(x) is x
    loss = context.mean(context.model(x) ** 2)
    torch.testing.assert_close(loss, (context.model(x) ** 2).mean())
    loss.backward()
    optimizer = torch.optim.SGD(context.model.parameters(), 0.1)
    norm = context.step(optimizer, 1.0)
    assert norm > 0
    assert all(p.grad is None for p in context.model.parameters())
    assert len(list(context.sampler(range(5)))) == 5
    context.seed(3)
    with pytest.raises(ValueError, match="needs 2 ranks or more: start the program with torchrun"):
        parallelize(Net(), conf_of("none", 1, 2))


def mistakes(rank):
    with pytest.raises(ValueError, match="modules may mix rows"):
        parallelize(nn.Sequential(nn.Unfold(3)), conf_of("none", 1, 2))
    with pytest.raises(ValueError, match="not divisible|does not divide|multiple"):
        parallelize(Net(), conf_of("none", 3, 1))


def test_mistakes_are_errors_on_all_ranks():
    run_processes(mistakes, 2, fork=True)


README = Path(__file__).parents[1] / "README.md"


def run_text(rank, text):
    """Run a script as torchrun would: the world is there already, and what it prints is kept."""
    lines: list[str] = []
    dist.is_torchelastic_launched = lambda: dist.get_world_size() > 1
    dist.init_process_group = lambda: None
    exec(text, {"print": lines.append, "__name__": "__main__"})
    return [float(line.removeprefix("loss ")) for line in lines]


@pytest.mark.slow
def test_the_script_of_the_readme():
    """The very text, on one rank and on four: the same losses."""
    text = README.read_text().split("```python\n")[1].split("```")[0]
    alone = run_processes(run_text, 1, text, timeout=120)[0]
    assert len(alone) == 5
    assert alone[-1] < alone[0]
    for printed in run_processes(run_text, 4, text, timeout=120):
        torch.testing.assert_close(torch.tensor(printed), torch.tensor(alone), rtol=1e-4, atol=1e-5)
