"""The progress of a training in a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from credit_parallel.app.training.loop import Reporter


class Bar(Reporter):
    """A bar with the loss, samples a second, and the memory of the rank that has taken most."""

    def started(self, summary: str, step: int, steps: int) -> None:
        """Print what runs where, and draw the bar."""
        print(summary, flush=True)
        # In a log file every update is a line of its own.
        terminal = sys.stderr.isatty()
        every = 0.1 if terminal else 10.0
        self.bar = tqdm(total=steps, initial=step, unit="step", mininterval=every, dynamic_ncols=terminal)
        if not terminal:
            self.bar.ncols = None  # tqdm up to 4.67 takes the width of a terminal from $COLUMNS, and cuts lines there

    def stepped(self, record: dict[str, Any]) -> None:
        """Move on."""
        self.bar.set_postfix_str(
            f"loss {record['loss']:.4f}, {record['samples_per_second']:.1f} samples/s, "
            f"{record['memory_mib']:.0f} MiB/rank",
            refresh=False,
        )
        self.bar.update(record["step"] - self.bar.n)

    def validated(self, record: dict[str, Any]) -> None:
        """A line above the bar, with the last step of the forecast."""
        scores = [
            f"{label} {values[-1]:.4g} (persistence {record['persistence_rmse'][label][-1]:.4g})"
            for label, values in record["rmse"].items()
        ]
        more = f" and {len(scores) - 4} more fields" if len(scores) > 4 else ""
        self.bar.write(f"step {record['step']}: validation RMSE {', '.join(scores[:4])}{more}")

    def ended(self, message: str) -> None:
        """Leave the bar."""
        self.bar.close()
        print(message, flush=True)
