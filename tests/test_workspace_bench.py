"""`nox -s bench` runs, and notices an exchange that sends too much."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.traffic import differences, least

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_quick_run_finds_the_least_traffic(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--ranks", "2", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["exchange"]
    assert {result["ranks"] for result in results} == {2, 3}
    for result in results:
        assert result["differences"] == []
        assert result["messages"] == result["least_messages"] > 0
        assert result["bytes"] == result["least_bytes"] > 0
        assert result["case"] in done.stdout
    # Worked out by hand: a row of 64 channels and 360 longitudes each way across the one boundary.
    small = next(result for result in results if result["case"] == "small, halo 1" and result["ranks"] == 2)
    assert (small["messages"], small["bytes"]) == (2, 2 * 64 * 360 * 4)


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
