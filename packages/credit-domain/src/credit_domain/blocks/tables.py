"""Tables of the whole grid, such as learned positions, of which each rank uses its rows."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from credit_domain.blocks.block import Block
from credit_domain.engine.ranks import domain_of, sizes_of
from credit_mesh import DomainParallelManager, RowPartition


def local_rows(
    table: Tensor,
    x: Tensor,
    dim: int = -2,
    *,
    partition: RowPartition | None = None,
    manager: DomainParallelManager | None = None,
    label: str = "local_rows",
    layer: Hashable = None,
) -> Tensor:
    """The rows of a whole table that belong to this rank's rows of ``x``.

    The gradient of the table is that of this rank's rows, and zero elsewhere, so that it adds up over the ranks.

    Args:
        table: Parameter or buffer of all rows, the same on every rank.
        x: This rank's rows of the tensor that the table is for.
        dim: The sharded dim, counted from the last where ``table`` and ``x`` have different numbers of dims.

    Returns:
        A view of ``table``.

    Raises:
        ValueError: On all ranks alike, if the table has not as many rows as there are.

    Collectives:
        None once the partition is known.
    """
    domain = domain_of(manager)
    sizes = sizes_of(x, dim, domain, label, partition, layer)
    if table.shape[dim] != sum(sizes):
        raise ValueError(
            f"{label}: the table of shape {tuple(table.shape)} has {table.shape[dim]} rows along dim {dim}; expected "
            f"those of the whole grid, {sum(sizes)}"
        )
    return table.narrow(dim, sum(sizes[: domain.rank]), sizes[domain.rank])


class PositionTable(Block):
    """Adds a learned value for each channel and point of the whole ``grid``, (H, W) or (T, H, W).

    The table is whole on each rank, and in the state_dict.
    """

    def __init__(
        self,
        channels: int,
        grid: tuple[int, ...],
        dim: int = -2,
        *,
        manager: DomainParallelManager | None = None,
        label: str | None = None,
    ) -> None:
        super().__init__(dim, manager=manager, label=label)
        self.table = nn.Parameter(torch.empty(1, channels, *grid))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add to this rank's rows, (B, C, H, W), the table's; see :func:`local_rows` for errors."""
        return x + local_rows(self.table, x, self.dim, **self.sharding)
