"""What normalises fields: their mean and spread, and their typical change over a lead, worked out on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from credit_halo import naming_missing_ranks
from credit_halo.extend import agree
from credit_mesh import DomainParallelManager
from credit_parallel.app.data.checks import checked_number, checked_times, one_line
from credit_parallel.app.data.source import Channel, Source
from credit_parallel.contract import device_of
from credit_parallel.losses import cos_latitude_weights

_BLOCK = 32 * 2**20  # bytes of fields that are read at once, if two times are no more


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of each channel, in the units of the data."""

    mean: Tensor  #: of shape (C,), float64
    std: Tensor  #: standard deviation, of shape (C,), float64
    increment: Tensor  #: root mean square of the change over one lead, of shape (C,), float64

    def normalise(self, x: Tensor) -> Tensor:
        """Fields of shape (..., C, H, W) less the mean, in units of the standard deviation; same dtype and device.

        Computed in float32 where the dtype is a shorter one.
        """
        mean, std = self._like(x)
        return ((x.to(mean.dtype) - mean) / std).to(x.dtype)

    def denormalise(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        mean, std = self._like(x)
        return (x.to(mean.dtype) * std + mean).to(x.dtype)

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, std = (value.to(x.device, dtype).view(-1, 1, 1) for value in (self.mean, self.std))
        return mean, std

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """Lists of numbers, with the labels of the channels; :meth:`from_dict` takes it, and JSON holds it exactly.

        Raises:
            ValueError: If there are not as many labels as channels.
        """
        if len(labels) != len(self.mean):
            raise ValueError(f"labels must name {len(self.mean)} channels; got {', '.join(labels)}")
        return {"channels": list(labels), **{key: getattr(self, key).tolist() for key in _KEYS}}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], labels: Sequence[str]) -> Statistics:
        """What :meth:`to_dict` returned.

        Raises:
            ValueError: If it is of other channels than ``labels``, or not whole.
        """
        if list(content.get("channels", ())) != list(labels):
            raise ValueError(
                f"the statistics are of the channels {', '.join(content.get('channels', ())) or 'none'}, and the data "
                f"have {', '.join(labels)}; work them out anew"
            )
        if any(len(content.get(key, ())) != len(labels) for key in _KEYS):
            raise ValueError(f"the statistics must have {', '.join(_KEYS)} of {len(labels)} channels each")
        return cls(*(torch.tensor(content[key], dtype=torch.float64) for key in _KEYS))


_KEYS = ("mean", "std", "increment")


@naming_missing_ranks("statistics")
def compute_statistics(
    source: Source,
    times: Sequence[int],
    lead_steps: int,
    rows: range,
    manager: DomainParallelManager | None = None,
    *,
    weights: Tensor | None = None,
    others: Sequence[int] = (),
) -> Statistics:
    """Mean and spread of each channel over all rows and some times, and its typical change over a lead.

    Domain ranks read their own rows, and replicas and tp peers each their share of the times, a few at a time; moments
    are put together as Chan et al. (1983), The American Statistician 37, 242-247, do it, in float64 and in the order of
    the ranks, so that they are the same on each, and those of one rank to rounding.

    Args:
        times: Indices of the times that count.
        lead_steps: Times from input to target. Changes are taken between times that both count, within a segment.
        rows: This rank's rows.
        manager: None for one rank by itself.
        weights: Weight of each row of the grid, of shape (H,); None takes the cosine of latitude.
        others: Further times, which do not count, but in which no value may be missing either.

    Raises:
        ValueError: On all ranks alike: if a value is missing or not finite, a channel is constant or does not change,
            no two times are a lead apart, the rows of the domain ranks are not those of the grid, arguments are wrong
            or a rank cannot read.

    Collectives:
        An all-gather of a few numbers, and one of nine numbers for each channel, over all ranks.
    """
    found = torch.zeros(len(_Moments.names), len(source.channels), dtype=torch.float64)
    problem, cause = None, None
    try:
        checked_times(source, (*times, *others))
        found = _own(source, list(times), lead_steps, rows, manager, _weights(source, weights), list(others))
    except Exception as error:
        problem, cause = str(error) if isinstance(error, ValueError) else one_line(error), error
        if manager is None:
            raise
    parts = [found]
    if manager is not None:
        world = dist.group.WORLD
        assert world is not None
        device = device_of(world)
        said = f"{len(times)} times, {len(source.channels)} channels, {source.grid.height} rows, lead {lead_steps}"
        try:
            heights = agree(world, None, "compute_statistics", lambda: said, device, problem, len(rows)) or []
        except ValueError as error:
            raise error from cause
        layout = manager.layout
        if sum(heights) != source.grid.height * layout.dp * layout.tp:
            own = heights[: layout.domain]
            raise ValueError(
                f"compute_statistics: rows of the domain ranks must be those of the grid, {source.grid.height} in all; "
                f"got {', '.join(map(str, own))}"
            )
        theirs = [torch.empty_like(found, device=device) for _ in heights]
        dist.all_gather(theirs, found.to(device))
        parts = [part.cpu() for part in theirs]
    total = _Moments(len(source.channels))
    for part in parts:
        total.merge(part)
    return _checked(source, total)


