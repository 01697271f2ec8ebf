"""What all tests share: the gate of the tests that need a GPU, Hypothesis's settings, what can be collected, and a look
at what each test leaves behind for others."""

from __future__ import annotations

import functools
import gc
import logging
import multiprocessing.forkserver
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Programs that a test calls in its own process leave torch's threads as the test found them.
os.environ.setdefault("CREDIT_HALO_SHARE_CORES", "0")

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

# A rank that is a process need not spend a second or two on these.
PRELOADED = [
    "credit_halo.testing",
    "credit_domain",
    "credit_parallel.app.training.loop",
    "hypothesis",
    "pytest",
    "xarray",
    # What torch.compile imports when it is first used takes longer than to compile a small function.
    "torch._inductor.compile_fx",
]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that need none.

    Some ranks are forks. Once autograd has seen a GPU, a fork may not run backward.
    """
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of each package run N quick tests only, and all tests in mixed order"
    parser.addoption("--few", type=int, metavar="N", help=text)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a few tests of each package, all of others, under `--few`; the same ones whenever the tests are the same."""
    if (few := config.getoption("few")) is None:
        return
    random.Random(0).shuffle(items)
    kept: list[pytest.Item] = []
    taken: dict[Path, int] = {}
    for item in items:
        folder = item.path.parent
        if "packages" in folder.parts:
            if item.get_closest_marker("slow") or taken.get(folder, 0) == few:
                continue
            taken[folder] = taken.get(folder, 0) + 1
        kept.append(item)
    left = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = kept


def pytest_report_header() -> str | None:
    """Say what is not collected."""
    return f"without {', '.join(MISSING)} no tests of: {', '.join(PARTS)}" if MISSING else None


FOUND = pytest.StashKey[dict[str, Any]]()


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


# What a test leaves behind for others. pytest puts filters of warnings back, and random generators are seeded below.


def threads_that_stay() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if not thread.daemon]


def whose(function: Any) -> object:
    """What tells a function from one in its place; torch itself puts others there, when it first compiles."""
    return "torch" if str(getattr(function, "__module__", "")).startswith("torch") else id(function)


def shared_state() -> dict[str, Any]:
    """What all tests of a process share, by what an error calls it."""
    found: dict[str, Any] = {f"${name}": value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    found["the working directory"] = os.getcwd()
    found["the handler of SIGINT"], found["that of SIGTERM"] = map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))
    found["non-daemon threads"] = set(threads_that_stay())
    found["processes"] = set(multiprocessing.active_children())
    loggers = {name: logging.getLogger(name) for name in ["", *logging.root.manager.loggerDict]}
    for name, logger in loggers.items():
        if not name or (name.startswith("credit") and name != "credit_halo.trace"):
            found[f"the logger {name or 'root'}"] = logger.level, logger.propagate, logger.disabled, [*logger.handlers]
    found.update({f"sys.modules[{name!r}]": id(module) for name, module in sys.modules.items()})
    if "torch.distributed" in sys.modules:
        import torch

        found["torch's default dtype"] = torch.get_default_dtype()
        found["torch's default device"] = torch.get_default_device()
        found["torch's grad mode"] = torch.is_grad_enabled()
        found["torch's autocast"] = torch.is_autocast_enabled("cpu")
        found["torch's deterministic mode"] = torch.are_deterministic_algorithms_enabled()
        found["torch's process group"] = torch.distributed.is_initialized()
        for at in (torch, torch.distributed, torch.nn, torch.nn.functional, torch.nn.Module):
            functions = {name: value for name, value in vars(at).items() if callable(value)}
            found.update({f"torch's {at.__name__}.{name}": whose(value) for name, value in functions.items()})
    return found


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Begin each test with the same random numbers, whatever ran before, and note what it finds."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch.distributed" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    trace = logging.getLogger("credit_halo.trace")  # whose lines go to the stderr of the test that first asked for them
    trace.handlers, trace.level, trace.propagate = [], logging.NOTSET, True
    item.stash[FOUND] = shared_state()
    # The application, called in this process, sets these for good. They are put back.
    path, torch = list(sys.path), sys.modules.get("torch") if "torch.distributed" in sys.modules else None
    threads = torch.get_num_threads() if torch else 0
    result = yield
    sys.path[:] = path
    if torch:
        torch.set_num_threads(threads)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Compare what a test leaves with what it found. What is new is left out where a first use makes it."""
    result = yield
    found = item.stash[FOUND]
    for kind, running in (
        ("non-daemon threads", threads_that_stay),
        ("processes", multiprocessing.active_children),
    ):
        for each in set(running()) - found[kind]:
            gc.collect()  # which ends the workers of a loader
            each.join(5)  # what was told to end may take a moment
    left = shared_state()
    # netCDF4 and torch's compiler set a variable each when they are imported.
    made_by_use = ("sys.modules", "torch", "the logger", "$HDF5_PLUGIN_PATH", "$TORCHINDUCTOR_CACHE_DIR")
    changed = [name for name in found if name not in left or left[name] != found[name]]
    changed += [name for name in left if name not in found and not name.startswith(made_by_use)]
    if changed:
        pytest.fail(f"left behind for other tests: {', '.join(changed)}", pytrace=False)
    return result
