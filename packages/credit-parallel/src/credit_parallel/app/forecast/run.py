"""Stepping a trained model forward from several starts, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from credit_halo import naming_missing_ranks
from credit_parallel.app.data.forcings import Forcings
from credit_parallel.app.data.source import Source
from credit_parallel.app.data.times import calendar_of, seconds_ahead
from credit_parallel.app.forecast.writer import ForecastWriter
from credit_parallel.app.training.experiment import Experiment
from credit_parallel.app.training.scores import LeadScores
from credit_parallel.checkpoint.together import together
from credit_parallel.contract import place_of

WHAT = "forecast"


@naming_missing_ranks("forecast")
def run_forecast(
    experiment: Experiment,
    starts: Sequence[int],
    steps: int,
    *,
    writer: ForecastWriter | None = None,
    seen: Callable[[int, int, Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Forecast from several starts, write the fields, and score them where the truth is in the data.

    Starts are dealt over the replicas; where they do not divide, some replicas compute one more that nobody sees, so
    that all ranks take part in every step. Each rank reads, computes and writes its own rows; nothing is gathered. One
    start is computed at a time, so that numbers do not depend on how many replicas there are.

    Args:
        starts: Indices of the times of the data to start from; the same on every rank.
        steps: Steps of the model, one lead each.
        writer: Gets the fields in the units of the data; made for the same starts and steps, as by
            :func:`open_writer`. It is not closed.
        seen: Called with the index of a start, that of a step, and the fields of this rank's rows, (C, rows, W) in the
            units of the data, on the ranks of the replica that computed them.
        progress: Called with the number of starts that all replicas together have done.

    Returns:
        A dict that is the same on every rank, of ``starts`` (labels), ``lead_seconds`` (None where times are none, or
        follow one another on the calendar), ``scored`` (how many starts were scored, for each lead), and ``rmse``,
        ``bias``, ``acc`` and the same of persistence (``persistence_rmse``, ...), by channel, a list over leads, with
        None where no truth is there.

    Raises:
        ValueError: On all ranks alike: if a start is none of the data's, or has no history; values are missing, or
            cannot be read; or as the writer.

    Collectives:
        Those of the model, of the writer and of the scores; for each step of a start a small all-gather.
    """
    source, data = experiment.checked.source, experiment.config.data
    statistics, context, device = experiment.statistics, experiment.context, experiment.device
    lead, rows = experiment.checked.lead_steps, experiment.rows
    layout, at = place_of(context.manager)
    with together(WHAT):
        if not len(starts) or steps < 1:
            raise ValueError(f"needs one start and one step or more; got {len(starts)} start(s) and {steps} step(s)")
        last = [_last_time(source, start, (data.history - 1) * lead) for start in starts]
        forcings = Forcings(data.forcings, source.grid, rows)
    scores = LeadScores(source.channels, statistics, experiment.weights(), steps)

    def read(times: Sequence[int]) -> Tensor:
        fields = source.read(times, rows)
        for time, whole in zip(times, fields.isfinite().all((1, 2, 3)).tolist(), strict=True):
            if not whole:
                raise ValueError(f"{source.name}: values are missing at {source.labels[time]}")
        return statistics.normalise(fields.to(experiment.dtype)).to(device)

    def known(start: int) -> Tensor:
        begin = None if source.seconds is None else source.seconds[start]
        passed = [seconds_ahead(source, start, step * lead) for step in range(steps + 1)]
        fields = [
            forcings.at(begin, None) if begin is None or a is None or b is None else forcings.at(begin + a, b - a)
            for a, b in pairwise(passed)
        ]
        return torch.stack(fields).to(device, experiment.dtype)

    context.sync_buffers()
    training = context.model.training
    context.model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(starts), layout.dp):
                index = min(first + at.dp, len(starts) - 1)
                start, mine = starts[index], first + at.dp < len(starts)
                with together(WHAT):
                    states = read(range(start - (data.history - 1) * lead, start + 1, lead))
                    given = known(start)
                for step, state in enumerate(experiment.predictions(states[None], given[None])):
                    time = start + (step + 1) * lead
                    truth = None
                    with together(WHAT):
                        if mine and time <= last[index]:
                            truth = read([time])
                    if truth is not None:
                        scores.update(step, state, truth, states[-1:])
                    if mine and (writer is not None or seen is not None):
                        fields = statistics.denormalise(state[0])
                        if seen is not None:
                            seen(index, step, fields)
                        if writer is not None:
                            writer.write(index, step, fields)
                    if writer is not None and ((step + 1) % writer.leads_held == 0 or step + 1 == steps):
                        writer.flush()
                context.end_startup()
                if progress is not None:
                    progress(min(first + layout.dp, len(starts)))
    finally:
        context.model.train(training)
    scored = [
        sum(start + (step + 1) * lead <= end for start, end in zip(starts, last, strict=True)) for step in range(steps)
    ]
    return {
        "starts": [source.labels[start] for start in starts],
        "lead_seconds": _leads(source, lead, steps) if source.seconds is not None and source.step is not None else None,
        "scored": scored,
        **scores.compute([count > 0 for count in scored]),
    }


def open_writer(
    experiment: Experiment,
    path: str | os.PathLike[str],
    starts: Sequence[int],
    steps: int,
    *,
    compression: int = 0,
    overwrite: bool = False,
    attributes: Mapping[str, str] | None = None,
) -> ForecastWriter:
    """A :class:`ForecastWriter` for :func:`run_forecast`, with its arguments and the writer's, alike on every rank."""
    source, context = experiment.checked.source, experiment.context
    lead = experiment.checked.lead_steps
    seconds, valid = source.seconds if _has_times(source) else None, None
    calendar = calendar_of(source)
    if seconds is not None and calendar is not None:
        begun = [seconds[start] for start in starts]
        valid = [[begin + calendar.ahead(begin, (step + 1) * lead) for step in range(steps)] for begin in begun]
    return ForecastWriter(
        path,
        source.channels,
        source.grid,
        [source.labels[start] for start in starts] if seconds is None else [seconds[start] for start in starts],
        _leads(source, lead, steps),
        experiment.checked.partition,
        context.manager,
        valid=valid,
        compression=compression,
        overwrite=overwrite,
        attributes=attributes,
    )


def _has_times(source: Source) -> bool:
    """Whether times are moments, and it is known when the next one is."""
    return source.seconds is not None and (source.step is not None or calendar_of(source) is not None)


def _leads(source: Source, lead_steps: int, steps: int) -> list[float]:
    """Seconds from the start for each step, or the numbers of the steps where no constant time lies between times."""
    unit = source.step * lead_steps if source.seconds is not None and source.step is not None else 1
    return [(step + 1) * unit for step in range(steps)]


def _last_time(source: Source, start: int, back: int) -> int:
    """The last time that follows a start without a gap, if the data reach back far enough before it."""
    for segment in source.segments:
        if segment.start <= start - back and start < segment.stop:
            return segment.stop - 1
    if not 0 <= start < len(source.labels):
        raise ValueError(f"{source.name}: starts are times 0 to {len(source.labels) - 1}; got {start}")
    raise ValueError(
        f"{source.name}: the model sees {back} time(s) before the start, and they are not there, or not without a gap, "
        f"before {source.labels[start]}"
    )
