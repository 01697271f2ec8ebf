"""Watching a model run: which module got and gave which tensors, in the order of execution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from credit_domain.containers import tensors_in
from credit_domain.engine.layer import DomainParallelLayer

Key = tuple[str, str, int]
"""``enter`` or ``exit``, the qualified name of a module, and which of its calls it is."""


@dataclass
class Event:
    """A module is called, or returns.

    Attributes:
        key: Which event.
        caller: Name of the module whose forward made the call.
        tensors: What it got, or gave, by path.
        gradients: The gradients that arrived there in backward, by path.
        calls: Functions that may mix rows which the caller used since the event before.
    """

    key: Key
    caller: str
    tensors: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    calls: tuple[str, ...] = ()


class Recorder:
    """Records the events of a model's forward, with everything random held fixed."""

    def __init__(self, model: nn.Module) -> None:
        self.events: list[Event] = []
        self.stack: list[str] = []
        self.noise: dict[str, int] = {}
        self.narrow: dict[str, str] = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        # Inside these, tensors hold rows of other ranks; what comes out of them is compared.
        regrouped = [n for n, module in model.named_modules() if getattr(module, "holds_other_rows", False)]
        self.elsewhere = tuple(f"{name}." if name else "" for name in regrouped)
        self.kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self._counts: dict[tuple[str, str], int] = {}
        self._suspects: list[str] = []
        self._on = False
        for module in model.modules():
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._exit, with_kwargs=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside; recomputation in a later backward is not recorded."""
        self._on = True
        with _Watch(self):
            try:
                yield
            finally:
                self._on = False

    def saw(self, function: str) -> None:
        """A function that may mix rows was called."""
        if self._on and function not in self._suspects:
            self._suspects.append(function)

    def narrowed(self, dtype: str) -> None:
        """Something was computed in a dtype of less than double precision; the first module of each dtype is kept."""
        if self._on:
            self.narrow.setdefault(dtype, (self.stack[-1] if self.stack else "") or "the model's own forward")

    def kind_of(self, name: str) -> str:
        """Name of the class of a module."""
        return self.kinds.get(name, "?")

    def to_cpu(self) -> Recorder:
        """Bring what was recorded to the CPU, so that it can be sent."""
        for i, event in enumerate(self.events):
            tensors, gradients = ({path: x.cpu() for path, x in xs.items()} for xs in (event.tensors, event.gradients))
            self.events[i] = replace(event, tensors=tensors, gradients=gradients)
        return self

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._on:
            name = self.names.get(id(module), "?")
            self._add("enter", name, {"args": args, "kwargs": kwargs})
            self.stack.append(name)

    def _exit(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._on:
            name = self.stack.pop()
            self._add("exit", name, {"out": output})

    def _add(self, kind: str, name: str, values: dict[str, Any]) -> None:
        count = self._counts[kind, name] = self._counts.get((kind, name), -1) + 1
        event = Event((kind, name, count), self.stack[-1] if self.stack else "", {}, calls=tuple(self._suspects))
        self._suspects = []
        for path, tensor in tensors_in(values):
            event.tensors[path] = tensor.detach().clone()
            if tensor.requires_grad:
                tensor.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad, path=path: event.gradients.__setitem__(path, grad.detach().clone())
                )
        self.events.append(event)


FIXED_NOISE = 0.5
"""What everything random returns while a model is verified."""

_DROPOUT = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
_NOISE = {torch.rand, torch.randn, torch.rand_like, torch.randn_like, torch.normal, torch.bernoulli}
_NOISE_OPERATORS = ("aten.rand", "aten.normal", "aten.bernoulli", "aten.uniform", "aten.exponential")
_NOISE_IN_PLACE = {Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_}
_IN_FUNCTIONAL = """pad interpolate scaled_dot_product_attention grid_sample unfold fold softmax conv2d conv3d
max_pool2d avg_pool2d adaptive_avg_pool2d layer_norm group_norm instance_norm batch_norm"""
_OF_TENSORS = "roll flip mean sum amax max var std cumsum softmax matmul"
_MIXES_ROWS: dict[Any, str] = {
    **{getattr(F, name): f"F.{name}" for name in _IN_FUNCTIONAL.split()},
    **{getattr(torch, name): f"torch.{name}" for name in [*_OF_TENSORS.split(), "einsum", "bmm"]},
    **{getattr(Tensor, name): f"Tensor.{name}" for name in _OF_TENSORS.split()},
    **{getattr(torch.fft, name): f"torch.fft.{name}" for name in ("fft", "rfft", "fft2", "rfft2")},
    Tensor.__matmul__: "@",
}
_NARROW = {torch.float32, torch.complex64, torch.bfloat16, torch.float16}
"""What a model in double precision computes in only where its own code asks for it."""


class _Watch(TorchFunctionMode):
    """Notes functions that may mix rows, and makes random ones return what does not depend on the layout."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _MIXES_ROWS.get(func)
        if name is not None:
            self.recorder.saw(name)
        if func in _DROPOUT:
            self._note("dropout")
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention and (len(args) > 4 or kwargs.get("dropout_p")):
            self._note("dropout")
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {name: value for name, value in kwargs.items() if name != "dropout_p"}
        if func in _NOISE:
            self._note(func.__name__)
            return func(*args, **kwargs).fill_(FIXED_NOISE)
        if func in _NOISE_IN_PLACE:
            self._note(func.__name__)
            return args[0].fill_(FIXED_NOISE)
        if str(func).startswith(_NOISE_OPERATORS):  # of a program
            return torch.full_like(func(*args, **kwargs), FIXED_NOISE)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.dtype in _NARROW:
            self.recorder.narrowed(str(out.dtype).removeprefix("torch."))
        return out

    def _note(self, name: str) -> None:
        self.recorder.noise[name] = self.recorder.noise.get(name, 0) + 1


def without_dropout(model: nn.Module) -> list[str]:
    """Set the dropout of a model to 0; the names of the modules that had any."""
    names = []
    for name, layer in model.named_modules():
        module = layer.wrapped if isinstance(layer, DomainParallelLayer) else layer
        p: Any = getattr(module, "p", None)
        if "Dropout" in type(module).__name__ and isinstance(p, float) and p:
            module.p = 0.0
            names.append(name)
    return names
