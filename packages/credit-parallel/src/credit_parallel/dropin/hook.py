"""Putting the drop-in in place, and taking it away again."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from credit_parallel.dropin.finder import Alias, DropInFinder
from credit_parallel.dropin.loading import load_state_dict
from credit_parallel.dropin.names import MODULES, PACKAGES, ROOT, is_replaced
from credit_parallel.dropin.scaler import unscale
from credit_parallel.dropin.torch_ddp import init

logger = logging.getLogger(__name__)

_METHODS: tuple[tuple[type, str, Any], ...] = (
    (GradScaler, "unscale_", unscale),
    (nn.Module, "load_state_dict", load_state_dict),
    (DistributedDataParallel, "__init__", init),
)
"""Methods of torch, and what stands in their place; ``__wrapped__`` is torch's own."""

_finder = DropInFinder()
_before: dict[str, ModuleType] = {}
"""The modules that stood under the replaced names, and what was imported from their folders."""


def install() -> None:
    """Make the reference's import paths resolve to these packages, in this process; may be called again.

    Call it before the program imports ``credit``. Modules of the reference that were imported before are replaced in
    ``sys.modules`` and as attributes of ``credit``; but whoever took names out of them (``from credit.parallel.mesh
    import ...``) keeps those, and a warning is logged that says who.
    """
    if _finder in sys.meta_path:
        return
    before = {name: module for name, module in sys.modules.items() if is_replaced(name)}
    _before.clear()
    _before.update(before)
    replaced = [name for name in before if name in MODULES]
    for name in replaced:
        del sys.modules[name]
    sys.meta_path.insert(0, _finder)
    for owner, name, ours in _METHODS:
        setattr(owner, name, ours)
    try:
        for name in replaced:
            import_module(name)
    except BaseException:
        uninstall()
        raise
    if replaced:
        _warn_of_users([before[name] for name in replaced])


def uninstall() -> None:
    """Undo :func:`install`: the modules that stood before stand again. Does nothing where it is not installed.

    Modules that were imported meanwhile keep what they took from the drop-in.
    """
    if _finder not in sys.meta_path:
        return
    sys.meta_path.remove(_finder)
    for owner, name, ours in _METHODS:
        setattr(owner, name, ours.__wrapped__)
    for name in [name for name in sys.modules if is_replaced(name)]:
        del sys.modules[name]
    sys.modules.update(_before)
    root = sys.modules.get(ROOT)
    if root is not None and _finder.provided(root):
        del sys.modules[ROOT]
    elif root is not None:
        for name in PACKAGES:
            child = name.removeprefix(f"{ROOT}.")
            if name in _before:
                setattr(root, child, _before[name])
            elif isinstance(getattr(root, child, None), Alias):
                delattr(root, child)
    _before.clear()


def _warn_of_users(replaced: Collection[ModuleType]) -> None:
    """Name the modules that took names out of modules which are replaced now."""
    theirs = {id(module) for module in replaced}
    users = []
    for name, module in list(sys.modules.items()):
        if isinstance(module, Alias) or name in MODULES or not isinstance(module, ModuleType):
            continue
        taken = [
            key
            for key, value in vars(module).items()
            if id(value) in theirs or (issubclass(type(value), (FunctionType, type)) and value.__module__ in MODULES)
        ]
        if taken:
            users.append(f"{name} ({', '.join(sorted(taken))})")
    if users:
        logger.warning(
            "imported before the drop-in was installed, these modules go on using what they took from the reference: "
            "%s. Install it first",
            "; ".join(sorted(users)),
        )
