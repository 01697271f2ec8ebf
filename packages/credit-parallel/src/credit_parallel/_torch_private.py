"""The private names of torch that this package cannot do without, each with the reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from credit_domain.extend import COMPILED
from credit_halo.extend import allow_recompilations, gone


def flatten(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Several axes as one.

    Parameters that are sharded over dp x domain and over tp live on both meshes, which must come from one root. A mesh
    of one's own, made with the public constructor, has another; there is no public way to merge axes.
    """
    try:
        merge = mesh._flatten
    except AttributeError as error:
        what = (
            "axes of a mesh cannot be merged: neither fold_domain nor apply_fsdp2 with complex parameters on two axes"
        )
        raise gone("torch.distributed.device_mesh.DeviceMesh._flatten", f"{what} works") from error
    return merge(name)


def root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that an axis was taken from: an axis by itself does not tell which other axes the world has."""
    try:
        root = mesh._get_root_mesh
    except AttributeError as error:
        what = "an axis of a mesh does not tell the others: pass a manager to apply_domain_parallel. Otherwise"
        raise gone("torch.distributed.device_mesh.DeviceMesh._get_root_mesh", what) from error
    return root()


def offsets_of(tensor: DTensor) -> list[tuple[int, ...]]:
    """Where the part of a tensor that this rank has begins in the whole; empty where the tensor is of other ranks.

    Parts are uneven, and a dim may be divided by two axes, in either order: this is what torch's checkpoints ask.
    """
    if tensor.device_mesh.get_coordinate() is None:
        return []
    try:
        chunks: Any = tensor.__create_chunk_list__
    except AttributeError as error:
        what = "a checkpoint cannot be written or read, as nothing tells which part of a tensor a rank has"
        raise gone("torch.distributed.tensor.DTensor.__create_chunk_list__", what) from error
    return [tuple(chunk.offsets) for chunk in chunks()]


def after_backward(callback: Callable[[], None]) -> None:
    """Call back when the backward that is running has ended; how DDP and FSDP wait for their messages."""
    try:
        queue: Any = Variable._execution_engine.queue_callback  # type: ignore[attr-defined, unused-ignore]
    except AttributeError as error:
        what = "gradients cannot be averaged at the end of the backward: neither DDP nor FSDP2 can be used"
        raise gone("torch.autograd.Variable._execution_engine.queue_callback", what) from error
    queue(callback)


def current_backward() -> int:
    """The number of the backward that is running, -1 outside of one.

    A backward that failed never calls back. Only its number tells that the next gradient is of another backward.
    """
    try:
        return int(torch._C._current_graph_task_id())
    except AttributeError as error:
        what = "a backward is not told from one that failed before it, and gradients would be those of both"
        raise gone("torch._C._current_graph_task_id", what) from error


def leave_to_others(module: nn.Module, names: Iterable[str]) -> None:
    """Have DistributedDataParallel leave parameters alone, for which it has no public way.

    It cannot reduce DTensors, and would keep a second copy of all gradients for what it does not send.
    """
    _tell_ddp()(module, list(names))


def left_to_others(module: nn.Module) -> list[str]:
    """The names that :func:`leave_to_others` gave for a module; nothing public tells."""
    _tell_ddp()
    return list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


@functools.cache
def _tell_ddp() -> Callable[..., Any]:
    """How DDP is told, once it is seen to write that where it is looked for here."""
    what = "DistributedDataParallel cannot leave parameters to others, and would average them twice"
    try:
        tell: Callable[..., Any] = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    except AttributeError as error:
        name = "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model"
        raise gone(name, what) from error
    tried = nn.Module()
    tell(tried, ["weight"])
    if getattr(tried, "_ddp_params_and_buffers_to_ignore", None) != ["weight"]:
        raise gone("attribute _ddp_params_and_buffers_to_ignore of modules in DistributedDataParallel", what)
    return tell


def is_view(x: Tensor) -> bool:
    """Whether autograd knows a tensor as a view of another; nothing public tells, and yes where nothing does."""
    try:
        return x._base is not None
    except AttributeError:
        return True


def compiled_of(model: Any) -> nn.Module | None:
    """The module that torch.compile made a model of; None if it is no such model."""
    inner = getattr(model, COMPILED.rstrip("."), None)
    if isinstance(inner, nn.Module):
        return inner
    if type(model).__name__ == "OptimizedModule":
        what = "the model inside of a compiled one is not found: compile it in place, by model.compile()"
        raise gone("torch._dynamo.OptimizedModule._orig_mod", f"{what}. Otherwise")
    return None


def copy_all(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Copy values into tensors, with few kernels on a GPU; one by one where torch has no such function."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(tensors, values)
        return
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def scale_all(tensors: list[Tensor], scale: Tensor) -> None:
    """Multiply tensors by a number, in place; otherwise as :func:`copy_all`."""
    if hasattr(torch, "_foreach_mul_"):
        torch._foreach_mul_(tensors, scale)
        return
    for tensor in tensors:
        tensor.mul_(scale)


def norms_of(tensors: list[Tensor], p: float, dtype: torch.dtype) -> list[Tensor]:
    """The norm of each tensor; otherwise as :func:`copy_all`."""
    if hasattr(torch, "_foreach_norm"):
        return list(torch._foreach_norm(tensors, p, dtype=dtype))
    return [torch.linalg.vector_norm(tensor, p, dtype=dtype) for tensor in tensors]


def compiled(function: Callable[..., Any], versions: int) -> Callable[..., Any]:
    """A function compiled as one graph, of which torch may make so many versions.

    Blocks of a class share its code, and each shape of theirs is a version, in training and without gradients. Before
    torch 2.12 ``torch.compile`` has no argument for it, and the limit is one of the whole process.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        limited: Any = functools.partial(torch.compile, recompile_limit=max(versions, 8))
    else:
        allow_recompilations(versions)
        limited = torch.compile
    return limited(function, fullgraph=True)  # type: ignore[no-any-return]
