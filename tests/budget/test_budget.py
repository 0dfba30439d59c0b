"""The work that a GiB or a file costs stays within the recorded budget; twice the work per chunk would not.

Counts, not times: see benchmarks/harness/counting.py. The budget is in budget.toml, recorded by ``make budget``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import budget
from harness.counting import LOADS, METRICS, Counter, Load, missing_tool

WASTEFUL = (sys.executable, str(Path(__file__).parent / "wasteful.py"))
TRIES = 4
PLAINTEXT = next(load for load in LOADS if load.name == "memory-plaintext")

reason = missing_tool()
counting = pytest.mark.skipif(reason is not None, reason=reason or "")
pytestmark = [pytest.mark.needs_transport, pytest.mark.timeout(900)]


def names(counter: Counter, load: Load) -> set[str]:
    """The metrics that are over the budget after one more count."""
    return {sentence.partition(":")[0] for sentence in budget.excesses(counter.count(), budget.read()[load.name])}


@counting
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
def test_the_work_is_within_its_budget(load: Load) -> None:
    counter, over = Counter(load), [""]
    for _ in range(TRIES):
        over = budget.excesses(counter.count(), budget.read()[load.name])
        if not over:
            break
    assert not over, "\n".join([*over, "If it is meant to cost that: make budget BUDGET_ARGS=--record"])


@counting
def test_far_shorter_chunks_are_noticed() -> None:
    """They may grow to four times what is set, a sixteenth of what is recorded."""
    counter = Counter(PLAINTEXT, flags=("--set", "transport.amst.chunk_size_kb=64"))
    assert any({"calls", "allocations"} <= names(counter, PLAINTEXT) for _ in range(TRIES))


@counting
def test_a_needless_copy_of_each_chunk_is_noticed() -> None:
    counter = Counter(PLAINTEXT, command=WASTEFUL)
    assert any("allocated_bytes" in names(counter, PLAINTEXT) for _ in range(TRIES))


def test_every_load_and_metric_was_recorded() -> None:
    recorded = budget.read()
    assert set(recorded) == {load.name for load in LOADS}
    for table in recorded.values():
        assert tuple(table.metrics) == METRICS
        for one in table.metrics.values():
            assert 0 < one.least <= one.median <= one.most
