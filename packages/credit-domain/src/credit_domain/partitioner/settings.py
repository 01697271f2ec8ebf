"""Plain attributes of modules, such as the rate of a dropout: what a forward does may depend on them.

A trace holds their values. So a program is for one set of them, and a model whose attributes have changed is traced
again. What a forward itself stores there, such as the shape of its input, no program stores. That is right where the
forward of the next call does the same whatever it finds, and refused elsewhere.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from credit_domain.partitioner.module_names import plain_name

Settings = dict[str, dict[str, Any]]
"""Values by the name of the attribute, by the name of the module."""

_PLAIN = frozenset((bool, int, float, complex, str, type(None)))
_LONGEST = 64  # a list beyond that is data
_NOTHING = object()
_OURS = ("_ddp", "_domain_parallel", "_fsdp", "_partition", "_programs", "_tp_")  # and of torch's wrappers
_TORCHS = frozenset(vars(nn.Module())) - {"training"}


def settings_of(model: nn.Module) -> Settings:
    """The plain attributes of all modules."""
    return {
        plain_name(name): {attribute: copy.deepcopy(value) for attribute, value, _ in _of(module)}
        for name, module in model.named_modules()
    }


def settings_key(model: nn.Module) -> tuple[Any, ...]:
    """The same, as a key; the order of the modules tells them apart."""
    return tuple([tuple([(attribute, key) for attribute, _, key in _of(m)]) for m in model.modules()])


def _of(module: nn.Module) -> list[tuple[str, Any, Any]]:
    found = []
    for name, value in vars(module).items():
        if name in _TORCHS or (name[0] == "_" and name.startswith(_OURS)):
            continue
        key = value if type(value) in _PLAIN else _frozen(value)
        if key is not _NOTHING:
            found.append((name, value, key))
    return found


def _frozen(value: Any) -> Any:
    """A plain value as one that has a hash: numbers, texts, and short containers of them; nothing of any other."""
    if type(value) in _PLAIN or isinstance(value, Enum):
        return value
    if type(value) is tuple and _PLAIN.issuperset(map(type, value)):
        return ("tuple", value) if len(value) <= _LONGEST else _NOTHING
    if type(value).__module__ == "numpy":
        known = 0 < getattr(value, "size", 0) <= _LONGEST
        return (str(value.dtype), value.shape, value.tobytes()) if known else _NOTHING
    items = _items(value)
    if items is None or len(items) > _LONGEST:
        return _NOTHING
    made = [(str(key), _frozen(item)) for key, item in items]
    return _NOTHING if any(item is _NOTHING for _, item in made) else (type(value).__name__, *made)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """What a container of settings holds; None of anything else."""
    if isinstance(value, (Namespace, SimpleNamespace)):
        return list(vars(value).items())
    if is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name, None)) for each in fields(value)]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, (set, frozenset)):
        return list(enumerate(sorted(value, key=repr)))
    return None


def restore(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the modules of a model these attributes."""
    for name, module in model.named_modules():
        vars(module).update(copy.deepcopy(dict(settings.get(plain_name(name), {}))))


def tensors_of(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """The tensors that are attributes of modules, and neither parameters nor buffers, by module and attribute."""
    return {
        (plain_name(name), attribute): value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def changed(before: Settings, after: Settings) -> list[str]:
    """Names of the attributes that differ, or that are new."""
    found = []
    for name, values in after.items():
        for attribute, value in values.items():
            known = before.get(name, {}).get(attribute, _NOTHING)
            if known is _NOTHING or _frozen(known) != _frozen(value):
                found.append(f"{name}.{attribute}" if name else attribute)
    return found


def classes_of(model: nn.Module) -> dict[str, type]:
    """The class of each module, by name. A wrapper has the name of the module in it, whose class counts."""
    return {plain_name(name): type(module) for name, module in model.named_modules()}


def replaced(model: nn.Module, classes: Mapping[str, type]) -> list[str]:
    """Names of the modules that are other ones than when their classes were noted, or are gone, or are new."""
    now = classes_of(model)
    kept = {name for name, kind in classes.items() if name in now and issubclass(now[name], kind)}
    return sorted((classes.keys() | now.keys()) - kept)