class _Moments:
    """Sums over weighted values of each channel, which can be put together."""

    names = ("weight", "mean", "square", "pairs", "change", "bad", "first_bad", "least", "most")

    def __init__(self, channels: int) -> None:
        zeros = torch.zeros(channels, dtype=torch.float64)
        self.weight, self.mean, self.square = zeros, zeros, zeros  # of deviations from the mean
        self.pairs, self.change = zeros, zeros  # weights and squares of changes
        self.bad, self.first_bad = zeros, zeros + torch.inf  # values that are not finite
        self.least, self.most = zeros + torch.inf, zeros - torch.inf

    def stacked(self) -> Tensor:
        return torch.stack([getattr(self, name) for name in self.names])

    def merge(self, part: Tensor) -> None:
        """Add the moments of other values."""
        weight, mean, square, pairs, change, bad, first_bad, least, most = part
        total = self.weight + weight
        share = torch.where(total > 0, weight / total, 0.0)
        delta = mean - self.mean
        self.mean = self.mean + delta * share
        self.square = self.square + square + delta**2 * self.weight * share
        self.weight, self.pairs, self.change = total, self.pairs + pairs, self.change + change
        self.bad, self.first_bad = self.bad + bad, torch.minimum(self.first_bad, first_bad)
        self.least, self.most = torch.minimum(self.least, least), torch.maximum(self.most, most)

    def look(self, fields: Tensor, times: Tensor) -> None:
        """Note which values of fields (T, C, rows, W) at some times are not finite."""
        bad = (~fields.isfinite()).sum((2, 3))
        first = torch.where(bad > 0, times[:, None].to(torch.float64), torch.inf)
        self.bad, self.first_bad = self.bad + bad.sum(0), torch.minimum(self.first_bad, first.amin(0))

    def add(self, fields: Tensor, changes: Tensor, times: Tensor, weights: Tensor) -> None:
        """Add fields (T, C, rows, W) and changes of some times, and the weights (rows, 1) of their rows."""
        self.look(fields, times)
        weight = weights.sum() * fields.shape[0] * fields.shape[3]
        values = fields.to(torch.float64)
        mean = (values * weights).sum((0, 2, 3)) / weight if weight > 0 else torch.zeros_like(self.mean)
        square = ((values - mean[:, None, None]) ** 2 * weights).sum((0, 2, 3))
        pairs = weights.sum() * changes.shape[0] * changes.shape[3]
        change = (changes**2 * weights).sum((0, 2, 3))
        every = torch.ones_like(mean)
        least, most = (f(values, (0, 2, 3)).to(torch.float64) for f in (torch.amin, torch.amax))
        none, never = torch.zeros_like(mean), torch.full_like(mean, torch.inf)
        self.merge(torch.stack([weight * every, mean, square, pairs * every, change, none, never, least, most]))


