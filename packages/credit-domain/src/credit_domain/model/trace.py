"""Running a model for its shapes alone: on the meta device, in one process, without data or memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from credit_domain._torch_private import buffers_of, parameters_of, pre_hooks_of
from credit_domain.casts import real_dtype_of
from credit_domain.containers import mapped
from credit_mesh import DomainParallelManager
from credit_mesh.extend import set_aside


@dataclass(frozen=True)
class LayerCall:
    """One call of a module.

    Attributes:
        name: Qualified name of the module.
        module: The module, with parameters on the meta device.
        input: Shape of its first tensor argument.
        output: Shape of its (first) result.
        dtype: Of its first tensor argument.
    """

    name: str
    module: nn.Module
    input: tuple[int, ...]
    output: tuple[int, ...]
    dtype: torch.dtype


def trace(model: nn.Module, inputs: Any, watch: Callable[[nn.Module], bool]) -> list[LayerCall]:
    """Run a copy of a model on the meta device and list the calls of the modules to watch, in order.

    Args:
        model: The model; it is not touched.
        inputs: Shape of its input; or a tuple of arguments or a dict of keyword arguments, each a shape, a tensor or
            anything else that ``forward`` takes.
        watch: Which modules to list.

    Raises:
        ValueError: If the model cannot be run for its shapes, with what it said.
    """
    try:
        ghost = meta_copy(model)
    except Exception as error:  # a copy is made by the model's own code
        raise ValueError(f"{type(model).__name__} could not be copied: {type(error).__name__}: {error}") from error
    dtype = real_dtype_of(ghost)

    def unreal(value: Any) -> Any:
        if is_shape(value):
            return torch.empty(tuple(value), dtype=dtype, device="meta")
        return mapped(value, lambda _, x: torch.empty_like(x, device="meta"))

    args, kwargs = arguments_of(inputs, unreal)
    calls: list[LayerCall] = []
    running: list[str] = []
    for name, module in ghost.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.train(False)  # in training it asks for a GPU wherever there is a process group; shapes are the same
        module.register_forward_pre_hook(lambda module, args, name=name: running.append(name))
        module.register_forward_hook(lambda *_: running.__delitem__(-1))  # what it returned would be the result
        if watch(module):
            module.register_forward_hook(_listing(name, calls), with_kwargs=True)
    try:
        with set_aside(), torch.no_grad(), torch.device("meta"):
            ghost(*args, **kwargs)
    except Exception as error:
        where = f" (in {running[-1]})" if running and running[-1] else ""
        raise ValueError(
            f"{type(model).__name__} could not be run for its shapes alone{where}: {type(error).__name__}: {error}"
        ) from error
    return calls


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model; weights that hooks computed, which torch does not copy, are computed anew."""
    computed = [v for part in model.modules() for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


FIRST_CALL = "_tries_at_first_call"
"""The attribute by which the hook of a pending trial is known; see ``credit_domain.verification.trial``."""

LONE_MANAGER = SimpleNamespace(
    domain_parallel_size=1, domain_rank=0, is_first_domain_rank=True, is_last_domain_rank=True, partition=None
)
"""Stands for a manager where a model runs on one rank."""


def managers_of(model: nn.Module) -> dict[int, Any]:
    """For a copy that runs on one rank: in place of each manager that its modules hold, one of a single rank."""
    held = (value for part in model.modules() for value in vars(part).values())
    return {id(value): LONE_MANAGER for value in held if isinstance(value, DomainParallelManager)}


def drop_trials(model: nn.Module) -> nn.Module:
    """Take pending trials away from a copy: the model that it is of waits for them, and not the copy."""
    for part in model.modules():
        for key, hook in list(pre_hooks_of(part).items()):
            if hasattr(hook, FIRST_CALL):
                del pre_hooks_of(part)[key]
    return model


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy for one rank whose tensors are all on the meta device, made without copying any of them."""
    memo = managers_of(model)
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor):
                memo[id(value)] = torch.empty_like(value, device="meta")
        for parameter in parameters_of(module).values():
            if parameter is not None:
                ghost = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(ghost, requires_grad=parameter.requires_grad)
        for buffer in buffers_of(module).values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return drop_trials(copy.deepcopy(model, memo))


def _listing(name: str, calls: list[LayerCall]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        result = output if isinstance(output, Tensor) else next((v for v in output if isinstance(v, Tensor)), None)
        if source is not None and result is not None:
            calls.append(LayerCall(name, module, tuple(source.shape), tuple(result.shape), source.dtype))

    return hook


def arguments_of(inputs: Any, made: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that ``inputs`` stands for (see :func:`trace`): each what ``made`` makes of what was given."""
    if isinstance(inputs, Mapping):
        return (), {name: made(value) for name, value in inputs.items()}
    listed = (inputs,) if isinstance(inputs, Tensor) or is_shape(inputs) else tuple(inputs)
    return tuple(map(made, listed)), {}


def rows_of(inputs: Any, shard_dim: int) -> int:
    """Rows of the first of the inputs, or of arguments, that has three dims or more; 0 if none has."""
    args, kwargs = arguments_of(inputs, lambda x: tuple(x.shape) if isinstance(x, Tensor) else x)
    shapes = [shape for shape in (*args, *kwargs.values()) if is_shape(shape) and len(shape) >= 3]
    return int(shapes[0][shard_dim]) if shapes else 0


def is_shape(value: Any) -> bool:
    """Whether a value is a shape: a sequence of two integers or more."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < 2:
        return False
    return all(isinstance(size, int) and not isinstance(size, bool) for size in value)
