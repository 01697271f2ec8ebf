"""Ranks on this machine, each a process of the same program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from credit_parallel.training.distributed import RENDEZVOUS

PATIENCE = 15.0
"""Seconds that ranks have to end after one of them has failed, or all were asked to."""

USERS_MISTAKE = 2
"""The exit status that :mod:`credit_parallel.cli.main` gives what it can tell in a line."""


def is_rank() -> bool:
    """Whether this process is one of several ranks already, started by torchrun or by :func:`run_ranks`."""
    return "WORLD_SIZE" in os.environ


def run_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run ``credit-parallel`` with the same arguments on several ranks, which meet through a file.

    The first rank writes to this terminal; what the others write is shown if they fail. SIGTERM and Ctrl-C are passed
    on. When a rank fails, the others are ended.

    Args:
        arguments: Those of the command line.
        ranks: How many processes.

    Returns:
        The exit status of the first rank that failed; 0 if none did.
    """
    with tempfile.TemporaryDirectory(prefix="credit-parallel-") as folder:
        shared = {
            **os.environ,
            RENDEZVOUS: str(Path(folder) / "rendezvous"),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        command = [sys.executable, *_program(), *arguments]
        outputs = [None if rank == 0 else (Path(folder) / f"{rank}.txt").open("w+b") for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
            )
            for rank, output in enumerate(outputs)
        ]

        def pass_on(number: int, frame: FrameType | None) -> None:
            _signal(processes, number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            failed = _wait(processes)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed is not None and (output := outputs[failed]) is not None:
            output.seek(0)
            text = output.read().decode(errors="replace")
            print(f"[rank {failed} of {ranks}]\n{text}", file=sys.stderr)
        for output in outputs:
            if output is not None:
                output.close()
    if failed is None:
        return 0
    status = processes[failed].returncode
    return status if status > 0 else 128 - status  # ended by a signal, as shells tell it


def _program() -> list[str]:
    """How Python runs this package; with the working directory on its path only where it is on ours."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        return ["-m", "credit_parallel"]
    # -m would put it there, and a file such as yaml.py in it would be imported; -P is of Python 3.11.
    return ["-c", "import sys; sys.path[:] = filter(None, sys.path); import credit_parallel.__main__"]


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all; the rank that failed first, after which the others are ended."""
    failed: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        if failed is None:
            failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
            if failed is not None:
                deadline = time.monotonic() + PATIENCE
                # Ranks that find the same mistake end by themselves; those that wait for the failed one do not.
                time.sleep(1)
                _signal(processes, signal.SIGTERM)
        elif time.monotonic() > deadline:
            _signal(processes, signal.SIGKILL)
        time.sleep(0.05)
    if processes[0].returncode == USERS_MISTAKE:
        return 0  # which all have found, and the first rank has told
    return failed if failed is not None else next((rank for rank, p in enumerate(processes) if p.returncode), None)


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
