"""What the configuration in a checkpoint may name: nothing that can run code, unless the user says so.

A configuration that the user writes is the user's word. One that comes out of a run folder is the word of whoever made
the folder. It can name code in three ways: as the model, as a data file that a reader unpickles (the index files of
GRIB, objects in a Zarr store), and as an option or an address that makes xarray do something else than read a file.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from credit_parallel.app.config import EMBEDDED, DataConfig, ModelConfig, RunConfig
from credit_parallel.app.data.backend import kind_of
from credit_parallel.app.data.opening import TUTORIAL
from credit_parallel.app.models import factory, is_shipped, module_class

_ENGINES = ("netcdf4", "h5netcdf", "scipy", "zarr", "cfgrib")
_PLAIN_OPTIONS = (
    "cache",
    "concat_characters",
    "consolidated",
    "decode_cf",
    "decode_coords",
    "decode_timedelta",
    "decode_times",
    "drop_variables",
    "engine",
    "filter_by_keys",
    "group",
    "mask_and_scale",
    "use_cftime",
    "zarr_format",
)
"""Options of ``xarray.open_dataset`` that say how to read, and name no file, no class and no address."""
_METADATA = (".zarray", ".zgroup", ".zmetadata", "zarr.json")
_MOST_METADATA = 1 << 28


def restricted(
    config: RunConfig, origin: object, *, model: str | None = None, data: str | None = None, trust: bool = False
) -> tuple[RunConfig, Callable[..., nn.Module]]:
    """A configuration out of a checkpoint, as far as it may be followed, and what makes its model.

    Args:
        origin: The checkpoint, for messages.
        model: The model that the user names, in place of the checkpoint's; a function is allowed then, and the working
            directory is searched too.
        data: The data that the user names, in place of the checkpoint's.
        trust: Whether the user trusts the checkpoint: what it names is imported and opened. Its model must be a
            subclass of ``torch.nn.Module`` all the same, and the working directory is not searched for it.

    Raises:
        ValueError: If the checkpoint names something that only the user may name. Nothing was imported or opened then.
    """
    if model is not None:
        config = dataclasses.replace(config, model=ModelConfig(model, config.model.options))
        make = factory(model)
    else:
        make = _model_of(config.model.name, origin, trust)
    if data is not None:
        every = (None, None)
        if EMBEDDED in (data, config.data.source) and data != config.data.source:  # options of the other kind of data
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, options={}))
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, source=data, train=every, valid=every)
        )
    if not trust:
        _check_options(config.data, origin)
        if data is None:
            config = dataclasses.replace(config, data=_data_of(config.data, origin))
    return config, make


def _model_of(name: str, origin: object, trust: bool) -> Callable[..., nn.Module]:
    if not is_shipped(name) and not trust:
        raise ValueError(
            f"{origin} names the model {name!r}, which is none of this package's, and a checkpoint alone cannot say "
            f"which code runs: say --model {name} if you know that code, or --trust if you trust all of the folder"
        )
    return module_class(name)


def _check_options(data: DataConfig, origin: object) -> None:
    if data.source == EMBEDDED:
        return  # its options are numbers, and checked
    given = dict(data.options)
    nested = given.pop("backend_kwargs", {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{origin} has the data option backend_kwargs={nested!r}; it must be a block")
    for key, value in (*given.items(), *nested.items()):
        if key not in _PLAIN_OPTIONS or (key == "engine" and value not in _ENGINES):
            raise ValueError(
                f"{origin} has the data option {key}={value!r}, which may make the reader do more than read: say "
                "--trust if you trust all of the folder"
            )


def _data_of(data: DataConfig, origin: object) -> DataConfig:
    """The data block, made so that opening its files runs nothing."""
    source = os.path.expanduser(data.source)
    if data.source == EMBEDDED or data.source.startswith(TUTORIAL):
        return data
    if "://" in source or "::" in source:
        raise ValueError(
            f"{origin} names data at the address {data.source!r}: say --data {data.source} if you want them from there"
        )
    kinds = set()
    for path in [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True)):
        kind = kind_of(path)[0]
        if kind == "of unknown kind":
            raise ValueError(f"{origin} names the data {path!r}, {kind}: say --data {data.source} if you know them")
        if kind == "Zarr":
            _check_zarr(Path(path), origin)
        kinds.add(kind)
    if "GRIB" in kinds or data.options.get("engine") == "cfgrib":
        return dataclasses.replace(data, options={**data.options, "indexpath": ""})  # its index files are pickles
    return data


def _check_zarr(store: Path, origin: object) -> None:
    """Refuse a Zarr store whose codecs unpickle what they read."""
    for folder, _, names in os.walk(store):
        for name in set(names) & set(_METADATA):
            path = Path(folder) / name
            if path.stat().st_size > _MOST_METADATA:
                raise ValueError(f"{path} is too large for the metadata of a Zarr store")
            try:
                codecs = list(_codecs(json.loads(path.read_bytes())))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            if any("pickle" in codec.lower() for codec in codecs):
                raise ValueError(
                    f"{origin} names the data {str(store)!r}, which hold pickled objects ({path.name} in {folder}); "
                    f"those run code when they are read: say --data {store} if you trust them"
                )


def _codecs(content: Any) -> Iterator[str]:
    if isinstance(content, list):
        for item in content:
            yield from _codecs(item)
    elif isinstance(content, dict):
        for key, value in content.items():
            if key in ("id", "name") and isinstance(value, str):
                yield value
            yield from _codecs(value)
