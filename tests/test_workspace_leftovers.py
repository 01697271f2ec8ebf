"""What the root's conftest.py finds that a test leaves behind, and how it takes a few tests of each package."""

import re
from pathlib import Path

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]

# What a test does, and what it is told.
LEAVES = {
    "variable": ("os.environ['CREDIT_LEFT'] = '1'", "$CREDIT_LEFT"),
    "folder": ("os.chdir('/')", "the working directory"),
    "handler": ("logging.getLogger().addHandler(logging.NullHandler())", "the logger root"),
    "level": ("logging.getLogger('credit_halo').setLevel(10)", "the logger credit_halo"),
    "module": ("sys.modules['json'] = os", "sys.modules['json']"),
    "dtype": ("torch.set_default_dtype(torch.float64)", "torch's default dtype"),
    "grad": ("torch.set_grad_enabled(False)", "torch's grad mode"),
    "function": ("dist.all_reduce = print", "torch's torch.distributed.all_reduce"),
    "group": ("dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)", "torch's process group"),
}


def test_what_is_left_behind_is_an_error_and_named(pytester):
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    body = "\n\n".join(f"def test_{name}():\n    {code}" for name, (code, _) in LEAVES.items())
    clean = "def test_clean(monkeypatch, caplog):\n    monkeypatch.setenv('A', 'b')\n    caplog.set_level(10)\n"
    head = "import json, logging, os, sys, torch\nimport torch.distributed as dist\nlogging.getLogger('credit_halo')\n"
    seeded = "".join(f"def test_drawn_{i}():\n    assert torch.rand(1).item() == {{}}\n" for i in range(2))
    first = "torch.rand(1, generator=torch.Generator().manual_seed(0)).item()"
    pytester.makepyfile("\n".join((head, body, clean, seeded.replace("{}", first))))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-q")
    result.assert_outcomes(passed=len(LEAVES) + 3, errors=len(LEAVES))
    said = dict(
        re.findall(
            r"ERROR at teardown of test_(\w+) .*\n(?:.*\n)??left behind for other tests: (.*)", result.stdout.str()
        )
    )
    assert said == {name: what for name, (_, what) in LEAVES.items()}


def test_a_few_of_each_package_and_all_of_the_repository(pytester):
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = slow gpu")
    for package in ("credit-one", "credit-two"):
        folder = pytester.mkdir("packages") if package == "credit-one" else pytester.path / "packages"
        tests = folder / package / "tests"
        tests.mkdir(parents=True)
        slow = "from pytest import mark\n@mark.slow\ndef test_slow(): raise AssertionError\n"
        quick = "".join(f"def test_{i}(): pass\n" for i in range(9))
        (tests / f"test_{package[7:]}.py").write_text(slow + quick)
    pytester.mkdir("tests")
    (pytester.path / "tests" / "test_root.py").write_text("def test_a(): pass\ndef test_b(): pass\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--few", "3", "packages", "tests")
    result.assert_outcomes(passed=8, deselected=14)
