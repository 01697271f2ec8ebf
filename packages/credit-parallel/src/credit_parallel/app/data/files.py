"""Fields in NetCDF, GRIB and Zarr, of which each rank reads its own rows."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from credit_mesh import RowPartition
from credit_parallel.app.data.backend import ENGINES, kind_of, open_file
from credit_parallel.app.data.checks import checked_rows, checked_times, one_line, some
from credit_parallel.app.data.chunks import Stored, runs, stored_as, values_touched
from credit_parallel.app.data.dims import Dataset, Field, fields_of, grid_of, time_axis_of
from credit_parallel.app.data.months import MonthStep
from credit_parallel.app.data.source import Channel, Cost, Grid, Source
from credit_parallel.app.data.times import TimeAxis
from credit_parallel.latitudes import ROUNDING


@dataclass(frozen=True)
class _File:
    """A file, its times, and how it stores each field."""

    path: str
    fields: tuple[Field, ...]
    channels: tuple[Channel, ...]
    grid: Grid
    axis: TimeAxis
    stored: tuple[Stored, ...]


class FileSource:
    """Files that xarray can open, joined along time; a :class:`credit_parallel.app.data.source.Source`.

    Nothing but coordinates is read when it is made. Each process opens the files for itself when it first reads fields,
    so a source can be sent to the workers of a loader.

    Args:
        paths: One file or store, or several that hold the same fields at other times.
        variables: Names of variables, in the order of the channels; empty for all that lie on the grid and change with
            time, sorted by name.
        levels: Values of the vertical coordinate, in the order of the channels of each variable; empty for all.
        options: Those of ``xarray.open_dataset``.
        name: What errors call it; None takes the path.

    Attributes:
        paths: The files, in the order of time.

    Raises:
        ValueError: If a file is missing or cannot be read; a variable or level is missing; a variable has dims that are
            not latitude, longitude, level and time, or a curvilinear grid; times do not increase; files do not match.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        variables: Sequence[str] = (),
        levels: Sequence[float] = (),
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if not paths:
            raise ValueError("FileSource needs a file at least; got none")
        self._options = dict(options or {})
        files = [_described(os.fspath(path), variables, levels, self._options) for path in paths]
        if all(file.axis.seconds for file in files):
            files.sort(key=lambda file: (file.axis.seconds or (0.0,))[0])
        self._files, first = files, files[0]
        for file in files[1:]:
            _match(first, file)
        self.paths = tuple(file.path for file in files)
        self.name = name or (first.path if len(files) == 1 else f"{first.path} and {len(files) - 1} more")
        self.channels, self.grid = first.channels, first.grid
        axis = _joined(files, self.name)
        self.labels: Sequence[str] = axis.labels
        self.seconds: Sequence[float] | None = axis.seconds
        self.segments: Sequence[range] = axis.segments
        self.step: float | None = axis.step
        self.calendar: MonthStep | None = axis.calendar
        if not axis.labels:
            raise ValueError(f"{self.name} has no times")
        self._starts = np.cumsum([0, *(len(file.axis.labels) for file in files)]).tolist()
        self._forget()

    def read(self, times: Sequence[int], rows: range) -> Tensor:
        """Fields of some times; see :class:`credit_parallel.app.data.source.Source`.

        Reads slices of one variable at a time: consecutive times and consecutive levels together.

        Raises:
            ValueError: If times or rows are none of the data's, or the file cannot be read.
        """
        checked_rows(self, rows)
        out = torch.empty(len(times), len(self.channels), len(rows), self.grid.width)
        if not len(rows):
            return out
        for at, k, span in self._runs(times):
            file, ds = self._files[k], self._opened(k)
            here = slice(at, at + span.stop - span.start)
            channel = 0
            for field in file.fields:
                for begin, levels in runs(field.levels):
                    first = channel + begin
                    values = _values(ds, file, field, span, levels, rows)
                    out[here, first : first + levels.stop - levels.start] = torch.from_numpy(values)
                channel += len(field.levels)
        return out

    def cost(self, times: Sequence[int], rows: range) -> Cost:
        """What :meth:`read` takes: each of its slices counts the chunks that it touches."""
        checked_rows(self, rows)
        needed = read = 0
        for _, k, span in self._runs(times):
            for per_time, touched, stored, dim in self._costs_of_rows(k, rows):
                count = span.stop - span.start
                needed += count * per_time
                read += touched * (1 if dim is None else values_touched(stored, dim, span.start, span.stop))
        return Cost(needed, read)

    def stored(self) -> tuple[tuple[Field, Stored], ...]:
        """The fields, and how the first file stores each."""
        return tuple(zip(self._files[0].fields, self._files[0].stored, strict=True))

    def _costs_of_rows(self, k: int, rows: range) -> list[tuple[int, int, Stored, str | None]]:
        """For each way in which a file stores fields: bytes needed of a time, bytes touched for each time touched."""
        known = self._row_costs.get((k, rows))
        if known is not None:
            return known
        # Variables that are stored alike are counted together.
        sums: dict[tuple[Any, ...], tuple[int, int, Stored, str | None]] = {}
        for field, stored in zip(self._files[k].fields, self._files[k].stored, strict=True):
            others = [dim for dim in stored.sizes if dim not in field.dims]
            line = values_touched(stored, field.latitude, rows.start, rows.stop) * stored.itemsize
            line *= stored.sizes[field.longitude]
            for dim in others:
                line *= stored.sizes[dim]
            levels = sum(
                1 if field.vertical is None else values_touched(stored, field.vertical, part.start, part.stop)
                for _, part in runs(field.levels)
            )
            own = len(field.levels) * len(rows) * self.grid.width * stored.itemsize
            key = (field.time, *((stored.chunks[field.time], stored.sizes[field.time]) if field.time else ()))
            before = sums.get(key, (0, 0, stored, field.time))
            sums[key] = (before[0] + own, before[1] + line * levels, stored, field.time)
        self._row_costs[k, rows] = list(sums.values())
        return self._row_costs[k, rows]

    def _runs(self, times: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
        """Runs of consecutive times of one file: where in the list, which file, which of its times."""
        for at, span in runs(checked_times(self, times)):
            start = span.start
            while start < span.stop:
                k = bisect.bisect_right(self._starts, start) - 1
                stop = min(span.stop, self._starts[k + 1])
                yield at + start - span.start, k, slice(start - self._starts[k], stop - self._starts[k])
                start = stop

    # Open files belong to one process.

    def _opened(self, k: int) -> Dataset:
        if self._process != os.getpid():
            self._forget()
        if k not in self._datasets:
            self._datasets[k] = open_file(self._files[k].path, self._options)
        return self._datasets[k]

    def _forget(self) -> None:
        self._process = os.getpid()
        self._datasets: dict[int, Dataset] = {}
        self._row_costs: dict[tuple[int, range], list[tuple[int, int, Stored, str | None]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but open files."""
        return {**self.__dict__, "_datasets": {}, "_row_costs": {}}

    def __repr__(self) -> str:
        return f"FileSource({self.name}: {some(c.label for c in self.channels)}; {len(self.labels)} times)"


def _described(path: str, variables: Sequence[str], levels: Sequence[float], options: Mapping[str, Any]) -> _File:
    with open_file(path, options) as ds:
        fields = fields_of(ds, path, variables, levels)
        return _File(
            path,
            fields,
            tuple(channel for field in fields for channel in field.channels),
            grid_of(ds, path, fields[0]),
            time_axis_of(ds, path, fields[0]),
            tuple(stored_as(ds[field.name], field) for field in fields),
        )


def _match(first: _File, other: _File) -> None:
    """Make sure that two files can be joined: their fields, units and grids are the same."""
    for what, a, b in (
        ("fields", [c.label for c in first.channels], [c.label for c in other.channels]),
        ("units", [c.units for c in first.channels], [c.units for c in other.channels]),
    ):
        if a != b:
            raise ValueError(
                f"{other.path} has the {what} {some(b)}, and {first.path} {some(a)}: they must be the same"
            )
    for what, x, y in (
        ("latitudes", first.grid.latitudes, other.grid.latitudes),
        ("longitudes", first.grid.longitudes, other.grid.longitudes),
    ):
        if x.shape != y.shape:
            raise ValueError(
                f"{other.path} has other {what} than {first.path}, {len(y)} and not {len(x)}: they must be on one grid"
            )
        # 359.99998 and -0.00002 are one place.
        apart = (torch.remainder(y - x + 180, 360) - 180).abs()
        if not bool((apart <= ROUNDING).all()):
            at = int(apart.argmax())
            raise ValueError(
                f"{other.path} has other {what} than {first.path}, by up to {float(apart[at]):.6g} degrees "
                f"({float(y[at]):.10g} and {float(x[at]):.10g} at index {at}): they must be on one grid"
            )


def _joined(files: Sequence[_File], name: str) -> TimeAxis:
    if len(files) == 1:
        return files[0].axis
    axes = [file.axis for file in files]
    for before, after in pairwise(files):
        a, b = before.axis.seconds, after.axis.seconds
        if a is None or b is None:
            raise ValueError(f"{name}: files are joined along time, and the times of {before.path} are no moments")
        if b[0] <= a[-1]:
            raise ValueError(
                f"{after.path} begins at {after.axis.labels[0]}, and {before.path} ends at {before.axis.labels[-1]}: "
                "files must hold different times; name a narrower pattern"
            )
    return TimeAxis.from_seconds([second for axis in axes for second in axis.seconds or ()], name)


def _values(ds: Dataset, file: _File, field: Field, times: slice, levels: slice, rows: range) -> np.ndarray[Any, Any]:
    """Values of a variable, in the order time, level, latitude, longitude."""
    array = ds[field.name]
    wanted: dict[str, Any] = {dim: 0 for dim in array.dims if dim not in field.dims}
    wanted[field.latitude] = slice(rows.start, rows.stop)
    if field.time is not None:
        wanted[field.time] = times
    if field.vertical is not None:
        wanted[field.vertical] = levels
    try:
        values = array.variable.isel(wanted).values
    except Exception as error:
        raise ValueError(f"{file.path}: variable {field.name!r} cannot be read: {one_line(error)}") from error
    order = [field.time, field.vertical, field.latitude, field.longitude]
    values = np.transpose(np.asarray(values), [field.dims.index(dim) for dim in order if dim is not None])
    shape = (times.stop - times.start, levels.stop - levels.start, len(rows), values.shape[-1])
    own: np.ndarray[Any, Any] = np.require(values.reshape(shape), np.float32, ["C", "W"])
    return own


def chunking_warning(source: Source, partition: RowPartition, most: float = 1.5) -> str | None:
    """One line, if the chunks of a file make ranks read much more than the rows that they need.

    Measured on the rows of all ranks at one time, since training takes times in any order.

    Args:
        partition: Who needs which rows.
        most: The largest ratio of bytes read to bytes needed that is fine.
    """
    total = sum((source.cost([0], partition.interval(rank)) for rank in range(partition.ranks)), Cost(0, 0))
    if not isinstance(source, FileSource) or total.read <= most * total.needed:
        return None
    fields = source.stored()
    field, stored = max(fields, key=lambda one: _excess(one[0], one[1], partition))
    kind = kind_of(source.paths[0])[0]
    now = " x ".join(f"{dim} {chunk}" for dim, chunk in stored.chunks.items())
    rows = _rows_of_chunks(partition)
    encoding = {
        field.name: {"chunksizes" if kind.startswith("NetCDF") else "chunks": _better(field, stored, rows)}
        for field, stored in fields
    }
    engine = f", engine={ENGINES[kind]!r}" if kind in ENGINES else ""
    write = f"to_netcdf('new.nc', encoding={encoding})" if kind.startswith("NetCDF") else ""
    write = write or f"drop_encoding().to_zarr('new.zarr', encoding={encoding})"
    return (
        f"{source.name}: ranks read {total.read / total.needed:.1f} times the bytes that they need, since {field.name} "
        f"is stored in chunks of {now}; rewrite it in chunks of one time and {rows} rows: "
        f"xarray.open_dataset({source.paths[0]!r}{engine}).{write}"
    )


def _excess(field: Field, stored: Stored, partition: RowPartition) -> float:
    """Bytes touched by the rows of all ranks at one time, beyond those needed."""
    touched = sum(
        values_touched(stored, field.latitude, rows.start, rows.stop)
        for rows in map(partition.interval, range(partition.ranks))
    )
    if field.time is not None:
        touched *= values_touched(stored, field.time, 0, 1)
    return float(touched - partition.rows) * stored.itemsize


def _rows_of_chunks(partition: RowPartition) -> int:
    """The most rows of a chunk of which ranks read no more than a quarter in vain."""
    for rows in range(max(partition.sizes), 1, -1):
        chunk = Stored({"y": partition.rows}, {"y": rows}, 1)
        intervals = map(partition.interval, range(partition.ranks))
        if sum(values_touched(chunk, "y", own.start, own.stop) for own in intervals) <= 1.25 * partition.rows:
            return rows
    return 1


def _better(field: Field, stored: Stored, rows: int) -> tuple[int, ...]:
    sizes = {**dict.fromkeys(stored.sizes, 1), field.latitude: rows, field.longitude: stored.sizes[field.longitude]}
    return tuple(sizes[dim] for dim in stored.sizes)
