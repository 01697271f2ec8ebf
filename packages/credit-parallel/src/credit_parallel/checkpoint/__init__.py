"""Checkpoints that are saved on one layout of ranks and loaded on any other, or on one rank.

A checkpoint is a folder of raw tensors and JSON: nothing in it can run code when it is loaded.
"""

from credit_parallel.checkpoint.folders import CheckpointError, NewerFormatError, latest
from credit_parallel.checkpoint.load import LoadedState, load_checkpoint
from credit_parallel.checkpoint.owner import release
from credit_parallel.checkpoint.plain import export_plain, load_plain
from credit_parallel.checkpoint.save import Save, save_checkpoint

__all__ = [
    "CheckpointError",
    "LoadedState",
    "NewerFormatError",
    "Save",
    "export_plain",
    "latest",
    "load_checkpoint",
    "load_plain",
    "release",
    "save_checkpoint",
]
