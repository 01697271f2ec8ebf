"""Writing forecasts, each rank its own rows."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from credit_halo import naming_missing_ranks
from credit_mesh import DomainParallelManager, RowPartition, get_domain_parallel_manager
from credit_parallel.app.data.source import Channel, Grid
from credit_parallel.app.forecast.contents import contents_of
from credit_parallel.app.forecast.stores import Block, Store, check_target, remove, store_of
from credit_parallel.checkpoint.together import is_distributed, rank_and_size, together
from credit_parallel.contract import device_of, gather_numbers, place_of

logger = logging.getLogger(__name__)

HELD_BYTES = 256 << 20


class ForecastWriter:
    """Writes forecasts to a NetCDF file or a Zarr store, by the CF conventions.

    Each rank writes its own rows; the whole field never lies on one rank. Replicas write forecasts from different
    starts. Of tensor-parallel peers, which have the same fields, the first writes. The file gets its name when it is
    complete; until then it has another, ``NAME.partial-<random>``, and after an error it is removed.

    .. code-block:: python

        with ForecastWriter("forecast.zarr", source.channels, source.grid, starts, leads, partition, manager) as writer:
            for start in mine:
                for lead, state in enumerate(states(start)):
                    writer.write(start, lead, state)
                writer.flush()  # as often on every rank

    Args:
        path: Where to; ends in ``.nc`` or ``.zarr``. Missing folders are made.
        channels: The channels of a field. Those of one name become one variable with a vertical coordinate.
        grid: Latitudes and longitudes of all rows.
        starts: Initial times of all forecasts, those of other replicas too: seconds since 1970-01-01, or labels where
            times are none.
        leads: Seconds from the initial time; numbers of steps where ``starts`` are labels, or ``valid`` is given.
        partition: Rows of each domain rank; None takes the declared one, or all rows on one rank.
        manager: The manager; None takes the present one, and a single rank where torch.distributed is not initialised.
        valid: The time of each start and lead, seconds since 1970-01-01, where it is no constant time after the start,
            such as months; None where it is, and for labels.
        compression: Level of zlib, 1 to 9; 0 for none.
        overwrite: Whether to replace what has this name, once the new file is complete.
        attributes: Of the file: ``title``, ``history`` and so on.

    Raises:
        ValueError: On all ranks alike: if arguments do not fit each other, there is something with this name and
            ``overwrite`` is not set, what writes the format is not installed, the file cannot be made, or not all
            ranks see it.

    Collectives:
        A few all-gathers of a number over the world.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        channels: Sequence[Channel],
        grid: Grid,
        starts: Sequence[float] | Sequence[str],
        leads: Sequence[float],
        partition: RowPartition | None = None,
        manager: DomainParallelManager | None = None,
        *,
        valid: Sequence[Sequence[float]] | None = None,
        compression: int = 0,
        overwrite: bool = False,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._overwrite = overwrite
        self._held: list[tuple[int, int, Tensor]] = []
        self._done = torch.zeros(len(starts), len(leads), dtype=torch.int64)
        self._is_open = False
        self._first = rank_and_size()[0] == 0
        with together(str(path)):
            manager = manager or get_domain_parallel_manager()
            self._layout, self._at = place_of(manager)
            declared = None if manager is None else manager.partition
            if partition is None:
                partition = declared or RowPartition.even(grid.height, 1)
            self._partition = RowPartition(partition.sizes)  # refuses ranks without rows
            if partition.rows != grid.height or partition.ranks != self._layout.domain:
                raise ValueError(
                    f"the partition must be of the {grid.height} rows of the grid over {self._layout.domain} domain "
                    f"ranks; got {partition}"
                )
            if not 0 <= compression <= 9:
                raise ValueError(f"compression must be 0 to 9; got {compression}")
            self._rows = partition.interval(self._at.domain)
            self._contents = contents_of(channels, grid, starts, leads, attributes or {}, valid)
            self._store: Store = store_of(self.path)
            self._shape = (len(channels), len(self._rows), grid.width)
            check_target(self.path, overwrite or not self._first)
        number = gather_numbers([secrets.randbits(31)])[0][0]
        self._partial = self.path.with_name(f"{self.path.name}.partial-{number:08x}")
        self._is_open = True
        try:
            with together(str(path)):
                if self._first:
                    self._make(compression)
            with together(str(path)):
                if not self._partial.exists():
                    raise ValueError(
                        "the file that the first rank made is not seen here; write to a folder that all see"
                    )
        except BaseException:
            self._abandon()
            raise

    @property
    def leads_held(self) -> int:
        """After how many leads to :meth:`flush`, for all ranks alike, so that few hundred MiB are held."""
        largest = self._shape[0] * max(self._partition.sizes) * self._shape[2] * 4
        return max(1, min(len(self._done[0]), HELD_BYTES // largest))

    def write(self, start: int, lead: int, fields: Tensor) -> None:
        """Take the fields of a forecast, to be written at the next :meth:`flush`, which also says what is wrong.

        They are those of an initial time and a lead, by their indices: this rank's rows, of shape (C, rows, W), in the
        units of the channels. They are copied.
        """
        if self._at.tp == 0:
            self._held.append((start, lead, fields.detach().to("cpu", torch.float32, copy=True)))

    @naming_missing_ranks("writing a forecast")
    def flush(self) -> None:
        """Write what :meth:`write` has taken; every rank must call it, one without fields too.

        Raises:
            ValueError: On all ranks alike: if fields do not fit the file, were written before, or cannot be written.

        Collectives:
            An all-gather of a number over the world for each turn: two for Zarr, one for each rank for NetCDF.
        """
        try:
            with together(str(self.path)):
                blocks = self._blocks()
            turns = self._store.turns(self._layout, self._at)
            for turn in range(turns.turns):
                with together(str(self.path)):
                    if turn == turns.mine and blocks:
                        self._store.write(self._partial, blocks)
        except BaseException:
            self._abandon()
            raise
        self._held.clear()

    @naming_missing_ranks("writing a forecast")
    def close(self) -> Path:
        """Write what is left, give the file its name, and return it; every rank must call it.

        Raises:
            ValueError: On all ranks alike: as :meth:`flush`, and if fields are missing, or written by two replicas.

        Collectives:
            Those of :meth:`flush`; a sum of a number for each start and lead over the world; an all-gather of one.
        """
        self.flush()
        try:
            done = self._done.clone()
            if is_distributed():
                done = done.to(device_of(None))
                dist.all_reduce(done)
            with together(str(self.path)):
                self._check_complete(done.cpu())
                if self._first:
                    self._commit()
        except BaseException:
            self._abandon()
            raise
        self._is_open = False
        return self.path

    def __enter__(self) -> ForecastWriter:
        """Return the writer, which is closed on leaving."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; after an error remove it."""
        if error is not None:
            self._abandon()
        elif self._is_open:
            self.close()

    def _make(self, compression: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"the folder cannot be made: {error}") from error
        self._store.create(self._partial, self._contents, self._partition, compression)

    def _blocks(self) -> list[Block]:
        if not self._is_open:
            raise ValueError("is complete, or was given up; nothing more can be written")
        blocks: list[Block] = []
        rows = slice(self._rows.start, self._rows.stop)
        for start, lead, fields in self._held:
            sizes = self._done.shape
            if not (0 <= start < sizes[0] and 0 <= lead < sizes[1]) or tuple(fields.shape) != self._shape:
                raise ValueError(
                    f"needs fields of shape (C, rows, W) = {self._shape} for start 0..{sizes[0] - 1} and lead "
                    f"0..{sizes[1] - 1}; got {tuple(fields.shape)} for start {start} and lead {lead}"
                )
            if self._done[start, lead]:
                raise ValueError(f"start {start}, lead {lead} was written before")
            self._done[start, lead] = 1
            values = fields.numpy()
            for variable in self._contents.variables:
                channels = list(variable.channels)
                if len(variable.dims) == 5:
                    blocks.append((variable.name, (start, lead, slice(None), rows, slice(None)), values[channels]))
                else:
                    blocks.append((variable.name, (start, lead, rows, slice(None)), values[channels[0]]))
        return blocks

    def _check_complete(self, done: Tensor) -> None:
        """Each domain rank of one replica has written each field."""
        wrong = (done != self._layout.domain).nonzero().tolist()
        if wrong:
            start, lead = wrong[0]
            raise ValueError(
                f"{len(wrong)} of {done.numel()} fields are missing or written twice, the first at start {start}, lead "
                f"{lead}, which {done[start, lead]} of {self._layout.domain} domain rank(s) wrote"
            )

    def _commit(self) -> None:
        try:
            if self.path.exists():
                if not self._overwrite:
                    raise ValueError("was made by somebody else meanwhile; choose another name")
                old = self._partial.with_name(f"{self._partial.name}.old")
                self.path.rename(old)  # a folder cannot be replaced in one step
                self._partial.rename(self.path)
                remove(old)
            else:
                self._partial.rename(self.path)
        except OSError as error:
            raise ValueError(f"{self._partial.name} cannot be renamed: {error}") from error
        logger.info("wrote %s", self.path)

    def _abandon(self) -> None:
        """Remove what was written so far; no collective, since another rank may be gone."""
        if self._is_open and self._first:
            remove(self._partial)
        self._is_open = False
        self._held.clear()
