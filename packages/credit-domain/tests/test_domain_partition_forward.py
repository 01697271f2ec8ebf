"""What a forward does besides torch's operators: backwards of its own, attributes, hooks on gradients."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from domain_partitioned import check_partitioned
from torch import Tensor, nn
from torch.autograd import Function

from credit_domain import initialize_domain_parallel, partition_model, partition_report
from credit_halo.testing import RankError, run_threads
from credit_mesh import RowPartition


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class StraightThrough(Function):
    """Rounds forward, and does nothing backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (3 * x).round() / 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Clipped(Function):
    """Mixes rows, has two results and an argument that is no tensor; backward, it depends on the gradient's norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        mean = x.mean(-2, keepdim=True)
        return x * weight * scale + mean, mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = ctx.scale * grad / grad.norm()
        return grad * weight + grad_mean / x.shape[-2], (grad * x).sum((0, 2, 3), keepdim=True), None


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.weight, self.table = nn.Parameter(torch.randn(1, 3, 1, 1)), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = StraightThrough.apply(self.conv(x))
        x, mean = Clipped.apply(x, self.weight, 0.7)
        return self.conv(x) + mean + StraightThrough.apply(self.table).sum()


@pytest.mark.parametrize("sizes", [(6, 5), (4, 1, 6), (3, 3, 3, 2)], ids=str)
def test_functions_with_a_backward_of_their_own(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    report = check_partitioned(OwnBackward().double(), [randn(2, 3, 11, 8)], sizes)
    assert [each.operation for each in report.repeated] == ["StraightThrough", "Clipped"]
    assert {move.operation for move in report.gathered} == {"StraightThrough"}, "Clipped reads what is whole already"
    assert sum(move.kind == "halo" for move in report.moves) == 2, "the convolutions work on this rank's rows"


class Hooked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        x.register_hook(lambda grad: grad.clamp(-1, 1))
        return x


class Dirty(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Dirty.apply(x + 1)


class Lucky(nn.Module):
    """Stochastic depth by Python's generator, or NumPy's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.draw() < 0.5 else x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Hooked(), r"registers a hook on the gradient of a tensor.*torch.autograd.Function"),
        (InPlace(), "Dirty changes its input in place"),
        (Counts(), "changes calls, and what it does depends on that"),
        (Lucky(random.random), "draws random numbers with random, which"),
        (Lucky(lambda: float(numpy.random.rand())), r"draws random numbers with numpy\.random, which"),
    ],
    ids=["hook", "in place", "counter", "random", "numpy"],
)
def test_what_no_program_can_keep_is_refused(model: nn.Module, message: str) -> None:
    def rank_main(rank: int) -> None:
        partition_model(copy.deepcopy(model), (1, 3, 8, 4), initialize_domain_parallel(2, 2))

    with pytest.raises(RankError, match=f"(?s){message}") as info:
        run_threads(rank_main, 2)
    assert all(isinstance(error, ValueError) for error in info.value.errors.values())


class Stores(nn.Module):
    """Stores the shape of its input, and a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.shape: tuple[int, ...] | None = None
        self.feature: Tensor | None = None
        self.rate, self.steps = 0.5, [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        self.shape = tuple(x.shape)
        self.feature = self.conv(x)
        return self.feature.flatten(2).reshape(self.shape) * self.rate * len(self.steps)


def test_what_forward_stores_may_be_what_it_does_not_depend_on(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        check_partitioned(Stores().double(), [randn(2, 3, 11, 8)], (6, 5))
    assert "forward of Stores stores tensors in feature" in caplog.text


def test_a_changed_attribute_is_another_program() -> None:
    torch.manual_seed(0)
    plain = Stores().double()
    x = randn(1, 3, 9, 4)

    def rank_main(rank: int) -> list[Tensor]:
        manager = initialize_domain_parallel(2, 2)
        partition = RowPartition((4, 5))
        manager.declare(partition)
        model = partition_model(copy.deepcopy(plain), (1, 3, 9, 4), manager)
        rows = partition.interval(rank)
        outs = []
        for rate, steps in ((0.5, [1, 2]), (0.25, [1, 2]), (0.25, [1, 2, 3]), (0.5, [1, 2])):
            model.rate, model.steps = rate, steps
            outs.append(model(x[:, :, rows.start : rows.stop]))
        assert len(model._partition.traces) == 3, "what was known is not traced again"
        assert partition_report(model).operators
        return outs

    parts = run_threads(rank_main, 2)
    for at, factor in enumerate((1.0, 0.5, 0.75, 1.0)):
        torch.testing.assert_close(torch.cat([part[at] for part in parts], -2), factor * plain.conv(x))
