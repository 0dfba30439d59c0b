"""The search for policers exactly on its bounds, and next to them."""

from __future__ import annotations

import pytest

from amst_cc_bbr.policer import LongTermBandwidth


class Intervals:
    """Intervals that begin and end with a loss; every method may be told otherwise."""

    def __init__(self) -> None:
        self.long_term = LongTermBandwidth(enabled=True)
        self.delivered = self.lost = 0
        self.long_term.reset(0.0, 0, 0)
        self.sample(0.0, lost=1)

    def sample(self, now: float, *, lost: int = 0, round_start: bool = False) -> bool:
        self.lost += lost
        return self.long_term.sample(
            now, delivered=self.delivered, all_lost=self.lost, lost=lost, app_limited=False, round_start=round_start
        )

    def end(self, now: float, *, delivered: int, lost: int, rounds: int = 4) -> bool:
        """``now`` the last of ``rounds`` begins and ``lost`` bytes are lost, after ``delivered`` were delivered."""
        for _ in range(rounds - 1):
            self.sample(now, round_start=True)
        self.delivered += delivered
        return self.sample(now, lost=lost, round_start=True)

    @property
    def found(self) -> bool:
        return self.long_term.bandwidth is not None


@pytest.fixture
def intervals() -> Intervals:
    return Intervals()


@pytest.mark.parametrize(("took", "found"), [(0.0009, False), (0.001, True)])
def test_an_interval_takes_a_millisecond_at_least(intervals, took, found):
    intervals.end(took, delivered=2560, lost=2560)
    assert intervals.found == found


@pytest.mark.parametrize(("rounds", "found"), [(3, False), (4, True), (16, True), (17, False)])
def test_an_interval_takes_4_to_16_rounds(intervals, rounds, found):
    intervals.end(1.0, delivered=2560, lost=2560, rounds=rounds)
    assert intervals.found == found


@pytest.mark.parametrize(("lost", "found"), [(499, False), (500, True)])
def test_50_bytes_lost_for_256_delivered_are_enough(intervals, lost, found):
    intervals.end(1.0, delivered=2560, lost=lost)
    assert intervals.found == found


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        (800_000, 900_000, True),
        (800_000, 900_001, False),
        (800_000, 700_000, True),
        (800_000, 699_999, False),
        (1000, 1505, True),
        (1000, 1506, False),
    ],
)
def test_rates_agree_that_differ_by_an_eighth_or_by_4_kbit_per_second_once_paced(intervals, first, second, agree):
    """4 kbit/s are 500 bytes/s at which data would leave, 1 % below the rates themselves: they may differ by 505."""
    assert not intervals.end(1.0, delivered=first, lost=first)
    assert intervals.end(2.0, delivered=second, lost=second) == agree
    assert intervals.long_term.in_use == agree
