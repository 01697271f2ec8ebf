"""One run saves into a folder at a time: who that is, and whether it is still there.

The first rank of a run claims the folder before it writes, and keeps it until the process ends. The file ``.owner``
says who has it. Where the file system has locks the claim is a lock on that file, which the kernel takes back when the
process ends, however it ends. The content is for what locks do not tell: processes of this machine are known by their
number and the time at which they started. On another machine the owner is there while the time of the file moves: an
owner touches it every few seconds, and clocks of machines need not agree.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on every system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

OWNER = ".owner"
BEAT = 10.0
"""Seconds after which an owner shows again that it is there."""
WATCH = 35.0
"""Seconds without a sign after which an owner on another machine is taken to be gone."""
ENDING = 5.0
"""Seconds in which the kernel takes back the locks of a process that was killed, once it counts as gone."""

_guard = threading.RLock()
_held: dict[str, _Claim] = {}


def claim(folder: Path) -> bool:
    """Take a folder for this process, or make sure that it still has it; returns whether it was taken anew.

    Ranks that are threads of one process, and runs of one process after another, share what the process has. If another
    run has the folder, a ValueError says which, and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(folder)
    with _guard:
        held = _held.get(key)
        if held is not None and held.pid == os.getpid():
            if held.is_valid():
                return False
            held.drop()  # the folder was removed, or this process stood still and another one has taken it
        _held.pop(key, None)
        _held[key] = _Claim(folder)
        return True


def release(folder: str | os.PathLike[str]) -> None:
    """Give a folder back before the process ends, so that another program may save into it."""
    with _guard:
        held = _held.pop(os.path.realpath(folder), None)
        if held is not None and held.pid == os.getpid():
            held.drop()


@atexit.register
def _release_all() -> None:
    for folder in list(_held):
        release(folder)


class _Claim:
    """A folder that this process has."""

    def __init__(self, folder: Path) -> None:
        self.path, self.pid, self._ended = folder / OWNER, os.getpid(), threading.Event()
        self.record = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": self.pid,
            "started": _started(self.pid),
            "since": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            self._take(folder)
        except BaseException:
            os.close(self._handle)
            raise
        threading.Thread(target=self._beat, name=f"owner of {folder}", daemon=True).start()

    def _take(self, folder: Path) -> None:
        locked, until = _lock(self._handle), time.monotonic() + ENDING
        while locked is False and time.monotonic() < until and _is_ending(_record(self._handle)):
            time.sleep(0.05)
            locked = _lock(self._handle)
        with _turn(self.path) if locked is None else nullcontext():
            before = _record(self._handle)
            if locked is False or (before and _is_alive(before, self.path, locked)):
                raise ValueError(_in_use(folder, before))
            if before:
                logger.info("%s was left by process %s on %s", folder, before.get("pid"), before.get("host"))
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(self.record).encode(), 0)
            os.fsync(self._handle)

    def is_valid(self) -> bool:
        """Whether the folder is still this claim's."""
        # Never by opening the file once more: closing it would give up the lock of this process.
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except FileNotFoundError:
            return False
        return same and _record(self._handle).get("run") == self.record["run"]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with _guard:
                if self._ended.is_set():
                    return
                try:
                    if not self.is_valid():
                        return
                    os.utime(self.path)
                except OSError as error:
                    logger.warning("%s could not be touched: %s", self.path, error)

    def drop(self) -> None:
        """Leave the folder to others."""
        self._ended.set()
        with suppress(OSError):
            if self.is_valid():
                os.ftruncate(self._handle, 0)
        os.close(self._handle)


def _in_use(folder: Path, record: dict[str, Any]) -> str:
    who = "another process"
    if record:
        who = f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"
    return (
        f"{folder} is in use by another run ({who}), and one run saves into a folder at a time: give this run a folder "
        f"of its own, or end the other one. If that run is gone all the same, remove {folder / OWNER}"
    )


def _lock(handle: int) -> bool | None:
    """Whether this process has the file now; None where there are no locks."""
    # A lock of the process, not of the open file: workers of a loader, which are forks, must not keep it alive.
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.debug("no locks here: %s", error)
        return None
    return True


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Without locks: look at the owner and become it while no other process does."""
    turn, until = path.with_name(f"{path.name}.turn"), time.monotonic() + WATCH + BEAT
    while True:
        try:
            os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            if time.monotonic() > until:  # whoever made it is gone: nobody takes that long
                turn.unlink(missing_ok=True)
            time.sleep(0.05)
    try:
        yield
    finally:
        turn.unlink(missing_ok=True)


def _record(handle: int) -> dict[str, Any]:
    """Who has the folder; empty if nobody has, or it cannot be read."""
    try:
        found = json.loads(os.pread(handle, 1 << 16, 0))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(record: dict[str, Any], path: Path, locked: bool | None) -> bool:
    """Whether the owner that a file names is still there, of which a lock says nothing."""
    if record.get("machine") != _machine():
        return _shows_signs(path, record)
    pid, known = record.get("pid"), record.get("started")
    started = _started(pid)
    if started is None or (pid == os.getpid() and started == known):
        return False
    if started == _UNKNOWN or known == _UNKNOWN:
        return locked is None
    return started == known


def _is_ending(record: dict[str, Any]) -> bool:
    """Whether who has a lock is about to give it back, or to say who it is."""
    return not record or (record.get("machine") == _machine() and _started(record.get("pid", 0)) is None)


def _shows_signs(path: Path, record: dict[str, Any]) -> bool:
    """Whether the time of a file moves while we look."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
    probe.touch()
    now = probe.stat().st_mtime  # by the clock of the file system
    probe.unlink()
    before = path.stat().st_mtime
    if now - before > WATCH:
        return False
    logger.warning(
        "%s was in use by process %s on %s moments ago: looking for up to %.0f s whether it still is",
        path.parent,
        record.get("pid"),
        record.get("host"),
        WATCH,
    )
    until = time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(min(1.0, WATCH / 10))
        if path.stat().st_mtime != before:
            return True
    return False


_UNKNOWN = "unknown"


def _machine() -> str:
    """What tells this machine, since it was started, from others; processes of other containers are not seen either."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _started(pid: Any) -> str | None:
    """When a process of this machine was started, in ticks; None if there is none, or it has ended."""
    if type(pid) is not int or pid < 1:
        return None
    if os.path.isdir("/proc/self"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return _UNKNOWN
