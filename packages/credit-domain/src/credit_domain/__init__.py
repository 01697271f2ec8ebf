"""Layers, converter, sharding and verification for domain parallelism.

Shards a model's rows (latitude) over the ranks of a domain group so that outputs and gradients are
those of one rank.

Nothing public yet.
"""

from credit_domain._version import __version__

__all__ = ["__version__"]
