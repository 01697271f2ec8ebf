"""Who is where, and who owns which rows.

Layout arithmetic for training on a (dp, tp, domain) mesh: :class:`RankLayout` knows the coordinates of
every rank, :class:`RowPartition` knows which latitude rows each domain rank holds, and
:class:`DomainParallelManager` ties both to torch.distributed process groups. There is no autograd and no
layer here.

The arithmetic needs no torch, so importing this package does not import it: the names that do need it
are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from credit_mesh._version import __version__
from credit_mesh.layout import AXES, Coords, RankLayout
from credit_mesh.parallelism import ParallelismConfig, dp_world_size, parse_parallelism_conf
from credit_mesh.partition import RowPartition, RowPiece

if TYPE_CHECKING:
    from credit_mesh.manager import (
        DomainParallelManager,
        destroy_domain_parallel,
        get_domain_parallel_manager,
        initialize_domain_parallel,
    )
    from credit_mesh.mesh import build_device_mesh, data_parallel_coords

__all__ = [
    "AXES",
    "Coords",
    "DomainParallelManager",
    "ParallelismConfig",
    "RankLayout",
    "RowPartition",
    "RowPiece",
    "__version__",
    "build_device_mesh",
    "data_parallel_coords",
    "destroy_domain_parallel",
    "dp_world_size",
    "get_domain_parallel_manager",
    "initialize_domain_parallel",
    "parse_parallelism_conf",
]

_NEEDS_TORCH = {
    "DomainParallelManager": "manager",
    "destroy_domain_parallel": "manager",
    "get_domain_parallel_manager": "manager",
    "initialize_domain_parallel": "manager",
    "build_device_mesh": "mesh",
    "data_parallel_coords": "mesh",
}


def __getattr__(name: str) -> object:
    """Load the names that need torch when they are first asked for (PEP 562)."""
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
