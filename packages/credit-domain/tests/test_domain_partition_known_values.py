"""What a forward makes of numbers alone can be read while it is traced; all else is refused, never guessed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from domain_partitioned import check_partitioned
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from credit_domain import initialize_domain_parallel, partition_model
from credit_domain.partitioner import capture, known_values
from credit_domain.partitioner.known_values import KnownValues
from credit_halo.testing import run_threads

H, W = 12, 6


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution of an input and a number that a function makes."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.number = nn.Conv2d(2, 2, 3, padding=1), number

    def forward(self, x: Tensor) -> Tensor:
        made = self.number(x)
        return self.conv(x) * (made if isinstance(made, Tensor) else float(made))


def checked_latitudes(x: Tensor) -> Tensor:
    lat = torch.linspace(90, -90, x.shape[-2], dtype=x.dtype, device=x.device)
    if not (torch.all(lat <= 90) and (lat[1:] - lat[:-1] < 0).all()):
        raise ValueError("latitudes must be strictly decreasing")
    assert float(lat.abs().max()) == 90.0
    return torch.cos(torch.deg2rad(lat)).clamp(min=0)[:, None]


def changed_in_place(x: Tensor) -> float:
    table = torch.zeros(4)
    row = table[1:3]
    row += 2
    table[0] = row.sum()
    return table.sum().item()


def by_numpy(x: Tensor) -> float:
    steps = torch.as_tensor(np.arange(3.0)).add_(1)
    return float(np.asarray(steps).sum() + steps.numpy()[0])


def of_its_shape(x: Tensor) -> float:
    count = torch.ones_like(x).sum().int()
    return len(range(x.new_full((2,), 3).int()[1])) / math.ceil(count / 100)


def lists(x: Tensor) -> float:
    first, *others = torch.linspace(0, 1, 5).tolist()
    halves = torch.arange(6).chunk(2)
    return first + sum(others) + int(halves[1][0]) + bool(torch.equal(halves[0], halves[1] - 3))


def moved(x: Tensor) -> float:
    return float(torch.arange(4, device=x.device).to(x.device, torch.float64).to(x).cpu().max())


@pytest.mark.parametrize("number", [checked_latitudes, changed_in_place, by_numpy, of_its_shape, lists, moved])
def test_a_number_of_numbers_alone_is_read(number):
    report = check_partitioned(Net(number).double(), [randn(1, 2, H, W)], (5, 3, 4))
    assert not report.gathered


def of_input(x: Tensor) -> float:
    return float(x.mean())


def of_a_changed_table(x: Tensor) -> float:
    table = torch.zeros(4, dtype=x.dtype)
    row = table[1:3]
    table[1] = x.mean()
    return row.sum().item()


def of_a_changed_view(x: Tensor) -> float:
    line = torch.ones(1, dtype=x.dtype)
    line.expand_as(x[0, 0, 0, :1]).add_(x.mean())
    return float(line)


def of_out(x: Tensor) -> float:
    line = torch.ones(2, dtype=x.dtype)
    torch.mul(x[0, 0, 0, :2], 2, out=line)
    return float(line[0])


def random(x: Tensor) -> float:
    return float(torch.rand(3).sum())


def random_in_place(x: Tensor) -> float:
    return float(torch.zeros(3).uniform_().sum())


def large(x: Tensor) -> float:
    return float(torch.ones(known_values._MOST + 1).sum())


@pytest.mark.parametrize(
    "number", [of_input, of_a_changed_table, of_a_changed_view, of_out, random, random_in_place, large]
)
def test_a_number_of_anything_else_is_refused_where_it_is_read(number):
    net = Net(number)

    def rank_main(rank: int) -> None:
        manager = initialize_domain_parallel(1, 1)
        with pytest.raises(ValueError, match="cannot be traced") as caught:
            partition_model(net, (1, 2, H, W), manager)
        if number is of_input:
            assert "test_domain_partition_known_values.py" in str(caught.value)
        assert "partitioner" not in str(caught.value)

    state = torch.get_rng_state()
    run_threads(rank_main, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_attribute_is_another_number():
    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.level = nn.Conv2d(2, 2, 3, padding=1), 3

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if torch.tensor([self.level]).sum() > 2 else x * float(torch.tensor(self.level) + 1)

    def rank_main(rank: int) -> None:
        model = Level()
        plain = copy.deepcopy(model.conv)
        partition_model(model, (1, 2, H, W), initialize_domain_parallel(1, 1))
        x = torch.randn(1, 2, H, W, generator=torch.Generator().manual_seed(1))
        assert torch.equal(model(x), plain(x))
        model.level = 1
        assert torch.equal(model(x), x * 2)

    run_threads(rank_main, 1)


CHANGES = {
    "view": lambda a, b, x: a[1:] if len(a) > 1 else a[:],
    "reshape": lambda a, b, x: a.reshape(1, -1)[0],
    "sum": lambda a, b, x: a.sum() + b,
    "cat": lambda a, b, x: torch.cat([a, b]),
    "flip": lambda a, b, x: a.flip(0),
    "add_": lambda a, b, x: a.add_(3),
    "+=": lambda a, b, x: a.__iadd__(b[-1].clone()),
    "set": lambda a, b, x: a.__setitem__(0, b[0].clone()),
    "set unknown": lambda a, b, x: b.__setitem__(-1, x.mean()),
    "add unknown": lambda a, b, x: b[:1].add_(x.sum()),
    "copy unknown": lambda a, b, x: a.copy_(x.flatten()[: len(a)]),
    "of unknown": lambda a, b, x: a + x.mean(),
    "like": lambda a, b, x: a.new_ones(2),
    "as": lambda a, b, x: b[:1].expand_as(x.flatten()[:1]),
}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_what_is_read_is_what_one_rank_reads(steps):
    read: list[list[Any]] = []

    def program(x: Tensor) -> None:
        made = [torch.arange(3, dtype=x.dtype), torch.zeros(2, dtype=x.dtype)]
        for name, first, second in steps:
            new = CHANGES[name](made[first % len(made)], made[second % len(made)], x)
            if isinstance(new, Tensor):
                made.append(new)
        read.append([])
        for each in made:
            try:
                read[-1].append(each.tolist())
            except Exception:
                read[-1].append(None)

    program(randn(20, 3))
    with capture.fake_mode(), KnownValues():
        program(torch.empty(20, 3, dtype=torch.float64))
    if not any("unknown" in name or name == "as" for name, _, _ in steps):
        assert read[1] == read[0]
    for real, traced in zip(read[0], read[1], strict=True):
        assert traced in (None, real)
