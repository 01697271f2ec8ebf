"""A training loop for sharded models, and its parts."""
