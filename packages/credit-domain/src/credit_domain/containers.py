"""Nested containers of tensors: dicts, lists, tuples, named tuples, dataclasses and TensorDicts."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, with their names: keys joined by dots, places as ``x[0]``."""
    if isinstance(value, Tensor):
        yield path, value
        return
    for name, item in (_held(value, path) or {}).values():
        yield from tensors_in(item, name)


def mapped(value: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """A copy of nested containers, with each tensor replaced by what ``change`` makes of its name and itself.

    Dicts and lists are new; of other containers those that hold what was replaced.

    Raises:
        ValueError: If what is replaced changes a batch dim of a TensorDict.
    """
    if isinstance(value, Tensor):
        return change(path, value)
    held = _held(value, path)
    if held is None:
        return value
    items = {key: (item, mapped(item, change, name)) for key, (name, item) in held.items()}
    changed = {key: new for key, (old, new) in items.items() if new is not old}
    if not changed and not isinstance(value, (dict, list)):
        return value
    if _is_tensordict(value):
        return _with_entries(value, changed, path)
    if isinstance(value, tuple):
        every = [new for _, new in items.values()]
        return value._make(every) if hasattr(value, "_make") else type(value)(every)
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)({key: new for key, (_, new) in items.items()})  # type: ignore[call-arg]
    copied = copy.copy(value)
    for key, new in changed.items():
        if isinstance(value, (Mapping, MutableSequence)):
            copied[key] = new
        else:
            object.__setattr__(copied, key, new)  # of a frozen dataclass too
    return copied


def _held(value: Any, path: str) -> dict[Any, tuple[str, Any]] | None:
    """What a container holds, by key, with the name of each; None of anything else."""
    dotted = f"{path}." if path else ""
    if isinstance(value, Mapping) or _is_tensordict(value):
        return {key: (f"{dotted}{key}", item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {i: (dotted + name, item) for i, (name, item) in enumerate(zip(value._fields, value, strict=True))}
    if isinstance(value, (tuple, MutableSequence)) and not isinstance(value, bytearray):
        return {i: (f"{path}[{i}]", item) for i, item in enumerate(value)}
    if is_dataclass(value) and not isinstance(value, type):
        present = [field.name for field in fields(value) if hasattr(value, field.name)]
        return {name: (dotted + name, getattr(value, name)) for name in present}
    return None


def _is_tensordict(value: Any) -> bool:
    """Whether this is one of the package tensordict, which is asked only where somebody else has imported it."""
    package = sys.modules.get("tensordict")
    return package is not None and package.is_tensor_collection(value) and not package.is_non_tensor(value)


def _with_entries(value: Any, changed: dict[str, Any], path: str) -> Any:
    new = value.clone(recurse=False)
    for key, item in changed.items():
        try:
            new.set(key, item)
        except RuntimeError as error:
            raise ValueError(f"the rows of {path}.{key} are one of its batch dims: {error}") from None
    return new
