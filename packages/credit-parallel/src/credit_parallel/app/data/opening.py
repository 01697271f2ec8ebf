"""From the ``data`` block of a configuration to the data."""

from __future__ import annotations

import glob
import inspect
import os

from credit_parallel.app.config import EMBEDDED, DataConfig
from credit_parallel.app.data.backend import xarray
from credit_parallel.app.data.checks import closest, one_line
from credit_parallel.app.data.files import FileSource
from credit_parallel.app.data.rossby_haurwitz import RossbyHaurwitz
from credit_parallel.app.data.source import Source

TUTORIAL = "tutorial:"


def open_source(data: DataConfig) -> Source:
    """Open what ``data.source`` names: files, or the embedded data set. No fields are read.

    Raises:
        ValueError: As :class:`credit_parallel.app.data.files.FileSource`, and for options that the embedded data set
            does not take; if a pattern matches no file, or a data set of ``xarray.tutorial`` cannot be fetched.
    """
    if data.source == EMBEDDED:
        return _embedded(data)
    source = os.path.expanduser(data.source)
    paths = [source]
    if source.startswith(TUTORIAL):
        paths = [_fetched(source.removeprefix(TUTORIAL))]
    elif "://" not in source and not os.path.exists(source):
        paths = sorted(glob.glob(source, recursive=True))
        if not paths:
            kind = "no file matches" if glob.has_magic(source) else "no such file:"
            raise ValueError(f"data.source: {kind} {source}; without a file, data.source: {EMBEDDED} needs none")
    return FileSource(paths, data.variables, data.levels, data.options, data.source)


def _embedded(data: DataConfig) -> RossbyHaurwitz:
    known = [key for key in inspect.signature(RossbyHaurwitz).parameters if key != "variables"]
    for key in data.options:
        if key not in known:
            raise ValueError(
                f"data.options.{key}: {EMBEDDED} has no such option; it has {', '.join(known)}{closest(key, known)}"
            )
    if data.levels:
        raise ValueError(f"data.levels: {EMBEDDED} has no levels; leave them out")
    options = dict(data.options)
    if data.variables:
        options["variables"] = data.variables
    return RossbyHaurwitz(**options)


def _fetched(name: str) -> str:
    """Where xarray keeps a data set of its tutorial, once it has fetched it."""
    try:
        with xarray().tutorial.open_dataset(name, cache=True) as ds:
            return str(ds.encoding["source"])
    except ImportError as error:
        raise ValueError(f"data.source: {TUTORIAL}{name} is fetched with pooch: pip install pooch ({error})") from None
    except Exception as error:
        raise ValueError(
            f"data.source: {TUTORIAL}{name} cannot be fetched: {one_line(error)}; it needs a network the first time, "
            "and a name of xarray.tutorial"
        ) from None
