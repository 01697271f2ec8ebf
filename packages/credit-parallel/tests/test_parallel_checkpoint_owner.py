"""One run saves into a folder at a time; one that is gone, however it went, is in nobody's way."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from credit_halo.testing import run_processes, run_threads
from credit_parallel.app.config import RunConfig
from credit_parallel.app.training.experiment import check
from credit_parallel.app.training.loop import CHECKPOINTS, train
from credit_parallel.checkpoint import folder_owner as owner
from credit_parallel.checkpoint import latest, load_checkpoint, release, save_checkpoint

spawn = multiprocessing.get_context("spawn")


def save(folder, step=1):
    save_checkpoint(folder, nn.Linear(1, 1), step=step)


def hold(folder, pipe, locks):
    """Another program, which saves once and then goes on."""
    if not locks:
        owner._lock = lambda handle: None
    save(folder, 7)
    pipe.send("here")
    pipe.poll(120)


class Other:
    """A program that has a folder until it is ended."""

    def __init__(self, folder, locks=True):
        self.pipe, end = spawn.Pipe()
        self.process = spawn.Process(target=hold, args=(folder, end, locks))
        self.process.start()
        assert self.pipe.poll(120)
        self.pipe.recv()

    def end(self):
        if self.process.is_alive():
            self.pipe.send("end")
        self.process.join(60)


@pytest.fixture
def other(tmp_path, request):
    """Another program that has the folder."""
    program = Other(tmp_path, getattr(request, "param", True))
    yield program.process
    program.end()


@pytest.fixture(params=[True, False], ids=["locks", "no locks"])
def locks(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(owner, "_lock", lambda handle: None)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("other", [True, False], indirect=True, ids=["locks", "no locks"])
def test_the_second_program_is_refused_and_goes_on_when_the_first_is_killed(tmp_path, other, monkeypatch, request):
    without = "no locks" in request.node.name
    if without:
        monkeypatch.setattr(owner, "_lock", lambda handle: None)
    for _ in range(2):  # being refused takes nothing away
        with pytest.raises(ValueError, match=rf"{tmp_path} is in use by another run \(process {other.pid} on .*remove"):
            save(tmp_path, 8)
    assert [path.name for path in tmp_path.glob("step*")] == ["step-00000007"]
    load_checkpoint(tmp_path, nn.Linear(1, 1))  # whoever reads is in nobody's way
    os.kill(other.pid, signal.SIGKILL)
    while owner._started(other.pid) is not None:  # a zombie is gone, though nobody has asked for its status
        time.sleep(0.01)
    save(tmp_path, 8)
    assert latest(tmp_path).name == "step-00000008"
    release(tmp_path)


def conf_of(folder):
    return RunConfig.from_dict(
        {
            "data": {"options": {"height": 6, "width": 8, "trajectories": 1, "times": 6}, "valid": None},
            "model": {"name": "unet", "width": 8},
            "trainer": {"steps": 1, "batch_size": 1},
            "folder": str(folder),
        }
    )


@pytest.mark.slow
def test_a_second_training_is_refused_at_its_start(tmp_path):
    folder = tmp_path / CHECKPOINTS
    program = Other(folder)
    with pytest.raises(ValueError, match="is in use by another run"):
        train(check(conf_of(tmp_path), 1), torch.device("cpu"))
    assert not (tmp_path / "statistics.json").exists()
    program.end()
    (folder / "step-00000007").rename(tmp_path / "other")
    assert train(check(conf_of(tmp_path), 1), torch.device("cpu")).finished
    # The training has given it back, though its process is still there.
    script = "import sys; from pathlib import Path; from credit_parallel.checkpoint import folder_owner as owner; "
    script += "print(owner.claim(Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def refused(rank, folder):
    with pytest.raises(ValueError, match=r"rank 0: .* is in use by another run"):
        save(folder, 9)
    return True


@pytest.mark.slow
def test_all_ranks_are_refused_alike(tmp_path, other):
    assert run_threads(refused, 3, tmp_path) == [True] * 3
    assert run_processes(refused, 2, tmp_path) == [True] * 2


def test_runs_of_one_process_share_its_folder(tmp_path, locks):
    """The first rank's process, which is alone, one of two, and alone again."""
    folder = tmp_path / "steps"

    def rank_main(rank):
        dist.destroy_process_group()
        for step in range(3 if rank == 0 else 0):
            save(folder, step)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        save(folder, 5)
        dist.destroy_process_group()
        if rank == 0:
            release(folder)
            assert (folder / owner.OWNER).read_bytes() == b""
            save(folder, 6)
            release(folder)

    run_processes(rank_main, 2, fork=True)
    assert latest(folder).name == "step-00000006"


