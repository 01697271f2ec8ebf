"""What a step of the training computes, worked out by hand."""

from __future__ import annotations

import torch

from credit_parallel.app.config import RunConfig
from credit_parallel.app.training import check, prepare, rollout, train
from credit_parallel.app.training.log import FILE, read_metrics


def test_a_rollout_goes_on_from_its_own_output():
    """A model that adds the two states that it sees makes Fibonacci numbers of their increments."""
    states = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)
    known = torch.tensor([0.0, 10.0, 0.0]).view(1, 3, 1, 1, 1)
    found = rollout(lambda x: x.sum(1, keepdim=True), states, known, torch.tensor([2.0]))
    # 2 + 2 (1 + 2 + 0) = 8; 8 + 2 (2 + 8 + 10) = 48; 48 + 2 (8 + 48 + 0) = 160
    assert [float(state) for state in found] == [8.0, 48.0, 160.0]


def test_the_loss_is_weighted_by_latitude_and_by_typical_changes(tmp_path):
    """Of an untrained model, which predicts no change, over all samples at once."""
    data = {"options": {"height": 9, "width": 12, "trajectories": 1, "times": 8}, "train": [0, 1], "valid": None}
    trainer = {"steps": 1, "batch_size": 7, "dtype": "float64", "device": "cpu"}
    conf = {"folder": str(tmp_path), "data": data, "model": {"width": 8}, "trainer": trainer}
    checked = check(RunConfig.from_dict(conf), 1)
    experiment = prepare(checked, torch.device("cpu"))
    statistics, samples = experiment.statistics, experiment.samples(checked.train, 1)
    fields = torch.stack([samples[i][0] for i in range(len(samples))])
    changes = (fields[:, 1] - fields[:, 0]) * (statistics.std / statistics.increment).view(-1, 1, 1)
    weights = torch.cos(torch.deg2rad(checked.source.grid.latitudes))
    expected = (changes.square().mean((0, 1, 3)) * weights).sum() / weights.sum()
    train(check(RunConfig.from_dict(conf), 1), torch.device("cpu"))
    (line,) = [line for line in read_metrics(tmp_path / FILE) if line["event"] == "train"]
    assert abs(line["loss"] / float(expected) - 1) < 1e-9
