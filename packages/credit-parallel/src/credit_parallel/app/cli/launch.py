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
from typing import IO, NamedTuple

from credit_parallel.app.training.distributed import RENDEZVOUS, left_properly

PATIENCE = 15.0
"""Seconds that ranks have to end after one of them has failed."""

ALIKE = 5.0
"""Seconds in which ranks that find the same mistake end by themselves."""

USERS_MISTAKE = 2
"""The exit status that :mod:`credit_parallel.app.cli.main` gives what it can tell in a line."""


class Ended(NamedTuple):
    """The rank that failed first."""

    rank: int
    status: int  #: as ``subprocess`` gives it: negative for a signal
    early: bool = False  #: whether it ended with 0 before the ranks had finished together

    def __str__(self) -> str:
        """Return what happened, in one line."""
        if self.early:
            return f"rank {self.rank} ended with status 0 before the ranks had finished together"
        if self.status < 0:
            return f"rank {self.rank} was killed by signal {-self.status} ({_name_of(-self.status)})"
        return f"rank {self.rank} ended with status {self.status}"

    @property
    def exit_status(self) -> int:
        """The status as shells tell it, which is never 0."""
        return 128 - self.status if self.status < 0 else self.status or 1


def is_rank() -> bool:
    """Whether this process is one of several ranks already, started by torchrun or by :func:`run_ranks`."""
    return "WORLD_SIZE" in os.environ


def run_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run ``credit-parallel`` with the same arguments on several ranks, which meet through a file.

    The first rank writes to this terminal; what the others write is shown if they fail. SIGTERM and Ctrl-C are passed
    on. When a rank fails, is killed, or ends before the ranks have finished together, that is told in a line, and the
    others are ended. Returns the exit status of the first rank that failed; 0 if none did.
    """
    return start_and_watch([sys.executable, *_program(), *arguments], ranks)


def start_and_watch(command: Sequence[str], ranks: int) -> int:
    """Run a command on several ranks; see :func:`run_ranks`."""
    processes: list[subprocess.Popen[bytes]] = []
    passed_on: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.add(number)
        _signal(processes, number)

    with tempfile.TemporaryDirectory(prefix="credit-parallel-") as folder:
        meeting = Path(folder) / "rendezvous"
        outputs = [None if rank == 0 else (Path(folder) / f"{rank}.txt").open("w+b") for rank in range(ranks)]
        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for rank, output in enumerate(outputs):
                processes.append(_start(command, rank, ranks, meeting, output))
                for number in tuple(passed_on):  # which came while ranks were being started
                    processes[-1].send_signal(number)
            failed = _wait(processes, meeting)
        finally:
            _end(processes)
            for number, handler in before.items():
                signal.signal(number, handler)
        if failed is not None and -failed.status not in passed_on:
            _tell(failed, ranks, outputs[failed.rank])
        for output in outputs:
            if output is not None:
                output.close()
    return 0 if failed is None else failed.exit_status


def _program() -> list[str]:
    """How Python runs this package; with the working directory on its path only where it is on ours."""
    if sys.path and sys.path[0] in ("", os.getcwd()):
        return ["-m", "credit_parallel"]
    # -m would put it there, and a file such as yaml.py in it would be imported; -P is of Python 3.11.
    return ["-c", "import sys; sys.path[:] = filter(None, sys.path); import credit_parallel.__main__"]


def _start(
    command: Sequence[str], rank: int, ranks: int, meeting: Path, output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        RENDEZVOUS: str(meeting),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]], meeting: Path) -> Ended | None:
    """Wait until all ranks have ended, or one has failed; return the rank that failed first."""
    while True:
        statuses = [process.poll() for process in processes]  # of every rank: the first one may wait for a later one
        failed = _failed(statuses, meeting)
        if failed is not None or None not in statuses:
            break
        time.sleep(0.05)
    if failed is not None and failed.status == USERS_MISTAKE:
        _wait_for_all(processes, ALIKE)  # all ranks may have found the same mistake, which the first rank tells
        if processes[0].returncode == USERS_MISTAKE:
            failed = Ended(0, USERS_MISTAKE)
    return failed


def _failed(statuses: Sequence[int | None], meeting: Path) -> Ended | None:
    """The rank that failed, among those that were found in one round: a killed one before those that noticed."""
    found = [
        Ended(rank, status, early=status == 0)
        for rank, status in enumerate(statuses)
        if status is not None and (status != 0 or not left_properly(meeting, rank))
    ]
    return min(found, key=lambda ended: (ended.status >= 0, ended.early), default=None)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run: ask them, and kill those that do not end."""
    _signal(processes, signal.SIGTERM)
    _wait_for_all(processes, PATIENCE)
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _wait_for_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _tell(failed: Ended, ranks: int, output: IO[bytes] | None) -> None:
    if output is not None:
        output.seek(0)
        text = output.read().decode(errors="replace")
        if text.strip():
            print(f"[rank {failed.rank} of {ranks}]\n{text}", file=sys.stderr)
    if failed != Ended(0, USERS_MISTAKE):  # of which the first rank has told
        print(f"credit-parallel: {failed}; the other ranks were ended", file=sys.stderr, flush=True)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return "unnamed"


def _signal(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
