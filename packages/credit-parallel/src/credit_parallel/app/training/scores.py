"""Scores of forecasts and of persistence, for each channel and lead, in the units of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from credit_parallel.app.data.source import Channel
from credit_parallel.app.data.statistics import Statistics
from credit_parallel.metrics import ACC, RMSE, Bias


class LeadScores:
    """RMSE, bias and anomaly correlation (ACC) of forecasts and of persistence, weighted by latitude.

    The climatology of the anomaly correlation is the mean of each channel over the training data. They are the same on
    every rank and every layout; leads that were never updated have none.

    Args:
        weights: Weight of each row of the whole grid, of shape (H,); None for equal ones.
        leads: How many leads there are.
    """

    def __init__(self, channels: Sequence[Channel], statistics: Statistics, weights: Tensor | None, leads: int) -> None:
        self._labels = [channel.label for channel in channels]
        self._std = statistics.std.double().cpu()
        normal = torch.zeros(len(channels), 1, 1)
        self._metrics: list[dict[str, Any]] = [
            {
                f"{prefix}{name}": metric
                for prefix in ("", "persistence_")
                for name, metric in (("rmse", RMSE(weights)), ("bias", Bias(weights)), ("acc", ACC(normal, weights)))
            }
            for _ in range(leads)
        ]

    def update(self, lead: int, prediction: Tensor, truth: Tensor, start: Tensor) -> None:
        """Add forecasts for the lead of an index, the truth, and the states that the forecasts began with.

        All are normalised, of shape (B, C, rows, W), this rank's rows; ranks that share samples add them alike.
        """
        for name, metric in self._metrics[lead].items():
            metric.update(start if name.startswith("persistence") else prediction, truth)

    def compute(self, leads: Sequence[bool]) -> dict[str, dict[str, list[float | None]]]:
        """The scores by name and channel: a list over leads, with None where there are none.

        Args:
            leads: Whether any rank has updated a lead; the same on every rank.

        Collectives:
            Those of :meth:`credit_parallel.metrics.Metric.compute`, for each score and lead.
        """
        found: dict[str, dict[str, list[float | None]]] = {}
        for name in self._metrics[0]:
            scale = torch.ones_like(self._std) if name.endswith("acc") else self._std
            values = [
                (metrics[name].compute().cpu() * scale).tolist() if known else [None] * len(scale)
                for metrics, known in zip(self._metrics, leads, strict=True)
            ]
            found[name] = {label: [value[c] for value in values] for c, label in enumerate(self._labels)}
        return found
