"""What a verification found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from credit_mesh import RowPartition


@dataclass(frozen=True)
class Difference:
    """Where the sharded model first computes something else.

    Attributes:
        phase: ``forward``, ``backward``, or ``failed`` where it raised.
        module: Qualified name of the first module, in the order of execution, that differs; ``""`` is the model.
        kind: Its class.
        what: What differs, in words.
        error: Largest absolute difference there, relative to the largest absolute value.
        rows: Rows that differ, counted in that tensor.
        seams: Those boundaries between ranks, in rows of that tensor, that lie within or beside these rows.
        advice: What to do.
    """

    phase: str
    module: str
    kind: str
    what: str
    error: float = 0.0
    rows: tuple[int, ...] = ()
    seams: tuple[int, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        where = f"{self.module or 'the model itself'} ({self.kind})"
        lines = [f"first difference ({self.phase}): {where}: {self.what}"]
        if self.rows:
            seams = f"; ranks meet at {', '.join(map(str, self.seams))}" if self.seams else ""
            lines.append(f"  rows {_ranges(self.rows)} differ, by up to {self.error:.1e}{seams}")
        if self.advice:
            lines.append(f"  {self.advice}")
        return "\n".join(lines)


@dataclass(frozen=True)
class VerificationReport:
    """The comparison of a model on one rank with its converted self on several; prints as a short table.

    Errors are largest absolute differences relative to the largest absolute value of what is compared.

    Attributes:
        ok: Whether everything agrees.
        ranks: Number of domain ranks.
        partition: How the rows of the input were divided; None if the model did not get that far.
        outputs: Error of each output.
        input_gradients: Error of the gradient of each input.
        parameter_gradients: Error of the gradient of each parameter.
        tolerance: The largest error that counts as rounding.
        difference: Where it first differs; None if it does not.
        notes: What was held fixed so that runs can be compared, and what could not be.
    """

    ok: bool
    ranks: int
    partition: RowPartition | None
    outputs: dict[str, float]
    input_gradients: dict[str, float]
    parameter_gradients: dict[str, float]
    tolerance: float
    difference: Difference | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "exact" if self.ok else "NOT exact"
        lines = [f"{verdict} on {self.ranks} ranks: {self.partition}" if self.partition else verdict]
        for what, errors in (
            ("outputs", self.outputs),
            ("input gradients", self.input_gradients),
            ("parameter gradients", self.parameter_gradients),
        ):
            if errors:
                name, worst = max(errors.items(), key=lambda item: _order(item[1]))
                wrong = sum(not error <= self.tolerance for error in errors.values())
                verdict = "ok" if not wrong else f"{wrong} WRONG"
                lines.append(f"  {what:20} {len(errors):4}  {verdict:9}  largest error {worst:.1e}  ({name})")
        if self.difference is not None:
            lines.append(str(self.difference))
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def raise_if_wrong(self) -> VerificationReport:
        """Return the report if everything agrees.

        Raises:
            ValueError: If anything differs, with the report as its message.
        """
        if not self.ok:
            raise ValueError(str(self))
        return self


def _order(error: float) -> float:
    return float("inf") if error != error else error  # not a number is worse than anything


def _ranges(rows: Sequence[int]) -> str:
    """Rows with runs folded: ``3-5, 9``."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][1] + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    listed = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(listed if len(listed) <= 8 else [*listed[:7], f"... ({len(rows)} in all)"])


def seams_near(rows: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Boundaries between ranks that lie within or beside the rows."""
    near = {*rows, *(row + 1 for row in rows)}
    return tuple(start for start in accumulate(sizes[:-1]) if start in near)
