#!/usr/bin/env bash
# ExportedProgram.run_decompositions forgets torch.no_grad: the decomposed program has other gradients, without an error.
#
# torch 2.13.0 (CPU), 2026-12-01. torch.export keeps a region under torch.no_grad as one node (wrap_with_set_grad_enabled),
# and the exported module has the gradients of the model. run_decompositions({}), which is asked to decompose nothing, puts
# the region's operators where they were called, with no detach() and no node that switches gradients off. The module that
# is made of it differentiates through them. Values are the same. A detach() that the model itself calls is kept.
# The place: the retracing in torch/export/exported_program.py (_decompose_exported_program), whose functionalisation
# runs through the body of that node.
# It matters to whoever trains a decomposed program: a power iteration of a spectral norm, a scale that is taken as a
# constant, a target network.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q "torch==2.13.0" numpy
"$here/venv/bin/python" -W ignore - <<'PY'
import torch


class Scaled(torch.nn.Module):
    """Divides by a mean that counts as a constant."""

    def forward(self, x):
        with torch.no_grad():
            mean = x.mean()
        return x / mean


def gradient(fn):
    x = torch.arange(1.0, 5.0).requires_grad_()
    out = fn(x)
    (out * torch.tensor([1.0, 0.0, 0.0, 0.0])).sum().backward()
    return out.detach(), x.grad


model = Scaled()
exported = torch.export.export(model, (torch.ones(4),), strict=False)
eager, kept, lost = (gradient(fn) for fn in (model, exported.module(), exported.run_decompositions({}).module()))
for name, (out, grad) in zip(("the model", "exported", "decomposed"), (eager, kept, lost)):
    print(f"{name}: values {out.tolist()}, gradient {[round(g, 3) for g in grad.tolist()]}")
assert torch.equal(eager[0], kept[0]) and torch.equal(eager[0], lost[0])
assert torch.equal(eager[1], kept[1])
assert not torch.allclose(eager[1], lost[1]), "this has changed"
PY
