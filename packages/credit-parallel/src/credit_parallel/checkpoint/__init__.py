"""Checkpoints that are saved on one layout of ranks and loaded on any other, or on one rank.

A checkpoint is a folder of safetensors files and JSON: nothing in it can run code when it is loaded.
"""

from credit_parallel.checkpoint.folder_owner import release
from credit_parallel.checkpoint.load import LoadedState, load_checkpoint
from credit_parallel.checkpoint.plain_files import export_plain, load_plain
from credit_parallel.checkpoint.save import Save, save_checkpoint
from credit_parallel.checkpoint.step_folders import latest
from credit_parallel.checkpoint.strict_reader import CheckpointError, NewerFormatError

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
