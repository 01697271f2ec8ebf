"""Names of a checkpoint that hold a wrapper's layer as a child, such as ``a.conv.weight`` for ``a.weight``.

The reference's converted models have such names: its wrapper of a convolution holds that as ``conv``. Here a wrapper
has the names of the layer that it wraps.
"""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from credit_domain.layers import DomainParallelCrossEmbedBranch, DomainParallelLayer

logger = logging.getLogger(__name__)

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _BatchNorm, _InstanceNorm)
_CHILD = re.compile(r"(?:(.*)\.)?(conv|norm)\.(.+)")
_ADDED = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod)\.")
"""What wrappers of torch add to names of modules, and leave out of a state dict or not."""


def plain_names(model: nn.Module, given: Iterable[str]) -> dict[str, str]:
    """Which names of a state dict mean others of the model.

    A name is changed only where all of this holds: the module before ``conv`` or ``norm`` is a convolution, a
    normalisation, or the padding and convolution of an embedding; the model lacks the given name and has the other one;
    the state dict lacks the other one; and no second name means the same.

    The model may be converted or plain, wrapped or not.

    Returns:
        The names of the state dict that are to be changed, each with what the model calls it.
    """
    names = set(given)
    found = {name: match for name in names if isinstance(name, str) and (match := _CHILD.fullmatch(name))}
    if not found:
        return {}
    modules = {_ADDED.sub("", name): module for name, module in model.named_modules(remove_duplicate=False)}
    own = {_ADDED.sub("", name): name for name in model.state_dict()}
    known = {_ADDED.sub("", name) for name in names}
    changed: dict[str, str] = {}
    meant: dict[str, list[str]] = {}
    for name, match in found.items():
        parent, child, rest = match.groups()
        path = _ADDED.sub("", f"{parent}." if parent else "").rstrip(".")
        for inner in _inside(modules.get(path), child):
            other = ".".join(part for part in (path, inner, rest) if part)
            if _ADDED.sub("", name) not in own and other in own and other not in known:
                changed[name] = own[other]
                meant.setdefault(own[other], []).append(name)
    return {name: other for name, other in changed.items() if len(meant[other]) == 1}


def _inside(module: nn.Module | None, child: str) -> Iterator[str]:
    """Where in a module the layer is that a wrapper of it would call ``child``; empty for the module itself."""
    if isinstance(module, DomainParallelLayer) and not isinstance(module, DomainParallelCrossEmbedBranch):
        module = module.wrapped
    if child == "norm":
        if isinstance(module, _NORMS):
            yield ""
    elif isinstance(module, _ConvNd):
        yield ""
    elif isinstance(module, DomainParallelCrossEmbedBranch) or _is_branch(module):
        assert module is not None
        yield list(module._modules)[1]


def _is_branch(module: nn.Module | None) -> bool:
    kinds = [nn.ZeroPad2d, nn.Conv2d]
    return isinstance(module, nn.Sequential) and len(module) == 2 and all(map(isinstance, module, kinds))


def with_plain_names(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict under the names of the model; see :func:`plain_names`. One line of the log says what was changed.

    Returns:
        The state dict itself where no name is changed, else a copy, with the same tensors.
    """
    changed = plain_names(model, state)
    if not changed:
        return state
    _log(changed)
    copied = {changed.get(name, name): value for name, value in state.items()}
    # What torch keeps of versions lies beside the entries of its own kind of dict.
    kept: Any = OrderedDict(copied)
    if hasattr(state, "_metadata"):
        kept._metadata = state._metadata
    return cast(Mapping[str, Any], kept)


def rename_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A pre-hook of ``load_state_dict`` that changes names as :func:`plain_names` says; conversion registers it."""
    changed = plain_names(module, [name.removeprefix(prefix) for name in state if name.startswith(prefix)])
    for name, other in changed.items():
        state[prefix + other] = state.pop(prefix + name)
    if changed:
        _log({prefix + name: prefix + other for name, other in changed.items()})


def _log(changed: Mapping[str, str]) -> None:
    name, other = next(iter(changed.items()))
    logger.info(
        "this state dict is that of a converted model of the reference: %d names were changed, such as %s to %s",
        *(len(changed), name, other),
    )
