"""Skip connections around a stride: rows must come back as they were divided before."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from credit_domain.engine.ranks import Domain
from credit_halo.extend import Bounded, group_by_name

_Strided = Bounded[tuple[str, int], tuple[tuple[int, ...], str]]
_strided: WeakKeyDictionary[ProcessGroup, _Strided] = WeakKeyDictionary()


def follow(source: tuple[int, ...], target: tuple[int, ...], domain: Domain, label: str) -> None:
    """Refuse to come back to the rows before a stride on a partition with which they would broadcast.

    Where boundaries are no multiples of a stride, neither an upsampling nor a crop after it undoes it. A skip
    connection then adds rows of other numbers, which torch refuses unless a rank has one row on either side.

    Raises:
        ValueError: On all ranks alike, if so.
    """
    before, after = sum(source), sum(target)
    if domain.size == 1 or domain.planned or before == after or torch.compiler.is_compiling():
        return
    known = _strided.setdefault(group_by_name(domain.group), Bounded(4096))
    held, where = known.get((domain.declared, after), (target, ""))
    if any(a != b and 1 in (a, b) for a, b in zip(held, target, strict=True)):
        raise ValueError(
            f"{label}: the {after} rows that {where} read as {held} over the ranks come back as {target}, so that a "
            "skip connection would broadcast single rows; divide the rows at multiples of the model's total stride: "
            "set manager.granularity before the height is declared"
        )
    if after < before and 2 * after <= before + 4:  # a stride of two or more, with some padding
        known[domain.declared, before] = (source, label)


def has_strides(domain: Domain) -> bool:
    """Whether any rows were strided, on all ranks alike."""
    return domain.size > 1 and bool(_strided.get(group_by_name(domain.group)))
