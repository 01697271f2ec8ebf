"""What packages that build on credit-halo need of it, and users do not: its face for them.

Names here keep their meaning within a minor version, as those of :mod:`credit_halo` do. Everything else in this package
may change with any release.
"""

from credit_halo._torch_private import group_by_name, keep_order, prepare_inductor
from credit_halo.agreement import agree, has_agreed
from credit_halo.bounded import Bounded
from credit_halo.learning import PartitionLearner, learn_while_tracing, learner

__all__ = [
    "Bounded",
    "PartitionLearner",
    "agree",
    "group_by_name",
    "has_agreed",
    "keep_order",
    "learn_while_tracing",
    "learner",
    "prepare_inductor",
]
