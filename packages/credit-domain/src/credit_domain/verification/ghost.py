"""A copy of a model without its weights, which can be made into a model with random ones at any time."""

from __future__ import annotations

import copy
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from credit_domain._torch_private import CHECKPOINTED, buffers_of, parameters_of
from credit_domain.casts import cast_tensor
from credit_domain.engine.layer import DomainParallelLayer
from credit_domain.model.trace import drop_trials, managers_of
from credit_domain.verification.compare import is_number
from credit_domain.verification.record import without_dropout

Switches = dict[str, dict[str, bool | int | float | str]]


@dataclass(frozen=True)
class Ghost:
    """A copy of a model whose parameters are on the meta device; buffers are kept, for masks and tables are in them.

    Attributes:
        model: The copy.
        names: Name of each parameter of the plain model, by identity.
        order: For each parameter that the modules of the copy hold, in order, the name in the plain model; None for
            one that the plain model does not have.
    """

    model: nn.Module
    names: dict[int, str]
    order: tuple[str | None, ...]

    @classmethod
    def of(cls, model: nn.Module, like: Ghost | None = None) -> Ghost:
        """The ghost of a model; of a converted one, ``like`` is the ghost of the plain one.

        Raises:
            ValueError: If it has buffers without values.
            TypeError, RuntimeError: If it cannot be copied.
        """
        if any(buffer.is_meta for buffer in model.buffers()):
            raise ValueError("its buffers are on the meta device")
        names = {id(p): name for name, p in model.named_parameters()} if like is None else like.names
        memo: dict[int, Any] = managers_of(model) if like is None else {}  # the plain model runs on one rank
        for part in model.modules():
            for value in vars(part).values():
                if isinstance(value, Tensor) and not value.is_leaf:  # a hook computes it, and will again
                    memo[id(value)] = value.detach().clone()
        for parameter in model.parameters():
            if id(parameter) in names:
                ghost = torch.empty_like(parameter, device="meta")
                memo[id(parameter)] = nn.Parameter(ghost, requires_grad=parameter.requires_grad)
        order = tuple(
            names.get(id(p)) for part in model.modules() for p in parameters_of(part).values() if p is not None
        )
        return cls(drop_trials(copy.deepcopy(model, memo)), names, order)

    @property
    def size(self) -> int:
        """Number of values in all parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def made(self, dtype: torch.dtype, device: torch.device, weights: dict[str, nn.Parameter]) -> nn.Module:
        """A model with random weights, without dropout, in ``dtype`` or the complex dtype that belongs to it.

        ``weights`` are those by their names in the plain model. Those that are missing are drawn and added, so that the
        ghosts of the plain and of the converted model share them.
        """
        model, names = copy.deepcopy(self.model), iter(self.order)
        own: dict[int, nn.Parameter] = {}
        for part in model.modules():
            for key, parameter in parameters_of(part).items():
                if parameter is None:
                    continue
                name = next(names)
                if name is None:  # a converter made it
                    value = cast_tensor(parameter.detach(), dtype, device)
                    made = own.setdefault(id(parameter), nn.Parameter(value, parameter.requires_grad))
                else:
                    if name not in weights:
                        value = _random(cast_tensor(parameter, dtype), name).to(device)
                        weights[name] = nn.Parameter(value, parameter.requires_grad)
                    made = weights[name]
                parameters_of(part)[key] = made
            for key, buffer in buffers_of(part).items():
                if buffer is not None:
                    buffers_of(part)[key] = cast_tensor(buffer, dtype, device)
        without_dropout(model)
        return model

    def follow(self, model: nn.Module, before: Switches) -> None:
        """Take over what has changed in the converted model since: its mode, switches and buffers.

        ``before`` are its switches (flags, numbers, texts) when it had just been converted.
        """
        mine, now = dict(self.model.named_modules()), switches_of(model)
        buffers = {name.replace(CHECKPOINTED, ""): buffer for name, buffer in model.named_buffers()}
        for name, part in mine.items():
            if name in now:
                was = before.get(name, {})
                changed = {key: value for key, value in now[name].items() if key not in was or was[key] != value}
                part.training = bool(now[name]["training"])
                _inner(part).__dict__.update(changed)
        for name, buffer in self.model.named_buffers():
            theirs = buffers.get(name)
            if theirs is not None and theirs.shape == buffer.shape and not theirs.is_meta:
                buffer.data = theirs.detach().clone().to(buffer.dtype)

    def restore(self, model: nn.Module) -> None:
        """Give a model that was made of this ghost its first buffers again."""
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            theirs.data = mine.detach().to(theirs.device, theirs.dtype, copy=True)


class Twins:
    """The models that ghosts make on a device, made when they are needed, with one set of weights."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._dtype = device, torch.float64
        self._weights: dict[str, nn.Parameter] = {}
        self._made: dict[int, nn.Module] = {}

    def model(self, ghost: Ghost, dtype: torch.dtype) -> nn.Module:
        """The model of a ghost, with its first buffers; those of another dtype are let go."""
        if dtype != self._dtype:
            self._dtype, self._weights, self._made = dtype, {}, {}
        if id(ghost) in self._made:
            ghost.restore(self._made[id(ghost)])
        else:
            self._made[id(ghost)] = ghost.made(dtype, self._device, self._weights)
        return self._made[id(ghost)]


def switches_of(model: nn.Module) -> Switches:
    """Flags, numbers and texts that the modules of a model hold, by the names of the modules."""
    return {
        name.replace(CHECKPOINTED, ""): {
            key: value for key, value in vars(_inner(part)).items() if isinstance(value, (bool, int, float, str))
        }
        for name, part in model.named_modules()
    }


def _inner(module: nn.Module) -> nn.Module:
    """The module that a converted layer wraps; any other module itself."""
    inner: nn.Module = module.wrapped if isinstance(module, DomainParallelLayer) else module
    return inner


def _random(like: Tensor, name: str) -> Tensor:
    """Weights of such a size that a layer keeps the scale of its input; scales near 1, biases near 0."""
    if not is_number(like):
        return torch.ones(like.shape, dtype=like.dtype, device="cpu")
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, dtype=like.dtype, generator=generator, device="cpu")
    if like.ndim < 2:
        return 0.1 * values if name.endswith("bias") else 1 + 0.1 * values
    return values / math.sqrt(max(1, math.prod(like.shape[1:])))
