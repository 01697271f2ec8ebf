"""The exchange of rows: messages and bytes against the least possible, time against a plain send and receive.

Each repetition times, one after the other and each forward and backward:

- `rows`: exchange_rows, which returns the rows that a rank needs, its own among them;
- `post`: post_rows and wait, for the missing rows alone;
- `plain`: isend and irecv of contiguous buffers, made before, of the same bytes between the same peers, there and back;
- `copy`: what `rows` does besides: a rank's own rows copied to a new tensor, there and back, nothing sent.

A repetition counts as long as its slowest rank took. `rows/plain` and `post/plain` are medians over the repetitions of
the ratio within one, with their quartiles.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from statistics import median, quantiles

import torch
import torch.distributed as dist

from benchmarks.traffic import differences, least, recorded, source_row
from credit_halo import exchange_rows, plan_rows, post_rows
from credit_halo.testing import run_processes
from credit_mesh import RowPartition

THREADS = 1  # run_processes gives each rank one
KINDS = ("rows", "post", "plain", "copy")


@dataclass(frozen=True)
class Case:
    """An exchange: dim -2 of `shape`, whose rows are all ranks' together, is sharded by `sizes`."""

    name: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    needs: tuple[range, ...]
    edge: str = "zeros"
    dtype: torch.dtype = torch.float32
    calls: int = 1  # in one measurement
    repetitions: int = 30

    @property
    def partition(self) -> RowPartition:
        return RowPartition(self.sizes)

    @property
    def bytes_per_row(self) -> int:
        return prod(self.shape) // self.shape[-2] * self.dtype.itemsize

    def least(self):
        return least(self.sizes, self.needs, self.edge, self.bytes_per_row)

    def missing(self, rank: int) -> tuple[int, ...]:
        """What a rank needs of others, in the order in which it needs it."""
        own, height = self.partition.interval(rank), sum(self.sizes)
        sources = ((row, source_row(row, height, self.edge)) for row in self.needs[rank])
        return tuple(row for row, source in sources if source is not None and source not in own)


def halo(name, shape, sizes, width, **more) -> Case:
    partition = RowPartition(tuple(sizes))
    own = [partition.interval(rank) for rank in range(partition.ranks)]
    needs = tuple(range(rows.start - width, rows.stop + width) for rows in own)
    return Case(name, shape, partition.sizes, needs, **more)


def cases(ranks: int, quick: bool) -> list[Case]:
    def even(rows, granularity=1):
        return RowPartition.even(rows, ranks, granularity).sizes

    uneven = tuple((20, 3, 2, 12)[rank % 4] for rank in range(ranks))
    blocks, target = even(181, 16 if ranks <= 12 else 1), RowPartition(even(181))
    moved = tuple(target.interval(rank) for rank in range(ranks))
    few = {"repetitions": 5} if quick else {}
    found = [
        halo("tiny, halo 1", (1, 1, 8 * ranks, 16), even(8 * ranks), 1, calls=5 if quick else 50, **few),
        halo("small, halo 1", (1, 64, 181, 360), even(181), 1, calls=1 if quick else 5, **few),
        halo(
            *("uneven, halo 8, circular", (1, 32, sum(uneven), 64), uneven, 8),
            **dict(edge="circular", dtype=torch.bfloat16, calls=2 if quick else 20, **few),
        ),
        Case("re-partition", (1, 64, 181, 360), blocks, moved, calls=1 if quick else 5, **few),
    ]
    if not quick:
        found.append(halo("large, halo 3", (1, 16, 721, 1440), even(721), 3, repetitions=15))
    return found


# On each rank


class Runner:
    """One case on one rank: each kind of exchange, as forward and backward."""

    def __init__(self, case: Case, rank: int):
        own = case.sizes[rank]
        missing = [case.missing(r) for r in range(len(case.sizes))]
        self.plan = plan_rows(case.partition, case.needs, rank=rank, edge=case.edge)
        self.lack = plan_rows(case.partition, missing, rank=rank, edge=case.edge)
        self.x = self.rows(case, own).requires_grad_()
        self.grads = {"rows": self.rows(case, len(case.needs[rank])), "post": self.rows(case, len(missing[rank]))}
        self.buffers = {
            pair: torch.ones(nbytes, dtype=torch.uint8) for pair, nbytes in case.least().items() if rank in pair
        }
        self.rank = rank
        kept = [row - case.partition.offsets[rank] for row in case.needs[rank]]
        self.kept = [(i, row) for i, row in enumerate(kept) if 0 <= row < own]

    @staticmethod
    def rows(case: Case, count: int):
        return torch.ones([*case.shape[:-2], count, case.shape[-1]], dtype=case.dtype)

    def forward(self, kind: str):
        if kind == "rows":
            return exchange_rows(self.x, self.plan)
        return post_rows(self.x, self.lack).wait()

    def backward(self, kind: str, out):
        torch.autograd.grad(out, self.x, self.grads[kind])

    def run(self, kind: str) -> None:
        if kind == "plain":
            self.pass_on(back=False)
            self.pass_on(back=True)
        elif kind == "copy":
            self.copy()
        else:
            self.backward(kind, self.forward(kind))

    def pass_on(self, back: bool) -> None:
        works = []
        for (source, target), buffer in self.buffers.items():
            sends = (self.rank == source) != back
            peer = target if self.rank == source else source
            works.append(dist.isend(buffer, peer) if sends else dist.irecv(buffer, peer))
        for work in works:
            work.wait()

    def copy(self) -> None:
        x, grad = self.x.detach(), self.grads["rows"]
        out, home = torch.empty_like(grad), torch.empty_like(x)
        if self.kept:
            (at, row), count = self.kept[0], len(self.kept)
            out.narrow(-2, at, count).copy_(x.narrow(-2, row, count))
            home.narrow(-2, row, count).copy_(grad.narrow(-2, at, count))


