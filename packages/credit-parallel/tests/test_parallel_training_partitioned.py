"""A training of a model that modules cannot convert: the same on every layout, through checkpoints and forecasts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from credit_halo.testing import run_processes
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import Reporter, check, train
from credit_parallel.app.training.log import FILE, read_metrics
from credit_parallel.domain import is_partitioned

HEIGHT, WIDTH = 21, 16


def conf_of(folder: Path, steps: int = 4, **parallelism: object) -> dict[str, object]:
    return {
        "folder": str(folder),
        "data": {"options": {"height": HEIGHT, "width": WIDTH, "trajectories": 2, "times": 12}, "valid": [0.75, 1.0]},
        "model": {"name": "partitioned_model:Net"},
        "trainer": {
            "parallelism": parallelism,
            "steps": steps,
            "batch_size": 2,
            "rollout": 2,
            "dtype": "float64",
            "device": "cpu",
        },
    }


class StopAt(Reporter):
    """Asks this process to stop after a step, as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, record: dict[str, object]) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trained(rank: int, conf: dict[str, object], stop: int = 0) -> bool:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    checked = check(RunConfig.from_dict(conf), world)
    train(checked, torch.device("cpu"), StopAt(stop))
    return is_partitioned(checked.model)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / FILE) if line["event"] == "train"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert not trained(0, conf_of(folder))
    return folder


LAYOUTS = [
    (3, {"domain": 3}),
    (4, {"data": "fsdp2", "domain": 2}),
    (4, {"data": "ddp", "domain": 2, "partition": "graph"}),
    (4, {"tensor": 2, "domain": 2}),
]


@pytest.mark.parametrize(("ranks", "parallelism"), LAYOUTS, ids=str)
def test_every_layout_has_the_losses_of_one_rank(ranks, parallelism, alone, tmp_path) -> None:
    assert all(run_processes(trained, ranks, conf_of(tmp_path, **parallelism), timeout=300))
    if parallelism.get("data", "none") == "none":  # with replicas, dropout masks differ
        assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-9)
    assert len(losses(tmp_path)) == 4


def test_a_training_goes_on_on_another_layout(tmp_path) -> None:
    """Without dropout, whose masks are drawn anew there; then in bfloat16, to which FSDP2 casts the parameters too."""

    def conf(folder: str, **parallelism: object) -> dict[str, object]:
        made = conf_of(tmp_path / folder, **parallelism)
        made["model"] = {"name": "partitioned_model:Net", "dropout": 0.0}
        return made

    trained(0, conf("alone"))
    narrow = conf("narrow", data="fsdp2", domain=2)
    narrow["trainer"].update(dtype="float32", amp=True)
    assert all(run_processes(trained, 4, narrow, timeout=300))
    assert losses(tmp_path / "narrow") == pytest.approx(losses(tmp_path / "alone"), rel=3e-2)
    assert all(run_processes(trained, 3, conf("moved", domain=3), 2, timeout=300))
    assert 2 <= len(losses(tmp_path / "moved")) < 4
    assert all(run_processes(trained, 4, conf("moved", data="fsdp2", domain=2), timeout=300))
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9)
