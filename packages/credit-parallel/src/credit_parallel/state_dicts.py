"""Whole state dicts of sharded models and optimizers: gathered on the first rank, and loaded from it.

They are those of the plain model on one rank, so that they move between layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from credit_domain.extend import COMPILED, plain_names, with_plain_names
from credit_halo import naming_missing_ranks
from credit_parallel.contract import device_of
from credit_parallel.domain import get_raw_model


def fsdp2_state_dict(model: nn.Module) -> dict[str, Any]:
    """The whole state dict of a model, however it is sharded, under the names of the plain model.

    It is that of the first rank of the world, in CPU memory of its own; other ranks get an empty dict.

    Collectives: gathers each sharded tensor.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return _copied(state) if _is_first() else {}


def fsdp2_load_state_dict(model: nn.Module, sd: Mapping[str, Any]) -> None:
    """Load the whole state dict that the first rank has into a model, however it is sharded; others' is not read.

    It is that of the plain model, or of a converted model of the reference (``a.conv.weight`` for ``a.weight``).

    Raises:
        ValueError: On all ranks alike, if names are missing or unknown, or shapes differ.

    Collectives: a broadcast of each tensor.
    """
    model = get_raw_model(model)
    own = {plain_name(name): name for name in model.state_dict()}
    if _is_first():
        sd = {plain_name(name): value for name, value in with_plain_names(model, sd).items()}
    _raise_together(_misfits(model, own, sd) if _is_first() else "", "fsdp2_load_state_dict")
    if dist.is_initialized():
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, dict(sd) if _is_first() else {}, options=options)
    else:
        model.load_state_dict({own[name]: value for name, value in sd.items()})


