"""Scores of forecasts against the truth, for each channel and step, in the units of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from credit_parallel.data.source import Channel
from credit_parallel.data.statistics import Statistics
from credit_parallel.metrics import ACC, RMSE, Bias


class Scores:
    """RMSE, bias and anomaly correlation of forecasts, and the RMSE of persistence, weighted by latitude.

    The climatology of the anomaly correlation is the mean of each channel over the training data.

    Args:
        channels: The fields.
        statistics: What normalises them.
        weights: Weight of each row of the whole grid, of shape (H,); None for equal ones.
        steps: States to come.
    """

    def __init__(self, channels: Sequence[Channel], statistics: Statistics, weights: Tensor | None, steps: int) -> None:
        self.labels = [channel.label for channel in channels]
        self.std = statistics.std
        self.weights = weights
        self._metrics = [self._step() for _ in range(steps)]

    def _step(self) -> dict[str, Any]:
        normal = torch.zeros(len(self.labels), 1, 1)
        return {
            "rmse": RMSE(self.weights),
            "bias": Bias(self.weights),
            "acc": ACC(normal, self.weights),
            "persistence_rmse": RMSE(self.weights),
        }

    def update(self, predictions: Sequence[Tensor], states: Tensor) -> None:
        """Add forecasts.

        Args:
            predictions: Normalised states to come, each (B, C, H, W), this rank's rows.
            states: The true ones, (B, 1 + steps, C, H, W), that of the start first.
        """
        for metrics, prediction, truth in zip(self._metrics, predictions, states[:, 1:].unbind(1), strict=True):
            for name in ("rmse", "bias", "acc"):
                metrics[name].update(prediction, truth)
            metrics["persistence_rmse"].update(states[:, 0], truth)

    def compute(self) -> dict[str, Any]:
        """The scores over all samples of all ranks, the same on each: by name, by channel, a list over steps.

        Raises:
            ValueError: If no rank has any samples.

        Collectives:
            Those of :meth:`credit_parallel.metrics.Metric.compute`, for each score and step.
        """
        found: dict[str, Any] = {}
        for name in ("rmse", "bias", "acc", "persistence_rmse"):
            scale = torch.ones_like(self.std) if name == "acc" else self.std
            values = torch.stack([metrics[name].compute().cpu() * scale.cpu() for metrics in self._metrics])
            found[name] = {label: values[:, c].tolist() for c, label in enumerate(self.labels)}
        return found
