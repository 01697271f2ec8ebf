"""Activation checkpoints: what one rank computes again in a backward, all must, where ranks speak to each other.

A checkpoint that is not reentrant computes again when a backward asks for a tensor that was saved, and stops after the
last of them. Ranks save different tensors, since some hold no rows. So everything that speaks to other ranks saves an
entry, and asks for it before it speaks in its backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def save_entry(ctx: Any, x: Tensor) -> None:
    """Save a tensor without entries for the backward."""
    ctx.save_for_backward(x.new_empty(0))


def ask_entry(ctx: Any) -> None:
    """Ask for what :func:`save_entry` saved; within a checkpoint its forward runs again here."""
    ctx.saved_tensors  # noqa: B018 - it is a property that unpacks


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        save_entry(ctx, x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ask_entry(ctx)
        return grads[0]


def marked(x: Tensor) -> Tensor:
    """A view of ``x`` whose backward makes a checkpoint compute again; ``x`` itself where it needs no gradient."""
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    out: Tensor = _Marked.apply(x)  # type: ignore[no-untyped-call]
    return out


def reach(x: Tensor) -> None:
    """Let a checkpoint compute again up to this point at least, though ``x`` needs no gradient."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        marked(torch.empty(0, device=x.device, requires_grad=True))
