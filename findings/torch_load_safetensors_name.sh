#!/usr/bin/env bash
# torch 2.13.0 (CPU) with safetensors 0.8.0, 2026-11-30: torch.load cannot read what torch.save wrote, if its name ends
# in ".safetensors".
#
# Guess: torch.load looks at the content, as it does to tell zip files from the older format, and gives the state dict back.
# Seen: SafetensorError "Error while deserializing header: header too large". torch/serialization.py (load, "Check if the
# file is a safetensors file") goes by the suffix alone and calls safetensors.torch.load_file; torch.save writes its zip
# file whatever the name. The docstring of torch.load does not mention it. The same bytes under another name load, and so
# does an open file.
# It matters to who lets users name the file: a state dict that is saved as "model.safetensors" is written and not readable.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy safetensors==0.8.0
"$tmp/venv/bin/python" - "$tmp" <<'PY'
import sys
from pathlib import Path

import torch

folder = Path(sys.argv[1])
state = {"weight": torch.arange(3.0)}
torch.save(state, folder / "model.safetensors")
try:
    torch.load(folder / "model.safetensors", weights_only=True)
except Exception as error:
    print("torch", torch.__version__, "by name:", type(error).__name__, error)
    assert type(error).__name__ == "SafetensorError" and "header too large" in str(error), "the behaviour has changed"
else:
    raise SystemExit("the behaviour has changed: the name does not matter")

with open(folder / "model.safetensors", "rb") as file:
    assert torch.equal(torch.load(file, weights_only=True)["weight"], state["weight"]), "the behaviour has changed"
(folder / "model.safetensors").rename(folder / "model.pt")
assert torch.equal(torch.load(folder / "model.pt", weights_only=True)["weight"], state["weight"])
print("as an open file, and under another name: loaded")
PY