def fsdp2_optimizer_state_dict(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer, by names of parameters; those that never had a gradient have none.

    The first rank of the world gets ``{"state": {name: {key: value}}, "param_groups": [{"params": [name], ...}]}`` in
    CPU memory of its own; other ranks an empty dict.

    Raises:
        ValueError: If the optimizer has parameters that are none of the model's, or keeps a plain tensor for a sharded
            parameter: then nobody can tell what it is a part of.

    Collectives: gathers each sharded tensor.
    """
    names = names_of(model, opt)
    state: dict[str, dict[str, Any]] = {}
    for p, name in names.items():
        if p not in opt.state:
            continue
        for key, value in opt.state[p].items():
            refuse_plain_part(opt, p, f"{key} of {name}", value)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if _is_first():
                state.setdefault(name, {})[key] = _copied(whole)
    if not _is_first():
        return {}
    groups = [
        {**_copied(_settings(group)), "params": [names[p] for p in group["params"]]} for group in opt.param_groups
    ]
    return {"state": state, "param_groups": groups}


def fsdp2_load_optimizer_state_dict(model: nn.Module, opt: torch.optim.Optimizer, sd: Mapping[str, Any]) -> None:
    """Load what :func:`fsdp2_optimizer_state_dict` returned on the first rank, however the model is sharded now.

    The optimizer has the same parameter groups; a new one will do. What other ranks give as ``sd`` is not read.

    Raises:
        ValueError: On all ranks alike, if groups hold other parameters, or a state is of an unknown parameter, or of
            another shape than the sharded parameter that it belongs to.

    Collectives: a broadcast of each tensor.
    """
    names = names_of(model, opt)
    parameters = {name: p for p, name in names.items()}
    wanted = [[names[p] for p in group["params"]] for group in opt.param_groups]
    if _is_first():
        sd = _with_plain_names(get_raw_model(model), sd)
    _raise_together(optimizer_misfits(parameters, wanted, sd) if _is_first() else "", "fsdp2_load_optimizer_state_dict")
    state, settings = from_first(_outline(sd) if _is_first() else None)
    # Tensors of a parameter's shape are divided as it is. torch's functions divide those of a module.
    holder = nn.Module()
    places: list[tuple[str, str]] = []
    for name, values in state.items():
        for key, value in values.items():
            if isinstance(value, _Shape):
                p = parameters[name]
                if value.shape == p.shape:
                    values[key] = zeros_like_parameter(p, value.dtype)
                else:
                    values[key] = torch.zeros(value.shape, dtype=value.dtype, device=p.device)
                holder.register_buffer(str(len(places)), values[key])
                places.append((name, key))
    whole = {str(i): sd["state"][name][key] for i, (name, key) in enumerate(places)} if _is_first() else {}
    if places:
        fsdp2_load_state_dict(holder, whole)
    number = {name: i for i, name in enumerate(name for group in wanted for name in group)}
    groups = [
        {**group, "params": [number[name] for name in mine]} for mine, group in zip(wanted, settings, strict=True)
    ]
    opt.load_state_dict({"state": {number[name]: values for name, values in state.items()}, "param_groups": groups})


def _with_plain_names(model: nn.Module, sd: Mapping[str, Any]) -> Mapping[str, Any]:
    """An optimizer's state under the model's names, where it is of a converted model of the reference."""
    listed = [name for group in sd["param_groups"] for name in group["params"]]
    changed = {name: plain_name(other) for name, other in plain_names(model, {*sd["state"], *listed}).items()}
    state = {changed.get(name, name): values for name, values in sd["state"].items()}
    groups = [
        {**group, "params": [changed.get(name, name) for name in group["params"]]} for group in sd["param_groups"]
    ]
    return {**sd, "state": state, "param_groups": groups}


def refuse_plain_part(opt: torch.optim.Optimizer, p: Tensor, what: str, value: Any) -> None:
    """Raise a ValueError if an optimizer keeps something other than numbers and DTensors for a sharded parameter."""
    plain = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.ndim > 0
    if isinstance(p, DTensor) and (plain or isinstance(value, (Mapping, list, tuple))):
        raise ValueError(
            f"{type(opt).__name__} keeps {what}, which is sharded, as a plain {type(value).__name__}: "
            "what it would be for the whole parameter is not known"
        )


def zeros_like_parameter(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a state of that dtype, divided as its parameter is."""
    # Torch casts the states of real parameters when it loads them, and leaves complex ones as they are.
    return torch.zeros_like(p, dtype=p.dtype if p.is_complex() and dtype.is_complex else dtype, requires_grad=False)


class _Shape(NamedTuple):
    """Stands for a tensor that is still to be sent."""

    shape: torch.Size
    dtype: torch.dtype


def _outline(sd: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """An optimizer's state without its tensors, but for single numbers, and the settings of its groups."""
    state = {
        name: {
            key: _Shape(value.shape, value.dtype) if isinstance(value, Tensor) and value.ndim else _copied(value)
            for key, value in values.items()
        }
        for name, values in sd["state"].items()
    }
    return state, [_copied(_settings(group)) for group in sd["param_groups"]]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def names_of(model: nn.Module, opt: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The names of an optimizer's parameters, in its order."""
    names: dict[Tensor, str] = {p: plain_name(name) for name, p in get_raw_model(model).named_parameters()}
    listed = [p for group in opt.param_groups for p in group["params"]]
    if strangers := [p for p in listed if p not in names]:
        raise ValueError(
            f"{len(strangers)} of the optimizer's {len(listed)} parameters are none of the model's, the first of shape "
            f"{tuple(strangers[0].shape)}: make the optimizer after the model is sharded"
        )
    return {p: names[p] for p in listed}


def plain_name(name: str) -> str:
    """A name without what torch.compile adds to it."""
    return name.replace(COMPILED, "")


def _misfits(model: nn.Module, own: Mapping[str, str], sd: Mapping[str, Any]) -> str:
    """What keeps a state dict from being loaded; empty if nothing does."""
    values = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in sd]
    problems += [f"{name} is unknown" for name in sd if name not in own]
    for name in own:
        value, given = values[own[name]], sd.get(name)
        if isinstance(value, Tensor) and isinstance(given, Tensor) and value.shape != given.shape:
            problems.append(f"{name} is of shape {tuple(given.shape)}, the model's of {tuple(value.shape)}")
    return first_few(problems, "; ")


def optimizer_misfits(parameters: Mapping[str, Tensor], wanted: Sequence[Sequence[str]], sd: Mapping[str, Any]) -> str:
    """Why a saved optimizer state does not fit the parameters; empty if it does."""
    problems = []
    groups = [list(group["params"]) for group in sd["param_groups"]]
    if [set(group) for group in groups] != [set(group) for group in wanted]:
        sizes = [[len(group) for group in both] for both in (groups, wanted)]
        strangers = sorted({name for group in groups for name in group} ^ {name for group in wanted for name in group})
        problems.append(
            f"the groups hold other parameters: {sizes[0]} of them saved, {sizes[1]} in the optimizer, not in both: "
            f"{', '.join(strangers[:4]) or 'none'}"
        )
    for name, values in sd["state"].items():
        p = parameters.get(name)
        if p is None:
            problems.append(f"there is a state of {name}, which is no parameter of the optimizer")
            continue
        for key, value in values.items():
            if isinstance(p, DTensor) and isinstance(value, Tensor) and value.ndim and value.shape != p.shape:
                problems.append(f"{key} of {name} is of shape {tuple(value.shape)}, the parameter of {tuple(p.shape)}")
            if isinstance(value, Tensor) and value.is_complex() and not p.is_complex():  # torch would cast it
                problems.append(f"{key} of {name} is complex, and the parameter is real")
    return first_few(problems, "; ")


def first_few(items: Sequence[str], between: str = ", ") -> str:
    """The first eight of some texts, and how many more there are."""
    more = [f"and {len(items) - 8} more"] if len(items) > 8 else []
    return between.join([*items[:8], *more])


# The first rank


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@naming_missing_ranks("sending a value from the first rank")
def from_first(value: Any) -> Any:
    """What the first rank of the world has."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=device_of(None))
    return values[0]


def _raise_together(problem: str, what: str) -> None:
    problem = from_first(problem)
    if problem:
        raise ValueError(f"{what}: {problem}")


def _copied(value: Any) -> Any:
    """A copy in CPU memory of whatever tensors there are."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
