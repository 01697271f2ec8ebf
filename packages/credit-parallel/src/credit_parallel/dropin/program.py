"""Running a program as python would, with the drop-in installed first."""

from __future__ import annotations

import builtins
import io
import json
import multiprocessing.spawn as spawn
import os
import runpy
import sys
import zipfile
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from credit_parallel.dropin.hook import install

USAGE = "usage: python -m credit_parallel.dropin script.py [argument ...]\n       ... -m module [argument ...]"
PROGRAM = "CREDIT_PARALLEL_DROPIN_PROGRAM"
"""Environment variable by which processes that this one starts anew know what it runs."""


def main(arguments: Sequence[str]) -> None:
    """Run a script, a folder or zip file with a ``__main__.py``, or ``-m`` and a module, with its arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        _stop(USAGE, 0 if arguments else 2)
    module = arguments[0] == "-m"
    given = list(arguments[1:] if module else arguments)
    if not given or (given[0].startswith("-") and not module):
        _stop(USAGE, 2)
    if not module and not os.path.exists(given[0]):
        where = os.path.abspath(given[0])
        _stop(f"{sys.executable}: can't open file {where!r}: [Errno 2] No such file or directory", 2)
    install()
    sys.argv[:] = given
    program = given[0] if module else os.path.abspath(given[0])
    os.environ[PROGRAM] = json.dumps([module, program])
    _have_children_install()
    if not module and not getattr(sys.flags, "safe_path", False):
        # For a module it is the working folder, as it is now. What is no script puts itself here.
        sys.path[:1] = [os.path.dirname(program)] if os.path.isfile(program) else []
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            _run_script(program)
    except (SystemExit, KeyboardInterrupt):
        raise  # for python to end by: a status, or a signal
    except BaseException as error:
        # As python reports it: without what ran the program.
        error.__traceback__ = _of_program(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def _run_script(path: str) -> None:
    """Run a script as the main module, which it stays until the process ends."""
    if os.path.isdir(path) or path.endswith(".pyc") or zipfile.is_zipfile(path):
        runpy.run_path(path, run_name="__main__")
        return
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    module = ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, __cached__=None, __file__=path)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _stop(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    sys.exit(status)


def _of_program(traceback: TracebackType | None) -> TracebackType | None:
    """The part of a traceback from the program's own first frame on."""
    running = (__file__, runpy.run_path.__code__.co_filename)
    while traceback is not None and traceback.tb_frame.f_code.co_filename in running:
        traceback = traceback.tb_next
    return traceback


def _have_children_install() -> None:
    """Have processes that multiprocessing starts by spawn or forkserver install the drop-in too.

    Those import the program's main module again, under another name, to find its functions. They are told to import
    :mod:`credit_parallel.dropin.child` in its place.
    """
    prepared = spawn.get_preparation_data

    def preparation(name: str) -> dict[str, Any]:
        data = prepared(name)
        if "init_main_from_path" in data or "init_main_from_name" in data:
            data.pop("init_main_from_path", None)
            data["init_main_from_name"] = "credit_parallel.dropin.child"
        return data

    spawn.get_preparation_data = preparation


def run_as_child(run_name: str) -> dict[str, Any]:
    """In a process that multiprocessing started anew: install the drop-in, and run the main module, as it calls it."""
    install()
    _have_children_install()
    module, program = json.loads(os.environ[PROGRAM])
    if module:
        return runpy.run_module(program, run_name=run_name, alter_sys=True)
    return runpy.run_path(program, run_name=run_name)
