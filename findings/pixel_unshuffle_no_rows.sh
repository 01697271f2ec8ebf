#!/usr/bin/env bash
# torch 2.13.0 (CPU), 2026-11-27: pixel_unshuffle of a tensor without rows keeps the shape of its input.
#
# Guess: (1, 4, 0, 4) becomes (1, 16, 0, 2), as for any other number of rows, and as the reference implementation in
# torch/_refs/nn/functional/__init__.py (pixel_unshuffle: view, permute, reshape) and the meta device have it.
# Seen: (1, 4, 0, 4) comes back. pixel_shuffle has the right shape forward; its backward, which is pixel_unshuffle of
# the gradient, raises "Function PixelShuffleBackward0 returned an invalid gradient at index 0".
# It matters to who divides rows over ranks: a rank without rows at a deep level has other channels than its peers.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$tmp/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

x = torch.ones(1, 4, 0, 4, requires_grad=True)
here, meta = F.pixel_unshuffle(x, 2).shape, F.pixel_unshuffle(x.to("meta"), 2).shape
print("torch", torch.__version__, "pixel_unshuffle:", tuple(here), "on the meta device:", tuple(meta))
assert tuple(here) == (1, 4, 0, 4) and tuple(meta) == (1, 16, 0, 2), "the behaviour has changed"

y = F.pixel_shuffle(x, 2)
assert tuple(y.shape) == (1, 1, 0, 8), "the behaviour has changed"
try:
    y.sum().backward()
except RuntimeError as error:
    print("pixel_shuffle, backward:", error)
    assert "PixelShuffleBackward0 returned an invalid gradient" in str(error), "the behaviour has changed"
else:
    raise SystemExit("the behaviour has changed: the backward works")
PY
