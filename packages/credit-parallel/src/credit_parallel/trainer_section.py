"""What the library reads of a configuration: its ``trainer`` section, as YAML has it or with types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from credit_mesh import ParallelismConfig


class Trainer(Protocol):
    """A ``trainer`` section with types: its keys are attributes, and a key that it lacks has its default."""

    @property
    def parallelism(self) -> ParallelismConfig:
        """The parallelism block."""
        ...


Conf: TypeAlias = Mapping[str, Any] | Trainer | None
"""A whole configuration, or its ``trainer`` section, as YAML has it or with types."""


def trainer_of(conf: Conf) -> Mapping[str, Any]:
    """The ``trainer`` section of a configuration, or the section itself; empty of None."""
    section = conf.get("trainer", conf) if isinstance(conf, Mapping) else conf
    if section is None:
        return {}
    if isinstance(getattr(section, "parallelism", None), ParallelismConfig):
        return vars(section)
    if not isinstance(section, Mapping):
        raise ValueError(f"conf must be a mapping with a trainer section; got {conf!r}")
    return section


def flag(section: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A switch of a configuration; a ValueError if it is no bool, since a text such as "false" would count as true."""
    value = section.get(key, default)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false; got {value!r}")
    return bool(value)
