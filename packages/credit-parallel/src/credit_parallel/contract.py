"""The contract between ranks: who reads which sample, and what all ranks must notice together.

Ranks that differ only in their tp or domain coordinate work on one sample. A sampler that was built with the global
rank gives them different ones; training then goes on, without an error, on fields whose north and south belong to
different days. A checksum of the batch finds it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from datetime import date, timedelta
from itertools import count, groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from credit_halo import naming_missing_ranks
from credit_mesh import (
    AXES,
    Coords,
    DomainParallelManager,
    ParallelismConfig,
    RankLayout,
    get_domain_parallel_manager,
    parse_parallelism_conf,
)

logger = logging.getLogger(__name__)

Where = DomainParallelManager | DeviceMesh | RankLayout | ParallelismConfig | Mapping[str, Any] | None
"""What says where this rank is: a manager, a whole mesh, a layout, or a configuration; None is the present manager."""


def place_of(where: Where = None) -> tuple[RankLayout, Coords]:
    """The layout of the world, and the coordinates of this rank.

    ``where`` is a manager; the whole device mesh; a layout of the world; a configuration with a parallelism block (see
    :func:`credit_mesh.parse_parallelism_conf`), or the block as a ``ParallelismConfig``. None takes the present
    manager, or a single rank where torch.distributed is not initialised.

    Raises:
        ValueError: If the layout is of another number of ranks than torch.distributed has, or nothing says what it is.
    """
    alive = dist.is_available() and dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if alive else (1, 0)
    coords = None
    if where is None:
        where = get_domain_parallel_manager() or (RankLayout() if world_size == 1 else None)
    if isinstance(where, Mapping):
        where = ParallelismConfig.from_block(parse_parallelism_conf(where))
    if isinstance(where, DomainParallelManager):
        layout, coords = where.layout, Coords(where.dp_rank, where.tp_rank, where.domain_rank)
    elif isinstance(where, DeviceMesh):
        names = where.mesh_dim_names or ()
        if not set(names) <= set(AXES) or where.get_coordinate() is None:
            raise ValueError(
                f"the axes of the mesh must be some of {', '.join(AXES)}, with this rank on it; got {where}"
            )
        layout = RankLayout(**{axis: where.size(names.index(axis)) for axis in names})
        coords = Coords(*(where.get_local_rank(axis) if axis in names else 0 for axis in AXES))
    elif isinstance(where, ParallelismConfig):
        # Without torch.distributed a script is one rank, whatever its configuration asks for.
        layout = where.layout(world_size) if alive else RankLayout()
    elif isinstance(where, RankLayout):
        layout = where
    else:
        raise ValueError(
            "the layout of the ranks is not known: pass a manager, the device mesh, a RankLayout or the configuration, "
            f"or call initialize_domain_parallel() first; got {where!r}"
        )
    if layout.world_size != world_size:
        raise ValueError(f"{layout} has {layout.world_size} ranks; torch.distributed has {world_size}")
    return layout, layout.coords(rank) if coords is None else coords


@naming_missing_ranks("comparing batches")
def check_batch(
    batch: Any, where: Where = None, *, sharded: bool = False, sample_ids: Any = None, label: str = "check_batch"
) -> None:
    """Make sure that all ranks which share a sample have read the same batch, bit for bit.

    Where all replicas have read one and the same batch, a warning is logged: right in a test, it is the sign of a
    missing sampler in training.

    Args:
        batch: What the loader returned, before it is sharded: tensors, numpy arrays, numbers, text, dates, None, and
            mappings, lists, tuples and dataclasses of them.
        sharded: Whether each domain rank has read its own rows only. Then batches are compared between tp peers, and
            ``sample_ids`` (indices or times of the samples), which are needed, between domain peers.

    Raises:
        ValueError: On every rank of the world alike, naming the ranks that differ and the entries of the batch in which
            they do, or an entry that cannot be compared; also if ``sample_ids`` are missing.

    Collectives: an all-gather of six numbers over the world; if it shows a difference, one of a line for each entry.
    """
    layout, at = place_of(where)
    if sharded and sample_ids is None and layout.domain > 1:
        raise ValueError(
            f"{label}: domain ranks that have read only their own rows cannot compare them: pass sample_ids= (the "
            "indices or times of the samples) with sharded=True"
        )
    if layout.world_size == 1:
        return
    problem, entries = "", {}
    try:
        entries = {"batch": fingerprints(batch), "sample_ids": fingerprints(sample_ids, "sample_ids")}
    except ValueError as error:
        problem = str(error)
    sums = [_checksum(entries.get(part)) for part in ("batch", "sample_ids")]
    ranks = [_Read(*numbers) for numbers in gather_numbers([*at, bool(problem), *sums])]
    differing = _differing({rank: ((r.dp, r.domain) if sharded else r.dp, r.batch) for rank, r in enumerate(ranks)})
    strangers = _differing({rank: (r.dp, r.sample_ids) for rank, r in enumerate(ranks)})
    if differing or strangers or any(r.problem for r in ranks):
        said: list[Any] = [None] * len(ranks)
        dist.all_gather_object(said, (problem, entries))
        problems = [f"on rank {rank} {text}" for rank, (text, _) in enumerate(said) if text]
        if problems:
            raise ValueError(f"{label}: {'; '.join(problems[:4])}")
        lines = [_said_apart(group, "batch", ranks, said) for group in differing]
        lines += [_said_apart(group, "sample_ids", ranks, said) for group in strangers if group not in differing]
        raise ValueError(f"{label}: {'; '.join(lines[:4])}{_ADVICE}")
    if layout.dp > 1 and not sharded and len({r.batch for r in ranks}) == 1 and dist.get_rank() == 0:
        logger.warning(
            "%s: all %d replicas have read the same batch; samplers take rank=dp_rank, num_replicas=dp_size",
            *(label, layout.dp),
        )


@naming_missing_ranks("looking for values that are not finite")
def check_finite(
    value: Tensor | float, group: ProcessGroup | None = None, *, what: str = "the loss", raises: bool = False
) -> bool:
    """Whether a loss or a gradient norm is finite on every rank; all ranks learn the same.

    Args:
        value: This rank's value or values.
        what: What errors call the value.
        raises: Raise a ValueError where it is not finite, on all ranks alike, naming those whose value it is.

    Collectives: an all-gather of a number.
    """
    if isinstance(value, DTensor):
        value = value.to_local()
    finite = bool(torch.isfinite(value.detach()).all()) if isinstance(value, Tensor) else math.isfinite(value)
    bad = [flag for (flag,) in gather_numbers([not finite], group)]
    if raises and any(bad):
        names = dist.get_process_group_ranks(group) if dist.is_initialized() else [0]
        where = _runs([rank for rank, flag in zip(names, bad, strict=True) if flag])
        raise ValueError(f"{what} is not finite on rank {where} (of {len(bad)})")
    return not any(bad)


@naming_missing_ranks("comparing numbers")
def gather_numbers(numbers: Sequence[int], group: ProcessGroup | None = None) -> list[list[int]]:
    """Some integers of each rank, on every rank; as many on each."""
    if not (dist.is_available() and dist.is_initialized()):
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device_of(group))
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    gathered: list[list[int]] = torch.stack(theirs).tolist()
    return gathered


def device_of(group: ProcessGroup | None) -> torch.device:
    """Where a group moves small tensors."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


