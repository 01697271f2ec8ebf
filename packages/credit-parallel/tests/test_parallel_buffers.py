"""Buffers of replicas: validation and checkpoints do not depend on which replica looks, nor on the domain."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from credit_halo.testing import run_processes
from credit_parallel import parallelize
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import check, train
from credit_parallel.app.training.log import FILE, read_metrics
from credit_parallel.buffers import sync_buffers, tell_replica_statistics


def net_of(in_channels, out_channels, norm="batch"):
    kinds = {"batch": nn.BatchNorm2d, "sync": nn.SyncBatchNorm}
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, padding=1), kinds[norm](6), nn.GELU(), nn.Conv2d(6, out_channels, 3, padding=1)
    )


def trained(rank, conf):
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    train(check(RunConfig.from_dict(conf), world), torch.device("cpu"))


def lines(folder, ranks, parallelism, norm="batch"):
    """What a small training in float64 logs: losses, and scores of the validation."""
    conf = {
        "folder": str(folder),
        "data": {"options": {"height": 19, "width": 8, "trajectories": 2, "times": 10}, "valid": [0.7, 1.0]},
        "model": {"name": f"{__name__}:net_of", "norm": norm},
        "trainer": {
            "parallelism": parallelism,
            **{"steps": 3, "batch_size": 4, "lr": 1e-2, "valid_every": 2, "dtype": "float64", "device": "cpu"},
        },
    }
    if ranks == 1:
        trained(0, conf)
    else:
        run_processes(trained, ranks, conf, timeout=900)
    read = read_metrics(Path(folder) / FILE)
    scores = [line for line in read if line["event"] == "valid"]
    assert [line["step"] for line in scores] == [2, 3]
    return [line["loss"] for line in read if line["event"] == "train"], [
        value for line in scores for name in ("rmse", "bias") for values in line[name].values() for value in values
    ]


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory):
    return lines(tmp_path_factory.mktemp("two"), 2, {"data": "ddp"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism",
    [{"data": data, "domain": domain} for data in ("ddp", "fsdp2") for domain in (1, 2, 3)][1:],
    ids=lambda parallelism: f"{parallelism['data']} {parallelism['domain']}",
)
def test_scores_do_not_depend_on_the_domain(parallelism, two_replicas, tmp_path):
    losses, scores = lines(tmp_path, 2 * parallelism["domain"], parallelism)
    assert losses == pytest.approx(two_replicas[0], rel=1e-9)
    assert scores == pytest.approx(two_replicas[1], rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallelism"), [(2, {"domain": 2}), (4, {"data": "ddp", "domain": 2})], ids=["domain", "both"]
)
def test_sync_batch_norm_is_one_ranks_batch_norm(ranks, parallelism, tmp_path):
    expected = lines(tmp_path / "one", 1, {})
    losses, scores = lines(tmp_path / "all", ranks, parallelism, "sync")
    assert losses == pytest.approx(expected[0], rel=1e-9)
    assert scores == pytest.approx(expected[1], rel=1e-9, abs=1e-12)


class Counting(nn.Module):
    """Its forward reads a buffer that the forward before it wrote, and holds one of this rank's rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("rows", torch.zeros(2))

    def forward(self, x):
        out = x * self.weight * (1 + self.seen)
        self.seen.add_(x.detach().sum())
        return out


def losses_of(domain, data):
    """Losses of three steps of two replicas, and the buffers of every rank."""

    def rank_main(rank):
        # Its buffer sums this rank's rows, as a trial would say.
        conf = {"trainer": {"parallelism": {"data": data, "domain": domain}}}
        context = parallelize(Counting(), conf, check=False)
        optimizer = torch.optim.SGD(context.model.parameters(), 1e-3)
        dict(context.model.named_modules())["module" if data == "ddp" else ""].rows.fill_(rank % domain)
        found = []
        for step in range(3):
            loss = context.model(
                torch.full((1, 1, 2, 2), (step + 1.0 + rank // domain) / 4, dtype=torch.float64)
            ).mean()
            loss.backward()
            context.step(optimizer)
            found.append(float(loss.detach()))
        context.sync_buffers()
        return found, {name.removeprefix("module."): value.clone() for name, value in context.model.named_buffers()}

    return run_processes(rank_main, 2 * domain, fork=True)


@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
def test_each_forward_reads_the_same_and_rows_stay(data):
    alone, two = losses_of(1, data), losses_of(2, data)
    for rank, (losses, buffers) in enumerate(two):
        expected, others = alone[rank // 2]
        assert losses == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(buffers["seen"], others["seen"])
        assert buffers["rows"].tolist() == [rank % 2] * 2
    assert len({float(buffers["seen"]) for _, buffers in (*alone, *two)}) == 1


def test_without_replicas_nothing_is_done():
    model = Counting()
    sync_buffers(model)
    assert tell_replica_statistics(nn.BatchNorm2d(2), 1) == []


def test_what_depends_on_replicas_is_said_once(caplog):
    def rank_main(rank):
        net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.SyncBatchNorm(2).eval(), nn.BatchNorm2d(2).eval())
        context = parallelize(net, {"trainer": {"parallelism": {"data": "ddp", "domain": 2}}})
        context.manager.declare(4)
        optimizer = torch.optim.SGD(context.model.parameters(), 1e-3)
        for _ in range(2):
            context.model(torch.ones(1, 2, 2, 2) + rank).square().mean().backward()
            context.step(optimizer)
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.WARNING, "credit_parallel"):
        messages = run_processes(rank_main, 4, fork=True)
    (said,) = [message for by_rank in messages for message in by_rank if "BatchNorm" in message]
    assert said.startswith("1: BatchNorm normalises by the samples of its own replica")


def test_sync_batch_norm_counts_each_sample_once_under_tensor_parallelism():
    """Tensor-parallel peers have the same samples: they would make the unbiased variance that of twice as many."""
    x = torch.randn(4, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = nn.BatchNorm2d(2).double()
    plain(x)

    def rank_main(rank):
        net = nn.Sequential(nn.SyncBatchNorm(2).double())
        context = parallelize(net, {"trainer": {"parallelism": {"data": "none", "tensor": 2, "domain": 2}}})
        context.manager.declare(4)
        context.model(context.shard(x))
        return context.model[0].running_var.clone()

    for found in run_processes(rank_main, 4, fork=True):
        torch.testing.assert_close(found, plain.running_var)
