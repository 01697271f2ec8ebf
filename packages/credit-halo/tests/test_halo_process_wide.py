"""What changes the process: said once, and left alone where the environment says so."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from credit_halo import process_wide
from credit_halo.extend import allow_recompilations, end_process, share_cores


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(process_wide, "_said", set())
    caplog.set_level(logging.DEBUG, process_wide.__name__)


@pytest.fixture
def limit() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads torch was told to compute in."""
    monkeypatch.delenv(process_wide.SHARE_CORES, raising=False)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1] if told else 64)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return told


def test_cores_are_shared_and_that_is_said_once(threads: list[int], caplog: pytest.LogCaptureFixture) -> None:
    for ranks in (2, 4, 4, 100):
        share_cores(ranks)
    assert threads == [4, 2, 1]
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "CREDIT_HALO_SHARE_CORES=0 leaves that alone" in record.getMessage()


def test_other_ranks_say_it_for_those_who_debug(
    threads: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    share_cores(2)
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_the_limit_of_versions_is_raised_and_never_lowered(limit: None, caplog: pytest.LogCaptureFixture) -> None:
    allow_recompilations(4)
    assert torch._dynamo.config.recompile_limit == 8
    assert not caplog.records
    allow_recompilations(40)
    assert torch._dynamo.config.recompile_limit == 40
    assert "40 versions of a function now; CREDIT_HALO_RECOMPILE=0" in caplog.text


def test_all_is_left_alone_where_the_environment_says_so(
    threads: list[int], limit: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (process_wide.SHARE_CORES, process_wide.RECOMPILE, process_wide.END_AT_ONCE):
        monkeypatch.setenv(variable, "0")
    share_cores(2)
    allow_recompilations(40)
    end_process(3)
    assert (threads, torch._dynamo.config.recompile_limit) == ([], 8)
    assert not caplog.records


@pytest.mark.parametrize(("setting", "said"), [("1", "written"), ("0", "written, usual way")])
def test_a_process_ends_at_once_or_the_usual_way(setting: str, said: str) -> None:
    program = (
        "import atexit, sys\nfrom credit_halo.extend import end_process\n"
        "atexit.register(lambda: print(', usual way', end=''))\nprint('written', end='')\nend_process(3)\nsys.exit(3)"
    )
    environment = {**os.environ, process_wide.END_AT_ONCE: setting}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, said)
