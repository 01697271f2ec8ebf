"""Converters for modules of the field that rules cannot guess, proved by verification; see ``docs/adapters.md``."""

from credit_domain.adapters import crossformer, cube, stochastic, swin
from credit_domain.adapters import unet_families as unet
from credit_domain.adapters.adapter import Adapter
from credit_domain.adapters.registry import Family, known_converters, known_families, register, table
from credit_domain.adapters.window_families import RegroupedModule

__all__ = [
    "Adapter",
    "Family",
    "RegroupedModule",
    "crossformer",
    "cube",
    "known_converters",
    "known_families",
    "register",
    "stochastic",
    "swin",
    "table",
    "unet",
]
