"""What a rank writes of a checkpoint: torch.distributed.checkpoint plans it, so that each value is written once."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from credit_parallel.checkpoint.saved_tensors import Chunk, Stored, refuse_uncovered
from credit_parallel.checkpoint.tensor_files import Piece, write_tensors


class RankWriter(StorageWriter):
    """Writes this rank's chunks to a file; with ``snapshot`` it copies them to memory, for :meth:`write` later."""

    def __init__(self, path: Path, *, snapshot: bool) -> None:
        self.path, self.snapshot = path, snapshot
        self.stock: dict[str, Stored] = {}  #: on the first rank, once planned, the tensors of all ranks
        self.size = self.checksum = 0
        self._pieces: list[Piece] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, or copy, the chunks that the plan gives this rank."""
        results = []
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            get = partial(self._resolve, planner, item)
            if self.snapshot:
                get = partial(Tensor.detach, get())
            chunk = Chunk(tuple(data.chunk.offsets), tuple(data.chunk.sizes), self.path.name)
            piece = Piece(item.index.fqn, data.properties.dtype, chunk.sizes, get)
            self._pieces.append(piece)
            results.append(WriteResult(item.index, math.prod(chunk.sizes) * piece.dtype.itemsize, chunk))
        if not self.snapshot:
            self.write()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _resolve(self, planner: SavePlanner, item: Any) -> Tensor:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        return tensor.detach().to("cpu", copy=self.snapshot).resolve_conj().resolve_neg()

    def write(self) -> None:
        """Write what is not written yet."""
        if self._pieces:
            self.size, self.checksum = write_tensors(self.path, self._pieces, "parts that one rank has saved")
            self._pieces.clear()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank: keep the index."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for of_rank in results for result in of_rank):
            if math.prod(result.storage_data.sizes):
                chunks[result.index.fqn].append(result.storage_data)
        for name, meta in metadata.state_dict_metadata.items():
            assert isinstance(meta, TensorStorageMetadata)
            self.stock[name] = Stored(meta.properties.dtype, tuple(meta.size), tuple(chunks[name]))
        for name, stored in self.stock.items():
            refuse_uncovered(name, stored)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: Any) -> Any:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never chosen by torch."""
        return False
