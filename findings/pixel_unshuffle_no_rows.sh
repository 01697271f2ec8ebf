#!/usr/bin/env bash
# torch.nn.functional.pixel_unshuffle of a tensor without rows, or without samples, returns it in the shape that it came in.
#
# torch 2.13.0 (CPU), 2026-12-01. One might expect (1, 16, 0, 2) of (1, 4, 0, 4) with a factor of 2: no rows, but the
# channels and columns of any other input. That is what torch itself says on the meta device, and what compiled code is
# therefore planned with. On a CPU the shape stays (1, 4, 0, 4). pixel_shuffle gives the right shape on both.
# The place: pixel_unshuffle_cpu in aten/src/ATen/native/PixelShuffle.cpp returns a clone where the input has no
# entries, before it would reshape it.
# It matters where ranks or tiles may have no rows: what comes next meets other channels.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q "torch==2.13.0" numpy
"$here/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

for shape in ((1, 4, 0, 4), (0, 4, 4, 4)):
    there = tuple(F.pixel_unshuffle(torch.empty(shape), 2).shape)
    said = tuple(F.pixel_unshuffle(torch.empty(shape, device="meta"), 2).shape)
    print(f"{shape}: {there} on a CPU, {said} on the meta device")
    assert there == shape != said, "this has changed"
up = tuple(F.pixel_shuffle(torch.empty(1, 4, 0, 4), 2).shape)
print(f"pixel_shuffle of (1, 4, 0, 4): {up}")
assert up == (1, 1, 0, 8), "this has changed"
PY
