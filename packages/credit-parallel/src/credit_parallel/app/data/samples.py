"""Samples of a training: this rank's rows of states one lead apart, normalised, and what is known in advance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from credit_parallel.app.data.checks import checked_number, checked_rows, checked_times
from credit_parallel.app.data.forcings import Forcings
from credit_parallel.app.data.source import Cost, Source
from credit_parallel.app.data.statistics import Statistics
from credit_parallel.app.data.times import lead_in_steps, seconds_ahead, times_between

__all__ = ["Samples", "lead_in_steps", "sample_starts", "times_between"]


def sample_starts(
    source: Source, *, times: Iterable[int] | None = None, lead_steps: int, history: int = 1, steps: int = 1
) -> list[int]:
    """The newest input time of each sample; the arguments are those of :class:`Samples`.

    Raises:
        ValueError: If a number is not positive, or a time is none of the data's.
    """
    for key, value in (("lead_steps", lead_steps), ("history", history), ("steps", steps)):
        checked_number(key, value)
    allowed = None if times is None else set(checked_times(source, times))
    offsets = range(-(history - 1) * lead_steps, steps * lead_steps + 1, lead_steps)
    return [
        time
        for segment in source.segments
        for time in range(segment.start - offsets[0], segment.stop - offsets[-1])
        if allowed is None or all(time + offset in allowed for offset in offsets)
    ]


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A map-style data set; ``samples[i]`` is what :func:`credit_parallel.app.training.rollout` starts from.

    - fields: normalised states of shape (history + steps, C, rows, W), one lead apart;
    - forcings: of shape (steps, F, rows, W), for the input of each step.

    Args:
        rows: This rank's rows.
        lead_steps: Times of the data from one state to the next.
        history: States that a model sees.
        steps: States to come.
        forcings: Names of fields that are known in advance; see :class:`credit_parallel.app.data.forcings.Forcings`.
        times: Indices of the times that samples may use, inputs and targets alike; None for all. No sample crosses
            from one segment to the next.
        dtype: Of both.

    Raises:
        ValueError: If an argument will not do, statistics are of another number of channels, or a forcing needs
            moments and times are none.
    """

    def __init__(
        self,
        source: Source,
        rows: range,
        statistics: Statistics,
        *,
        lead_steps: int,
        history: int = 1,
        steps: int = 1,
        forcings: Sequence[str] = (),
        times: Iterable[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(statistics.mean) != len(source.channels):
            raise ValueError(
                f"{source.name} has {len(source.channels)} channels, and statistics are of {len(statistics.mean)}"
            )
        self.source = source
        self.rows = checked_rows(source, rows)
        self.statistics = statistics
        self.dtype = dtype
        self._starts = sample_starts(source, times=times, lead_steps=lead_steps, history=history, steps=steps)
        self._fields = range(-(history - 1) * lead_steps, steps * lead_steps + 1, lead_steps)
        self._inputs = range(0, steps * lead_steps, lead_steps)
        self._lead_steps = lead_steps
        self._forcings = Forcings(forcings, source.grid, rows)
        if source.seconds is None:
            self._forcings.at(None, 0.0)  # refuses what needs a time

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.start(index)
        fields = self.source.read([start + offset for offset in self._fields], self.rows).to(self.dtype)
        known = torch.stack([self._known(start + offset) for offset in self._inputs])
        return self.statistics.normalise(fields), known.to(self.dtype)

    def start(self, index: int) -> int:
        """Index of the newest input time of a sample.

        Raises:
            IndexError: If there is no such sample.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} samples; got {index}")
        return self._starts[index]

    def cost(self, indices: Iterable[int] | None = None) -> Cost:
        """What reading this rank's rows takes, of some samples; None for all of them, each once."""
        total = Cost(0, 0)
        for index in range(len(self)) if indices is None else indices:
            start = self.start(index)
            total += self.source.cost([start + offset for offset in self._fields], self.rows)
        return total

    def _known(self, time: int) -> Tensor:
        seconds = None if self.source.seconds is None else self.source.seconds[time]
        return self._forcings.at(seconds, seconds_ahead(self.source, time, self._lead_steps))
