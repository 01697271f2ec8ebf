"""The private names of torch that this package cannot do without, each with the reason."""

from __future__ import annotations

from torch.distributed import ProcessGroup, distributed_c10d


def group_by_name(name: str) -> ProcessGroup:
    """The process group of a name.

    An operator that torch.compile traces takes the name of a group, not the group. torch's own functional
    collectives turn it back with this function; there is no public one. It knows the groups of the calling thread
    where ranks run as threads, which a table of our own would not.
    """
    return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, no-any-return, arg-type, unused-ignore]
