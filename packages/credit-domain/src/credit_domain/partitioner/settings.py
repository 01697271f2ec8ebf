"""Plain attributes of modules, such as the rate of a dropout: what a forward does may depend on them.

A trace holds their values. So a program is for one set of them, and a model whose attributes have changed is traced
again. What a forward itself stores there, such as the shape of its input, no program stores. That is right where the
forward of the next call does the same whatever it finds, and refused elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from credit_domain.partitioner.module_names import plain_name

Settings = dict[str, dict[str, Any]]
"""Values by the name of the attribute, by the name of the module."""

_PLAIN = frozenset((bool, int, float, complex, str, type(None)))
_LONGEST = 64  # a list beyond that is data


def settings_of(model: nn.Module) -> Settings:
    """The plain attributes of all modules, without those whose name says that they are private."""
    return {plain_name(name): dict(_of(module)) for name, module in model.named_modules()}


def settings_key(model: nn.Module) -> tuple[Any, ...]:
    """The same, as a key; the order of the modules tells them apart."""
    return tuple([tuple(_of(module)) for module in model.modules()])


def _of(module: nn.Module) -> list[tuple[str, Any]]:
    found = []
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _PLAIN:
            if name[0] != "_":
                found.append((name, value))
        elif (kind is tuple or kind is list) and name[0] != "_" and _is_plain_list(value):
            found.append((name, tuple(value)))
    return found


def _is_plain_list(values: Any) -> bool:
    return len(values) <= _LONGEST and all(type(value) in _PLAIN for value in values)


def restore(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the modules of a model these attributes, where they have such."""
    for name, module in model.named_modules():
        for attribute, value in settings.get(plain_name(name), {}).items():
            if attribute in (own := vars(module)):
                own[attribute] = list(value) if isinstance(own[attribute], list) else value


def tensors_of(model: nn.Module) -> dict[str, int]:
    """The tensors that are attributes of modules, and neither parameters nor buffers: their identities by name."""
    return {
        f"{plain_name(name)}.{attribute}".removeprefix("."): id(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def changed(before: Settings, after: Settings) -> list[str]:
    """Names of the attributes that differ, or that are new."""
    found = []
    for name, values in after.items():
        for attribute, value in values.items():
            if before.get(name, {}).get(attribute, ...) != value:
                found.append(f"{name}.{attribute}" if name else attribute)
    return found
