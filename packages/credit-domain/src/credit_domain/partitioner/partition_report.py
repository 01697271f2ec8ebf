"""What a program sends, and what it does on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from credit_domain.partitioner.builder import Move, Repeated


@dataclass(frozen=True)
class PartitionReport:
    """What a program sends, and what it does on every rank; prints as a table.

    Attributes:
        moves: Everything that goes from rank to rank in a forward.
        repeated: Operators on rows that every rank does as a whole.
        operators: Operators of the traced model.
        granularity: With blocks of so many rows of the model's input, views would move no rows. It is 1 if they move
            none, or no such block fits every rank.
        seconds: What tracing and writing the program took.
        flops: Floating-point operations of a forward of the whole: products, convolutions and attention as
            :mod:`torch.utils.flop_counter` counts them, all else as one for each entry of a result.
        repeated_flops: Those that every rank does: of ``repeated``, and of operators on values without rows, such as
            tables and embeddings of time.
    """

    moves: tuple[Move, ...]
    repeated: tuple[Repeated, ...]
    operators: int
    granularity: int
    seconds: float
    flops: int = 0
    repeated_flops: int = 0

    @property
    def repeated_share(self) -> float:
        """The share of a forward's arithmetic that every rank repeats, of 1."""
        return self.repeated_flops / self.flops if self.flops else 0.0

    @property
    def gathered(self) -> tuple[Move, ...]:
        """The values that every rank brings together as a whole."""
        return tuple(move for move in self.moves if move.kind == "gather")

    def __str__(self) -> str:
        lines = [
            f"{self.operators} operators; {len(self.moves)} exchanges and sums, of which {len(self.gathered)} gather a "
            f"whole value; every rank repeats {len(self.repeated)} operators on rows, and "
            f"{100 * self.repeated_share:.2g} % of the arithmetic; traced in {self.seconds:.1f} s"
        ]
        for move in self.gathered:
            lines.append(f"  gathers  {move.module or '(model)'}: {move.operation}, {move.bytes} bytes  {move.line}")
        for each in self.repeated:
            lines.append(
                f"  repeats  {each.module or '(model)'}: {each.operation}, {each.entries} entries, "
                f"{each.flops:.2g} operations  {each.line}"
            )
        return "\n".join(lines)
