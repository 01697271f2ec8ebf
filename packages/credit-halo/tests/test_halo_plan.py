"""The plan against brute force: every row that anybody needs, and not one message more."""

import itertools
import time
from collections import Counter

import pytest
from halo_reference import EDGES, edge_rule, partitions, reach, source_row
from hypothesis import given
from hypothesis import strategies as st

from credit_halo import EdgeRule, ExchangePlan, plan_halo, plan_repartition, plan_rows
from credit_mesh import RowPartition


def carry_out(plans: list[ExchangePlan]) -> list[list[tuple[int | None, bool]]]:
    """Execute plans on row numbers: what each rank ends up with, position by position."""
    partition = plans[0].partition
    results = []
    for plan in plans:
        got: dict[int, tuple[int | None, bool]] = {}

        def put(position: int, value: tuple[int | None, bool], got: dict = got) -> None:
            assert position not in got, "a position is filled once"
            got[position] = value

        for message in plan.recvs:
            (sent,) = [m for m in plans[message.peer].sends if m.peer == plan.rank]
            assert tuple(sent.rows) == tuple(message.rows), "both sides know the same message"
            rows = [partition.offsets[message.peer] + row for row in sent.rows]
            for placement in message.placements:
                for into, row in zip(placement.into, placement.rows, strict=True):
                    put(into, (rows[row], placement.crossed))
        for placement in plan.local:
            for into, row in zip(placement.into, placement.rows, strict=True):
                put(into, (partition.offsets[plan.rank] + row, placement.crossed))
        for position in plan.fills:
            put(position, (None, False))
        results.append([got[position] for position in range(plan.out_rows)])
    return results


def check(partition: RowPartition, needs: list, name: str) -> None:
    height = partition.rows
    plans = [plan_rows(partition, needs, rank=rank, edge=edge_rule(name)) for rank in range(partition.ranks)]
    assert carry_out(plans) == [[source_row(row, height, name) for row in need] for need in needs]
    owner = [rank for rank, size in enumerate(partition.sizes) for _ in range(size)]
    for plan, need in zip(plans, needs, strict=True):
        rows = {row for row, _ in (source_row(row, height, name) for row in need) if row is not None}
        least = Counter(owner[row] for row in rows if owner[row] != plan.rank)
        assert {m.peer: len(m.rows) for m in plan.recvs} == least, "each missing row once, one message a peer"
        assert len({m.peer for m in plan.recvs}) == len(plan.recvs)
        assert len({m.peer for m in plan.sends}) == len(plan.sends)
        assert plan.received_rows == sum(least.values())
    assert sum(plan.sent_rows for plan in plans) == sum(plan.received_rows for plan in plans)
    assert len({plan.digest for plan in plans}) == 1


@given(st.data(), partitions(empty=True), st.sampled_from(EDGES))
def test_halos_of_any_width(data: st.DataObject, partition: RowPartition, name: str) -> None:
    most = max(0, reach(name, partition.rows))
    before, after = data.draw(st.integers(0, most)), data.draw(st.integers(0, most))
    needs = [range(partition.offsets[r] - before, partition.offsets[r + 1] + after) for r in range(partition.ranks)]
    check(partition, needs, name)
    for rank, need in enumerate(needs):
        assert plan_halo(partition, before, after, rank=rank, edge=edge_rule(name)).out_rows == len(need)


@given(st.data(), partitions(empty=True), st.sampled_from(EDGES))
def test_intervals_that_differ_between_ranks(data: st.DataObject, partition: RowPartition, name: str) -> None:
    most = max(0, reach(name, partition.rows))
    needs = []
    for _ in range(partition.ranks):
        start = data.draw(st.integers(-most, partition.rows + most))
        stop = data.draw(st.integers(start, partition.rows + most))
        needs.append(range(start, stop))
    check(partition, needs, name)


@given(st.data(), partitions(empty=True), st.sampled_from(EDGES))
def test_any_list_of_rows(data: st.DataObject, partition: RowPartition, name: str) -> None:
    most = max(0, reach(name, partition.rows))
    row = st.integers(-most, partition.rows - 1 + most)
    progressions = st.builds(
        lambda start, step, count: [r for r in (start + step * i for i in range(count)) if abs(r) < 10**6],
        row,
        st.integers(-3, 3),
        st.integers(0, 6),
    ).map(lambda rows: [r for r in rows if -most <= r <= partition.rows - 1 + most])
    needs = [data.draw(st.lists(row, max_size=12) | progressions) for _ in range(partition.ranks)]
    check(partition, needs, name)


