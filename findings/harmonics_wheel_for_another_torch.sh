#!/usr/bin/env bash
# Beside torch 2.13.0, pip chooses a wheel of torch-harmonics that cannot be imported.
#
# torch-harmonics 0.9.1, torch 2.13.0 (CPU), Python 3.11, x86_64, 2026-12-01. Expected: pip takes the newest release that
# works with the torch that is there. Found: 0.9.2 asks for torch 2.11 and 0.9.3 for torch 2.14, so pip takes 0.9.1, which
# asks for torch>=2.6.0. Its extension modules need a symbol that this torch does not have, so `import torch_harmonics`
# raises ImportError. `pip check` is content.
# The place: Requires-Dist in the METADATA of the three wheels, and torch_harmonics/attention/_C of 0.9.1.
# It matters to whoever installs spherical models beside a torch that is there already. 0.9.3 without its requirements
# (pip install --no-deps) can be imported beside torch 2.13.0.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/venv"
"$here/venv/bin/pip" install -q "torch==2.13.0" "torch-harmonics<=0.9.3"
"$here/venv/bin/pip" list 2>/dev/null >"$here/list"
grep "^torch" "$here/list"
grep -qE "^torch[-_]harmonics +0\.9\.1$" "$here/list"
"$here/venv/bin/pip" check
if "$here/venv/bin/python" -c "import torch_harmonics" 2>"$here/error"; then
    echo "this has changed: 0.9.1 can be imported" >&2
    exit 1
fi
grep -o "ImportError.*undefined symbol" "$here/error" | sed "s|$here/venv/||"
"$here/venv/bin/pip" install -q --no-deps "torch-harmonics==0.9.3"
"$here/venv/bin/python" -c "import torch_harmonics; print('0.9.3 beside torch 2.13.0: imported')"