_ADVICE = (
    ". Ranks that differ only in their tp or domain coordinate work on the same sample: build samplers with "
    "rank=dp_rank, num_replicas=dp_size (of data_parallel_coords(conf)), or with data_parallel_sampler, not with the "
    "global rank; and let these ranks shuffle and augment alike"
)


class _Read(NamedTuple):
    """What a rank says of its batch."""

    dp: int
    tp: int
    domain: int
    problem: int
    batch: int
    sample_ids: int


def _differing(said: dict[int, tuple[Hashable, int]]) -> list[list[int]]:
    """Ranks of one place that do not say the same."""
    groups: dict[Hashable, list[int]] = {}
    for rank, (place, _) in said.items():
        groups.setdefault(place, []).append(rank)
    return [ranks for ranks in groups.values() if len({said[rank][1] for rank in ranks}) > 1]


def _said_apart(group: list[int], part: str, ranks: list[_Read], said: list[Any]) -> str:
    """Who read what in a group of ranks that should have read the same."""
    by_sum: dict[int, list[int]] = {}
    for rank in group:
        by_sum.setdefault(getattr(ranks[rank], part), []).append(rank)
    sides = " and ".join(f"rank {_runs(side)}" for side in list(by_sum.values())[:8])
    sides += f" and others ({len(by_sum)} in all)" if len(by_sum) > 8 else ""
    entries = [said[rank][1][part] for rank in group]
    names = sorted({name for entry in entries for name in entry})
    names = [name for name in names if len({entry.get(name) for entry in entries}) > 1]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    what = "batches" if part == "batch" else "samples"
    where = f"{', '.join(names[:4])}{more}"
    return f"replica {ranks[group[0]].dp} must read one batch, but {sides} have read different {what} ({where})"


