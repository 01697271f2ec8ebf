"""Which module of ours stands behind which of the reference."""

from __future__ import annotations

ROOT = "credit"
"""The package of the reference. Where it is installed, it is left as it is but for the modules below."""

PACKAGES = ("credit.domain_parallel", "credit.parallel")
"""The two packages of it that are replaced."""

MODULES = {
    "credit.domain_parallel": "credit_domain",
    "credit.domain_parallel.convert": "credit_domain.convert",
    "credit.domain_parallel.halo_exchange": "credit_domain.halo_exchange",
    "credit.domain_parallel.layers": "credit_domain.layers",
    "credit.domain_parallel.manager": "credit_domain.manager",
    "credit.domain_parallel.sharding": "credit_domain.sharding",
    "credit.parallel": "credit_parallel",
    "credit.parallel.collectives": "credit_parallel.collectives",
    "credit.parallel.domain": "credit_parallel.domain",
    "credit.parallel.fsdp2": "credit_parallel.fsdp2",
    "credit.parallel.mesh": "credit_parallel.mesh",
    "credit.parallel.tensor_parallel": "credit_parallel.tensor_parallel",
}
"""By the name that programs import, the module that answers."""


def is_replaced(name: str) -> bool:
    """Whether a module is one of the two packages, or in one of them."""
    return name.startswith(tuple(f"{package}." for package in PACKAGES)) or name in PACKAGES
