"""Write what the tests gave on a version of torch into the table of docs/compatibility.md.

    pytest --junitxml=results.xml packages
    python tools/compatibility.py results.xml

Run it by the Python that ran the tests: it asks that one for its torch and its GPUs. A row of the same torch, Python
and machine is replaced.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by tools/compatibility.py -->", "<!-- end -->"
HEAD = ("torch", "Python", "where", "passed", "failed", "skipped", "on")


class Row(NamedTuple):
    """A run of the tests."""

    torch: str
    python: str
    where: str
    passed: int
    failed: int
    skipped: int
    on: str

    @property
    def order(self) -> tuple[list[int], list[int], str]:
        """Numbers, so that 2.9 comes before 2.10."""
        return *(list(map(int, re.findall(r"\d+", text))) for text in (self.torch, self.python)), self.where  # type: ignore[return-value]


def read(junit: str, torch: str, python: str, where: str) -> Row:
    """The row for a report in JUnit's XML.

    Raises:
        ValueError: If it has no test.
    """
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    on = ""
    for suite in ElementTree.fromstring(junit).iter("testsuite"):
        on = suite.get("timestamp", "")[:10]
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    if not counts["tests"]:
        raise ValueError("the report has no test")
    failed = counts["failures"] + counts["errors"]
    return Row(torch, python, where, counts["tests"] - failed - counts["skipped"], failed, counts["skipped"], on)


def merged(page: str, row: Row) -> str:
    """The page with a row added, or put in the place of one of the same torch, Python and machine.

    Raises:
        ValueError: If the page has no table of ours.
    """
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no table between {BEGIN} and {END}")
    rows = {}
    for line in table.strip().splitlines()[2:]:
        torch, python, where, passed, failed, skipped, on = (cell.strip() for cell in line.strip("| ").split("|"))
        rows[torch, python, where] = Row(torch, python, where, int(passed), int(failed), int(skipped), on)
    rows[row.torch, row.python, row.where] = row
    lines = [HEAD, ["---"] * len(HEAD), *sorted(rows.values(), key=lambda row: row.order)]
    written = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"{before}{BEGIN}\n\n{written}\n\n{END}{after}"


def main() -> None:
    """Read a report, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("report", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the table")
    args = parser.parse_args()
    import torch

    python = ".".join(map(str, sys.version_info[:2]))
    gpus = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    where = ", ".join((f"{platform.system()} {platform.machine()}", *sorted(gpus)))
    row = read(args.report.read_text(), torch.__version__.partition("+")[0], python, where)
    args.page.write_text(merged(args.page.read_text(), row))


if __name__ == "__main__":
    main()