def _runs(ranks: Sequence[int]) -> str:
    """Ranks with runs folded: ``0-2, 5``."""
    counter = count()
    runs = [list(run) for _, run in groupby(ranks, lambda rank: rank - next(counter))]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# Checksums


def fingerprints(value: Any, path: str = "batch") -> dict[str, str]:
    """A short text for each entry of nested containers, by its path; equal texts stand for equal bits."""
    return dict(_leaves(path, value))


def _checksum(entries: dict[str, str] | None) -> int:
    digest = hashlib.sha1(repr(entries).encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:7], "big")


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Each entry of nested containers, with a text that stands for its bits."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        yield path, _tensor_text(path, value)
    elif numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        if value.dtype.hasobject:
            raise ValueError(f"{path} is a numpy array of objects, which cannot be compared")
        digest = hashlib.sha1(numpy.ascontiguousarray(value).tobytes(), usedforsecurity=False).hexdigest()
        yield path, f"{value.dtype} of shape {value.shape}: {digest}"
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, date, timedelta)):
        yield path, f"{type(value).__name__} {value!r}"
    elif isinstance(value, Mapping):
        yield path, f"{len(value)} keys"
        for key in sorted(value, key=repr):
            yield from _leaves(f"{path}[{key!r}]", value[key])
    elif isinstance(value, (list, tuple)):
        yield path, f"{len(value)} items"
        for index, item in enumerate(value):
            yield from _leaves(f"{path}[{index}]", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, type(value).__name__
        for field in dataclasses.fields(value):
            yield from _leaves(f"{path}.{field.name}", getattr(value, field.name))
    else:
        raise ValueError(
            f"{path} is of type {type(value).__name__}, which cannot be compared: pass the tensors, numbers and texts "
            "of the batch alone"
        )


_WORDS = 1 << 22  # at once: 32 MiB, and a few times that to work on
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, as int64 holds it


def _tensor_text(path: str, x: Tensor) -> str:
    """Dtype, shape, and two sums modulo 2**64 over the bits of a tensor, one of which knows where each word lies.

    Words are multiplied and folded first, so that what repeats (masks, whole numbers, fields that were float16) does
    not cancel. Integers add up to the same in any order, and so on every device.
    """
    if x.layout is not torch.strided or x.is_quantized or isinstance(x, DTensor):
        raise ValueError(f"{path} is no dense tensor ({x.layout}, {type(x).__name__}), and cannot be compared")
    flat = x.detach().resolve_conj().resolve_neg().reshape(-1)
    raw = flat.as_strided(flat.shape, (1,)) if flat.numel() < 2 else flat.contiguous()  # one element has any stride
    raw = raw.view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=x.device)
    for start in range(0, raw.numel(), 8 * _WORDS):
        piece = raw[start : start + 8 * _WORDS]
        if piece.numel() % 8 or piece.storage_offset() % 8:
            piece = torch.cat([piece, piece.new_zeros(-piece.numel() % 8)])
        words = piece.view(torch.int64) * _ODD
        words ^= words >> 32
        places = torch.arange(1, words.numel() + 1, device=x.device) + start // 8
        sums += torch.stack([words.sum(), (words * places).sum()])
    return f"{x.dtype} of shape {tuple(x.shape)}: {sums.tolist()}"
