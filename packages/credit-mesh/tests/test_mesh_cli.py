"""`python -m credit_mesh` as typed."""

import json
import subprocess
import sys

import pytest

from credit_mesh import RankLayout, RowPartition
from credit_mesh.cli import main


def test_it_draws_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["8", "--tensor", "2", "--domain", "2", "--height", "721"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 ranks = 2 data-parallel (dp) x 2 tensor-parallel (tp) x 2 domain, 721 rows")
    assert "  rows 0..360  |   rank 0  |   rank 2  |   rank 4  |   rank 6  |" in lines
    assert "rows 361..720  |   rank 1  |   rank 3  |   rank 5  |   rank 7  |" in lines
    assert lines[-1].split() == ["7", "1", "1", "1", "361..720", "360", "6", "pole"]
    assert all(line == line.rstrip() for line in lines)


def test_json_says_the_same_as_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    main(["12", "--tensor", "2", "--domain", "3", "--height", "241", "--granularity", "16", "--json"])
    report = json.loads(capsys.readouterr().out)
    layout, rows = RankLayout(2, 2, 3), RowPartition.even(241, 3, 16)
    assert {axis: report[axis] for axis in ("dp", "tp", "domain")} == {"dp": 2, "tp": 2, "domain": 3}
    assert report["rows_per_domain_rank"] == list(rows.sizes)
    assert len(report["ranks"]) == 12
    for rank, record in enumerate(report["ranks"]):
        at = layout.coords(rank)
        own = rows.interval(at.domain)
        assert record == {
            **at._asdict(),
            "rank": rank,
            "rows": [own.start, own.stop],
            **dict(zip(("north", "south"), layout.neighbors(rank), strict=True)),
        }


def test_a_large_world_is_cut_short_unless_all_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    main(["100000", "--tensor", "4", "--domain", "20"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 120
    assert "... and 99936 more ranks" in out
    main(["100", "--all"])
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "99"
    main(["100000", "--rank", "99999"])
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["99999", "99999"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["6", "--tensor", "4"], "world_size=6 is not divisible"),
        (["4", "--domain", "4", "--height", "3"], "at most 3 ranks fit"),
        (["0"], "world_size must be an integer >= 1"),
        (["4", "--tensor", "0"], "parallelism.tensor must be"),
        (["4", "--rank", "4"], "rank must be in 0..3"),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert info.value.code == 2
    assert message in capsys.readouterr().err


def test_it_runs_as_a_module_and_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "credit_mesh", "50000", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("50000 ranks")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
