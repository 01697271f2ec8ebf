"""The blocks of a model: what FSDP2 gathers, and what the backward recomputes, as a whole."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from credit_parallel.domain import manager_of
from credit_parallel.trainer_section import Conf, trainer_of

logger = logging.getLogger(__name__)

BLOCK_CLASSES = ("Transformer", "UpBlock", "UpBlockPS")
"""Names of classes whose instances are blocks; others opt in with ``_fsdp2_shard = True``."""


def _has_fsdp2_shard(module: nn.Module) -> bool:
    """Whether a module, or its class, opts in as a block."""
    return getattr(module, "_fsdp2_shard", False) is True


def blocks_of(model: nn.Module, conf: Conf) -> dict[str, nn.Module]:
    """The blocks of a model by name, inner ones before those that they are in; the model itself is none.

    A ValueError says what ``trainer.fsdp2_blocks`` lists, by class names or by dotted names of modules, and is not
    there.
    """
    wanted = trainer_of(conf).get("fsdp2_blocks") or ()
    if isinstance(wanted, str) or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"trainer.fsdp2_blocks must be a list of class names and module names; got {wanted!r}")
    blocks: dict[str, nn.Module] = {}
    found: set[str] = set()
    for name, module in model.named_modules():
        names = {name, type(module).__name__}
        found |= names
        if name and (_has_fsdp2_shard(module) or names & {*BLOCK_CLASSES, *wanted}):
            blocks[name] = module
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"trainer.fsdp2_blocks names no module or class of the model: {', '.join(missing)}")
    return dict(reversed(blocks.items()))


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to any part of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


# Activation checkpointing


def _apply_activation_checkpointing(model: nn.Module, conf: Conf = None) -> nn.Module:
    """Have blocks recomputed in the backward instead of keeping their activations.

    Each outermost block is recomputed once, with the random numbers that it drew. Names of parameters and modules stay
    as they are. May be called again, but not after ``fully_shard``: parameters would be gathered at the wrong time.
    Where rows are exchanged, torch.compile leaves blocks alone, since torch 2.13 cannot compile the recomputation of an
    exchange; a ``block.forward`` that was compiled before stays compiled.
    """
    if is_sharded(model):
        raise ValueError("activation checkpointing must be applied before fully_shard; the model is sharded already")
    blocks = blocks_of(model, conf)
    outer = [block for name, block in blocks.items() if not any(name.startswith(f"{other}.") for other in blocks)]
    manager = manager_of(model)
    exchanges = manager is not None and manager.domain_parallel_size > 1
    for block in outer:
        if not isinstance(block.forward, functools.partial):
            # A partial of a bound method, unlike a closure, follows the module when it is copied.
            block.forward = functools.partial(_checkpointed_apart if exchanges else _checkpointed, block.forward)
    if not outer:
        logger.warning("activation checkpointing found no block in %s: see trainer.fsdp2_blocks", type(model).__name__)
    return model


_HAS_EARLY_STOP = "early_stop" in inspect.signature(checkpoint).parameters


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Recomputation must not stop early: a rank with few rows keeps other tensors than the rest, and might leave out an
    # exchange that the others wait for.
    if _HAS_EARLY_STOP:
        return checkpoint(forward, *args, use_reentrant=False, early_stop=False, **kwargs)
    with set_checkpoint_early_stop(False):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator, no-untyped-call, unused-ignore]
def _checkpointed_apart(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _checkpointed(forward, *args, **kwargs)
