"""What all tests share: the gate of the tests that need a GPU, Hypothesis's settings, and what can be collected."""

from __future__ import annotations

import functools
import multiprocessing.forkserver
import os
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# No deadline: a first example may start processes or load torch's operators.
# The same examples in every run, here and in CI, and no data base of earlier failures.
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
# New examples in every run, and first those that failed before.
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
# Those of a seed (`nox -s fuzz`): nothing that another run left behind decides.
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True, database=None, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "ci")

# The command line and its parts need more than torch, which is all that a closed GPU machine may have.
MISSING = [package for package in ("numpy", "pydantic", "tqdm", "yaml") if find_spec(package) is None]
PARTS = (
    *(
        "buffers",
        "checkpoint_forged",
        "checkpoint_owner",
        "checkpoint_trust",
        "complex",
        "config",
        "data",
        "demo",
        "era5",
    ),
    *("examples", "forecast", "launch", "missing_ranks", "plan", "plots", "reducer", "resuming", "training"),
)
collect_ignore_glob = [f"packages/credit-parallel/tests/test_parallel_{part}*.py" for part in PARTS] if MISSING else []

# A rank that is a process need not spend half a second on these.
PRELOADED = [
    "credit_halo.testing",
    "credit_domain",
    "credit_parallel.app.training.loop",
    "hypothesis",
    "pytest",
    "xarray",
]


def pytest_report_header() -> str | None:
    """Say what is not collected."""
    return f"without {', '.join(MISSING)} no tests of: {', '.join(PARTS)}" if MISSING else None


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """The GPUs that torch sees. Imports torch, so ask only when a test needs to know."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def pytest_report_collectionfinish(items: list[pytest.Item]) -> str | None:
    """Say which GPUs the tests run on, and how, where there are tests that use them."""
    count = sum(item.get_closest_marker("gpu") is not None for item in items)
    if not count:
        return None
    names = gpu_names()
    if not names:
        return f"gpu: none (tests that need one: {count})"
    if len(names) == 1:
        return f"gpu: 1 ({names[0]}): NCCL at world size 1, and many ranks as threads on it"
    return f"gpu: {len(names)} ({', '.join(sorted(set(names)))}): NCCL, one process per GPU"


SEEDS = ("manual_seed", "seed", "set_rng_state", "fork_rng")


def not_on_a_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that seeds torch's one generator, refused where a test calls it on a rank that is a thread."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        caller = Path(sys._getframe(1).f_code.co_filename)
        on_a_thread = threading.current_thread().name.startswith("rank ")
        if on_a_thread and caller.parent.name in ("tests", "benchmarks"):  # not where the library or torch does
            raise RuntimeError(
                f"torch.{function.__name__} on a rank of run_threads: all ranks share torch's generator, and race for "
                "it. Make what is random before, or from a torch.Generator of its own"
            )
        return function(*args, **kwargs)

    return checked


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare for ranks, where there will be any.

    Those that are threads may not seed torch: the numbers of one would be another's now and then. Those that are
    processes are forks of one process, which is started with what they import and is installed.
    """
    if "credit_halo.testing" in sys.modules:
        import torch

        for name in SEEDS:
            checked = not_on_a_thread(getattr(torch.random, name))
            for module in (torch, torch.random):
                if hasattr(module, name):
                    setattr(module, name, checked)
    if any(hasattr(getattr(item, "module", None), "run_processes") for item in session.items):
        multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` where there is none; under CREDIT_REQUIRE_GPU=1 that is an error."""
    if item.get_closest_marker("gpu") is None or gpu_names():
        return
    reason = "no GPU: torch.cuda.is_available() is False"
    if os.environ.get("CREDIT_REQUIRE_GPU", "0") not in ("", "0"):
        pytest.fail(f"{reason}, and CREDIT_REQUIRE_GPU is set", pytrace=False)
    pytest.skip(reason)
