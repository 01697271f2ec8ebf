"""What a training step of a model keeps in memory and sums over tensor-parallel ranks, measured without data.

The model runs once on the meta device, forward, for one sample of the whole grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from credit_domain.casts import cast_module
from credit_domain.extend import meta_copy, real_dtype_of
from credit_parallel.blocks import blocks_of
from credit_parallel.tensor_parallel.declaration import Declaration, DividedLayer, declares
from credit_parallel.tensor_parallel.validation import read_blocks
from credit_parallel.trainer_section import Conf


@dataclass(frozen=True)
class StepCost:
    """What one sample of the whole grid costs on a rank that has a share of the channels; in bytes."""

    parameters: int  #: of all parameters
    root: int  #: of those that are in no block
    largest: int  #: of those of the largest block
    #: Of activations that autograd keeps for the backward, each storage once, parameters and buffers left out.
    kept: int
    #: The same where blocks are recomputed in the backward: what is kept outside of them and what goes into them, and,
    #: while it is recomputed, the block that keeps the most.
    recomputed: int
    tensor_forward: int  #: that row-parallel layers sum forward
    tensor_backward: int  #: that column-parallel layers sum backward
    tensor_again: int  #: of ``tensor_forward``, those in blocks that may be recomputed
    inputs: int  #: of the input
    outputs: int  #: of the output
    fused: int  #: of fused weights whose rows are rearranged at each forward, and kept so until the backward
    fused_sent: int  #: of those rows, that the rank that sends the most sends


def step_cost(
    model: nn.Module, shape: Sequence[int], *, tensor: int = 1, amp: bool = False, conf: Conf = None
) -> StepCost:
    """Run a copy of a model on the meta device, and add up.

    Args:
        shape: Shape of its input, of the whole grid; costs are those of as many samples.
        tensor: The tensor-parallel degree.
        amp: Whether activations are bfloat16.

    Raises:
        ValueError: If blocks cannot be divided over ``tensor`` ranks, or the model cannot be run for its shapes.
    """
    ghost = meta_copy(model)
    declarations = narrow(ghost, tensor)
    parameters = _bytes(ghost.parameters())
    blocks = blocks_of(ghost, conf)
    of_blocks = list(_parameters_of(blocks))
    largest = max((_bytes(own) for own in of_blocks), default=0)
    inside = {id(p) for own in of_blocks for p in own}
    root = _bytes(p for p in ghost.parameters() if id(p) not in inside)
    fused = [layer for declaration in declarations for layer in declaration.layers.values() if len(layer.parts) > 1]
    if amp:
        cast_module(ghost, torch.bfloat16)
    outer = [block for name, block in blocks.items() if not any(name.startswith(f"{other}.") for other in blocks)]
    kept, sums = _Kept(ghost, outer), _Sums(declarations, outer)
    x = torch.empty(tuple(shape), dtype=real_dtype_of(ghost), device="meta")
    try:
        with torch.device("meta"), torch.enable_grad(), saved_tensors_hooks(kept.save, lambda tensor: tensor):
            out = ghost(x)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} could not be run for its shapes alone: {type(error).__name__}: {error}"
        ) from error
    outputs = [out] if isinstance(out, Tensor) else [o for o in out if isinstance(o, Tensor)]
    return StepCost(
        parameters=parameters,
        root=root,
        largest=largest,
        kept=kept.all(),
        recomputed=kept.recomputed(),
        tensor_forward=sums.forward,
        tensor_backward=sums.backward,
        tensor_again=sums.again,
        inputs=_bytes([x]),
        outputs=_bytes(outputs),
        fused=_bytes(weight for layer in fused for weight in _rearranged(layer)),
        fused_sent=sum(
            _bytes(_rearranged(layer)) * _rows_sent(layer.parts, tensor) // (sum(layer.parts) // tensor)
            for layer in fused
        ),
    )


def narrow(ghost: nn.Module, tensor: int) -> list[Declaration]:
    """Give a model on the meta device the parameters and heads of one of ``tensor`` ranks; returns what was divided."""
    if tensor == 1:
        return []
    blocks = [(name, module) for name, module in ghost.named_modules() if declares(module, native=False)]
    if not blocks:
        raise ValueError("no block declares _tp_col and _tp_row, so there is nothing to divide")
    declarations, problems = read_blocks(ghost, blocks, tensor, native=False)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    for declaration in declarations:
        for layer in declaration.layers.values():
            _divide(layer.layer, "weight", 0 if layer.role == "column" else 1, tensor)
            if layer.role == "column" and layer.layer.bias is not None:
                _divide(layer.layer, "bias", 0, tensor)
        for module, attribute, value in declaration.counts:
            setattr(module, attribute, value)
        for owner, name, dim in declaration.views:
            if dim is not None:
                _divide(owner, name, dim, tensor)
    return declarations


def _rearranged(layer: DividedLayer) -> list[Tensor]:
    """What of a layer with several parts is divided."""
    names = ("weight", "bias") if layer.role == "column" else ("weight",)
    return [p for name, p in layer.layer.named_parameters() if name in names]


def _rows_sent(parts: Sequence[int], tensor: int) -> int:
    """Rows of a weight that a rank has, in a slice of the whole, and that others work with, in slices of each part."""
    share = sum(parts) // tensor
    starts = list(accumulate(parts, initial=0))
    sent = [0] * tensor
    for reader in range(tensor):
        for start, part in zip(starts, parts, strict=False):
            for row in range(start + part * reader // tensor, start + part * (reader + 1) // tensor):
                sent[row // share] += row // share != reader
    return max(sent)


def _divide(owner: nn.Module, name: str, dim: int, tensor: int) -> None:
    whole = owner.get_parameter(name)
    shape = [size // tensor if d == dim else size for d, size in enumerate(whole.shape)]
    part = torch.empty(shape, dtype=whole.dtype, device="meta")
    setattr(owner, name, nn.Parameter(part, requires_grad=whole.requires_grad))


class _Kept:
    """Storages that autograd keeps, and in which block they were first needed."""

    def __init__(self, model: nn.Module, outer: Sequence[nn.Module]) -> None:
        self.running: int | None = None
        self.storages: dict[int, Any] = {}  # alive, so that a number stays that of one storage
        self.excluded = {self._number(t) for t in (*model.parameters(), *model.buffers())}
        self.outside: set[int] = set()
        self.given: set[int] = set()
        self.inside: list[set[int]] = [set() for _ in outer]
        for i, block in enumerate(outer):
            block.register_forward_pre_hook(self._entering(i), with_kwargs=True)
            block.register_forward_hook(self._leaving)

    def save(self, tensor: Tensor) -> Tensor:
        (self.outside if self.running is None else self.inside[self.running]).add(self._number(tensor))
        return tensor

    def all(self) -> int:
        return self._total(self.outside.union(*self.inside))

    def recomputed(self) -> int:
        stays = self.outside | self.given
        return self._total(stays) + max((self._total(inside - stays) for inside in self.inside), default=0)

    def _total(self, numbers: set[int]) -> int:
        return sum(self.storages[number].nbytes() for number in numbers - self.excluded)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.storages[id(storage)] = storage
        return id(storage)

    def _entering(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.running = i
            self.given.update(self._number(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

        return hook

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running = None


class _Sums:
    """Bytes that tensor-parallel layers sum."""

    def __init__(self, declarations: Sequence[Declaration], outer: Sequence[nn.Module]) -> None:
        self.forward = self.backward = self.again = 0
        again = {id(module) for block in outer for module in block.modules()}
        for declaration in declarations:
            for columns, rows in declaration.pairs:
                for row in rows:
                    row.layer.register_forward_hook(self._row(id(row.layer) in again))
                # Columns that read the same tensor share the sum of its gradient.
                columns[0].layer.register_forward_pre_hook(self._column)

    def _row(self, again: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.forward += _bytes([output])
            self.again += _bytes([output]) if again else 0

        return hook

    def _column(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.backward += _bytes(args[:1])


def _bytes(tensors: Any) -> int:
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)


def _parameters_of(blocks: Mapping[str, nn.Module]) -> Iterator[list[nn.Parameter]]:
    """The parameters of each block, without those of blocks inside it, which come first."""
    seen: set[int] = set()
    for block in blocks.values():
        own = [p for p in block.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        yield own
