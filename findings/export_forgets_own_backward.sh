#!/usr/bin/env bash
# torch.export forgets the backward of a torch.autograd.Function, and gradient hooks of tensors, without a word.
#
# torch 2.13.0 (CPU), 2026-12-01. Expected: an error, a warning, or a node that keeps the function. Found: with
# strict=False the forward of the function is traced as ordinary operators. The exported module differentiates those, so
# a straight-through rounding has a gradient of 0 where the model's is 1. With strict=True the forward is traced under
# no_grad, and the result has no gradient at all. A hook that forward registers on a tensor (register_hook) is lost both
# ways. Values are right, and no warning is given.
# The place: torch/export/_trace.py; the tracer of _non_strict_export runs through Function.apply, and that of
# _strict_export goes by dynamo's handling of it.
# It matters to whoever trains an exported program: quantisation, clipped gradients, norms and activations with a
# backward of their own.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q "torch==2.13.0" numpy
"$here/venv/bin/python" - <<'PY'
import warnings

import torch


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounds(torch.nn.Module):
    def forward(self, x):
        return StraightThrough.apply(2 * x)


class Scales(torch.nn.Module):
    """The hook makes the gradient ten times as large."""

    def forward(self, x):
        y = 2 * x
        y.register_hook(lambda grad: 10 * grad)
        return y


def gradient(fn):
    x = torch.tensor([0.3, 1.9], requires_grad=True)
    out = fn(x)
    if out.requires_grad:
        out.sum().backward()
    return out.tolist(), None if x.grad is None else x.grad.tolist()


for model in (Rounds(), Scales()):
    found = {"the model": gradient(model)}
    for strict in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exported = torch.export.export(model, (torch.ones(2, requires_grad=True),), strict=strict)
        about = [w for w in caught if "backward" in str(w.message) or "hook" in str(w.message)]
        assert not about, f"this has changed: {about[0].message}"
        found[f"exported, strict={strict}"] = gradient(exported.module())
    for name, (out, grad) in found.items():
        print(f"{type(model).__name__}, {name}: values {out}, gradient {grad}")
    (values, right), *others = found.values()
    assert all(out == values for out, _ in others)
    assert all(grad != right for _, grad in others), "this has changed"
PY
