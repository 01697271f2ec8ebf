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

from credit_domain._torch_private import ADDED_NAMES, children_of, copy_metadata
from credit_domain.layers import DomainParallelCrossEmbedBranch, DomainParallelLayer

logger = logging.getLogger(__name__)

_NORMS = (
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.SyncBatchNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CHILD = re.compile(r"(?:(.*)\.)?(conv|norm)\.(.+)")


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
    modules = {ADDED_NAMES.sub("", name): module for name, module in model.named_modules(remove_duplicate=False)}
    own = {ADDED_NAMES.sub("", name): name for name in model.state_dict()}
    known = {ADDED_NAMES.sub("", name) for name in names}
    changed: dict[str, str] = {}
    meant: dict[str, list[str]] = {}
    for name, match in found.items():
        parent, child, rest = match.groups()
        path = ADDED_NAMES.sub("", f"{parent}." if parent else "").rstrip(".")
        for inner in _inside(modules.get(path), child):
            other = ".".join(part for part in (path, inner, rest) if part)
            if ADDED_NAMES.sub("", name) not in own and other in own and other not in known:
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
    elif isinstance(module, _CONVOLUTIONS):
        yield ""
    elif isinstance(module, DomainParallelCrossEmbedBranch) or _is_branch(module):
        assert module is not None
        yield list(children_of(module))[1]


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
    kept: Any = OrderedDict(copied)
    copy_metadata(state, kept)
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