def _own(
    source: Source,
    times: Sequence[int],
    lead_steps: int,
    rows: range,
    manager: DomainParallelManager | None,
    weights: Tensor,
    others: Sequence[int],
) -> Tensor:
    """The moments of this rank's rows of its share of the times."""
    checked_number("lead_steps", lead_steps)
    if any(a >= b for a, b in pairwise(times)):
        raise ValueError("times must be indices in increasing order, each once")
    moments = _Moments(len(source.channels))
    own_weights = weights[rows.start : rows.stop, None]
    at_once = max(1, _BLOCK // max(1, 8 * len(source.channels) * len(rows) * source.grid.width))
    counted, targets = set(times), _targets(source, times, lead_steps)
    for block in _blocks(_share(times, manager), at_once):
        ahead = [targets[time] for time in block if targets[time] in counted]
        needed = sorted({*block, *ahead})
        fields = source.read(needed, rows)
        place = {time: i for i, time in enumerate(needed)}
        own = fields[[place[time] for time in block]]
        starts = [time for time in block if targets[time] in counted]
        changes = fields[[place[time] for time in ahead]].double() - fields[[place[time] for time in starts]].double()
        if own.numel():
            moments.add(own, changes, torch.tensor(block), own_weights)
    for block in _blocks(_share(others, manager), at_once):
        moments.look(source.read(block, rows), torch.tensor(block))
    return moments.stacked()


def _share(times: Sequence[int], manager: DomainParallelManager | None) -> Sequence[int]:
    """The times of this rank: each replica and tp peer takes others."""
    if manager is None:
        return times
    parts = manager.layout.dp * manager.layout.tp
    part = manager.dp_rank * manager.layout.tp + manager.tp_rank
    return times[len(times) * part // parts : len(times) * (part + 1) // parts]


def _blocks(times: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(times), size):
        yield list(times[start : start + size])


def _targets(source: Source, times: Sequence[int], lead_steps: int) -> dict[int, int]:
    """The time one lead after each; -1 where its segment ends before."""
    ends = {time: segment.stop for segment in source.segments for time in segment}
    return {time: time + lead_steps if time + lead_steps < ends[time] else -1 for time in times}


def _weights(source: Source, weights: Tensor | None) -> Tensor:
    if weights is None:
        return cos_latitude_weights(source.grid.latitudes)
    weights = weights.detach().cpu().double()
    if weights.shape != (source.grid.height,) or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise ValueError(
            f"weights must be of shape ({source.grid.height},), one for each row of the grid, not negative and not all "
            f"zero; got {tuple(weights.shape)}"
        )
    return weights


def _checked(source: Source, total: _Moments) -> Statistics:
    """The statistics, if they can normalise anything: no value is missing, and every channel varies and changes."""
    name, bad = source.name, torch.nonzero(total.bad)[:, 0].tolist()
    if bad:
        c, more = bad[0], f", and {len(bad) - 1} more field(s) have such values" if len(bad) > 1 else ""
        raise ValueError(
            f"{name}: {_called(source.channels[c])} has {int(total.bad[c])} value(s) that are missing or not finite, "
            f"first at {source.labels[int(total.first_bad[c])]}{more}; fill them (for example with xarray's fillna or "
            "interpolate_na), or leave the variable, level or times out"
        )
    if not bool((total.weight > 0).all()):
        raise ValueError(f"{name}: there are no times to work statistics out of")
    if not bool((total.pairs > 0).all()):
        raise ValueError(f"{name}: no two of the times are one lead apart within a segment; take more times")
    constant = [
        channel.label
        for channel, flat, still in zip(source.channels, total.least == total.most, total.change == 0, strict=True)
        if flat or still
    ]
    if constant:
        raise ValueError(
            f"{name}: {', '.join(constant)} cannot be learned, constant or without any change over a lead in the times "
            "that are given; leave it out of data.variables or data.levels"
        )
    std, increment = (total.square / total.weight).sqrt(), (total.change / total.pairs).sqrt()
    return Statistics(total.mean, std, increment)


def _called(channel: Channel) -> str:
    level = "" if channel.level is None else f" at level {channel.level:g}"
    return f"variable {channel.name!r}{level}"
