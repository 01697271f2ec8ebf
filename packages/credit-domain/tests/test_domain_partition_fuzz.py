"""Random programs are exact on ranks. ``CREDIT_FUZZ=2000`` draws so many."""

from __future__ import annotations

import os

import torch
from domain_partitioned import check_partitioned
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from partition_graphs import graphs

CASES = int(os.environ.get("CREDIT_FUZZ", "25"))


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), graphs())
def test_random_programs(data, case):
    graph, whole, words = case
    ranks = data.draw(st.integers(2, 4))
    rows = whole.shape[-2]
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), min_size=ranks - 1, max_size=ranks - 1)))
    sizes = tuple(b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True))
    note(f"{list(whole.shape)} as {sizes}: {words}")
    torch.manual_seed(0)
    check_partitioned(graph, [whole], sizes, rtol=1e-8)
