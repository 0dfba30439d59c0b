"""IntervalSet against a plain set of integers."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from amst_core.engine.intervals import IntervalSet

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


@given(SPANS, st.integers(0, 40), st.integers(0, 40))
def test_agrees_with_a_set_of_integers(spans: list[tuple[int, int]], a: int, b: int) -> None:
    intervals, model = IntervalSet(), set[int]()
    for start, end in spans:
        new = set(range(start, end)) - model
        assert intervals.add(start, end) == len(new)
        model |= new
    probe = set(range(a, b))
    assert intervals.total == len(model)
    assert intervals.end == (max(model) + 1 if model else 0)
    assert intervals.prefix == next(i for i in range(42) if i not in model)
    assert intervals.covers(a, b) == (probe <= model)
    assert intervals.overlaps(a, b) == bool(probe & model)
    gaps = list(intervals.gaps(a, b))
    assert {i for s, e in gaps for i in range(s, e)} == probe - model
    assert all(s < e for s, e in gaps) and all(x[1] < y[0] for x, y in itertools.pairwise(gaps))
    held = intervals.spans()
    assert {i for s, e in held for i in range(s, e)} == model
    assert all(x[1] < y[0] for x, y in itertools.pairwise(held)), "neighbours must be merged"
    assert intervals.spans(after=20, limit=1) == tuple(s for s in held if s[0] >= 20)[:1]
