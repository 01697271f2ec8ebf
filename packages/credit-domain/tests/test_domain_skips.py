"""Skip connections around a stride, on partitions that are no multiples of it: exact or refused, never broadcast."""

from __future__ import annotations

import copy

import pytest
import torch
from domain_reference import randn, shard
from torch import nn

from credit_domain import convert_to_domain_parallel
from credit_domain.manager import initialize_domain_parallel
from credit_domain.model.granularity import stride_of
from credit_halo.testing import RankError, run_threads
from credit_mesh import RowPartition


class Net(nn.Module):
    def __init__(self, down, up):
        super().__init__()
        self.first, self.down, self.mid, self.up = nn.Conv2d(2, 2, 3, padding=1), down, nn.Conv2d(2, 2, 3, 1, 1), up

    def forward(self, x):
        h = self.first(x)
        return h + self.up(self.mid(self.down(h)))


def strided():
    return nn.Conv2d(2, 2, 3, 2, 1)


PATHS = {
    "nearest": lambda: (strided(), nn.Upsample(scale_factor=2)),
    "bilinear": lambda: (strided(), nn.Upsample(scale_factor=2, mode="bilinear")),
    "transposed": lambda: (strided(), nn.ConvTranspose2d(2, 2, 4, 2, 1)),
    "odd": lambda: (strided(), nn.ConvTranspose2d(2, 2, 3, 2, 1)),
    "pool": lambda: (nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
    "shuffled": lambda: (nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.PixelShuffle(2))),
    "two levels": lambda: (nn.Sequential(strided(), strided()), nn.Sequential(*[nn.Upsample(scale_factor=2)] * 2)),
    "at once": lambda: (nn.Sequential(strided(), strided()), nn.Upsample(scale_factor=4)),
    "cropped": lambda: (
        nn.Conv2d(2, 2, 2, 2, 1),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.ZeroPad2d(-1)),
    ),
    "resampled": lambda: (nn.Upsample(scale_factor=0.5), nn.ConvTranspose2d(2, 2, 4, 2, 1)),
}
CASES = [(2, 2), (1, 2, 1), (1, 3), (2, 1, 1), (1, 2, 2), (3, 1, 1), (1, 1, 3), (2, 1, 3), (3, 3), (4, 1), (4, 4)]


def outcome(name, sizes, declare):
    """ "exact", or what the first rank that raised says; anything else fails."""
    partition = RowPartition(sizes)
    torch.manual_seed(0)
    net = Net(*PATHS[name]()).double()
    x = randn(1, 2, partition.rows, partition.rows)
    try:
        whole = net(x)
    except RuntimeError:
        return "no net"

    def rank_main(rank):
        manager = initialize_domain_parallel(partition.ranks, partition.ranks)
        model = convert_to_domain_parallel(copy.deepcopy(net), manager)
        if declare:
            manager.declare(partition)
        return model(shard(x, partition, rank)).detach()

    try:
        out = torch.cat(run_threads(rank_main, partition.ranks), -2)
    except RankError as error:
        return str(error)
    torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-10)
    return "exact"


@pytest.mark.parametrize("declare", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_never_broadcast(name, declare):
    found = [outcome(name, sizes, declare) for sizes in CASES]
    assert "exact" in found or "levels" in name or name == "at once"
    if not declare and name != "odd":
        assert any("would broadcast single rows" in each for each in found)


def test_a_resampling_to_a_fraction_is_a_stride():
    assert stride_of(nn.Upsample(scale_factor=0.5), -2) == (2, 1)
    assert stride_of(nn.Upsample(scale_factor=(0.25, 2.0)), -2) == (4, 1)