@given(st.data(), partitions(), st.integers(1, 4))
def test_ranges_with_a_step(data: st.DataObject, partition: RowPartition, step: int) -> None:
    needs = []
    for rank in range(partition.ranks):
        rows = range(rank % step, partition.rows, step)
        needs.append(rows[::-1] if data.draw(st.booleans()) else rows)
    check(partition, needs, "zeros")


@given(st.data(), partitions(empty=True))
def test_repartition_sends_only_rows_that_change_hands(data: st.DataObject, source: RowPartition) -> None:
    cuts = sorted(
        data.draw(st.lists(st.integers(0, source.rows), min_size=source.ranks - 1, max_size=source.ranks - 1))
    )
    ends = [0, *cuts, source.rows]
    target = RowPartition(tuple(b - a for a, b in itertools.pairwise(ends)), allow_empty=True)
    plans = [plan_repartition(source, target, rank=rank) for rank in range(source.ranks)]
    assert carry_out(plans) == [[(row, False) for row in target.interval(rank)] for rank in range(target.ranks)]
    moved = sum(source.owner(row) != target.owner(row) for row in range(source.rows))
    assert sum(plan.sent_rows for plan in plans) == moved


def test_plans_are_cached() -> None:
    partition = RowPartition.even(33, 4)
    first = plan_halo(partition, 1, 2, rank=1)
    assert plan_halo(RowPartition.even(33, 4), 1, 2, rank=1) is first
    assert plan_halo(partition, 1, 2, rank=2) is not first
    assert plan_halo(partition, 1, 2, rank=1, edge="circular") is not first


def test_a_plan_for_1024_ranks_holds_only_its_own_part() -> None:
    partition = RowPartition.even(4 * 1024 + 1, 1024)
    started = time.process_time()
    plan = plan_halo(partition, 2, 3, rank=512, edge="circular")
    seconds = time.process_time() - started
    assert [(m.peer, len(m.rows)) for m in plan.sends] == [(511, 3), (513, 2)]
    assert [(m.peer, len(m.rows)) for m in plan.recvs] == [(511, 2), (513, 3)]
    started = time.process_time()
    for rank in range(16):
        plan_halo(RowPartition.even(65, 16), 2, 3, rank=rank, edge="circular")
    assert seconds < 50 * (time.process_time() - started) + 0.05, "not in proportion to all pairs of ranks"


def test_the_repr_says_what_moves() -> None:
    plan = plan_halo(RowPartition.even(10, 3), 1, 1, rank=1)
    assert repr(plan) == (
        "ExchangePlan(rank 1 of RowPartition(10 rows over 3: 4, 3 x 2): 3 rows in, 5 out, edge zeros; "
        "sends 1 to 0, 1 to 2; receives 1 from 0, 1 from 2)"
    )


THREE = RowPartition((3, 3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_rows(THREE, [range(3)], rank=0), "one entry for each of the 3 ranks; got 1"),
        (lambda: plan_rows(THREE, [range(3)] * 3, rank=3), "rank must be in 0..2; got 3"),
        (lambda: plan_halo(THREE, -1, 0, rank=0), "the halo before must be an integer >= 0; got -1"),
        (lambda: plan_halo(THREE, 0, True, rank=0), "the halo after must be an integer >= 0; got True"),
        (lambda: plan_halo(THREE, 8, 0, rank=0, edge="reflect"), "'reflect' reaches 7 rows beyond a tensor of 8 rows"),
        (lambda: plan_halo(THREE, 0, 9, rank=0, edge="pole"), "'pole' reaches 8 rows beyond a tensor of 8 rows"),
        (lambda: plan_halo(THREE, 1, 1, rank=0, edge="mirror"), "edge must be one of 'zeros', .*; got 'mirror'"),
        (lambda: EdgeRule("pole", signs=(1, 2)), r"signs must be 1 or -1, .* got \(1, 2\)"),
        (lambda: plan_repartition(THREE, RowPartition((3, 3, 3)), rank=0), "must have the same rows and ranks"),
    ],
)
def test_mistakes_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("rank", range(3))
def test_a_rule_that_does_not_reach_is_refused_on_every_rank(rank: int) -> None:
    with pytest.raises(ValueError, match="reaches 7 rows"):
        plan_halo(THREE, 8, 0, rank=rank, edge="reflect")
