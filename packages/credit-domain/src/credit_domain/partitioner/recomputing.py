"""``torch.utils.checkpoint`` inside a model: what it calls is one part of the program, and is recomputed as before.

A trace runs through such a call and forgets it. So while a model is traced the function is another one, which marks
what goes in and what comes out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from credit_domain.containers import mapped

_checkpoint = torch.utils.checkpoint.checkpoint


@torch.library.custom_op("credit_domain::checkpoint_edge", mutates_args=())
def checkpoint_edge(x: Tensor, number: int, begins: bool) -> Tensor:
    """Marks a tensor that goes into a call, or comes out of it."""
    return x.clone()


@checkpoint_edge.register_fake
def _(x: Tensor, number: int, begins: bool) -> Tensor:
    return x.clone()


checkpoint_edge.register_autograd(lambda ctx, grad: (grad, None, None))

Calls = list[dict[str, Any]]
"""The keyword arguments of each call, in order."""


@contextmanager
def marked_checkpoints(model: nn.Module) -> Iterator[Calls]:
    """While this lasts, a model's calls of ``checkpoint`` run their function, and mark what goes in and comes out."""
    calls: Calls = []

    def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        names = ("use_reentrant", "context_fn", "determinism_check", "debug", "preserve_rng_state", "early_stop")
        how = {name: kwargs.pop(name) for name in names if name in kwargs}
        number = len(calls)
        calls.append({name: value for name, value in how.items() if name != "use_reentrant"})
        args, kwargs = mapped((args, kwargs), lambda _, x: checkpoint_edge(x, number, True))
        return mapped(function(*args, **kwargs), lambda _, x: checkpoint_edge(x, number, False))

    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    modules = [torch.utils.checkpoint, *(sys.modules[name] for name in names if name in sys.modules)]
    found = [(module, name) for module in modules for name, value in vars(module).items() if value is _checkpoint]
    patches = [mock.patch.object(module, name, checkpoint) for module, name in set(found)]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in reversed(patches):
            patch.stop()


def recomputed(number: int, how: dict[str, Any]) -> Callable[..., Any]:
    """A program that runs once forward, and again in the backward."""

    def checkpoint(module: Any, *values: Any) -> Any:
        def run(*values: Any) -> Any:
            return module._programs[number](module, *values)

        return _checkpoint(run, *values, use_reentrant=False, **how)

    return checkpoint
