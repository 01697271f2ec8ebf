"""The launcher notices every rank that ends, says which it was and how, and leaves no process behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from credit_parallel.app.cli import launch
from credit_parallel.app.cli.launch import Ended, start_and_watch

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
rank, ranks, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(sys.argv[1])
(folder / f"pid-{rank}").write_text(str(os.getpid()))
while len(list(folder.glob("pid-*"))) < ranks:
    time.sleep(0.01)
def leave():
    meeting = Path(os.environ["CREDIT_PARALLEL_RENDEZVOUS"])
    meeting.with_name(f"{meeting.name}.left-{rank}").touch()
"""


def ranks_of(folder: Path, body: str, ranks: int = 3) -> int:
    return start_and_watch([sys.executable, "-c", PROGRAM + body, str(folder)], ranks)


def assert_gone(folder: Path, ranks: int = 3) -> None:
    for rank in range(ranks):
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / f"pid-{rank}").read_text()), 0)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by signal 9 (SIGKILL)"),
        ("print('what it said'); sys.exit(3)", 3, "ended with status 3"),
        ("sys.exit(0)", 1, "ended with status 0 before the ranks had finished together"),
    ],
)
def test_a_rank_that_ends_alone_is_told_and_ends_the_others(
    rank: int, how: str, status: int, text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ranks_of(tmp_path, f"if rank == {rank}:\n    {how}\ntime.sleep(600)") == status
    out, err = capfd.readouterr()
    assert f"rank {rank} {text}" in err
    if "what it said" in how:
        assert "what it said" in (err if rank else out)
    assert_gone(tmp_path)


def test_a_killed_rank_at_the_real_rendezvous(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "if rank == 2:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    join = "import torch; from credit_parallel.app.training.distributed import joined\n"
    join += "with joined(torch.device('cpu')): pass"
    assert ranks_of(tmp_path, body + join) == 137
    assert "rank 2 was killed by signal 9 (SIGKILL)" in capfd.readouterr().err
    assert_gone(tmp_path)


def test_ranks_that_finish_together_are_no_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks_of(tmp_path, "time.sleep(0.3 * rank); leave()") == 0
    assert capfd.readouterr().err == ""


def test_a_mistake_that_all_ranks_find_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks_of(tmp_path, "print('no such file', file=sys.stderr); sys.exit(2)") == 2
    assert capfd.readouterr().err == "no such file\n"


def test_a_rank_that_does_not_end_when_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"deaf-{rank}").touch()
while len(list(folder.glob("deaf-*"))) < ranks:
    time.sleep(0.01)
if rank == 1:
    sys.exit(3)
if rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(600)
"""
    assert ranks_of(tmp_path, body) == 3
    assert "rank 1 ended with status 3" in capfd.readouterr().err
    assert_gone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("heeded", [True, False])
def test_signals_are_passed_on(number: signal.Signals, heeded: bool, tmp_path: Path) -> None:
    body = "time.sleep(600)"
    if heeded:
        body = f"signal.signal({int(number)}, lambda *_: (leave(), os._exit(0)))\n"
        body += "(folder / f'ready-{rank}').touch()\ntime.sleep(600)"
    else:
        body = f"signal.signal({int(number)}, signal.SIG_DFL)\n(folder / f'ready-{{rank}}').touch()\ntime.sleep(600)"
    script = (
        "import sys; from credit_parallel.app.cli.launch import start_and_watch;"
        "sys.exit(start_and_watch([sys.executable, '-c', *sys.argv[1:]], 3))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, PROGRAM + body, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.glob("ready-*"))) < 3:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=240)
    assert process.returncode == (0 if heeded else 128 + number)
    assert err == ""
    assert_gone(tmp_path)


def test_a_signal_without_a_name() -> None:
    assert str(Ended(1, -35)) == "rank 1 was killed by signal 35 (unnamed)"
    assert Ended(1, -35).exit_status == 163


CONFIGURATION = """
folder: {folder}/run
data: {{options: {{height: 21, width: 8, trajectories: 1, times: 10}}}}
model: {{name: unet, width: 8, levels: 2, groups: 2}}
trainer: {{parallelism: {{data: ddp}}, steps: 1000000, batch_size: 3, device: cpu, timeout: 20}}
"""


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank that a launcher has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (found,) = [
        int(pid)
        for pid in children
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="finds ranks through /proc")
@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        (signal.SIGKILL, 137, r"rank 2 was killed by signal 9 \(SIGKILL\)"),
        (signal.SIGSTOP, 1, r"rank 2 \(dp 2, tp 0, domain 0\) does not answer"),
    ],
)
def test_a_training_ends_where_a_rank_is_lost(how: signal.Signals, status: int, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(CONFIGURATION.format(folder=tmp_path))
    line = [sys.executable, "-m", "credit_parallel", "train", "-c", str(tmp_path / "config.yml")]
    process = subprocess.Popen([*line, "--ranks", "3", "--quiet"], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(rank_of(process, 2), how)
    _, err = process.communicate(timeout=240)
    assert process.returncode == status
    assert re.search(text, err), err
