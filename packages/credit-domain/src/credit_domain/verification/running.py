"""One run of a model, whole or on the rows of one rank: what it gave, and what was recorded."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from credit_domain.containers import mapped, tensors_in
from credit_domain.verification.compare import is_number
from credit_domain.verification.record import Recorder
from credit_halo import ExchangeError


class Run:
    """One run of a model.

    Args:
        model: The model.
        args: Its positional arguments. Floating-point and complex tensors are copied, and get a gradient.
        kwargs: Its keyword arguments, likewise.

    Attributes:
        recorder: What was recorded.
        inputs: The copies, by name: ``0`` is the first positional argument.
        outputs: The floating-point and complex tensors that it returned, by name.
        gradients: What :meth:`backward` kept of the gradients of parameters, by name.
        failed_in: The module that raised.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.model, self.recorder = model, Recorder(model)
        self._args, self._kwargs = mapped((tuple(args), dict(kwargs)), lambda _, x: _leaf(x))
        named = {**{str(i): value for i, value in enumerate(self._args)}, **self._kwargs}
        self.inputs = {path: x for path, x in tensors_in(named) if x.requires_grad}
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Any] = {}
        self.failed_in = ""

    def forward(self) -> None:
        """Run the model; whatever it raises is raised."""
        # A model may change its inputs in place, which leaves of the graph do not allow.
        args, kwargs = mapped((self._args, self._kwargs), lambda _, x: x.clone())
        try:
            with self.recorder.recording():
                out = self.model(*args, **kwargs)
        except Exception:
            self.failed_in = self.recorder.stack[-1] if self.recorder.stack else ""
            raise
        self.outputs = {path or "output": x for path, x in tensors_in(out) if is_number(x)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs."""
        return {path: tuple(out.shape) for path, out in self.outputs.items()}

    def factors(self, seed: int) -> dict[str, Tensor]:
        """Random weights of the outputs, for a loss."""
        generator = torch.Generator("cpu").manual_seed(seed)
        return {
            path: torch.randn(out.shape, dtype=out.dtype, generator=generator, device="cpu").to(out.device)
            for path, out in self.outputs.items()
        }

    def backward(self, factors: Mapping[str, Tensor], keep: Callable[[Tensor], Any] = lambda grad: grad) -> None:
        """Differentiate the sum of the outputs times the factors; ``keep`` is called with each parameter's gradient."""
        terms = [(out * factors[path]).sum() for path, out in self.outputs.items() if out.requires_grad]
        if terms:
            total = sum(terms[1:], terms[0])
            (total.real if total.is_complex() else total).backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = keep(parameter.grad)
                parameter.grad = None

    def input_gradient(self, path: str) -> Tensor:
        """The gradient of an input; zeros where it has none."""
        x = self.inputs[path]
        return torch.zeros_like(x) if x.grad is None else x.grad


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(is_number(x))


def attempt(make: Callable[[], nn.Module], given: Any) -> tuple[Run | None, str]:
    """Make a model and run it on ``(args, kwargs)``: the run, and what went wrong, or an empty text.

    Raises:
        ExchangeError: If a peer is gone; all else that is raised is told.
    """
    run = None
    try:
        run = Run(make(), *given)
        run.forward()
    except ExchangeError:
        raise
    except Exception as error:
        return run, f"{type(error).__name__}: {line_of(error)}"
    if not run.outputs:
        return run, "it returns no tensor of numbers"
    if not all(bool(x.isfinite().all()) for x in run.outputs.values()):
        return run, "its result is not finite"
    return run, ""


def line_of(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."


@contextmanager
def set_apart(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run copies of a model inside, on a device, of which nothing is left afterwards.

    The gradients of the model and the generators of torch, Python and NumPy are as before. A copy of a model still has
    its weights where a function that it holds has them.
    """
    parameters, state = list(model.parameters()), random.getstate()
    grads = [parameter.grad for parameter in parameters]
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(device)
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # A checkpoint around the first call must not count what is saved for the backward here.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(drawn)
