"""The sessions of the workspace: `nox -l` lists them, `nox -s tests-gloo tests-gpu` runs the tests."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2026.10"
nox.options.sessions = ["tests-gloo", "tests-gpu", "lint", "types", "build", "docs"]
# pip, not uv: where a machine is told by pip's own settings which build of torch to take, uv does not see them.
nox.options.default_venv_backend = "virtualenv"

# Lowest layer first: a package depends on those before it, never on those after it.
PACKAGES = ["credit-mesh", "credit-halo", "credit-domain", "credit-parallel"]

PYPROJECT = nox.project.load_toml("pyproject.toml")
DIST = Path("dist").absolute()

# Ranks are processes (or threads) already: more threads in each only take the cores from one another.
TEST_ENV = {"OMP_NUM_THREADS": "1"}

# Nothing is compiled when it is installed. What is imported has to be kept, also on machines that are told to keep no
# bytecode: every process that starts would compile torch again, for 4 seconds.
KEEP_BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}

# `--no-compile` leaves the bytecode of torch's 2,000 modules to those that are imported (6 s instead of 19 s).
PIP = ["--quiet", "--no-compile", "--constraint", "constraints.txt"]


def group(name: str) -> list[str]:
    return list(nox.project.dependency_groups(PYPROJECT, name))


def lowest(package: str) -> list[str]:
    """The package and every layer below it."""
    return PACKAGES[: PACKAGES.index(package) + 1]


def purelib(session: nox.Session) -> str:
    """Where the environment of the session has its packages."""
    return (
        session.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", silent=True) or ""
    ).strip()


@nox.session(default=False)
def torch(session: nox.Session) -> None:
    """Install torch, and what builds the packages, once for all sessions that need them."""
    session.install(*PIP, "torch", "hatchling")


def install(session: nox.Session, packages: list[str], *tools: str, extras: str = "") -> None:
    """Install packages of this repository as a user would (not editable), and tools beside them.

    `extras` are those of credit-parallel, such as "[data,plot]". Of torch, which is large and slow to install, there is
    one for all sessions: a line in a `.pth` file lets Python, and pip, find it beneath what is installed here. And its
    hatchling builds all packages, instead of a fresh build environment for each; the session `build` does build them
    in isolation, and tries them where nothing lies beneath.
    """
    session.env.update(KEEP_BYTECODE)
    here = Path(session.virtualenv.location)
    own = Path(purelib(session))
    (own / "torch.pth").write_text(f"{here.parent / 'torch' / own.relative_to(here)}\n")
    if tools:
        session.install(*PIP, *tools)
    if packages:
        wanted = {package: extras if package == "credit-parallel" else "" for package in packages}
        session.install(*PIP, "--no-build-isolation", *(f"./packages/{p}{extra}" for p, extra in wanted.items()))


@nox.session(name="tests-gloo", requires=["torch"], allow_parallel=True)
@nox.parametrize("package", [nox.param(name, id=name, tags=[name]) for name in PACKAGES] + [nox.param("all", id="all")])
def tests_gloo(session: nox.Session, package: str) -> None:
    """The tests that need no GPU: each package with only the layers below it; then names and leftovers of all.

    The last collects the tests of all packages in one process, which finds names that clash, and runs a few of each in
    mixed order, which finds what one leaves behind for others; tests of the repository run only there.
    """
    everything = package == "all"
    tools = [*group("test"), *(group("notebook") if package == "credit-domain" else [])]
    install(session, PACKAGES if everything else lowest(package), *tools, extras="[data,grib,plot,tensorboard]")
    how = (
        ["--few", "20", "tests", "packages"]
        if everything
        else ["-n", "2", "--dist", "worksteal", f"packages/{package}/tests"]
    )
    options = ["--timeout", "1200", "--durations", "8", "-m", "not gpu"]
    session.run("pytest", *options, *how, *session.posargs, env=TEST_ENV)


HERE = ".".join(map(str, sys.version_info[:2]))
TORCHES = ["2.11", "2.12", "2.13", "2.14", "2.15"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# Each torch on one Python, and the oldest and the newest on each other one.
PAIRS = [(HERE, version) for version in TORCHES]
PAIRS += [(python, version) for python in PYTHONS if python != HERE for version in (TORCHES[0], TORCHES[-1])]


@nox.session(name="tests-torch", default=False)
@nox.parametrize(
    "python,version", [nox.param(*pair, id=f"{pair[1]}-python{pair[0]}", tags=[f"torch{pair[1]}"]) for pair in PAIRS]
)
def tests_torch(session: nox.Session, version: str) -> None:
    """Outside CI: all tests on each torch from the oldest on; an environment of 5 to 7 GB, and 20 minutes, for each.

    Writes what ran into docs/compatibility.md, unless arguments (`-- -k norm`) choose tests.
    """
    session.env.update(KEEP_BYTECODE)
    session.install("--quiet", "--no-compile", f"torch=={version}.*", *group("test"), *group("notebook"))
    session.install("--quiet", *(f"./packages/{p}" for p in PACKAGES))
    session.install("--quiet", "./packages/credit-parallel[data,grib,plot,tensorboard]")
    report = Path(session.create_tmp()) / "results.xml"
    options = ["-m", "not gpu", "-n", "2", "--dist", "worksteal", "--timeout", "1200", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    session.run("pytest", *options, *session.posargs, "packages", env=TEST_ENV, success_codes=[0, 1])
    if report.exists() and not session.posargs:
        session.run("python", "tools/compatibility.py", str(report))
    if report.exists() and not all(f'{kind}="0"' in report.read_text() for kind in ("failures", "errors")):
        session.error(f"tests failed on torch {version}")


@nox.session(name="fuzz-programs", default=False, requires=["torch"])
def fuzz_programs(session: nox.Session) -> None:
    """Outside CI: 2,000 random programs, partitioned; some 15 minutes."""
    install(session, lowest("credit-domain"), *group("test"))
    tests = "packages/credit-domain/tests/test_domain_partition_fuzz.py"
    session.run("pytest", "--timeout", "7200", *session.posargs, tests, env=TEST_ENV | {"CREDIT_FUZZ": "2000"})


@nox.session(default=False, requires=["torch"])
def zoo(session: nox.Session) -> None:
    """Outside CI: models of other packages, partitioned; writes docs/zoo.md; 7 minutes. `-- --only NAME` tries one."""
    install(session, lowest("credit-domain"), *group("test"), *group("zoo"))
    session.install("--quiet", "--no-compile", "--no-deps", "torch-harmonics==0.9.3")  # it asks for torch 2.14 alone
    session.run("python", "tools/zoo.py", *session.posargs, env=TEST_ENV)


@nox.session(name="tests-floors", default=False, requires=["torch"])
def tests_floors(session: nox.Session) -> None:
    """The tests of credit-parallel that need no GPU, with the lowest versions of all that it names, but torch."""
    pins = floors(session, "credit-parallel")
    session.log(f"the lowest versions: {' '.join(pins)}")
    install(session, PACKAGES, *group("test"), *pins, extras="[data,grib,plot,tensorboard]")
    # Those that old releases cause by what they call in newer ones beneath them, which are not pinned.
    options = ["--timeout", "1200", "--durations", "8", "-m", "not gpu", "-W", "ignore::DeprecationWarning"]
    how = ["-n", "2", "--dist", "worksteal", "packages/credit-parallel/tests"]
    session.run("pytest", *options, *how, *session.posargs, env=TEST_ENV)


def floors(session: nox.Session, package: str) -> list[str]:
    """The lowest versions that go together, and have wheels, of what a package and its extras name, but torch."""
    project = nox.project.load_toml(f"packages/{package}/pyproject.toml")["project"]
    named = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    others = [line for line in named if Requirement(line).name not in ("torch", *PACKAGES)]
    session.install("--quiet", "uv")  # it looks for versions, and pip installs them
    with tempfile.TemporaryDirectory() as outside:
        wanted = Path(outside) / "wanted.in"
        wanted.write_text("\n".join(others))
        options = ["--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:", "--resolution", "lowest-direct"]
        python = str(Path(session.bin) / "python")
        found = session.run("uv", "pip", "compile", *options, "--python", python, str(wanted), silent=True) or ""
    names = {canonicalize_name(Requirement(line).name) for line in others}
    return [line for line in found.splitlines() if canonicalize_name(Requirement(line).name) in names]


@nox.session(requires=["torch"])
def fuzz(session: nox.Session) -> None:
    """Run the property tests with new examples for 20 minutes; `-- --minutes N`, `-- --seed N` to repeat."""
    install(session, PACKAGES, *group("test"), extras="[data,grib,plot,tensorboard]")
    session.run("python", "tools/fuzz.py", *session.posargs, env=TEST_ENV)


@nox.session(requires=["torch"], allow_parallel=True)
def demo(session: nox.Session) -> None:
    """Train a small model on 4 ranks and on one, and compare; `nox -s demo -- --help` tells more."""
    install(session, PACKAGES, extras="[data,plot]")
    session.run("credit-parallel", "demo", *session.posargs)


@nox.session(name="tests-gpu", requires=["torch"], allow_parallel=True)
def tests_gpu(session: nox.Session) -> None:
    """The tests marked `gpu`, on whatever GPUs there are; a line of pytest's says which and how."""
    required = os.environ.get("CREDIT_REQUIRE_GPU", "0") not in ("", "0")
    if not required and not might_have_gpu():
        session.skip("no GPU: no device file and no driver tool of one on this machine")
    install(session, PACKAGES, *group("test"), extras="[data,plot]")
    probe = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    count = int((session.run("python", "-c", probe, silent=True) or "0").split()[-1])
    session.log(f"torch sees {count} GPU(s)")
    if count == 0 and required:
        session.error("CREDIT_REQUIRE_GPU is set, and torch.cuda.is_available() is False")
    if count == 0:
        session.skip("no GPU: torch.cuda.is_available() is False")
    session.run("pytest", "--timeout", "1200", "-m", "gpu", "packages", "tests", *session.posargs, env=TEST_ENV)


