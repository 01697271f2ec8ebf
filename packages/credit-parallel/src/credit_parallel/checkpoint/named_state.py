"""What of a model and an optimizer is in a checkpoint, under which names."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from credit_parallel.checkpoint.json_values import names_in, pack, unpack
from credit_parallel.checkpoint.saved_tensors import Stock, name_of
from credit_parallel.checkpoint.strict_reader import CheckpointError
from credit_parallel.state_dicts import (
    first_few,
    names_of,
    optimizer_misfits,
    plain_name,
    refuse_plain_part,
    zeros_like_parameter,
)

logger = logging.getLogger(__name__)

MODEL, OPTIMIZER, RNG = "model/", "optimizer/", "rng/"

# How an optimizer computes is a matter of the layout and the device; the rest of a group's settings is the training's.
_OWN_SETTINGS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")


def model_entries(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model's state dict, which share its memory, and its other entries, by plain names."""
    entries = {plain_name(name): value for name, value in model.state_dict().items()}
    tensors = {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in entries.items() if name not in tensors}


def load_model(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Load values by plain names. Tensors are the model's own by now, but hooks of modules want to know."""
    own = {plain_name(name): name for name in model.state_dict()}
    model.load_state_dict({own[name]: value for name, value in values.items()}, strict=False)


def optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of an optimizer, for JSON, by names of parameters; its tensors go into ``tensors``."""
    names = names_of(model, optimizer)
    state: dict[str, Any] = {}
    for p, name in names.items():
        if p not in optimizer.state:
            continue
        state[name] = {}
        for key, value in optimizer.state[p].items():
            path = f"{OPTIMIZER}{name}/{key}"
            refuse_plain_part(optimizer, p, f"{key} of {name}", value)
            if isinstance(value, DTensor):
                tensors[path] = value.detach()
                state[name][key] = {"tensor": path}
            else:
                state[name][key] = pack(value, path, tensors)
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        settings = {key: value for key, value in group.items() if key not in _OWN_SETTINGS}
        packed = pack(settings, f"{OPTIMIZER}group {i}", tensors)
        groups.append({"params": [names[p] for p in group["params"]], "settings": packed})
    return {"state": state, "param_groups": groups}


def optimizer_problem(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], stock: Stock
) -> str:
    """What keeps a saved state from being loaded into an optimizer; empty if nothing does."""
    names = names_of(model, optimizer)
    wanted = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    parameters = {name: p for p, name in names.items()}
    shapes = {
        name: unpack({"dict": list(values.items())}, lambda tensor: _outline(stock, tensor))
        for name, values in saved["state"].items()
    }
    return optimizer_misfits(parameters, wanted, {"state": shapes, "param_groups": saved["param_groups"]})


def _outline(stock: Stock, name: str) -> Tensor:
    return torch.empty(stock[name].shape, dtype=stock[name].dtype, device="meta")


def optimizer_targets(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], stock: Stock
) -> dict[str, Tensor]:
    """Memory for the tensors of a saved state: divided as its parameter where it is of the same shape."""
    targets = {}
    parameters = {name: p for p, name in names_of(model, optimizer).items()}

    def allocate(name: str, p: Tensor) -> None:
        stored = stock[name]
        if stored.shape == tuple(p.shape) and not (name.endswith("/step") and not stored.shape):
            targets[name] = zeros_like_parameter(p, stored.dtype)
        else:
            targets[name] = torch.zeros(stored.shape, dtype=stored.dtype, device=p.device if stored.shape else "cpu")

    for name, values in saved["state"].items():
        for value in values.values():
            for tensor in names_in(value):
                allocate(tensor, parameters[name])
    for group in saved["param_groups"]:
        for tensor in names_in(group["settings"]):
            targets[tensor] = torch.zeros(stock[tensor].shape, dtype=stock[tensor].dtype)
    return targets


def rehearse_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], stock: Stock, where: str
) -> None:
    """Load a saved state into a shadow of an optimizer, whose tensors have shapes and no values.

    A CheckpointError, which names the checkpoint (``where``), says what keys are missing or of which other type values
    are.
    """
    shadow = object.__new__(type(optimizer))
    shadow.__dict__.update(optimizer.__dict__)
    names = names_of(model, optimizer)
    shadows = {p: torch.empty(p.shape, dtype=p.dtype, device="meta") for p in names}
    shadow.state = defaultdict(dict)
    shadow.param_groups = [{**group, "params": [shadows[p] for p in group["params"]]} for group in shadow.param_groups]
    try:
        _load(shadow, list(names.values()), saved, lambda name: _outline(stock, name))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is damaged, or of another optimizer: {type(optimizer).__name__} cannot load its state ({error!r})"
        ) from None
    except (RuntimeError, NotImplementedError) as error:
        logger.debug("%s wants values of its state, and could not be tried beforehand: %s", type(optimizer), error)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], tensor_of: Callable[[str], Tensor]
) -> None:
    """Give an optimizer a saved state, whose tensors are there."""
    _load(optimizer, list(names_of(model, optimizer).values()), saved, tensor_of)


def _load(
    optimizer: torch.optim.Optimizer, names: list[str], saved: Mapping[str, Any], tensor_of: Callable[[str], Tensor]
) -> None:
    number = {name: i for i, name in enumerate(names)}
    state = {
        number[name]: {key: unpack(value, tensor_of) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    groups, at = [], 0
    for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        own = {key: group[key] for key in _OWN_SETTINGS if key in group}
        params = list(range(at, at := at + len(group["params"])))
        groups.append({**unpack(kept["settings"], tensor_of), **own, "params": params})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the groups of an optimizer set for the training: learning rate, weight decay and the like."""
    return [{k: v for k, v in group.items() if k not in _OWN_SETTINGS} for group in optimizer.param_groups]


def changed_settings(mine: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that differ, in words; of a scheduled learning rate that of its start, not of its last step."""
    found = []
    for i, (own, other) in enumerate(zip(mine, saved, strict=True)):
        scheduled = "initial_lr" in own and "initial_lr" in other
        for key in sorted(set(own) & set(other)):
            if own[key] != other[key] and not (key == "lr" and scheduled):
                found.append(f"{key} of group {i}: {other[key]!r} in the checkpoint, {own[key]!r} here")
    return found


def dtype_problem(own: Mapping[str, Tensor], saved: Mapping[str, torch.dtype]) -> str:
    """Which complex tensors would lose their imaginary parts; empty if none would."""
    lost = [
        f"{name} is {name_of(saved[name])} there, {name_of(p.dtype)} here"
        for name, p in own.items()
        if name in saved and saved[name].is_complex and not p.is_complex()
    ]
    return f"complex tensors do not fit into real ones: {first_few(lost)}" if lost else ""


def casts(own: Mapping[str, Tensor], saved: Mapping[str, torch.dtype]) -> list[str]:
    """How tensors are cast while they are loaded, in words; empty if none is."""
    counts: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, p in own.items():
        if name in saved and saved[name] != p.dtype:
            counts.setdefault((saved[name], p.dtype), []).append(name)
    return [
        f"{len(names)} tensor(s) from {name_of(there)} to {name_of(here)} ({names[0]}{', ...' if names[1:] else ''})"
        for (there, here), names in counts.items()
    ]


def model_problem(
    own: Mapping[str, Tensor], others: Sequence[str], stock: Mapping[str, Sequence[int]], strict: bool
) -> tuple[str, list[str], list[str]]:
    """How a saved model differs from this one: the problem, names that are missing there, names that are missing here.

    ``others`` are names of this model that are no tensors; ``stock`` has the shapes of saved tensors, () for what is
    none. Other shapes are a problem always, other names if ``strict``.
    """
    names = [*own, *others]
    missing = [name for name in names if name not in stock]
    unexpected = sorted(set(stock) - set(names))
    shapes = [
        f"{name} is {tuple(stock[name])} there, {tuple(p.shape)} here"
        for name, p in own.items()
        if name in stock and tuple(stock[name]) != tuple(p.shape)
    ]
    problems = []
    if strict and missing:
        problems.append(f"missing from it: {first_few(missing)}")
    if strict and unexpected:
        problems.append(f"unexpected in it: {first_few(unexpected)}")
    if shapes:
        problems.append(f"of other shapes: {first_few(shapes)}")
    return "; ".join(problems), missing, unexpected
