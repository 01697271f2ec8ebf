"""The gate in the root conftest.py, tried with a stand-in for torch that has as many GPUs as we like."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(pytester, monkeypatch):
    monkeypatch.delenv("CREDIT_REQUIRE_GPU", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest((ROOT / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = gpu")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_gpu():
            pass

        def test_cpu():
            pass
        """
    )

    def run(gpus, *args):
        pytester.makepyfile(
            torch=f"""
            class cuda:
                is_available = staticmethod(lambda: {gpus} > 0)
                device_count = staticmethod(lambda: {gpus})
                get_device_name = staticmethod(lambda i: "Imaginary 9000")
            print("torch is imported")
            """
        )
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", "-rs", "-s", *args)

    return run


def test_without_a_gpu_it_skips_with_a_reason(run):
    result = run(0, "-m", "gpu")
    result.assert_outcomes(skipped=1, deselected=1)
    result.stdout.fnmatch_lines(["gpu: none (tests that need one: 1)", "*torch.cuda.is_available() is False*"])
    assert result.ret == 0


def test_without_a_gpu_it_fails_where_one_is_required(run, monkeypatch):
    monkeypatch.setenv("CREDIT_REQUIRE_GPU", "1")
    result = run(0)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*no GPU: torch.cuda.is_available() is False, and CREDIT_REQUIRE_GPU is set"])
    assert result.ret == 1


@pytest.mark.parametrize(
    ("gpus", "how"),
    [
        (1, "gpu: 1 (Imaginary 9000): NCCL at world size 1, and many ranks as threads on it"),
        (4, "gpu: 4 (Imaginary 9000): NCCL, one process per GPU"),
    ],
)
def test_with_gpus_it_runs_and_says_how(run, gpus, how):
    result = run(gpus, "-m", "gpu")
    result.assert_outcomes(passed=1, deselected=1)
    assert how in result.outlines


def test_without_gpu_tests_torch_is_not_imported(run):
    result = run(0, "-m", "not gpu")
    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.no_fnmatch_line("torch is imported")
