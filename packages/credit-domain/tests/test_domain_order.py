"""Two like layers in another order on one rank: told apart by name without a message of its own, or by debugging."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from credit_domain import convert_to_domain_parallel
from credit_halo.testing import run_threads
from credit_mesh import RowPartition, initialize_domain_parallel

PARTITION = RowPartition((3, 1, 4))


class Two(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.two = kind(), kind()

    def forward(self, x, y, swap=False):
        if swap:
            two = self.two(y)
            return self.one(x), two
        one = self.one(x)
        return one, self.two(y)


class Twice(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one = kind()

    def forward(self, x, y, swap=False):
        if swap:
            two = self.one(y)
            return self.one(x), two
        one = self.one(x)
        return one, self.one(y)


KINDS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "batch": lambda: nn.BatchNorm2d(4),
    "layer": lambda: nn.LayerNorm((8, 3)),
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "pool": lambda: nn.AdaptiveAvgPool2d(1),
}


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("kind", ["group", "batch", "layer"])
def test_norms_of_one_shape_without_debugging(kind, warm):
    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        mine = convert_to_domain_parallel(Two(KINDS[kind]).double(), manager)
        x, y = (torch.full((2, 4, PARTITION.sizes[rank], 3), value, dtype=torch.float64) for value in (1.0, 2.0))
        for _ in range(warm):
            mine(x, y)
        with pytest.raises(ValueError, match="the ranks") as info:
            mine(x, y, swap=rank == 1)
        mine(x, y)
        return str(info.value)

    found = run_threads(rank_main, 3, timeout=60)
    assert all(re.search(r"rank 0, 2: one.*rank 1: two", message) for message in found)
    if warm:
        assert len(set(found)) == 1
        assert "statistics of different layers" in found[0]


@pytest.mark.parametrize("warm", [0, 3])
@pytest.mark.parametrize("made", [Two, Twice])
@pytest.mark.parametrize("kind", KINDS)
def test_debugging_tells_all_apart(kind, made, warm, monkeypatch):
    monkeypatch.setenv("CREDIT_HALO_DEBUG", "1")

    def rank_main(rank):
        manager = initialize_domain_parallel(3, 3)
        manager.declare(PARTITION)
        mine = convert_to_domain_parallel(made(KINDS[kind]).double(), manager)
        shape = (2, 4, PARTITION.sizes[rank], 3)
        x, y = (torch.full(shape, value, dtype=torch.float64, requires_grad=True) for value in (1.0, 2.0))
        for _ in range(warm):
            one, two = mine(x, y)
            (one.sum() + two.sum()).backward()
        with pytest.raises(ValueError, match="the ranks") as info:
            mine(x, y, swap=rank == 1)
        one, two = mine(x, y)
        (one.sum() + two.sum()).backward()
        return str(info.value)

    found = run_threads(rank_main, 3, timeout=60)
    assert all("rank 0, 2: " in message and "rank 1: " in message for message in found)
    if warm:
        assert len(set(found)) == 1
