"""A training loop for sharded models, and its parts."""

from credit_parallel.app.training.experiment import Checked, Experiment, check, prepare
from credit_parallel.app.training.loop import Outcome, Reporter, train
from credit_parallel.app.training.rollout import rollout

__all__ = ["Checked", "Experiment", "Outcome", "Reporter", "check", "prepare", "rollout", "train"]
