"""The hook that tries a model before its first call, also where that is compiled."""

from __future__ import annotations

import itertools
import operator
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from credit_domain.engine.ranks import constant
from credit_domain.model.trace import FIRST_CALL


class FirstCall:
    """A hook that tries a model before its first call.

    Compiled code keeps it, and finds while it is traced that the trial is over: taking it away would compile anew.

    Args:
        trial: The :class:`credit_domain.verification.trial.Trial`.
        model: The converted model.
    """

    def __init__(self, trial: Any, model: nn.Module) -> None:
        setattr(self, FIRST_CALL, True)
        self._trial, self._model, self._number = trial, ref(model), next(_numbers)
        _hooks[self._number] = self
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Try the model, unless that is over."""
        if not torch.compiler.is_compiling():
            if self._number not in _over:
                self._trial.at_call(module, args, kwargs)
                _over.add(self._number)  # not where it was refused: it would be again
            self._handle.remove()
        elif not _is_over(self._number):
            shapes = tuple(tuple(operator.index(size) for size in x.shape) for x in args if isinstance(x, Tensor))
            _try_while_tracing(self._number, shapes if len(shapes) == len(args) and not kwargs else ())


_numbers = itertools.count()
_over: set[int] = set()
_hooks: WeakValueDictionary[int, FirstCall] = WeakValueDictionary()


@constant
def _is_over(number: int) -> bool:
    return number in _over


@constant
def _try_while_tracing(number: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    trial, model = _hooks[number]._trial, _hooks[number]._model()
    if shapes and model is not None:
        trial.at_call(model, tuple(torch.empty(shape, device="meta") for shape in shapes), {})
    else:
        trial.warn("its first call is compiled, with other arguments than tensors; pass input_shape=")
    _over.add(number)
    return 0
