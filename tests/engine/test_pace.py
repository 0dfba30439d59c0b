"""The token bucket holds its rate over any stretch of time, and acknowledgements are late when RFC 6298 says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amst_core.engine.pace import BURST_S, MIN_CHUNK, AckTimer, TokenBucket

RATE = 1_000_000.0
LONGEST = 100_000
"""Bytes of the longest chunk below: two bursts."""


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.integers(1, LONGEST)),
        min_size=1,
        max_size=200,
    )
)
def test_no_stretch_of_time_carries_more_than_rate_times_time_plus_a_burst_and_a_chunk(
    steps: list[tuple[float, int]],
) -> None:
    """Whatever pauses a sender makes, and whatever it asks for: what goes is bounded."""
    bucket, now = TokenBucket(RATE, now=0.0), 0.0
    went: list[tuple[float, int]] = []
    for pause, size in steps:
        now += pause
        if bucket.ready_at(now) <= now:
            bucket.take(size)
            went.append((now, size))
    for first in range(len(went)):
        total = 0
        for at, size in went[first:]:
            total += size
            assert total <= (at - went[first][0]) * RATE + RATE * BURST_S + LONGEST + 1e-3


@given(st.lists(st.integers(1, LONGEST), min_size=20, max_size=100))
def test_a_sender_that_never_rests_gets_its_rate(sizes: list[int]) -> None:
    bucket, now = TokenBucket(RATE, now=100.0), 100.0
    for size in sizes:
        now = max(now, bucket.ready_at(now))
        bucket.take(size)
    # all but the last were waited for: a debt is paid before the next one goes
    assert now - 100.0 == pytest.approx(sum(sizes[:-1]) / RATE, abs=1e-6)


def test_a_chunk_may_leave_a_debt_that_the_next_one_waits_for() -> None:
    bucket = TokenBucket(RATE, now=0.0)
    assert bucket.ready_at(0.0) == 0.0, "no debt: one may go although nothing was saved up"
    bucket.take(500_000)
    assert bucket.ready_at(0.0) == pytest.approx(0.5)
    assert bucket.ready_at(0.4) == pytest.approx(0.5)
    assert bucket.ready_at(0.5) == 0.5


def test_a_rest_saves_up_one_burst_and_no_more() -> None:
    bucket = TokenBucket(RATE, now=0.0)
    assert bucket.ready_at(3600.0) == 3600.0
    bucket.take(int(RATE * BURST_S))
    assert bucket.ready_at(3600.0) == 3600.0, "the burst is exactly used up"
    bucket.take(1000)
    assert bucket.ready_at(3600.0) == pytest.approx(3600.001)


# ---- another rate ---------------------------------------------------------------------------------

RATES = (1e3, 1e5, 1e6, 1e9)


@given(
    st.lists(
        st.tuples(st.floats(0, 0.5), st.floats(0, 2), st.sampled_from(RATES) | st.none()),
        min_size=1,
        max_size=200,
    )
)
def test_no_stretch_of_time_carries_more_however_often_the_rate_changes(
    steps: list[tuple[float, float, float | None]],
) -> None:
    """A chunk takes its size over the rate in force: all but the last of a stretch fit into it and a burst."""
    bucket, now = TokenBucket(RATE, now=0.0), 0.0
    went: list[tuple[float, float]] = []
    for pause, longer, rate in steps:
        now += pause
        if rate is not None:
            bucket.change(rate, now=now)
        if bucket.ready_at(now) <= now:
            bucket.take(int(bucket.chunk * (1 + longer)))
            went.append((now, int(bucket.chunk * (1 + longer)) / bucket.rate))
    for first in range(len(went)):
        cost = 0.0
        for at, takes in went[first:]:
            assert cost <= at - went[first][0] + BURST_S + 1e-6
            cost += takes


@pytest.mark.parametrize("rate", RATES)
def test_a_change_keeps_the_time_that_a_debt_takes(rate: float) -> None:
    bucket = TokenBucket(RATE, now=0.0)
    bucket.take(500_000)
    bucket.change(rate, now=0.2)
    assert bucket.ready_at(0.2) == pytest.approx(0.5)
    assert bucket.ready_at(0.5) == pytest.approx(0.5)
    bucket.take(int(rate))
    assert bucket.ready_at(0.5) == pytest.approx(1.5), "the new rate holds from then on"


def test_a_change_gives_no_burst() -> None:
    bucket = TokenBucket(RATE, now=0.0)
    bucket.ready_at(10.0)
    bucket.take(int(RATE * BURST_S))
    for number in range(100):
        bucket.change(RATE * (2 + number), now=10.0)
    bucket.take(1)
    assert bucket.ready_at(10.0) > 10.0, "the burst was used up before"


def test_a_rest_before_a_change_counts_at_the_rate_that_was_in_force() -> None:
    bucket = TokenBucket(1000.0, now=0.0)
    bucket.take(1000)
    bucket.change(1e9, now=0.5)
    assert bucket.ready_at(0.5) == pytest.approx(1.0)


@pytest.mark.parametrize(("rate", "chunk"), [(1e3, MIN_CHUNK), (MIN_CHUNK / BURST_S, MIN_CHUNK), (1e8, 5_000_000)])
def test_chunks_are_cut_to_a_burst(rate: float, chunk: int) -> None:
    assert TokenBucket(rate, now=0.0).chunk == pytest.approx(chunk, abs=1)


# ---- RFC 6298 -------------------------------------------------------------------------------------


def test_before_any_sample_a_second_is_late() -> None:
    assert AckTimer().late_after_s == 1.0


def test_the_first_sample_counts_thrice() -> None:
    """(2.2): SRTT <- R, RTTVAR <- R/2, RTO <- SRTT + 4 RTTVAR."""
    timer = AckTimer()
    timer.sample(0.5)
    assert timer.late_after_s == pytest.approx(1.5)


def test_later_samples_are_smoothed() -> None:
    """(2.3): RTTVAR with beta 1/4 from the old SRTT, then SRTT with alpha 1/8."""
    timer = AckTimer()
    smoothed, variation = 0.5, 0.25
    timer.sample(0.5)
    for sample in (0.7, 0.3, 0.3, 2.0, 0.5, 0.5):
        timer.sample(sample)
        variation = 3 / 4 * variation + 1 / 4 * abs(smoothed - sample)
        smoothed = 7 / 8 * smoothed + 1 / 8 * sample
        assert timer.late_after_s == pytest.approx(smoothed + 4 * variation)


def test_a_fast_path_is_not_pressed() -> None:
    timer = AckTimer()
    for _ in range(100):
        timer.sample(0.001)
    assert timer.late_after_s == 0.2
