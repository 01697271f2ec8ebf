#!/usr/bin/env bash
# A spherical Fourier model of torch-harmonics that was made double computes in float32, and returns float64.
#
# torch-harmonics 0.9.3, torch 2.13.0 (CPU), 2026-12-01. Expected: after model.double() an error of the order of 1e-16, or
# an exception at a layer that takes float32 alone. Found: no warning; the result has the dtype float64, and differs from
# that of the same model in float32 by no more than rounding in float32. An input that is changed by 1e-12 gives the same
# result to the last bit.
# The place: torch_harmonics/examples/models/_layers.py; the forward of SpectralConvS2 calls x.float(), and casts its
# result back to the dtype of the input. Its weights are complex64, which Module.double() leaves as they are.
# It matters to whoever verifies a model in float64.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q "torch==2.13.0" "numpy>=1.26"
"$here/venv/bin/pip" install -q --no-deps "torch-harmonics==0.9.3"
"$here/venv/bin/python" - <<'PY'
import copy

import torch
from torch_harmonics.examples.models import SphericalFourierNeuralOperator

torch.manual_seed(0)
sizes = {"img_size": (16, 32), "in_chans": 2, "out_chans": 2, "embed_dim": 8, "num_layers": 2, "scale_factor": 1}
single = SphericalFourierNeuralOperator(**sizes).eval()
double = copy.deepcopy(single).double()
x = torch.randn(1, 2, 16, 32, dtype=torch.float64)
out = double(x)
changed = double(x + 1e-12)
error = ((out - single(x.float())).abs().max() / out.abs().max()).item()
print(f"dtype {out.dtype}; parameters {sorted(str(d) for d in {p.dtype for p in double.parameters()})}")
print(f"difference to the model in float32: {error:.1e} of the largest entry")
print(f"entries that an input changed by 1e-12 changes: {(changed != out).sum().item()} of {out.numel()}")
assert out.dtype == torch.float64
assert error < 1e-5
assert torch.equal(changed, out), "this has changed"
PY
