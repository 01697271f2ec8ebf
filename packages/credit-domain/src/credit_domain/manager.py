"""The domain-parallel side of a rank, from :mod:`credit_mesh`, under the name that programs know it by."""

from credit_mesh import (
    DomainParallelManager,
    destroy_domain_parallel,
    get_domain_parallel_manager,
    initialize_domain_parallel,
)

__all__ = [
    "DomainParallelManager",
    "destroy_domain_parallel",
    "get_domain_parallel_manager",
    "initialize_domain_parallel",
]
