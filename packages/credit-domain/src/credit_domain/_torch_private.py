"""The private names of torch that this package cannot do without, each with the reason."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# A wrapper answers for the module that it wraps: one set of parameters, buffers, children and hooks, under the names
# that they have there. torch has no public way for two modules to be one, so they share the dicts that hold all that.
# A fresh module tells which dicts a module has in this version of torch.
SHARED = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))
# Not a dict, and set by the registration of a hook: says which kind of backward hooks the shared dict holds.
COPIED = ("_is_full_backward_hook", "training")


def share(wrapper: nn.Module, wrapped: nn.Module) -> None:
    """Let a wrapper have the parameters, buffers, children and hooks of another module as its own."""
    for name in SHARED:
        wrapper.__dict__[name] = wrapped.__dict__[name]
    for name in COPIED:
        wrapper.__dict__[name] = wrapped.__dict__[name]


def version_of(x: Tensor) -> int:
    """How often a tensor has been changed in place: what autograd looks at, and there is no public name for it."""
    return x._version


def apply_to_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter, gradient and buffer by what a function makes of it.

    This is what ``module.to`` calls, and modules that must do more when they are moved override it. The public ways to
    it offer no cast that treats complex tensors apart.
    """
    module._apply(change)  # type: ignore[no-untyped-call]
