"""Run the property tests over and over with new examples, until a test fails or the time is up.

Each round has a seed, which is printed first, and takes the test files in another order, so that a round that is cut
short by the time does not leave out the same ones always. A failure prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PROFILE = "fuzz"


def test_files(paths: list[str]) -> list[str]:
    """The files under the paths that use Hypothesis."""
    found = [f for path in map(Path, paths) for f in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]
    return [str(file) for file in found if "hypothesis" in file.read_text(encoding="utf-8")]


def run_round(seed: int, files: list[str], options: list[str], seconds: float) -> tuple[int | None, str]:
    """One round; None for its exit status where the time was up."""
    random.Random(seed).shuffle(files)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rfE", "-m", "hypothesis and not gpu", "--timeout", "300"]
    command += [f"--hypothesis-seed={seed}", *options, *files]
    environment = {**os.environ, "HYPOTHESIS_PROFILE": PROFILE}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # pytest's workers and the ranks that they started too
            process.communicate()
            return None, ""
    return process.returncode, output


def main() -> int:
    """Return 0 when the time is up without a failure, 1 at the first failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["packages"], help="test files and folders (default: packages)")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long to draw (default: 20)")
    parser.add_argument("--seed", type=int, help="seed of the first round; the others are drawn")
    parser.add_argument("--workers", type=int, default=2, help="pytest's workers (default: 2)")
    args = parser.parse_args()
    files = test_files(args.paths)
    if not files:
        parser.error(f"no test file under {', '.join(args.paths)} uses Hypothesis")
    workers = ["-n", str(args.workers), "--dist", "worksteal"] if args.workers > 1 else []
    end = time.monotonic() + 60 * args.minutes
    rounds, seed = 0, args.seed
    while rounds == 0 or time.monotonic() < end:
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        print(f"round {rounds + 1}: seed {seed}", flush=True)
        status, output = run_round(seed, list(files), workers, max(1.0, end - time.monotonic()))
        if status is None:
            break
        if status:
            print(output)
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+?::\S+(?: [^-]\S*)*|\S+)", output, flags=re.MULTILINE)
            tests = " ".join(f"'{test}'" for test in failed) or " ".join(args.paths)
            print(f"repeat: HYPOTHESIS_PROFILE={PROFILE} python -m pytest --hypothesis-seed={seed} {tests}")
            return 1
        rounds, seed = rounds + 1, None
    print(f"the time is up: {rounds} whole rounds of {len(files)} files, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
