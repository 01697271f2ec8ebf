"""Files that several ranks write, each its own rows: NetCDF in turns, Zarr at once."""

from __future__ import annotations

import importlib
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from credit_mesh import Coords, RankLayout, RowPartition
from credit_parallel.app.forecast.contents import Contents

logger = logging.getLogger(__name__)

Block = tuple[str, tuple[Any, ...], Any]
"""Name of a variable, indices and slices of all its dimensions, and values."""


class Turns(NamedTuple):
    """When a rank may write, so that no two ever write where they would undo each other's work."""

    mine: int  #: its turn
    turns: int  #: how many there are


class NetCDFStore:
    """A NetCDF 4 file. HDF5 without MPI has one writer at a time, and a file that two have open may be damaged."""

    def __init__(self) -> None:
        self._netcdf = _imported("netCDF4")

    def turns(self, layout: RankLayout, at: Coords) -> Turns:
        """One rank after the other; of tp peers, which have the same rows, the first."""
        return Turns(at.dp * layout.domain + at.domain, layout.dp * layout.domain)

    def create(self, path: Path, contents: Contents, partition: RowPartition, compression: int) -> None:
        """Make the file; space is taken as values come."""
        with _in_a_line(path), self._netcdf.Dataset(path, "w", format="NETCDF4") as file:
            file.setncatts(contents.attributes)
            for dim, size in contents.sizes.items():
                file.createDimension(dim, size)
            for name, dims, values, attributes in contents.coordinates:
                text = values.dtype.kind == "U"
                made = file.createVariable(name, str if text else values.dtype, dims)
                made.setncatts(attributes)
                made[:] = values.astype(object) if text else values
            for variable in contents.variables:
                made = file.createVariable(
                    variable.name,
                    np.float32,
                    variable.dims,
                    fill_value=np.float32(np.nan),
                    chunksizes=chunks(contents.shape(variable), partition),
                    zlib=compression > 0,
                    complevel=compression,
                )
                made.setncatts(variable.attributes)

    def write(self, path: Path, blocks: Iterable[Block]) -> None:
        """Open the file, write, and close it, for the next rank."""
        with _in_a_line(path), self._netcdf.Dataset(path, "a") as file:
            file.set_auto_maskandscale(False)
            for name, where, values in blocks:
                file[name][where] = values


class ZarrStore:
    """A Zarr store of format 2, which all versions of Zarr read; each chunk is a file."""

    def __init__(self) -> None:
        self._zarr = _imported("zarr")

    def turns(self, layout: RankLayout, at: Coords) -> Turns:
        """First even, then odd domain ranks: only neighbours have rows in one chunk (see :func:`chunks`)."""
        return Turns(at.domain % 2, min(2, layout.domain))

    def create(self, path: Path, contents: Contents, partition: RowPartition, compression: int) -> None:
        """Make the store: its metadata, for all to find in one file, and its coordinates."""
        codec = _imported("numcodecs").Zlib(compression) if compression else None
        three = int(self._zarr.__version__.split(".")[0]) >= 3
        with _in_a_line(path):
            # Made by the folder's name, which both versions take.
            group = self._zarr.open_group(str(path), mode="w", **({"zarr_format": 2} if three else {}))
            group.attrs.update(contents.attributes)

            def make(name: str, dims: tuple[str, ...], attributes: dict[str, Any], **options: Any) -> Any:
                if three:
                    options["compressors"] = options.pop("compressor")
                made = (group.create_array if three else group.create)(name, **options)
                made.attrs.update({"_ARRAY_DIMENSIONS": list(dims), **attributes})
                return made

            for name, dims, values, attributes in contents.coordinates:
                kind = {"shape": values.shape, "chunks": values.shape, "dtype": values.dtype, "fill_value": None}
                make(name, dims, attributes, compressor=None, **kind)[...] = values
            for variable in contents.variables:
                shape = contents.shape(variable)
                kind = {"shape": shape, "chunks": chunks(shape, partition), "dtype": "<f4", "fill_value": np.nan}
                make(variable.name, variable.dims, variable.attributes, compressor=codec, **kind)
            self._zarr.consolidate_metadata(str(path))

    def write(self, path: Path, blocks: Iterable[Block]) -> None:
        """Write the chunks; one that is not this rank's alone is read first."""
        with _in_a_line(path):
            group = self._zarr.open_group(str(path), mode="r+")
            for name, where, values in blocks:
                group[name][where] = values


Store: TypeAlias = NetCDFStore | ZarrStore
"""A file, or a folder of files."""


def chunks(shape: tuple[int, ...], partition: RowPartition) -> tuple[int, ...]:
    """The chunks of a variable: one start and lead, all levels and longitudes, and as many rows as the smallest shard.

    So many consecutive rows lie on two neighbouring ranks at most: to reach a third they would have to hold all of
    the one between, and one row on either side.
    """
    return (1, 1, *shape[2:-2], min(partition.sizes), shape[-1])


def store_of(path: Path) -> Store:
    """The store that a name asks for, by its suffix; a ValueError says if what writes it is not installed."""
    if path.suffix == ".nc":
        return NetCDFStore()
    if path.suffix == ".zarr":
        return ZarrStore()
    raise ValueError("the name of a forecast must end in .nc (NetCDF) or .zarr (Zarr)")


def check_target(path: Path, overwrite: bool) -> None:
    """Make sure that a forecast can have a name: of a known kind, and free unless ``overwrite`` is set."""
    store_of(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; choose another name, or have it overwritten")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a failure is logged, since it is an error that brings us here."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed: pip install 'credit-parallel[data]'") from None


@contextmanager
def _in_a_line(path: Path) -> Iterator[None]:
    """What the disk or HDF5 refuse, told in a line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path.name} could not be written: {' '.join(str(error).split())}") from error