def might_have_gpu() -> bool:
    """A look that costs nothing. It may be wrong when it says yes (torch decides then), not when it says no."""
    if sys.platform != "linux":
        return True
    # NVIDIA, its embedded boards, AMD, and the Windows subsystem for Linux, in this order.
    files = any(any(Path("/dev").glob(name)) for name in ("nvidia*", "nv[hg]*", "kfd", "dxg"))
    return files or any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi", "amd-smi"))


@nox.session(allow_parallel=True)
def lint(session: nox.Session) -> None:
    """Ruff's rules and format, the layers and their faces, and the same ruff in pre-commit."""
    session.install("--quiet", *group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("python", "tools/check_layers.py", *PACKAGES)

    ruff = next(r for r in map(Requirement, group("lint")) if r.name == "ruff")
    hook = re.search(r"ruff-pre-commit\s+rev: v(\S+)", Path(".pre-commit-config.yaml").read_text())
    if hook is None or not ruff.specifier.contains(hook[1]):
        session.error(f"pre-commit's ruff ({hook and hook[1]}) is not one that the lint group takes ({ruff})")


@nox.session(requires=["torch"], allow_parallel=True)
def types(session: nox.Session) -> None:
    """Strict mypy over the four packages, from source."""
    install(session, [], *group("types"))
    session.run("mypy", *session.posargs)


@nox.session(allow_parallel=True)
def build(session: nox.Session) -> None:
    """Build the four wheels, then try them in a clean environment: each before the next, higher, one is installed."""
    session.install("--quiet", "--no-compile", *group("build"))
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as outside:  # of the repository: only what is installed can be imported
        tmp = Path(outside)
        session.env["HATCH_DATA_DIR"] = str(tmp / "hatch")  # no build environment of an earlier run
        versions = {}
        for package in PACKAGES:
            with session.chdir(f"packages/{package}"):
                session.run("hatch", "build", str(DIST))
                output = session.run("hatch", "version", silent=True) or ""
                versions[package] = output.split()[-1]  # what comes before is about the build environment
        wheels = {p: DIST / f"{p.replace('-', '_')}-{versions[p]}-py3-none-any.whl" for p in PACKAGES}

        # The siblings just built, whatever an index may have under their names.
        siblings = tmp / "siblings.txt"
        siblings.write_text("".join(f"{package} @ {wheel.as_uri()}\n" for package, wheel in wheels.items()))
        check, clean = Path("tools/check_wheel.py").absolute(), tmp / "clean"
        session.run("virtualenv", "--quiet", str(clean))
        python = str(clean / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        for package in PACKAGES:
            pip = [python, "-m", "pip", "install", *PIP, "--constraint", str(siblings)]
            session.run(*pip, str(wheels[package]), external=True)
            with session.chdir(tmp):
                args = [package, versions[package], *lowest(package)[:-1]]
                session.run(python, "-I", str(check), *args, external=True)


@nox.session(requires=["torch"], allow_parallel=True)
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    install(session, PACKAGES, *group("docs"))
    out = "docs/_build/html"
    session.run("sphinx-build", "-E", "-W", "--keep-going", "-n", "docs", out, *session.posargs)
    session.log(f"open {out}/index.html")


@nox.session(requires=["torch"])
def bench(session: nox.Session) -> None:
    """Measure what the packages cost: counts must be the least possible, compiled code exact; times are only shown."""
    install(session, PACKAGES, "numpy")  # without it torch warns in every process
    session.run("python", "-m", "benchmarks", *session.posargs, env=TEST_ENV)
