"""Torch's DistributedDataParallel, for programs that wrap a model with parameters divided over tp ranks by themselves.

It takes no DTensors. They are left out of it, and their gradients are averaged at the end of the backward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_parallel._torch_private import leave_to_others, left_to_others
from credit_parallel.collectives import start_equal
from credit_parallel.domain import get_raw_model, manager_of
from credit_parallel.reducer import GradientReducer
from credit_parallel.tensor_parallel import _is_tp_sharded_param

_original: Callable[..., None] = DistributedDataParallel.__init__
_signature = inspect.signature(_original)


@functools.wraps(_original)
def init(self: DistributedDataParallel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Make a ``DistributedDataParallel`` of a model with divided parameters."""
    known = left_to_others(module)
    divided = {
        name: p
        for name, p in module.named_parameters(remove_duplicate=False)
        if _is_tp_sharded_param(p) and name not in known and f".{name}" not in known
    }
    if not divided:
        return _original(self, module, *args, **kwargs)
    group: Any = _signature.bind(self, module, *args, **kwargs).arguments.get("process_group") or dist.group.WORLD
    manager = manager_of(module)
    spans = _spans_tp(group, divided, 1 if manager is None else manager.domain_parallel_size)
    if not spans:
        start_equal(module, [group])
    elif manager is not None and manager.domain_parallel_size > 1:
        start_equal(module, [manager.domain_group])
    leave_to_others(module, [*known, *divided, *(f".{name}" for name in divided if "." not in name)])
    _original(self, module, *args, **kwargs)
    if not spans:
        # Torch's own reducer averages the others.
        GradientReducer(get_raw_model(module), divided, group, alone=False).follow(self)
    return None


def _spans_tp(group: Any, divided: dict[str, Any], domain: int) -> bool:
    """Whether a group holds tp ranks, beside domain ranks and nobody else; with several replicas a ValueError."""
    ranks = set(dist.get_process_group_ranks(group))
    name, parameter = next(iter(divided.items()))
    assert isinstance(parameter, DTensor)
    tp = set(parameter.device_mesh.mesh.flatten().tolist())
    if len(ranks & tp) < 2:
        return False
    if len(ranks) != len(tp) * domain:
        raise ValueError(
            f"DistributedDataParallel: process_group holds {len(ranks)} ranks, among them several of the tp ranks "
            f"{sorted(tp)} that {name} is divided over: pass the group of the dp axis, such as "
            "submeshes['dp'].get_group()"
        )
    return True  # sync_domain_gradients averages over the domain ranks
