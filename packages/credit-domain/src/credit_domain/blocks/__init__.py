"""Blocks that models of the field are made of, exact on sharded rows, to use or to copy.

Their parameters have the names that they have in a model for one GPU, and every function takes and returns this rank's
rows. ``docs/blocks.md`` shows how each is used and why it is exact. Besides their own arguments the functions take

- ``dim``: the sharded dim; latitude, -2, unless a function says otherwise.
- ``partition``: who holds which rows of the input (of ``key``: which tokens); where None, the ranks ask each other,
  once for each ``layer``.
- ``manager`` and ``label``: as in :mod:`credit_domain.functional`.
- ``layer``: what a module remembers the partition by; see :class:`Block`.

Blocks take ``dim``, ``manager`` and ``label``. What all exchanges raise is said in :mod:`credit_domain.functional`.
"""

from credit_domain.blocks.attention import FullAttention, LinearAttention, attention, linear_attention
from credit_domain.blocks.block import Block
from credit_domain.blocks.excitation import GlobalMean, ScSE, SqueezeExcitation, global_mean
from credit_domain.blocks.tables import PositionTable, local_rows
from credit_domain.blocks.windows import WindowAttention, Windows, join_windows, split_windows

__all__ = [
    "Block",
    "FullAttention",
    "GlobalMean",
    "LinearAttention",
    "PositionTable",
    "ScSE",
    "SqueezeExcitation",
    "WindowAttention",
    "Windows",
    "attention",
    "global_mean",
    "join_windows",
    "linear_attention",
    "local_rows",
    "split_windows",
]
