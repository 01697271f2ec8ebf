"""The plan of a partitioned model says what its ranks send: to the message and the byte."""

from __future__ import annotations

import copy
import time
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from domain_partitioned import SharedGhost
from partition_cases import CASES, LAYERS, H
from torch import nn
from trial_models import COLUMNS, FAULTS, ROWS
from trial_models import Net as Around

from credit_domain import initialize_domain_parallel, partition_model, plan_domain_parallel
from credit_domain.partitioner import partitioning
from credit_domain.partitioner.program_plan import ProgramPlanner
from credit_halo.testing import run_threads
from credit_mesh import RowPartition

SIZES = (4, 2, 3, 3)


def counted(model: nn.Module, inputs: list[torch.Tensor], sizes=SIZES, calls_before: int = 0) -> list[tuple[int, int]]:
    """Messages and bytes that each of four ranks sends in a forward; those of a transposition count apart."""
    sent: Counter[Any] = Counter()
    partition, ghost = RowPartition(sizes), SharedGhost(model)
    (kind,) = run_threads(lambda rank: type(dist.group.WORLD), 1)
    send, spread = kind.send, kind.all_to_all
    on = False

    def sending(self, tensor, dst, tag=0):
        if on:
            sent[self._rank, "messages"] += 1
            sent[self._rank, "bytes"] += tensor.numel() * tensor.element_size()
        return send(self, tensor, dst, tag)

    def spreading(self, outputs, inputs):
        if on:
            others = [x.numel() * x.element_size() for rank, x in enumerate(inputs) if rank != self._rank]
            sent[self._rank, "messages"] += sum(size > 0 for size in others)
            sent[self._rank, "bytes"] += sum(others)
        return spread(self, outputs, inputs)

    def rank_main(rank: int) -> None:
        nonlocal on
        manager = initialize_domain_parallel(4, 4)
        manager.declare(partition)
        mine, rows = copy.deepcopy(model), partition.interval(rank)
        partition_model(mine, tuple(inputs), manager)
        divided = mine._partition.divided
        own = [x[..., rows.start : rows.stop, :] if f"[0][{i}]" in divided else x for i, x in enumerate(inputs)]
        for _ in range(calls_before):
            mine(*own)
        manager.domain_group.barrier()
        on = True
        mine(*own)

    with (
        mock.patch.object(kind, "send", sending),
        mock.patch.object(kind, "all_to_all", spreading),
        mock.patch.object(partitioning, "Ghost", return_value=ghost),
    ):
        run_threads(rank_main, 4)
    return [(sent[rank, "messages"], sent[rank, "bytes"]) for rank in range(4)]


@pytest.mark.parametrize("name", [*CASES, *LAYERS])
def test_what_is_planned_is_what_is_sent(name: str) -> None:
    """Bytes of all ranks together; messages of the busiest rank, which need not be the same at each operator."""
    case = (CASES | LAYERS)[name]
    torch.manual_seed(0)
    model = case.make().double().eval()
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in case.shapes]
    assert inputs[0].shape[-2] == H
    sent = counted(model, inputs)
    plan = ProgramPlanner(model, tuple(inputs)).plan(4, RowPartition(SIZES))
    layers = [layer for layer in plan.layers if layer.collective != "reduction"]
    reduced = sum(layer.total_bytes for layer in plan.layers if layer.collective == "reduction")
    beside = sum(size for _, size in sent) - sum(layer.total_bytes for layer in layers)
    assert beside == 0 if not reduced else 0 <= beside <= 6 * reduced  # extremes and moments are sent, sums are not
    if not beside:
        busiest = max(messages for messages, _ in sent)
        assert busiest <= sum(layer.messages for layer in layers) <= 3 * busiest
        assert max(size for _, size in sent) <= sum(layer.bytes for layer in layers)


def test_convolutions_of_one_value_share_an_exchange() -> None:
    """Known from the first call on: the second one sends what the widest kernel reads, and what the pooling does."""

    def convolved(*kernels: int) -> nn.Module:
        layers = [nn.Conv2d(4, 4, kernel, padding=kernel // 2).double() for kernel in kernels]

        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.branches = nn.ModuleList(layers)

            def forward(self, x):
                return sum(branch(x) for branch in self.branches) + F.max_pool2d(x, 3, 1, 1)

        return Branches()

    inputs, sizes = [torch.randn(2, 4, 32, 16, dtype=torch.float64)], (8, 7, 9, 8)
    first = counted(convolved(3, 5, 7), inputs, sizes)
    later = counted(convolved(3, 5, 7), inputs, sizes, calls_before=1)
    assert later == counted(convolved(7), inputs, sizes) != first


def test_a_plan_for_many_ranks_takes_seconds() -> None:
    """A UNet-like chain with windows, a transform along rows, and a gather, on 1,024 ranks; 60 operators that send."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(27))

        def forward(self, x):
            for conv in self.convs:
                x = x + torch.tanh(conv(x))
            x = torch.fft.fft(torch.roll(x, 5, -2), dim=-2).real.to(x)
            return torch.tril(x) + x.mean(-2, keepdim=True)

    model = nn.Sequential(Stage(), Stage())
    planner = ProgramPlanner(model, (1, 4, 2048, 1024))
    start = time.process_time()
    plan = planner.plan(1024)
    assert time.process_time() - start < 20
    assert plan.partition.ranks == 1024
    assert sum(layer.kind == "conv2d" for layer in plan.layers) == 54
    assert {layer.collective for layer in plan.layers} == {"exchange", "gather", "transpose"}
    assert sum("every rank does aten.tril.default" in note for note in plan.notes) == 2
    convolution = next(layer for layer in plan.layers if layer.kind == "conv2d")
    assert (convolution.messages, convolution.bytes) == (2, 2 * 4 * 1024 * 4)
    (gather, *_) = (layer for layer in plan.layers if layer.collective == "gather")
    assert (gather.messages, gather.bytes) == (1023, 1023 * 2 * 4 * 1024 * 4)


def test_what_modules_cannot_is_planned_by_operations() -> None:
    with pytest.raises(ValueError, match="modules may mix rows"):
        plan_domain_parallel(Around(Refused()), (1, 3, ROWS, COLUMNS), 3, method="modules")
    plan = plan_domain_parallel(Around(Refused()), (1, 3, ROWS, COLUMNS), 3)
    assert [layer.kind for layer in plan.layers] == ["conv2d", "conv2d"]
    assert "planned operation by operation" in plan.notes[0]
    assert "conv2d" in str(plan)
    by_modules = plan_domain_parallel(Around(FAULTS[3]()), (1, 3, ROWS, COLUMNS), 3)
    by_operations = plan_domain_parallel(Around(FAULTS[3]()), (1, 3, ROWS, COLUMNS), 3, method="graph")
    assert [layer.kind for layer in by_modules.layers] != [layer.kind for layer in by_operations.layers]
    with pytest.raises(ValueError, match=r"(?s)2 \(Refused\).*It cannot be partitioned .* either"):
        plan_domain_parallel(nn.Sequential(nn.Identity(), Branches(), Refused()), (1, 3, ROWS, COLUMNS), 3)


class Refused(nn.Unfold):
    """A layer without a rule, in a model that runs."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x):
        return super().forward(x).view(x.shape)


class Branches(nn.Module):
    def forward(self, x):
        return x.flip(-2) if x.sum() > 0 else x
