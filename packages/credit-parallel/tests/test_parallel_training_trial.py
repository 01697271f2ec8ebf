"""A model whose own code mixes rows is partitioned by `train`, or refused before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from credit_halo.testing import RankError, run_processes
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import check
from credit_parallel.app.training.experiment import prepare
from credit_parallel.domain import is_partitioned


class PoolByHand(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y - y.mean((-2, -1), keepdim=True)


def prepared(rank: int, trial: bool, folder: Path, partition: str = "auto") -> bool:
    """Whether it is partitioned operation by operation."""
    trainer = {"steps": 1, "trial": trial, "parallelism": {"data": "none", "domain": 2, "partition": partition}}
    options = {"height": 12, "width": 16}
    model = {"name": f"{__name__}:PoolByHand"}
    config = {"folder": str(folder), "data": {"options": options}, "model": model, "trainer": trainer}
    experiment = prepare(check(RunConfig.from_dict(config), 2), torch.device("cpu"))
    return is_partitioned(experiment.context.model)


def test_it_is_partitioned_or_refused_before_the_first_step_unless_that_is_switched_off(tmp_path: Path) -> None:
    assert run_processes(prepared, 2, True, tmp_path) == [True] * 2
    with pytest.raises(RankError, match=r"the model itself \(PoolByHand\)"):
        run_processes(prepared, 2, True, tmp_path, "modules")
    assert run_processes(prepared, 2, False, tmp_path) == [False] * 2