def test_a_fork_has_not_what_its_parent_has(tmp_path):
    save(tmp_path)
    pid = os.fork()
    if not pid:
        try:
            owner.claim(tmp_path)
        except ValueError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert not owner.claim(tmp_path)  # and its parent still has it
    release(tmp_path)


def left_behind(folder, **changes):
    """What another process has left."""
    record = {"run": "1", "host": "node7", "machine": owner._machine(), "pid": os.getpid(), "started": "1"}
    (folder / owner.OWNER).write_text(json.dumps({**record, "since": "some time", **changes}))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "[]", '{"pid": true}', '{"pid": "x", "machine": 3}'])
def test_what_cannot_be_read_is_in_nobodys_way(tmp_path, locks, monkeypatch, content):
    monkeypatch.setattr(owner, "WATCH", 0.05)
    (tmp_path / owner.OWNER).write_text(content)
    assert owner.claim(tmp_path)
    release(tmp_path)


def test_a_process_that_has_the_number_of_the_one_before(tmp_path, locks):
    parent = os.getppid()
    left_behind(tmp_path, pid=parent, started="1")  # started at another time
    assert owner.claim(tmp_path)
    release(tmp_path)
    left_behind(tmp_path, pid=parent, started=owner._started(parent))
    with pytest.raises(ValueError, match=f"process {parent} on node7, since some time"):
        owner.claim(tmp_path)


def test_an_owner_on_another_machine_is_known_by_its_signs(tmp_path, locks, monkeypatch, caplog):
    monkeypatch.setattr(owner, "WATCH", 1.0)
    left_behind(tmp_path, machine="elsewhere")
    ended = threading.Event()

    def beat():
        while not ended.wait(0.1):
            os.utime(tmp_path / owner.OWNER)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(ValueError, match="on node7"):
        owner.claim(tmp_path)
    ended.set()
    thread.join()
    assert owner.claim(tmp_path)  # no sign while we looked
    assert caplog.text.count("looking for up to 1 s") == 2
    release(tmp_path)
    left_behind(tmp_path, machine="elsewhere")
    os.utime(tmp_path / owner.OWNER, (0, time.time() - 60))
    assert owner.claim(tmp_path)  # at once: nobody was there for long
    assert caplog.text.count("looking for") == 2
    release(tmp_path)


def test_an_owner_shows_that_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.05)
    owner.claim(tmp_path)
    os.utime(tmp_path / owner.OWNER, (0, 0))
    until = time.monotonic() + 30
    while (tmp_path / owner.OWNER).stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.02)
    release(tmp_path)


def test_a_folder_that_was_taken_meanwhile(tmp_path, locks):
    """As by a program that found this one standing still for minutes."""
    save(tmp_path)
    (tmp_path / owner.OWNER).unlink()
    left_behind(tmp_path, pid=os.getppid(), started=owner._started(os.getppid()))
    with pytest.raises(ValueError, match="is in use by another run"):
        save(tmp_path, 2)
    (tmp_path / owner.OWNER).unlink()
    save(tmp_path, 2)
    release(tmp_path)
