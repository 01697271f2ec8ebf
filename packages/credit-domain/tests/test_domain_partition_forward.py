"""What a forward does besides torch's operators: backwards of its own, attributes, hooks on gradients."""

from __future__ import annotations

import copy
import enum
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
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


class Remembers(nn.Module):
    """Adds what it has stored before."""

    def __init__(self, before: Tensor | None) -> None:
        super().__init__()
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        out = x if self.before is None else x + self.before
        self.before = x.detach().mean(-2, keepdim=True)
        return out


class Data(nn.Module):
    """Changes a parameter through ``data``, whose values it also reads there, which is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight.data
        self.weight.data.clamp_(0, 1)
        return x * self.weight


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
        (Remembers(None), "changes before, and what it does depends on that"),
        (Remembers(torch.ones(1, 3, 1, 4)), "changes before, and what it does depends on that"),
        (Data(), "changes a tensor through its data"),
        (Lucky(random.random), "draws random numbers with random, which"),
        (Lucky(lambda: float(numpy.random.rand())), r"draws random numbers with numpy\.random, which"),
    ],
    ids=["hook", "in place", "counter", "state", "another state", "data", "random", "numpy"],
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


class Average(nn.Module):
    """Keeps a moving average of its input, in place or by assignment; normalises by it in eval mode."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("top", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        new = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3))
        if self.how == "assigned":
            self.mean = new.detach()
            self.top = self.top + x.detach().amax()
        else:
            with torch.no_grad():
                self.mean.copy_(new)
                self.top += x.amax()
        return self.conv(x) - self.mean[:, None, None]


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_buffers_that_forward_changes_in_any_way(how: str) -> None:
    torch.manual_seed(0)
    check_partitioned(Average(how).double(), [randn(2, 3, 11, 8)], (6, 5), calls=3)


class ByGrad(nn.Module):
    """Another number where its input needs a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.requires_grad else 3 * x


class Config(enum.Enum):
    ONE = 1
    TWO = 2


@dataclass
class Options:
    scale: float = 1.0


class Configured(nn.Module):
    """Attributes of many kinds, one of which the class has, and a private one."""

    base = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.options, self.more, self.kind = Options(), {"scale": 1.0}, Config.ONE
        self.factor, self.names, self._hidden = numpy.float64(1.0), {"a"}, 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = self.options.scale * self.more["scale"] * self.kind.value * float(self.factor) * len(self.names)
        return self.conv(x) * scale * self.base * self._hidden


def on_two_ranks(plain: nn.Module, calls: list[Callable[[Any, Tensor], Any]], example: Any = None) -> list[list[Any]]:
    """What calls of a partitioned copy give on each of two ranks."""

    def rank_main(rank: int) -> list[Any]:
        manager = initialize_domain_parallel(2, 2)
        partition = RowPartition((4, 5))
        manager.declare(partition)
        model = partition_model(copy.deepcopy(plain), example or (1, 3, 9, 4), manager)
        rows = partition.interval(rank)
        return [call(model, randn(1, 3, 9, 4)[:, :, rows.start : rows.stop]) for call in calls]

    return run_threads(rank_main, 2)


CHANGES: dict[str, Callable[[Any], None]] = {
    "dataclass": lambda m: setattr(m.options, "scale", 2.0),
    "dict": lambda m: m.more.update(scale=2.0),
    "enum": lambda m: setattr(m, "kind", Config.TWO),
    "numpy": lambda m: setattr(m, "factor", numpy.float64(2.0)),
    "set": lambda m: m.names.add("b"),
    "private": lambda m: setattr(m, "_hidden", 2.0),
    "of the class": lambda m: setattr(m, "base", 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_attributes_of_many_kinds_are_followed(name: str) -> None:
    plain = Configured().double()

    def changed(model: Any, x: Tensor) -> Tensor:
        CHANGES[name](model)
        return model(x)

    parts = on_two_ranks(plain, [lambda model, x: model(x), changed])
    first, second = (torch.cat([part[at] for part in parts], -2) for at in range(2))
    torch.testing.assert_close(first, plain(randn(1, 3, 9, 4)))
    torch.testing.assert_close(second, 2 * first)


def test_a_branch_on_whether_the_input_needs_a_gradient() -> None:
    parts = on_two_ranks(ByGrad(), [lambda model, x: model(x), lambda model, x: model(x.requires_grad_()).detach()])
    x = randn(1, 3, 9, 4)
    for at, factor in enumerate((3, 2)):
        torch.testing.assert_close(torch.cat([part[at] for part in parts], -2), factor * x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.GELU(), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        x = self.act(self.conv(x))
        return x if aux is None else x + aux.mean(-2, keepdim=True)


def test_what_is_not_the_model_that_was_partitioned_is_refused() -> None:
    def with_more(model: Any, x: Tensor) -> None:
        with pytest.raises(ValueError, match=r"the argument .* of shape .* was not among the example inputs"):
            model(x, aux=x)

    def inner(model: Any, x: Tensor) -> None:
        with pytest.raises(ValueError, match="this Conv2d is part of a partitioned model"):
            model.conv(x)

    def replaced(model: Any, x: Tensor) -> None:
        model.act = nn.Tanh()
        with pytest.raises(ValueError, match=r"Two was changed after it was partitioned \(act\)"):
            model(x)

    on_two_ranks(Two().double(), [lambda model, x: model(x), with_more, inner, replaced])


class Layouts(nn.Module):
    """Results with rows at other dims, and without rows."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "channels last": x.movedim(1, -1),
            "transposed": x.transpose(-1, -2),
            "tokens": x.flatten(2),
            "coarse": x[..., ::2, :],
            "sorted": x.sort(-2).values,
            "product": x.prod(-2),
            "spectrum": torch.fft.fft(x, dim=-2).abs().mean(-2),
        }


def test_results_are_divided_where_their_rows_are_and_whole_without() -> None:
    parts = on_two_ranks(Layouts(), [lambda model, x: model(x)])
    dims = {"channels last": 1, "transposed": 3, "tokens": 2, "coarse": 2, "sorted": 2}
    for name, expected in Layouts()(randn(1, 3, 9, 4)).items():
        found = [part[0][name] for part in parts]
        if name in dims:
            torch.testing.assert_close(torch.cat(found, dims[name]), expected)
            assert found[0].shape[dims[name]] < expected.shape[dims[name]]
        else:
            for each in found:
                torch.testing.assert_close(each, expected)


def test_a_second_derivative_through_a_function_of_its_own_is_refused() -> None:
    def call(model: Any, x: Tensor) -> None:
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    on_two_ranks(Straight(), [call])


class Straight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x)
