"""What a partitioned model will send, on any number of ranks, without data, process groups or GPUs."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from torch import nn

from credit_domain.model.domain_plan import DomainPlan, PlannedLayer
from credit_domain.partitioner.builder import Builder, Move
from credit_domain.partitioner.capture import Ghost
from credit_domain.partitioner.partitioning import whole_arguments
from credit_domain.partitioner.settings import settings_of
from credit_domain.partitioner.steps import Place
from credit_domain.partitioner.writing import Writing
from credit_mesh import RowPartition

_COLLECTIVES = {"gather": "gather", "transpose": "transpose", "sum": "reduction"}


class ProgramPlanner:
    """Plans for a model that is traced once.

    Args:
        model: The plain model; it is not touched.
        inputs: Its arguments of the whole, as :func:`credit_domain.partition_model` takes them.
        shard_dim: The sharded dim, negative.

    Raises:
        ValueError: If the model cannot be traced, or no argument has rows.
    """

    def __init__(self, model: nn.Module, inputs: Any, shard_dim: int = -2) -> None:
        self._model, self._shard_dim = model, shard_dim
        ghost = Ghost(model)
        arguments, self._divided, self._rows = whole_arguments(model, ghost, inputs, shard_dim)
        self._names = arguments.names
        self._captured = ghost.capture(arguments, settings_of(model))

    def plan(self, ranks: int, partition: RowPartition | None = None) -> DomainPlan:
        """What the program of so many ranks sends in one forward.

        Args:
            ranks: Number of domain ranks.
            partition: How the rows of the input are divided; None divides them evenly, in blocks that let windows move
                no rows, where such blocks fit every rank.

        Raises:
            ValueError: If there are fewer rows than ranks.
        """
        if partition is None:
            blocks = self.granularity(ranks)
            partition = RowPartition.even(self._rows, ranks, blocks if blocks * ranks <= self._rows else 1)
        written = self._written(partition)
        layers = tuple(_planned(move, partition) for move in written.moves)
        return DomainPlan(partition, layers, _notes(written))

    def granularity(self, ranks: int = 2) -> int:
        """Rows in blocks of the input with which windows of the model move none."""
        return math.lcm(*self._written(RowPartition.even(self._rows, ranks)).blocks)

    def _written(self, partition: RowPartition) -> Builder:
        """The program of the first rank, which knows what all of them send."""
        place = Place(SimpleNamespace(), 0, partition.ranks)
        names, divided = self._names, self._divided
        return Writing(self._captured, self._model, place, self._shard_dim, partition.sizes, divided, names).write()[0]


def _planned(move: Move, declared: RowPartition) -> PlannedLayer:
    source = declared if move.source is None else move.source
    size, total = move.bytes, move.total_bytes
    if move.kind == "sum":  # as a ring does it
        size = round(2 * (source.ranks - 1) / source.ranks * move.bytes)
        total = size * source.ranks
    return PlannedLayer(
        *(move.module, move.operation.removeprefix("aten.").removesuffix(".default"), source.rows, source),
        target=move.target,
        halo=move.halo,
        messages=move.messages,
        bytes=size,
        total_bytes=total,
        collective=_COLLECTIVES.get(move.kind, "exchange"),
    )


def _notes(written: Builder) -> tuple[str, ...]:
    share = 100 * written.repeated_flops / max(1, sum(written.flops.values()))
    notes = [
        "planned operation by operation, as by convert_to_domain_parallel with input_shape",
        f"every rank repeats {share:.2g} % of the arithmetic of a forward",
    ]
    for each in written.repeated:
        where = f"{each.module or 'the model'} ({each.line})"
        notes.append(f"every rank does {each.operation} of {where} as a whole: {each.entries} entries")
    return tuple(dict.fromkeys(notes))
