"""Functions of the model with a backward of their own: each is called on the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from credit_domain.partitioner.autograd_functions import on_every_rank
from credit_domain.partitioner.builder import Builder, Value
from credit_domain.partitioner.rules.table import RULES, divided, results, whole
from credit_domain.partitioner.steps import named


def apply_function(b: Builder, tensors: Sequence[Value], number: int) -> tuple[Value, ...]:
    """All operands are brought together, and gradients are summed before the function's backward."""
    call = b.functions[number]
    if divided(list(tensors)):
        b.repeats()
    b.sums(sum(like.numel() * like.element_size() for like in b.meta))
    step = named(on_every_rank(call, b.place.manager), call.kind.__name__)
    made: tuple[Value, ...] = results(b, b.emit(step, *whole(b, list(tensors))), None)
    return made


RULES[torch.ops.credit_domain.apply_function.default] = apply_function
