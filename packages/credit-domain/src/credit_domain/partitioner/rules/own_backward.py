"""Functions of the model with a backward of their own: each is called on the whole, unless it is known better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Function

from credit_domain.partitioner.autograd_functions import on_every_rank
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.rules.table import RULES, divided, results, whole
from credit_domain.partitioner.steps import named


def apply_function(b: Builder, tensors: Sequence[Value], number: int) -> tuple[Value, ...]:
    """All operands are brought together, and gradients are summed before the function's backward."""
    call = b.functions[number]
    if call.kind in EACH_ENTRY:
        ((x,), run, how) = tensors, EACH_ENTRY[call.kind], call.args[1:]
        step = named(lambda x: (run(x, *how),), run.__name__)
        made: tuple[Value, ...] = results(b, b.emit(step, b.at(x, x.layout)), x.layout)
        return made
    if divided(list(tensors)):
        b.repeats()
    b.sums(sum(like.numel() * like.element_size() for like in b.meta))
    step = named(on_every_rank(call, b.place.manager), call.kind.__name__)
    made = results(b, b.emit(step, *whole(b, list(tensors))), None)
    return made


EACH_ENTRY: dict[type[Function], Callable[..., Any]] = {}
"""Functions that treat each entry of a tensor alone, forward and backward, and what a program calls for each."""


def each_entry(function: type[Function], call: Callable[..., Any]) -> None:
    """Make known that a function treats each entry of its first argument, a tensor, alone.

    A program calls ``call`` with this rank's rows and the function's other arguments. One that sends entries to ranks
    with the same rows is of this kind too.
    """
    EACH_ENTRY[function] = call


RULES[torch.ops.credit_domain.apply_function.default] = apply_function
