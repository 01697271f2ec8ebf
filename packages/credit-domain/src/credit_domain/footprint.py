"""Which input rows each output row of a layer reads, and who owns what comes out: integers only, no torch.

Each function takes the partition of a layer's input rows and the layer's parameters along the sharded dim, and returns
a :class:`Footprint`. What it refuses it refuses for all ranks alike, since nothing in it depends on the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from credit_halo import EdgeRule
from credit_mesh import RowPartition


@dataclass(frozen=True)
class Footprint:
    """The rows that a layer reads on each rank.

    Attributes:
        source: Partition of the input rows.
        target: Partition of the output rows.
        needs: Global input rows that each rank reads; they may lie beyond the edges, where ``edge`` fills them.
        edge: What lies beyond the edges.
    """

    source: RowPartition
    target: RowPartition
    needs: tuple[range, ...]
    edge: EdgeRule

    @property
    def is_local(self) -> bool:
        """Whether every rank needs just its own rows."""
        own = (range(*pair) for pair in pairwise(self.source.offsets))
        return all(need == rows or not (need or rows) for need, rows in zip(self.needs, own, strict=True))


def _footprint(
    source: RowPartition, target: RowPartition, need: Callable[[int, int], range], edge: EdgeRule
) -> Footprint:
    """A footprint from what output rows ``[start, stop)`` need; a rank without output rows needs nothing."""
    needs = tuple(need(start, stop) if stop > start else range(0) for start, stop in pairwise(target.offsets))
    return Footprint(source, target, needs, edge)


def window_rows(rows: int, kernel: int, stride: int, before: int, after: int, dilation: int, ceil: bool = False) -> int:
    """Output rows of a window that slides over ``rows`` rows; at most 0 if it does not fit once."""
    room = rows + before + after - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    out = -(-room // stride) + 1
    # As in torch: a window of pooling must start within the rows or the padding before them.
    return out - 1 if (out - 1) * stride >= rows + before else out


def convolution(
    source: RowPartition,
    kernel: int,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
    edge: EdgeRule | None = None,
) -> Footprint:
    """Output row ``j`` reads row ``j * stride - before`` and ``dilation * (kernel - 1)`` rows on.

    Its owner is that of input row ``j * stride``.

    Raises:
        ValueError: If the padded rows are fewer than the kernel spans, or fewer than the edge rule reflects or wraps.
    """
    before, after = padding
    edge = EdgeRule() if edge is None else edge
    rows = window_rows(source.rows, kernel, stride, before, after, dilation)
    span = dilation * (kernel - 1) + 1
    if source.rows + before + after < span:
        raise ValueError(
            f"the kernel spans {span} rows, and {source.rows} rows with padding {before} and {after} are only "
            f"{source.rows + before + after}"
        )
    check_reach(source.rows, padding, edge)
    return _windows(source, source.strided(stride, rows), span, stride, before, edge)


def check_reach(rows: int, padding: tuple[int, int], edge: EdgeRule) -> None:
    """Refuse what torch refuses: padding as far as (reflect) or farther than (circular) the rows reach."""
    widest = max(padding)
    if edge.kind == "reflect" and widest >= rows:
        raise ValueError(f"reflection by {widest} rows needs more than {widest} rows; there are {rows}")
    if edge.kind == "circular" and widest > rows:
        raise ValueError(f"circular padding by {widest} rows would wrap around {rows} rows more than once")


def _windows(
    source: RowPartition, target: RowPartition, span: int, stride: int, before: int, edge: EdgeRule
) -> Footprint:
    def need(start: int, stop: int) -> range:
        return range(start * stride - before, (stop - 1) * stride - before + span)

    return _footprint(source, target, need, edge)


def pooling(
    source: RowPartition,
    kernel: int,
    stride: int,
    padding: int = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
    edge: EdgeRule | None = None,
) -> Footprint:
    """Like :func:`convolution`; with ``ceil_mode`` the last window may reach beyond the padding.

    Raises:
        ValueError: If a window would not fit once, the padding is more than half of it, or a number is out of range.
    """
    span = dilation * (kernel - 1) + 1
    if min(kernel, stride, dilation) < 1 or not 0 <= padding <= span // 2:
        raise ValueError(
            "kernel, stride and dilation of pooling must be at least 1, and padding from 0 to half of what the kernel "
            f"spans; got kernel {kernel}, stride {stride}, dilation {dilation} and padding {padding}"
        )
    rows = window_rows(source.rows, kernel, stride, padding, padding, dilation, ceil_mode)
    if rows < 1:
        raise ValueError(f"the window spans {span} rows, more than {source.rows} rows with padding {padding} have")
    edge = EdgeRule() if edge is None else edge
    return _windows(source, source.strided(stride, rows), span, stride, padding, edge)


def adaptive_window(row: int, rows: int, out: int) -> range:
    """The input rows that an output row of adaptive pooling from ``rows`` to ``out`` rows reads."""
    return range(row * rows // out, -(-(row + 1) * rows // out))


def adaptive_pooling(source: RowPartition, rows: int) -> Footprint:
    """Output row ``i`` reads the rows of :func:`adaptive_window`; its owner is that of the first of them.

    Raises:
        ValueError: If the number of output rows is negative.
    """
    if rows < 0:
        raise ValueError(f"the output of adaptive pooling must have 0 rows or more; got {rows}")
    ends = [-(-offset * rows // source.rows) for offset in source.offsets]
    target = RowPartition(tuple(b - a for a, b in pairwise(ends)), allow_empty=True)

    def need(start: int, stop: int) -> range:
        first, last = (adaptive_window(row, source.rows, rows) for row in (start, stop - 1))
        return range(first.start, last.stop)

    return _footprint(source, target, need, EdgeRule())


def adaptive_runs(start: int, stop: int, rows: int, out: int) -> tuple[tuple[int, int, int], ...]:
    """Cut output rows into runs that are an adaptive pooling of their own: (first input row, input rows, output rows).

    The windows of one are irregular, so that its rows from the middle are not, in general, the pooling of the rows that
    they read. A single row always is.
    """
    windows = [adaptive_window(row, rows, out) for row in range(start, stop)]
    runs = []
    while windows:
        first = windows[0].start
        for count in range(len(windows), 0, -1):
            read = windows[count - 1].stop - first
            shifted = (range(w.start - first, w.stop - first) for w in windows[:count])
            if all(adaptive_window(row, read, count) == window for row, window in enumerate(shifted)):
                break
        runs.append((first, read, count))
        windows = windows[count:]
    return tuple(runs)


def transposed_rows(rows: int, kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> int:
    """Output rows of a transposed convolution."""
    return (rows - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1


def transposed_convolution(
    source: RowPartition, kernel: int, stride: int = 1, padding: int = 0, output_padding: int = 0, dilation: int = 1
) -> Footprint:
    """Output row ``i`` reads the rows ``j`` for which ``i = j * stride - padding + dilation * tap``.

    Its owner is that of input row ``i // stride``. There are zeros beyond the edges, where no row contributes.

    Raises:
        ValueError: If nothing would come out.
    """
    rows = transposed_rows(source.rows, kernel, stride, padding, output_padding, dilation)
    if rows < 1:
        raise ValueError(
            f"a transposed convolution of {source.rows} rows with kernel {kernel}, stride {stride} and padding "
            f"{padding} has {rows} rows"
        )
    reach = dilation * (kernel - 1)

    def need(start: int, stop: int) -> range:
        last = (stop - 1 + padding) // stride
        # At least one row, so that there is something to convolve where no row contributes.
        return range(min(-(-(start + padding - reach) // stride), (start + padding) // stride, last), last + 1)

    return _footprint(source, source.upsampled(stride, rows), need, EdgeRule())


def padded(source: RowPartition, before: int, after: int, edge: EdgeRule) -> Footprint:
    """Rows are added at the edges (or cut off, where negative), and boundaries between ranks stay where they are.

    Output row ``i`` belongs to the owner of input row ``i``, so that a convolution which takes the padding off again
    restores the partition.

    Raises:
        ValueError: If the edge rule does not reach that far, or no row would be left.
    """
    rows = source.rows + before + after
    if rows < 1:
        raise ValueError(f"padding {source.rows} rows by {before} and {after} leaves {rows} rows")
    check_reach(source.rows, (before, after), edge)

    def need(start: int, stop: int) -> range:
        return range(start - before, stop - before)

    return _footprint(source, source.strided(1, rows), need, edge)


def pixel_unshuffle(source: RowPartition, factor: int) -> Footprint:
    """Blocks of ``factor`` rows become one row, at the owner of the first of them.

    Raises:
        ValueError: If the rows do not divide.
    """
    if source.rows % factor:
        raise ValueError(f"{source.rows} rows cannot be cut into blocks of {factor}")
    return _windows(source, source.strided(factor), factor, factor, 0, EdgeRule())


def resampled_partition(source: RowPartition, rows: int, declared: RowPartition | None) -> RowPartition:
    """Who owns the output rows of a resampling to ``rows`` rows, which no stride or factor need relate to the input.

    The first that applies:

    1. As many rows as came in stay where they are.
    2. As many rows as the model's input has, or as a stride of 2 or more leaves of them, are divided as there, so that
       what is resampled to a level of the model meets what is at that level.
    3. An upsampling or a stride of ``source`` that gives as many rows divides them.
    4. Boundaries move in proportion.
    """
    if rows == source.rows:
        return source
    if declared is not None:
        if declared.rows == rows:
            return declared
        stride = max(2, -(-declared.rows // rows))
        if -(-declared.rows // stride) == rows:
            return declared.strided(stride)
    if rows > source.rows:
        factor = -(-rows // source.rows)
        if -(-rows // factor) == source.rows:
            return source.upsampled(factor, rows)
    else:
        stride = -(-source.rows // rows)
        if -(-source.rows // stride) == rows:
            return source.strided(stride)
    ends = [-(-offset * rows // source.rows) for offset in source.offsets]
    return RowPartition(tuple(stop - start for start, stop in pairwise(ends)), allow_empty=True)


def resampling(source: RowPartition, target: RowPartition, first: tuple[int, ...], last: tuple[int, ...]) -> Footprint:
    """Output row ``i`` reads rows ``first[i]`` to ``last[i]``, both included."""

    def need(start: int, stop: int) -> range:
        return range(min(first[start:stop]), max(last[start:stop]) + 1)

    return _footprint(source, target, need, EdgeRule())
