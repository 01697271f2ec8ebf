"""Data x tensor x domain parallel training.

Composes the layers below it: data, tensor and domain parallelism over one device mesh, checkpoints,
and the command line.

Nothing public yet.
"""

from credit_parallel._version import __version__

__all__ = ["__version__"]
