"""Opening a file with xarray, whatever kind it is; what goes wrong becomes one line that says what to do."""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from credit_parallel.app.data.checks import one_line
from credit_parallel.app.data.dims import Dataset

_opening = threading.Lock()  # filters of warnings belong to the process

ENGINES = {"Zarr": "zarr", "GRIB": "cfgrib"}
"""What opens files of kinds that xarray knows by their names alone."""

_KINDS = {
    b"\x89HDF": ("NetCDF-4", "data", ("netCDF4", "h5netcdf")),
    b"CDF\x01": ("NetCDF-3", "data", ("netCDF4", "scipy")),
    b"CDF\x02": ("NetCDF-3", "data", ("netCDF4", "scipy")),
    b"CDF\x05": ("NetCDF-3", "data", ("netCDF4",)),
    b"GRIB": ("GRIB", "grib", ("cfgrib",)),
}


def xarray() -> Any:
    """The module; a ValueError says if it is not installed."""
    try:
        import xarray as module
    except ImportError:
        raise ValueError("reading files needs xarray: pip install 'credit-parallel[data]'") from None
    return module


def open_file(path: str, options: Mapping[str, Any]) -> Dataset:
    """A file, a Zarr store or a URL as an ``xarray.Dataset`` that has read no fields.

    A ValueError says if it is not there, is of no kind that can be read, needs a package that is missing, or an option
    of ``xarray.open_dataset`` is unknown.
    """
    if "chunks" in options:
        raise ValueError("data.options.chunks: files are read piece by piece without dask; leave it out")
    module = xarray()
    kind, extra, readers = kind_of(path)
    if readers and "engine" not in options and not any(map(importlib.util.find_spec, readers)):
        raise ValueError(f"{path} is {kind}: pip install 'credit-parallel[{extra}]', which brings {readers[0]}")
    engine = {"engine": ENGINES[kind]} if kind in ENGINES else {}
    try:
        with _opening, warnings.catch_warnings():
            # Of attributes that do not conform, of defaults of later versions, and of where metadata are.
            warnings.simplefilter("ignore", module.SerializationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated", RuntimeWarning)
            return module.open_dataset(path, **{"cache": False, **engine, **options})
    except TypeError as error:
        if "argument" in str(error) and options:
            raise ValueError(
                f"data.options has {', '.join(options)}, and xarray.open_dataset does not take them all: {error}"
            ) from None
        raise ValueError(_unreadable(path, kind, error)) from error
    except Exception as error:
        raise ValueError(_unreadable(path, kind, error)) from error


def kind_of(path: str) -> tuple[str, str, tuple[str, ...]]:
    """The kind of a file, the extra that brings what reads it, and the packages of which one will do."""
    if "://" in path:
        return ("Zarr", "data", ("zarr",)) if path.rstrip("/").endswith(".zarr") else ("a URL", "data", ())
    file = Path(path)
    if not file.exists():
        raise ValueError(f"no such file: {path}")
    if file.is_dir():
        if any((file / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata")):
            return "Zarr", "data", ("zarr",)
        raise ValueError(f"{path} is a folder and no Zarr store; name its files with a pattern, such as {path}/*.nc")
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    return _KINDS.get(start, ("of unknown kind", "data", ()))


def _unreadable(path: str, kind: str, error: BaseException) -> str:
    if kind == "of unknown kind" and isinstance(error, ValueError):  # xarray lists its readers, at length
        return (
            f"{path} cannot be opened: it is no NetCDF, GRIB or Zarr that a reader is installed for: see "
            "pip install 'credit-parallel[data]' and 'credit-parallel[grib]', or data.options.engine"
        )
    hint = ""
    if kind == "GRIB":
        hint = "; of fields of several kinds choose some with data.options: {backend_kwargs: {filter_by_keys: ...}}"
    return f"{path} ({kind}) cannot be opened: {one_line(error)}{hint}"
