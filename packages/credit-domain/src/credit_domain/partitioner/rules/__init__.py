"""What becomes of each operator: one table, by families."""

from credit_domain.partitioner.rules import (
    joining,
    layers,
    moving,
    own_backward,
    own_layers,
    pointwise,
    products,
    random,
    reducing,
    sampling,
    spectral,
    views,
)
from credit_domain.partitioner.rules.table import RULES, rule_for

__all__ = [
    "RULES",
    "joining",
    "layers",
    "moving",
    "own_backward",
    "own_layers",
    "pointwise",
    "products",
    "random",
    "reducing",
    "rule_for",
    "sampling",
    "spectral",
    "views",
]
