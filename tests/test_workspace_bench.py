"""`nox -s bench` runs, and notices an exchange that sends too much and compiled code that computes something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, simulate
from benchmarks.__main__ import MESSAGES, NORMS, PARTS, mistakes
from benchmarks.traffic import differences, least

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick(tmp_path):
    """The numbers of a quick run of all parts, and what it printed."""
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--ranks", "2", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_quick_run(quick):
    """One test, so that of two workers only one makes the run."""
    finds_the_least_traffic(*quick)
    has_every_part(quick[0])


def finds_the_least_traffic(all_results, printed):
    results = all_results["exchange"]
    assert {result["ranks"] for result in results} == {2, 3}
    for result in results:
        assert result["differences"] == []
        assert result["messages"] == result["least_messages"] > 0
        assert result["bytes"] == result["least_bytes"] > 0
        assert result["case"] in printed
    # Worked out by hand: a row of 64 channels and 360 longitudes each way across the one boundary.
    small = next(result for result in results if result["case"] == "small, halo 1" and result["ranks"] == 2)
    assert (small["messages"], small["bytes"]) == (2, 2 * 64 * 360 * 4)


def has_every_part(results):
    assert set(PARTS) < set(results)
    assert (
        {r["net"]: r["messages"]["sent"] for r in results["nets"]}
        == {**MESSAGES, "unet": MESSAGES["unet"] + NORMS["unet"]}
        == {
            "chain": 18,
            "unet": 15,  # 4 of them sums of norms
            "embedding": 2,
            "transformer": 10,
        }
    )
    for r in results["nets"]:
        assert r["limit_ratio"] > 0
        # The embedding keeps the 14 rows that its widest kernel reads beyond the 32 of a rank, and 2 of them twice.
        assert r["kept_ratio"] < (1.5 if r["net"] == "embedding" else 1.1)
    for r in results["scaling"]:
        assert r["domain"]["lower"] <= r["domain"]["median"] <= r["domain"]["upper"]
        assert r["cores_allow"] <= r["ranks"]
    assert all(r["difference"] <= 1e-5 for r in results["compiled"])
    assert {r["what"] for r in results["planning"]} == {"convert", "plan", "layouts", "verify"}
    assert [r["ranks"] for r in results["checkpoint"]] == [2, 3]
    assert isinstance(results["gpu"], list) or results["gpu"]["skipped"].startswith("no GPU")


def test_mistakes_are_told():
    messages = {"sent": 36, "received": 36, "others": {}}
    right = {"net": "chain", "ranks": 4, "messages": messages, "messages_graph": messages}
    more = {**right, "messages_graph": {"sent": 37, "received": 36, "others": {}}}
    least = {"sent": 15, "received": 15, "others": {"allgather": 4}}
    gathers = {"sent": 11, "received": 11, "others": {"allgather": 5}}
    gathered = {"net": "unet", "ranks": 2, "messages": gathers, "messages_graph": least}
    compiled = {"model": "unet", "layout": "domain"}
    assert mistakes({"nets": [right], "compiled": [{**compiled, "difference": 1e-6}]}) == []
    found = mistakes({"nets": [right, more, gathered], "compiled": [{**compiled, "difference": float("nan")}]})
    assert [text.split(":")[0] for text in found] == ["nets", "nets", "compiled"]
    assert "chain, 4 ranks" in found[0]
    assert mistakes({"exchange": [{"case": "a", "ranks": 2, "differences": ["b"]}]}) == ["exchange: a, 2 ranks, b"]


def test_simulated_scaling():
    case = simulate.Case(height=81, width=64, channels=4, features=8)
    free = simulate.Machine(flops=1e12, bandwidth=1e30, latency=0.0)
    for kind, steps in simulate.simulate(case, free, (1, 2, 4), 16, batch=4).items():
        assert {(s.dp, s.domain) for s in steps} >= {(1, 1), (1, 2), (4, 1), (2, 4)}
        for step in steps:
            assert step.ranks == step.dp * step.domain <= 16
            # Nothing but uneven rows costs anything: 81 rows in blocks of 8 are 40 and 41, or 24, 24, 16 and 17.
            rows = {1: 81, 2: 41, 4: 24}[step.domain]
            expected = 81 / step.domain / rows
            assert simulate.efficiency(kind, steps, step, False) == pytest.approx(expected)
    slow = simulate.Machine(flops=1e12, bandwidth=1e9, latency=1e-3)
    steps = simulate.simulate(case, slow, (1, 2), 4, batch=4)["strong"]
    for step in steps:
        overlap, without = (simulate.efficiency("strong", steps, step, way) for way in (True, False))
        assert without < overlap < 1 or step.ranks == 1
        assert (step.halo > 0) == (step.norms > 0) == (step.domain > 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gpu_part(device, capsys):
    results = gpu.run(quick=True, device=device)
    assert {result["dtype"] for result in results} == {"bfloat16", "float32"}
    assert all(0 < r["ratio"]["lower"] <= r["ratio"]["upper"] for r in results)


def test_gpu_part_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.run(quick=True) == {"skipped": "no GPU: torch.cuda.is_available() is False"}
    assert "skipped: no GPU" in capsys.readouterr().out


def test_least_traffic_counts_each_distinct_row_once():
    # Rank 2 asks for row 0 twice, once beyond the end; rank 1 for a row that nobody has.
    needs = [range(0, 3), range(2, 4), [4, 5, 0, 6]]
    assert least((2, 2, 2), needs, "circular", 10) == {(1, 0): 10, (0, 2): 10}
    assert least((2, 2, 2), [range(-1, 2), range(1, 4), []], "zeros", 10) == {(0, 1): 10}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"sent": [(1, 8), (1, 8)]}, "0 to 1: sent [8, 8] bytes; least [16]"),  # cut in two
        ({"sent": [(1, 24)]}, "0 to 1: sent [24] bytes; least [16]"),
        ({"sent": []}, "0 to 1: sent [] bytes; least [16]"),
        ({"received": [(1, 0)]}, "1 to 0: received [0] bytes; least []"),  # an empty message is one too many
        ({"others": {"barrier": 1}}, "rank 0 called the group apart from its messages: {'barrier': 1}"),
    ],
)
def test_other_traffic_than_the_least_is_told(answer, message):
    right = {"sent": [(1, 16)], "received": [], "others": {}}
    other = {"sent": [], "received": [(0, 16)], "others": {}}
    assert differences([right, other], {(0, 1): 16}) == []
    assert message in differences([right | answer, other], {(0, 1): 16})
