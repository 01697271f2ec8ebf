"""The plan of a model: what it will send, and what would fail, without ranks or data."""

from __future__ import annotations

import json
import time

import pytest
import torch
from domain_models import CubeEmbedding, MultiKernelEmbedding, PeriodicConv2d, PeriodicResidualNet, UNet
from domain_reference import partitions, shard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from credit_domain import convert_to_domain_parallel, plan_domain_parallel
from credit_domain.blocks import WindowAttention
from credit_domain.layers import DomainParallelPeriodicConv2d
from credit_domain.model.planning import traffic
from credit_domain.ops.conv.convolution import Convolution
from credit_halo import plan_rows
from credit_halo.testing import ThreadGroup, run_threads
from credit_mesh import RowPartition, get_domain_parallel_manager, initialize_domain_parallel


@settings(max_examples=100)
@given(st.data(), partitions(st.integers(4, 40)))
def test_traffic_is_that_of_the_exchange(data, partition):
    mode = data.draw(st.sampled_from(["zeros", "replicate", "circular", "reflect"]))
    kernel, stride = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    pads = (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
    try:
        found = Convolution(kernel, stride, *pads, 1, mode).footprint(partition)
    except ValueError:
        return
    plans = [plan_rows(partition, found.needs, rank=rank, edge=mode) for rank in range(partition.ranks)]
    _, _, sent, messages = traffic(found)
    assert sent == [plan.sent_rows for plan in plans]
    assert messages == [len(plan.sends) for plan in plans]


class StridedWindows(nn.Module):
    """Convolutions that have a total stride, around windows that exchange rows by themselves."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 4, 2, 2), nn.ConvTranspose2d(4, 2, 2, 2)
        self.windows = WindowAttention(4, (2, 2), 2, (1, 1))

    def forward(self, x):
        return self.up(self.windows(self.down(x)))


def test_a_run_for_shapes_takes_no_other_rank_along():
    """The blocks of a model look up the present manager, and must not find it."""

    def planned(rank):
        manager = initialize_domain_parallel(2, 2)
        plan_domain_parallel(StridedWindows(), (1, 2, 16, 8), 2)
        convert_to_domain_parallel(StridedWindows(), manager, input_shape=(1, 2, 16, 8))
        assert get_domain_parallel_manager() is manager
        return manager.granularity

    assert run_threads(planned, 2) == [2, 2]


def test_unet():
    plan = plan_domain_parallel(UNet(), (2, 3, 36, 12), 3)
    assert plan.partition == RowPartition((12, 12, 12))
    first = plan.layers[0]
    assert (first.name, first.kind, first.rows, first.halo) == ("stem.body.0", "Conv2d", 36, (1, 1))
    assert first.messages == 2
    assert first.bytes == 2 * (2 * 3 * 12 * 4)
    assert first.total_bytes == 4 * (2 * 3 * 12 * 4)
    norm = next(layer for layer in plan.layers if layer.kind == "GroupNorm")
    assert norm.collective == "reduction"
    down = next(layer for layer in plan.layers if layer.name == "down1")
    assert down.target == RowPartition((6, 6, 6))
    assert plan.notes == ()
    text = str(plan)
    assert text.splitlines()[1].split() == ["layer", "kind", "rows", "rows/rank", "halo", "messages", "KiB"]
    assert "busiest rank, one forward" in text
    as_dict = json.loads(json.dumps(plan.to_dict()))
    assert as_dict["layers"][0]["bytes"] == first.bytes
    assert as_dict["partition"] == [12, 12, 12]


def test_a_thousand_ranks_in_seconds():
    start = time.process_time()
    plan = plan_domain_parallel(UNet(), (1, 3, 4 * 1024, 64), 1024)
    assert plan.partition.ranks == 1024
    assert plan.layers[0].messages == 2
    assert time.process_time() - start < 60  # a few seconds; planning each rank's part would take many minutes


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (UNet, (1, 3, 36, 12)),
        (lambda: UNet(odd=True), (1, 3, 41, 12)),
        (CubeEmbedding, (1, 2, 4, 36, 8)),
        (lambda: nn.Sequential(nn.Upsample(scale_factor=1.7, mode="bicubic"), nn.ReflectionPad2d(2)), (1, 2, 13, 5)),
        (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d((5, 3))), (1, 2, 23, 8)),
    ],
)
def test_bytes_are_those_that_are_sent(make, shape, monkeypatch):
    """Counted where messages leave, in a forward of the converted model."""
    plan = plan_domain_parallel(make(), shape, 3)
    twins = [make() for _ in range(3)]
    sent: list[tuple[int, int]] = []
    send = ThreadGroup.send

    def counting(group, tensor, dst, tag=0):
        sent.append((group.rank(), tensor.nbytes))
        return send(group, tensor, dst, tag)

    monkeypatch.setattr(ThreadGroup, "send", counting)

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        twin = convert_to_domain_parallel(twins[rank], manager, check=False)  # a trial sends rows too
        manager.declare(plan.partition)
        with torch.no_grad():
            twin(shard(torch.ones(shape), plan.partition, rank))

    run_threads(rank_main, 3)
    exchanges = [layer for layer in plan.layers if layer.collective == "exchange"]
    assert sum(size for _, size in sent) == sum(layer.total_bytes for layer in exchanges)
    most = max(sum(rank == r for rank, _ in sent) for r in range(3))
    assert most <= plan.messages


def test_what_would_fail_later_fails_now_by_name():
    with pytest.raises(ValueError, match="Sequential could not be run for its shapes alone .in 0.: RuntimeError"):
        plan_domain_parallel(nn.Sequential(nn.Conv2d(3, 3, 3)), (1, 2, 9, 9), 2)
    with pytest.raises(ValueError, match="at most 2 ranks fit 9 rows in blocks of 8"):
        plan_domain_parallel(nn.Sequential(nn.Conv2d(1, 1, 8, 8)), (1, 1, 9, 9), 3)
    with pytest.raises(ValueError, match="1 modules may mix rows.*\n.*1 .Unfold"):
        plan_domain_parallel(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Unfold(3)), (1, 1, 9, 9), 2, method="modules")
    with pytest.raises(ValueError, match="no input has rows to shard"):
        plan_domain_parallel(nn.Linear(2, 2), (2, 2), 2)


def test_a_skip_connection_that_would_not_meet_is_noted():
    plan = plan_domain_parallel(UNet(), (1, 3, 36, 12), 3, partition=RowPartition((13, 11, 12)))
    assert any("must be divided alike" in note for note in plan.notes)


def test_custom_converters_are_not_planned_and_said_so():
    custom = {PeriodicConv2d: DomainParallelPeriodicConv2d}
    plan = plan_domain_parallel(PeriodicResidualNet(), (1, 3, 17, 10), 3, custom_converters=custom)
    assert {layer.kind for layer in plan.layers} == {"InstanceNorm2d"}
    assert any(note.startswith("stem: by a custom converter") for note in plan.notes)


def test_the_model_is_not_touched_and_takes_no_memory():
    model = MultiKernelEmbedding()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_domain_parallel(model, (1, 3, 4_000, 640_000), 7)
    assert plan.partition.rows == 4_000
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not model._forward_hooks
