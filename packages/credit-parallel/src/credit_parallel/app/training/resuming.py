"""What a changed configuration means for a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from credit_parallel.app.config import present_keys

# They say how, where and how often, and change no number of the training.
_FREE = (
    *("folder", "data.workers", "trainer.parallelism", "trainer.grad_accum_steps", "trainer.activation_checkpoint"),
    *("trainer.fsdp2_blocks", "trainer.find_unused_parameters", "trainer.trial", "trainer.compile", "trainer.device"),
    *("trainer.valid_every", "trainer.checkpoint_every", "trainer.keep", "trainer.log_every", "trainer.tensorboard"),
)
# The place in the order of samples is counted in them.
_FIXED = ("trainer.batch_size", "trainer.rollout", "trainer.seed")
_OPTIONS = ("model.", "data.options.")


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between the configuration of a checkpoint and that of the run which goes on from it, in words.

    Both are as ``RunConfig.to_dict`` gives them, the saved one perhaps of a former version. A ValueError refuses a
    change of what cannot change within a run.
    """
    before, here = dict(_leaves(present_keys(saved))), dict(_leaves(now))
    # Keys that only one of both has are of another version, but for options, which are free.
    keys = {key for key in {*before, *here} if key.startswith(_OPTIONS) or (key in before and key in here)}
    differ = [
        key
        for key in sorted(keys)
        if before.get(key) != here.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]
    told = {key: f"{key}: {_said(before, key)} in the checkpoint, {_said(here, key)} now" for key in differ}
    fixed = [told[key] for key in differ if key in _FIXED]
    if fixed:
        raise ValueError(
            f"{'; '.join(fixed)}: this cannot change in a run that goes on, since its place in the order of samples is "
            "counted in it: set it back, or give the new run a folder of its own"
        )
    return list(told.values())


def follow(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
    """Let a schedule that was loaded go on, at the step where it is, with the optimizer's own learning rates."""
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _said(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not there"
