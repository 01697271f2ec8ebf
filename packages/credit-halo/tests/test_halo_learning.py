"""Learning a partition from the other ranks: once, and forgotten by all ranks alike."""

import pytest
import torch
import torch.distributed as dist

from credit_halo.extend import Bounded, PartitionLearner
from credit_halo.learning import DECLARED
from credit_halo.testing import ThreadGroup, run_threads


def test_the_oldest_entry_is_forgotten_however_often_it_is_looked_up() -> None:
    bounded: Bounded[int, str] = Bounded(2)
    bounded[1] = "a"
    assert bounded.setdefault(2, "b") == "b"
    assert bounded.setdefault(1, "other") == "a"
    bounded[1] = "c"
    assert bounded[1] == "c"
    bounded[3] = "d"
    assert dict(bounded) == {2: "b", 3: "d"}
    bounded.setdefault(4, "e")
    assert dict(bounded) == {3: "d", 4: "e"}


def test_ranks_ask_once_for_each_layer_declaration_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [0] * 2
    original = ThreadGroup.all_gather

    def counted(*args, **kwargs):
        asked[dist.get_rank()] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(ThreadGroup, "all_gather", counted)

    def rank_main(rank: int) -> list[int]:
        learner, rows = PartitionLearner(), 2 + rank
        first, second = learner.new_layer(), learner.new_layer()

        def ask(declared: str, layer: int | None, width: int = 1) -> int:
            before = asked[rank]
            x = torch.ones(1, rows, width)
            assert learner.sizes(x, 1, dist.group.WORLD, "test", declared=declared, layer=layer) == (2, 3)
            return asked[rank] - before

        return [
            ask("2,3", first),
            ask("2,3", first),
            ask("2,3", second),
            ask("2,3", first, width=2),
            ask("4,6", first),
            ask("2,3", first),
            *(ask("2,3", None) for _ in range(2)),
            *(ask("", first) for _ in range(2)),
        ]

    for counts in run_threads(rank_main, 2):
        assert counts == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1]


def test_all_ranks_forget_the_same_though_one_looks_up_more() -> None:
    """As a rank does that computes an activation checkpoint again; it would hang if that kept what others forget."""

    def rank_main(rank: int) -> None:
        learner, layer = PartitionLearner(), 0

        def sizes(declared: int) -> tuple[int, ...]:
            return learner.sizes(torch.ones(1, 2), 1, dist.group.WORLD, "test", declared=str(declared), layer=layer)

        for declared in range(DECLARED):
            assert sizes(declared) == (2, 2)
        if rank == 1:
            sizes(0)
        for declared in (DECLARED, 0, 1):
            assert sizes(declared) == (2, 2)

    run_threads(rank_main, 2, timeout=20)
