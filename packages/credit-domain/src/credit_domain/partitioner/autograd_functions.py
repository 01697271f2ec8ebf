"""Functions of a model with a backward of their own (:class:`torch.autograd.Function`), and what no program can keep.

A trace has what such a function does forward, and forgets its backward. So while a model is traced the call of one is a
single operator. The program calls the function itself, on the whole, on every rank.

What a function does backward may depend on all of the gradient, as where it is clipped. A rank holds a part of the
gradient alone. So the parts are summed before the function's backward, and each rank then returns its share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from credit_domain._torch_private import version_of
from credit_domain.containers import mapped, tensors_in
from credit_domain.engine.ranks import domain_of, sum_over

_apply = Function.__dict__["apply"]


@dataclass
class Applied:
    """One call of a function.

    Attributes:
        kind: The function.
        args: What it was given; tensors stand for others.
        result: What it returned, likewise.
    """

    kind: type[Function]
    args: tuple[Any, ...]
    result: Any = None

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Call the function on other tensors."""
        new = iter(tensors)
        return _apply.__get__(None, self.kind)(*mapped(self.args, lambda _, x: next(new)))


_calls: list[Applied] = []


@torch.library.custom_op("credit_domain::apply_function", mutates_args=())
def apply_function(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    """Stands for the call of a function while a model is traced."""
    raise NotImplementedError("this operator is traced, and never run")


@apply_function.register_fake
def _(tensors: Sequence[Tensor], number: int) -> list[Tensor]:
    call = _calls[number]
    versions = [version_of(x) for x in tensors]
    with torch.no_grad():
        call.result = call.run(tensors)
    if versions != [version_of(x) for x in tensors]:
        raise ValueError(f"{call.kind.__name__} changes its input in place; return a new tensor instead")
    return [x.clone() for _, x in tensors_in(call.result)]


def _untraced(*_: Any) -> Any:
    raise NotImplementedError("a gradient that forward itself takes of a torch.autograd.Function cannot be traced")


apply_function.register_autograd(_untraced)


@contextmanager
def marked_functions() -> Iterator[list[Applied]]:
    """While this lasts, calls of functions are traced as one operator each."""
    _calls.clear()

    def apply(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
        tensors = [x for _, x in tensors_in(args)]
        if kwargs or not tensors or kind.__module__.startswith("torch."):
            return _apply.__get__(None, kind)(*args, **kwargs)
        if any(isinstance(arg, nn.Module) for arg in args):
            raise ValueError(f"{kind.__name__} is given a module, whose parameters a program cannot see; pass tensors")
        _calls.append(Applied(kind, args))
        new = iter(torch.ops.credit_domain.apply_function(tensors, len(_calls) - 1))
        return mapped(_calls[-1].result, lambda _, x: next(new))

    def register_hook(x: Tensor, hook: Callable[..., Any]) -> None:
        raise ValueError(
            "forward registers a hook on the gradient of a tensor, which a program does not keep: write a "
            "torch.autograd.Function with that backward instead"
        )

    changes = _NoChangesOfData()
    with (
        mock.patch.object(Function, "apply", classmethod(apply)),
        mock.patch.object(Tensor, "register_hook", register_hook),
        mock.patch.object(Tensor, "data", property(changes.give, changes.refuse), create=True),
        changes,
    ):
        yield _calls


def changes_in_place(name: str) -> bool:
    """Whether a function of torch is one that changes its first argument, by its name."""
    return name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


class _NoChangesOfData(TorchFunctionMode):
    """Refuses what is changed in place through ``data``: a trace would give it a gradient, or end the process."""

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[int, Tensor] = {}

    def give(self, x: Tensor) -> Tensor:
        """What ``x.data`` is in a trace."""
        data = x.detach()
        self._given[id(data)] = data
        return data

    def refuse(self, *_: Any) -> None:
        """Refuse a change."""
        raise ValueError("forward changes a tensor through its data: change the tensor itself, under torch.no_grad()")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if changes_in_place(getattr(func, "__name__", "")) and args and id(args[0]) in self._given:
            self.refuse()
        return func(*args, **(kwargs or {}))


class _WithGradient(Function):
    """The same forward; backward, what a function makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.change(grad), None


def on_every_rank(call: Applied, manager: Any) -> Callable[..., Any]:
    """A function that calls another on the whole, which every rank holds."""

    def run(*tensors: Tensor) -> Any:
        domain = domain_of(manager)

        def share(grad: Tensor) -> Tensor:
            return grad / domain.size  # every rank holds all of it

        def complete(grad: Tensor) -> Tensor:
            return sum_over(grad.contiguous(), domain)

        shares: list[Any] = [_WithGradient.apply(x, share) for x in tensors]  # type: ignore[no-untyped-call]
        out = [x for _, x in tensors_in(call.run(shares))]
        return tuple(_WithGradient.apply(x, complete) for x in out)  # type: ignore[no-untyped-call]

    return run
