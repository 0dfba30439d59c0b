"""The windowed filters, against a filter that keeps everything."""

from __future__ import annotations

import random

import pytest

from amst_core.congestion import WindowedMax, WindowedMin
from amst_core.errors import UsageError

KINDS = [(WindowedMax, max), (WindowedMin, min)]
SPAN = 10.0


def measured(seed: int, shape: str) -> list[tuple[float, float]]:
    """(time, value) pairs: times go forward by irregular steps, sometimes by more than a window."""
    rng, now, level, found = random.Random(seed), 0.0, 100.0, []
    for _ in range(600):
        now += rng.choice([0.0, 0.1, 0.5, 1.0, 3.0]) if rng.random() > 0.01 else 25.0
        level += {"noise": 0.0, "rising": 0.5, "falling": -0.5}[shape]
        found.append((now, level + rng.uniform(-10, 10)))
    return found


def window(pairs: list[tuple[float, float]], count: int, span: float = SPAN) -> list[float]:
    now = pairs[count - 1][0]
    return [value for time, value in pairs[:count] if now - time <= span]


@pytest.mark.parametrize("shape", ["noise", "rising", "falling"])
@pytest.mark.parametrize(("kind", "best"), KINDS)
def test_what_it_tells_was_measured_in_the_window_and_is_no_worse_than_what_is_new(kind, best, shape):
    for seed in range(5):
        pairs, kept, seen = measured(seed, shape), kind(SPAN), []
        for count, (now, value) in enumerate(pairs, 1):
            told = kept.update(value, now)
            seen.append(told)
            assert told == kept.value
            assert told in window(pairs, count)
            assert best(told, value) == told
        assert len(set(seen)) > 10, "it never moved: this shape tests nothing"


@pytest.mark.parametrize(("kind", "best"), KINDS)
def test_it_rarely_differs_from_a_filter_that_keeps_everything(kind, best):
    same = total = 0
    for seed in range(5):
        pairs, kept = measured(seed, "noise"), kind(SPAN)
        for count, (now, value) in enumerate(pairs, 1):
            same += kept.update(value, now) == best(window(pairs, count))
            total += 1
    assert same > 0.95 * total


@pytest.mark.parametrize(("kind", "best"), KINDS)
def test_it_is_never_worse_than_the_best_of_the_last_quarter(kind, best):
    """The three choices lie far apart in the window: a steady trend away from the best costs no more than this."""
    for seed in range(5):
        rng, kept, pairs = random.Random(seed), kind(SPAN), []
        for step in range(600):
            trend = -step if kind is WindowedMax else step
            pairs.append((step * 0.1, trend + rng.uniform(0, 0.5)))
            told = kept.update(pairs[-1][1], pairs[-1][0])
            newest = window(pairs, len(pairs), SPAN / 4)
            assert best(told, best(newest)) == told


@pytest.mark.parametrize(("kind", "sign"), [(WindowedMax, 1), (WindowedMin, -1)])
def test_a_new_best_is_told_at_once_and_kept_for_the_window(kind, sign):
    kept = kind(10)
    assert kept.value is None
    kept.update(sign * 5.0, 0)
    assert kept.update(sign * 9.0, 1) == sign * 9.0
    for round_trip in range(2, 12):
        assert kept.update(sign * 5.0, round_trip) == sign * 9.0
    assert kept.update(sign * 5.0, 12) == sign * 5.0


@pytest.mark.parametrize(("kind", "sign"), [(WindowedMax, 1), (WindowedMin, -1)])
def test_when_the_best_grows_too_old_the_best_of_the_rest_follows(kind, sign):
    kept = kind(10)
    for round_trip, value in enumerate([9, 3, 3, 7, 3, 3, 5, 3, 3, 3, 3]):
        assert kept.update(sign * value, round_trip) == sign * 9
    assert kept.update(sign * 3, 11) == sign * 7
    assert kept.update(sign * 3, 13) == sign * 7
    assert kept.update(sign * 3, 14) == sign * 5


def test_after_a_silence_longer_than_the_window_only_the_new_counts():
    kept = WindowedMax(10)
    kept.update(9.0, 0)
    assert kept.update(1.0, 30) == 1.0


def test_a_reset_forgets():
    kept = WindowedMin(10)
    kept.update(1.0, 0)
    assert kept.reset(4.0, 1) == 4.0
    assert kept.value == 4.0
    assert kept.update(5.0, 2) == 4.0


@pytest.mark.parametrize("span", [0, -1, float("nan"), float("inf")])
def test_a_window_without_length_is_refused(span):
    with pytest.raises(UsageError, match="positive, finite"):
        WindowedMax(span)
