"""What an exchange sends: rows and messages of each rank, from the footprint alone."""

from __future__ import annotations

from itertools import pairwise

from credit_domain.engine.footprint import Footprint


def traffic(footprint: Footprint) -> tuple[int, int, list[int], list[int]]:
    """The widest halo before and after, and for each rank the rows that it sends and to how many ranks.

    Each rank's missing rows are split by owner, so that the cost grows with the ranks and not with their square.
    """
    source = footprint.source
    sent, messages = [0] * source.ranks, [0] * source.ranks
    before = after = 0
    for rank, ((start, stop), need) in enumerate(zip(pairwise(source.offsets), footprint.needs, strict=True)):
        if not need:
            continue
        wanted: dict[int, set[int]] = {}
        if isinstance(need, tuple) or need.step != 1:
            missing = [range(row, row + 1) for row in set(need) if not start <= row < stop]
            own = [at for at, row in enumerate(need) if start <= row < stop]
            if own:
                before, after = max(before, own[0]), max(after, len(need) - 1 - own[-1])
        elif stop > start:
            before, after = max(before, start - need.start), max(after, need.stop - stop)
            missing = [range(need.start, min(need.stop, start)), range(max(need.start, stop), need.stop)]
        else:
            missing = [need]
        for part in missing:
            for span in footprint.edge.spans(part, source.rows):
                if span.row is None:
                    continue
                ends = sorted({span.row, span.row + (span.length - 1) * span.step})
                for piece in source.owners(ends[0], ends[-1] + 1):
                    if piece.rank != rank:
                        wanted.setdefault(piece.rank, set()).update(range(piece.start, piece.stop))
        for owner, rows in wanted.items():
            sent[owner] += len(rows)
            messages[owner] += 1
    return before, after, sent, messages
