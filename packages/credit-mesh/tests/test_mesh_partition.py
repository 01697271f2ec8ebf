"""RowPartition against brute force over rows."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from credit_mesh import RowPartition, RowPiece


@st.composite
def partitions(draw: st.DrawFn) -> RowPartition:
    granularity = draw(st.integers(1, 8))
    ranks = draw(st.integers(1, 9))
    rows = draw(st.integers(1, 150))
    assume(-(-rows // granularity) >= ranks)
    return RowPartition.even(rows, ranks, granularity)


@pytest.mark.parametrize(
    ("rows", "ranks", "granularity", "sizes"),
    [
        (241, 4, 1, (61, 60, 60, 60)),
        (241, 4, 16, (64, 64, 64, 49)),
        (721, 4, 16, (192, 176, 176, 177)),
        (640, 4, 16, (160, 160, 160, 160)),
        (33, 3, 16, (16, 16, 1)),
        (15, 1, 16, (15,)),
        (7, 7, 1, (1,) * 7),
    ],
)
def test_even(rows: int, ranks: int, granularity: int, sizes: tuple[int, ...]) -> None:
    assert RowPartition.even(rows, ranks, granularity).sizes == sizes


@given(rows=st.integers(1, 120), ranks=st.integers(1, 10), granularity=st.integers(1, 9))
def test_even_is_as_even_as_blocks_allow_or_refused(rows: int, ranks: int, granularity: int) -> None:
    fits = -(-rows // granularity)
    if ranks > fits:
        with pytest.raises(ValueError, match=f"at most {fits} ranks fit"):
            RowPartition.even(rows, ranks, granularity)
        return
    partition = RowPartition.even(rows, ranks, granularity)
    assert sum(partition.sizes) == rows
    assert min(partition.sizes) > 0
    assert all(boundary % granularity == 0 for boundary in partition.offsets[:-1])
    blocks = [size // granularity for size in partition.sizes]
    assert max(blocks) - min(blocks) <= 1
    assert all(size % granularity == 0 for size in partition.sizes[:-1])


@given(partitions(), st.data())
def test_rows_have_one_owner_and_intervals_split_by_owner(partition: RowPartition, data: st.DataObject) -> None:
    owner = [rank for rank, size in enumerate(partition.sizes) for _ in range(size)]
    assert [partition.owner(row) for row in range(partition.rows)] == owner
    assert [list(partition.interval(rank)) for rank in range(partition.ranks)] == [
        [row for row in range(partition.rows) if owner[row] == rank] for rank in range(partition.ranks)
    ]
    start = data.draw(st.integers(0, partition.rows))
    stop = data.draw(st.integers(start, partition.rows))
    pieces = list(partition.owners(start, stop))
    assert [(piece.rank, row) for piece in pieces for row in range(piece.start, piece.stop)] == [
        (owner[row], row) for row in range(start, stop)
    ]
    assert len({piece.rank for piece in pieces}) == len(pieces)


def test_ranks_without_rows_own_nothing() -> None:
    partition = RowPartition((0, 3, 0, 0, 2, 0), allow_empty=True)
    assert [partition.owner(row) for row in range(5)] == [1, 1, 1, 4, 4]
    assert list(partition.owners(0, 5)) == [RowPiece(1, 0, 3), RowPiece(4, 3, 5)]
    assert list(partition.interval(5)) == []


@given(partitions(), st.integers(1, 6), st.integers(-3, 3))
def test_a_strided_row_goes_to_the_owner_of_its_first_input_row(
    partition: RowPartition, stride: int, more: int
) -> None:
    rows = max(0, -(-partition.rows // stride) + more)
    out = partition.strided(stride, rows)
    assert out.rows == rows
    for row in range(rows):
        assert out.owner(row) == (
            partition.owner(row * stride) if row * stride < partition.rows else partition.ranks - 1
        )
    if more == 0:
        assert out == partition.strided(stride)


@given(partitions(), st.integers(1, 6), st.integers(-3, 3))
def test_an_upsampled_row_goes_to_the_owner_of_its_input_row(partition: RowPartition, factor: int, more: int) -> None:
    rows = max(0, partition.rows * factor + more)
    out = partition.upsampled(factor, rows)
    assert out.rows == rows
    for row in range(rows):
        assert out.owner(row) == (
            partition.owner(row // factor) if row // factor < partition.rows else partition.ranks - 1
        )
    if more == 0:
        assert out == partition.upsampled(factor)


@given(partitions())
def test_stride_and_upsampling_undo_each_other_where_the_granularity_allows(partition: RowPartition) -> None:
    step = partition.granularity
    down = partition.strided(step)
    assert down.granularity == 1
    assert down.upsampled(step, partition.rows) == partition
    assert down.upsampled(step).granularity == step


def test_comparison_is_by_sizes() -> None:
    assert RowPartition((4, 4), 4) == RowPartition([4, 4])  # type: ignore[arg-type]
    assert hash(RowPartition((4, 4), 4)) == hash(RowPartition((4, 4)))
    assert RowPartition((4, 4)) != RowPartition((4, 3))
    assert RowPartition((4, 4)) != (4, 4)


def test_repr_is_readable() -> None:
    assert repr(RowPartition.even(241, 4)) == "RowPartition(241 rows over 4: 61, 60 x 3)"
    assert repr(RowPartition.even(241, 4, 16)) == "RowPartition(241 rows over 4: 64 x 3, 49, granularity 16)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: RowPartition.even(3, 4),
            "would leave rank 3 without rows; at most 3 ranks fit 3 rows in blocks of 1",
        ),
        (lambda: RowPartition.even(33, 4, 16), "at most 3 ranks fit 33 rows in blocks of 16"),
        (lambda: RowPartition.even(0, 1), "rows must be an integer >= 1; got 0"),
        (lambda: RowPartition.even(8, 0), "ranks must be an integer >= 1; got 0"),
        (lambda: RowPartition.even(8, 2, 0), "granularity must be an integer >= 1; got 0"),
        (lambda: RowPartition.even(8.0, 2), r"rows must be .* got 8.0 \(float\)"),  # type: ignore[arg-type]
        (lambda: RowPartition(()), "sizes must list the rows of each rank"),
        (lambda: RowPartition((3, -1)), "rows of rank 1 must be an integer >= 0; got -1"),
        (lambda: RowPartition((3, 0, 2)), "rank 1 would hold no rows of 5"),
        (
            lambda: RowPartition((3, 5), 4),
            "the boundary after rank 0 is row 3, which is not a multiple of granularity=4",
        ),
        (lambda: RowPartition((3, 5)).owner(8), r"row must be in 0\.\.7; got 8"),
        (lambda: RowPartition((3, 5)).owner(-1), r"row must be in 0\.\.7; got -1"),
        (lambda: RowPartition((3, 5)).owners(2, 9), r"\[2, 9\) must lie within \[0, 8\)"),
        (lambda: RowPartition((3, 5)).interval(2), r"rank must be in 0\.\.1; got 2"),
    ],
)
def test_mistakes_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
