"""The private names of torch that this package cannot do without, each with the reason."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from credit_halo.extend import gone

# A wrapper answers for the module that it wraps: one set of parameters, buffers, children and hooks, under the names
# that they have there. torch has no public way for two modules to be one, so they share the dicts that hold all that.
# A fresh module tells which dicts a module has in this version of torch, and what else: its mode, and which kind of
# backward hooks the shared dict holds.
_FRESH = vars(nn.Module())
SHARED = tuple(name for name, value in _FRESH.items() if isinstance(value, (dict, set)))
COPIED = tuple(name for name in _FRESH if name not in SHARED)

COMPILED = "_orig_mod."
"""What torch.compile adds to the names of what it wraps."""

CHECKPOINTED = "_checkpoint_wrapped_module."
"""What torch's wrapper for activation checkpoints adds to names of modules, and leaves out of a state dict."""

ADDED_NAMES = re.compile(f"(?:{re.escape(CHECKPOINTED)}|{re.escape(COMPILED)})")


def share(wrapper: nn.Module, wrapped: nn.Module) -> None:
    """Let a wrapper have the parameters, buffers, children and hooks of another module as its own."""
    missing = sorted({"_parameters", "_buffers", "_modules"} - set(SHARED))
    if missing:
        what = "a converted layer cannot have the parameters of the module that it wraps"
        raise gone(f"dict torch.nn.Module.{missing[0]}", what)
    for name in (*SHARED, *COPIED):
        wrapper.__dict__[name] = wrapped.__dict__[name]


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself, with those that are None.

    ``named_parameters`` leaves out those that are None, and ``getattr`` finds a property of the same name first. This
    and the two below are what hooks, parametrisations and wrappers of torch work on.
    """
    try:
        return module._parameters
    except AttributeError as error:
        raise gone("torch.nn.Module._parameters", "a module's own parameters are not found") from error


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, with those that are None."""
    try:
        return module._buffers
    except AttributeError as error:
        raise gone("torch.nn.Module._buffers", "a module's own buffers are not found") from error


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module, with those that are None.

    ``named_children`` leaves out a child that stands there twice, and to replace one by ``setattr`` runs what the
    module's class does then.
    """
    try:
        return module._modules
    except AttributeError as error:
        raise gone("torch.nn.Module._modules", "a module's children are not found") from error


def set_children(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    """Give a module children of its own, instead of those that it shares with another."""
    module.__dict__["_modules"] = dict(children)


def pre_hooks_of(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """What a module calls before its forward; the handle that removes one has only who registered it."""
    try:
        return module._forward_pre_hooks
    except AttributeError as error:
        raise gone("torch.nn.Module._forward_pre_hooks", "the hooks of a module are not found") from error


def drop_hooks(module: nn.Module) -> None:
    """Take away all that is called before or after a module's forward or backward, from a copy that is only traced."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        if name not in vars(module):
            raise gone(f"torch.nn.Module.{name}", "the hooks of a module are not found")
        vars(module)[name].clear()


def fake_mode() -> Any:
    """A mode in which tensors on any device hold no memory; the public meta device is one of its own."""
    try:
        from torch._subclasses import FakeTensorMode
    except ImportError as error:
        raise gone("torch._subclasses.FakeTensorMode", "a model cannot be traced without its memory") from error
    with _entering:
        if not _first and torch.version.cuda:
            _enter(FakeTensorMode())
    return FakeTensorMode(allow_non_fake_inputs=True)


_entering = threading.Lock()
_first: list[threading.Thread] = []


def _enter(mode: Any) -> None:
    """Let a thread that stays be the first in the process that enters such a mode.

    Torch built for CUDA keeps, where there is no device, a part of the memory of the first thread that enters, and
    reads it whenever another does (2.11.0, ``ensureCUDADeviceGuardSet``). Ranks may be threads, which end.
    """
    entered = threading.Event()

    def first(stay: bool) -> None:
        try:
            with mode:
                pass
        finally:
            entered.set()
        if stay:
            threading.Event().wait()

    if threading.current_thread() is threading.main_thread():
        _first.append(threading.current_thread())
        first(stay=False)
    else:
        _first.append(threading.Thread(target=first, args=(True,), name="credit_domain tracing", daemon=True))
        _first[0].start()
        entered.wait()


_never = itertools.count(-1, -1)


def version_of(x: Tensor) -> int:
    """How often a tensor has been changed in place: what autograd looks at, and there is no public name for it.

    Without it, a number that no tensor had before: whoever asks takes the tensor for another one then.
    """
    try:
        return x._version
    except AttributeError:
        return next(_never)


def apply_to_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter, gradient and buffer by what a function makes of it.

    This is what ``module.to`` calls, and modules that must do more when they are moved override it. The public ways to
    it offer no cast that treats complex tensors apart.
    """
    try:
        apply = module._apply
    except AttributeError as error:
        raise gone("torch.nn.Module._apply", "a module cannot be cast as a whole") from error
    apply(change)  # type: ignore[no-untyped-call]


def computing_methods(kind: type[nn.Module]) -> tuple[str, ...]:
    """The methods of a class of torch that a subclass may override to compute something else."""
    if not issubclass(kind, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "forward", "__call__"
    if not hasattr(kind, "_conv_forward"):
        what = f"a subclass of torch.nn.{kind.__name__} that computes something else is not told from one that does not"
        raise gone(f"torch.nn.{kind.__name__}._conv_forward", what)
    return "forward", "__call__", "_conv_forward"


def copy_metadata(given: Mapping[str, Any], copied: Any) -> None:
    """What torch keeps of versions of modules lies beside the entries of its own kind of state dict."""
    if hasattr(given, "_metadata"):
        copied._metadata = given._metadata
