"""Checkpoints that someone has changed, checksums included: they load, or are refused by name; nothing in between."""

from __future__ import annotations

import hashlib
import json


def forge(step, index):
    """Write another index, and its checksum into the manifest."""
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    (step / "index.json").write_bytes(content)
    manifest = json.loads((step / "manifest.json").read_bytes())
    manifest["index"] = hashlib.sha256(content).hexdigest()
    (step / "manifest.json").write_text(json.dumps(manifest))
