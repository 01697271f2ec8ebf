"""Values of tensors that a forward makes itself, from numbers alone: a check or a branch may read them in a trace.

Traced tensors hold no memory, so nothing can be read from them. What ``torch.linspace`` returns, and what is worked out
of that, has the same values in each call. So the same is worked out beside the trace, on tensors with memory. Where
forward then asks for a number (``if``, ``float``, ``.item()``, ``.tolist()``), it gets that of the same tensor with
memory. Values that follow from arguments, parameters or buffers are not known, and reading them is refused as before.
"""

from __future__ import annotations

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from credit_domain.containers import mapped, tensors_in
from credit_domain.partitioner.autograd_functions import changes_in_place

logger = logging.getLogger(__name__)

_MOST = 1 << 22  # entries of a tensor that is kept in memory beside the trace

_MAKE = frozenset(
    {torch.tensor, torch.as_tensor, torch.from_numpy, torch.arange, torch.linspace, torch.logspace, torch.eye}
    | {torch.zeros, torch.ones, torch.full, torch.tril_indices, torch.triu_indices}
)
_MAKE_LIKE = frozenset(
    {torch.zeros_like, torch.ones_like, torch.full_like}
    | {Tensor.new_tensor, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}
)
_READ = frozenset(
    {getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "complex", "index", "array", "format")}
    | {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.is_nonzero, torch.is_nonzero}
    | {Tensor.equal, torch.equal, Tensor.allclose, torch.allclose}
)
_VIEWS_BY_SHAPE = {"expand_as", "view_as", "reshape_as"}  # of the first argument, whatever the values of the second
_DEVICE = re.compile(r"(cpu|cuda|xpu|mps)(:\d+)?")
_NOT_KNOWN = re.compile("rand|bernoulli|dropout|multinomial|normal|poisson|uniform|exponential|cauchy|geometric|empty")


class KnownValues(TorchFunctionMode):
    """While this lasts, what a forward makes of numbers alone can be read."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of the traced tensor, which is kept
        self._room = 4 * _MOST
        self._aside = ThreadPoolExecutor(1)  # what traces is a matter of the thread

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._known.clear()
        self._aside.shutdown()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        given = [x for _, x in tensors_in((args, kwargs))]
        known = self._follows(func, name, given)
        if known and func in _READ:
            return self._beside(func, args, kwargs)
        made = func(*args, **kwargs)
        in_place = changes_in_place(name) or kwargs.get("out") is not None
        if known and (in_place or isinstance(made, (Tensor, tuple, list))):
            try:
                followed = self._keep(made, self._beside(func, args, kwargs))
            except Exception as error:  # a tensor is then as unknown as any other
                logger.debug("%s is not followed beside the trace: %s", name, error)
                followed = False
            if not followed:
                self._forget(given)
        elif in_place or name in _VIEWS_BY_SHAPE:
            self._forget(given)
        return made

    def _follows(self, func: Any, name: str, given: list[Tensor]) -> bool:
        """Whether a result follows from what is known."""
        if _NOT_KNOWN.search(name):
            return False
        if func in _MAKE_LIKE:
            return given[0].numel() <= _MOST and all(id(x) in self._known for x in given[1:])
        return all(id(x) in self._known for x in given) if given else func in _MAKE

    def _beside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The same call on tensors with memory, on the CPU."""
        if func is Tensor.cuda:
            return self._known[id(args[0])][1]

        def with_memory(_: str, x: Tensor) -> Tensor:
            found = self._known.get(id(x))
            return torch.zeros(x.shape, dtype=x.dtype) if found is None else found[1]

        def run() -> Any:
            with torch.no_grad():
                values, named = mapped((args, kwargs), with_memory)
                named = {key: "cpu" if key == "device" else value for key, value in named.items()}
                made = func(*(_on_cpu(value) for value in values), **named)
                return made.clone() if func in (torch.from_numpy, torch.as_tensor) else made

        return self._aside.submit(run).result()

    def _keep(self, made: Any, beside: Any) -> bool:
        if isinstance(made, (tuple, list)):
            return len(made) == len(beside) and all(self._keep(*pair) for pair in zip(made, beside, strict=True))
        if isinstance(made, Tensor):
            self._room -= made.numel()
            if made.shape != beside.shape or made.numel() > _MOST or self._room < 0:
                return False
            self._known[id(made)] = made, beside
        return True

    def _forget(self, tensors: list[Tensor]) -> None:
        """Forget tensors, and all that share their memory."""
        found = (self._known.get(id(x)) for x in tensors)
        changed = {pair[1].untyped_storage().data_ptr() for pair in found if pair is not None}
        kept = {at: pair for at, pair in self._known.items() if pair[1].untyped_storage().data_ptr() not in changed}
        self._known = kept


def _on_cpu(value: Any) -> Any:
    named = isinstance(value, str) and _DEVICE.fullmatch(value)
    return "cpu" if named or isinstance(value, torch.device) else value
