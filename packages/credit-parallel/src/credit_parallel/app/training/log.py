"""The log of a run: a line of JSON for each event, and TensorBoard where it is wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricsLog:
    """Writes ``metrics.jsonl`` in the folder of a run, on the first rank; the others write nothing.

    Args:
        step: The step that a run goes on from: what was logged of later ones, by a run that ended after its last
            checkpoint, is dropped.
        tensorboard: Whether to write for TensorBoard too.

    Raises:
        ValueError: If TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], first: bool, step: int = 0, tensorboard: bool = False) -> None:
        self._file = self._board = None
        if not first:
            return
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError(
                    "trainer.tensorboard: TensorBoard is not installed: pip install 'credit-parallel[tensorboard]'"
                ) from None
            self._board = SummaryWriter(str(folder), purge_step=step)

    def write(self, event: str, **values: Any) -> None:
        """Write one event; nested mappings become nested JSON, and tags of TensorBoard joined by ``/``."""
        if self._file is None:
            return
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        self._file.flush()
        if self._board is not None and "step" in values:
            for name, value in _numbers(event, values):
                if name != f"{event}/step":
                    self._board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a log; none if there is no file. A last line that was cut off is left out."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, list):  # over the steps of a forecast
        value = {str(i): item for i, item in enumerate(value, 1)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}/{key}", item)
    elif isinstance(value, (int, float)):
        yield name, value
