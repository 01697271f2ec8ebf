"""The private names of torch that this package cannot do without, each with the reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_halo.extend import allow_recompilations


def flatten(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Several axes as one.

    Parameters that are sharded over dp x domain and over tp live on both meshes, which must come from one root. A mesh
    of one's own, made with the public constructor, has another; there is no public way to merge axes.
    """
    return mesh._flatten(name)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that an axis was taken from: an axis by itself does not tell which other axes the world has."""
    if hasattr(mesh, "_get_root_mesh"):
        return mesh._get_root_mesh()
    resources: Any = device_mesh._mesh_resources  # type: ignore[attr-defined, unused-ignore]
    return resources.get_root_mesh(mesh)  # type: ignore[no-any-return]


def offsets_of(tensor: DTensor) -> list[tuple[int, ...]]:
    """Where the part of a tensor that this rank has begins in the whole; empty where the tensor is of other ranks.

    Parts are uneven, and a dim may be divided by two axes, in either order: this is what torch's checkpoints ask.
    """
    if tensor.device_mesh.get_coordinate() is None:
        return []
    return [tuple(chunk.offsets) for chunk in tensor.__create_chunk_list__()]  # type: ignore[no-untyped-call]


def after_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward that is running has ended; how DDP and FSDP wait for their messages."""
    Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined, unused-ignore]


def current_backward() -> int:
    """The number of the backward that is running, -1 outside of one.

    A backward that failed never calls back. Only its number tells that the next gradient is of another backward.
    """
    return int(torch._C._current_graph_task_id())


def leave_to_others(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel leave parameters alone, for which it has no public way.

    It cannot reduce DTensors, and would keep a second copy of all gradients for what it does not send.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))  # type: ignore[no-untyped-call]


def left_to_others(module: nn.Module) -> list[str]:
    """The names that :func:`leave_to_others` gave for a module; nothing public tells."""
    return list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def is_view(x: Tensor) -> bool:
    """Whether autograd knows a tensor as a view of another; nothing public tells."""
    return x._base is not None


def compiled(function: Callable[..., Any], versions: int) -> Callable[..., Any]:
    """A function compiled as one graph, of which torch may make so many versions.

    Blocks of a class share its code, and each shape of theirs is a version, in training and without gradients. Before
    ``torch.compile`` had an argument for it, the limit was one of the whole process.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limited: Any = functools.partial(torch.compile, recompile_limit=max(versions, 8))
    else:
        allow_recompilations(versions)
        limited = torch.compile
    return limited(function, fullgraph=True)  # type: ignore[no-any-return]