def on_rank(rank: int, todo: list[Case]) -> list[dict]:
    """The traffic of each case, by kind and direction, and its seconds for each kind and repetition."""
    answers = []
    for case in todo:
        runner = Runner(case, rank)
        for kind in KINDS:  # the first use of a plan is not what is measured
            runner.run(kind)
        traffic = {}
        for kind in ("rows", "post"):
            with recorded() as forward:
                out = runner.forward(kind)
            with recorded() as backward:
                runner.backward(kind, out)
            traffic[kind] = {"forward": forward.answer(), "backward": backward.answer()}
        seconds = {kind: [] for kind in KINDS}
        for _ in range(case.repetitions):
            for kind in KINDS:
                dist.barrier()
                started = time.perf_counter()
                for _ in range(case.calls):
                    runner.run(kind)
                seconds[kind].append((time.perf_counter() - started) / case.calls)
        answers.append({"traffic": traffic, "seconds": seconds})
    return answers


# Of all ranks


def summary(case: Case, answers: list[dict]) -> dict:
    """What the ranks answered about one case, as one row of the table."""
    expected = case.least()
    back = {(target, source): nbytes for (source, target), nbytes in expected.items()}
    wrong = []
    for kind in ("rows", "post"):
        for direction, wanted in (("forward", expected), ("backward", back)):
            found = differences([answer["traffic"][kind][direction] for answer in answers], wanted)
            wrong += [f"{kind} {direction}: {text}" for text in found]
    sent = [nbytes for answer in answers for _, nbytes in answer["traffic"]["rows"]["forward"]["sent"]]
    slowest = {kind: [max(t) for t in zip(*(a["seconds"][kind] for a in answers), strict=True)] for kind in KINDS}
    result = {"case": case.name, "ranks": len(case.sizes), "dtype": str(case.dtype).removeprefix("torch.")}
    result |= {"shape": case.shape, "sizes": case.sizes, "repetitions": case.repetitions}
    result |= {"messages": len(sent), "least_messages": len(expected)}
    result |= {"bytes": sum(sent), "least_bytes": sum(expected.values()), "differences": wrong}
    result["milliseconds"] = {kind: 1e3 * median(times) for kind, times in slowest.items()}
    for kind in ("rows", "post"):
        ratios = [a / b for a, b in zip(slowest[kind], slowest["plain"], strict=True)]
        result[f"{kind}_over_plain"] = dict(zip(("lower", "median", "upper"), quantiles(ratios, n=4), strict=True))
    return result


COLUMNS = (
    f"{'case':<26}{'ranks':>5}  {'messages':>9}{'bytes':>12}{'least':>6}"
    f"{'rows':>10}{'post':>10}{'plain':>10}{'copy':>10}  {'rows/plain':<19}{'post/plain':<19}"
)


def line(result: dict) -> str:
    def ratio(kind):
        q = result[f"{kind}_over_plain"]
        return f"{q['median']:.2f} ({q['lower']:.2f}-{q['upper']:.2f})"

    times = "".join(f"{result['milliseconds'][kind]:>10.3f}" for kind in KINDS)
    return (
        f"{result['case']:<26}{result['ranks']:>5}  {result['messages']:>9}{result['bytes']:>12}"
        f"{'NO' if result['differences'] else 'yes':>6}{times}  {ratio('rows'):<19}{ratio('post'):<19}"
    ).rstrip()


def run(worlds: list[int], *, quick: bool) -> list[dict]:
    """Run all cases on each number of ranks, printing a line for each."""
    print("messages and bytes: of all ranks, one way; times: ms of forward and backward; ratios: median (quartiles)")
    print(COLUMNS.rstrip(), flush=True)
    results = []
    for ranks in worlds:
        todo = cases(ranks, quick)
        answers = run_processes(on_rank, ranks, todo, timeout=600.0, group_timeout=120.0)
        for i, case in enumerate(todo):
            results.append(summary(case, [answer[i] for answer in answers]))
            print(line(results[-1]), flush=True)
    return results
