"""Process groups by name: torch's, and those of ranks that are threads (:mod:`credit_halo.testing`)."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup

from credit_halo import _torch_private

_not_torchs: WeakValueDictionary[str, Any] = WeakValueDictionary()


def remember(group: Any) -> None:
    """Let a group be found by its ``group_name`` that torch does not know."""
    _not_torchs[group.group_name] = group


def group_by_name(name: str) -> ProcessGroup:
    """The group of a name: an operator that torch.compile traces takes the name of a group, not the group."""
    found = _not_torchs.get(name)
    return _torch_private.group_by_name(name) if found is None else found


def all_groups() -> list[ProcessGroup]:
    """All groups of this rank, those too that a DeviceMesh made for itself."""
    world = dist.group.WORLD
    own: Any = None if world is None else _not_torchs.get(world.group_name)
    if own is None:
        return _torch_private.groups_of_process()
    found: list[Any] = [each() for each in _not_torchs.valuerefs()]
    return [group for group in found if group is not None and (group.world, group.me) == (own.world, own.me)]
