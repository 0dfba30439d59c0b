"""The core's own detector: thresholds, hysteresis, what is not known, how soon and how often the mode changes."""

from __future__ import annotations

import pytest

from amst_core.interfaces import Mode, ModeDecision, PathSample
from amst_core.modes import ThresholdDetector, Thresholds, tier_of
from amst_core.modes.detector import DWELL_S, HISTORY, SETTLED_S

GBIT = 125e6
MBIT = 125e3
STEP_S = 0.5
DATACENTER, INTERNET, HYBRID = Mode.DATACENTER, Mode.INTERNET, Mode.HYBRID


class Path:
    """A detector, shown two samples a second of a path that changes."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.detector = ThresholdDetector(thresholds)
        self.now = 50.0

    def show(self, latency_s: float | None, bandwidth: float | None = None, loss: float | None = None) -> ModeDecision:
        self.now += STEP_S
        return self.detector.update(PathSample(latency_s, bandwidth, loss), now=self.now)

    def stay(
        self,
        latency_s: float | None,
        bandwidth: float | None = None,
        loss: float | None = None,
        *,
        s: float = SETTLED_S,
    ) -> Mode:
        for _ in range(round(s / STEP_S)):
            decision = self.show(latency_s, bandwidth, loss)
        return decision.mode

    def changes_within(
        self, mode: Mode, latency_s: float | None, bandwidth: float | None = None, loss: float | None = None
    ) -> float:
        """Seconds until it says ``mode``."""
        start = self.now
        while self.show(latency_s, bandwidth, loss).mode is not mode:
            assert self.now - start < 100
        return self.now - start


@pytest.mark.parametrize(
    ("latency_s", "bandwidth", "loss", "mode"),
    [
        (0.0001, 10 * GBIT, 0.0, DATACENTER),
        (0.001, 0.94 * GBIT, 0.0, DATACENTER),  # what a path of 1 Gbit/s delivers
        (0.0099, None, None, DATACENTER),
        (0.0101, 2 * GBIT, 0.0, HYBRID),
        (0.050, None, None, HYBRID),
        (0.0501, 10 * GBIT, 0.0, INTERNET),
        (0.001, 0.7 * GBIT, 0.0, INTERNET),
        (0.001, 5 * GBIT, 0.02, INTERNET),
        (0.02, 100 * MBIT, 0.0, INTERNET),
        (0.2, 100 * MBIT, 0.05, INTERNET),
    ],
)
def test_what_a_path_is(latency_s: float, bandwidth: float | None, loss: float | None, mode: Mode) -> None:
    assert Path().stay(latency_s, bandwidth, loss) is mode


def test_nothing_is_known() -> None:
    decision = Path().show(None)
    assert (decision.mode, decision.tier) == (DATACENTER, None)
    assert decision.reason == "the round trip is not known; what it carries is not known"


@pytest.mark.parametrize(
    ("first", "then", "mode"),
    [
        ((0.009,), (0.0115,), DATACENTER),
        ((0.009,), (0.0125,), HYBRID),
        ((0.013,), (0.0105,), HYBRID),
        ((0.013,), (0.0095,), DATACENTER),
        ((0.055,), (0.041,), INTERNET),
        ((0.055,), (0.039,), HYBRID),
        ((0.045,), (0.049,), HYBRID),
        ((0.045,), (0.051,), INTERNET),
        ((0.001, 2 * GBIT), (0.001, 0.8 * GBIT), DATACENTER),
        ((0.001, 2 * GBIT), (0.001, 0.74 * GBIT), INTERNET),
        ((0.001, 0.5 * GBIT), (0.001, 0.85 * GBIT), INTERNET),
        ((0.001, 0.5 * GBIT), (0.001, 0.91 * GBIT), DATACENTER),
        ((0.001, 2 * GBIT, 0.0), (0.001, 2 * GBIT, 0.009), DATACENTER),
        ((0.001, 2 * GBIT, 0.0), (0.001, 2 * GBIT, 0.011), INTERNET),
        ((0.001, 2 * GBIT, 0.02), (0.001, 2 * GBIT, 0.006), INTERNET),
        ((0.001, 2 * GBIT, 0.02), (0.001, 2 * GBIT, 0.004), DATACENTER),
    ],
)
def test_hysteresis(first: tuple[float, ...], then: tuple[float, ...], mode: Mode) -> None:
    path = Path()
    path.stay(*first, s=2 * SETTLED_S)
    assert path.stay(*then, s=2 * SETTLED_S) is mode


def test_a_slow_start_is_no_slow_path() -> None:
    path = Path()
    for rate in (10 * MBIT, 100 * MBIT, 300 * MBIT, 600 * MBIT, 5 * GBIT, 5 * GBIT):
        assert path.show(0.005, rate).mode is DATACENTER


def test_a_burst_of_losses_is_no_lossy_path() -> None:
    path = Path()
    assert path.show(0.001, 2 * GBIT, 0.3).mode is DATACENTER
    assert path.stay(0.001, 2 * GBIT, 0.0, s=5.0) is DATACENTER


def test_a_path_that_becomes_another_is_seen_when_the_history_has_passed() -> None:
    path = Path()
    path.stay(0.001, 2 * GBIT)
    assert path.changes_within(INTERNET, 0.08, 2 * GBIT) == HISTORY * STEP_S
    path.stay(0.08, 200 * MBIT, s=25.0)
    assert path.changes_within(DATACENTER, 0.001, 2 * GBIT) == STEP_S, "shorter than the shortest is seen at once"
    path.stay(0.001, 2 * GBIT, s=25.0)
    assert path.changes_within(INTERNET, 0.001, 200 * MBIT) == (HISTORY - 1) * STEP_S, "of ten the best does not count"


def test_a_mode_stays_for_its_dwell() -> None:
    path = Path()
    path.stay(0.08)
    path.changes_within(DATACENTER, 0.001)
    assert path.changes_within(INTERNET, 0.2) == DWELL_S


def test_within_a_minute_a_little_beyond_a_threshold_is_not_enough() -> None:
    path = Path()
    path.stay(0.08)
    path.changes_within(DATACENTER, 0.001)
    assert path.stay(0.0175, s=SETTLED_S - STEP_S) is DATACENTER
    assert path.show(0.0175).mode is HYBRID
    path.stay(0.0175)
    path.changes_within(DATACENTER, 0.001)
    path.stay(0.0185, s=DWELL_S - STEP_S)
    assert path.show(0.0185).mode is HYBRID


def test_who_was_slow_stays_so_until_it_is_seen_to_be_faster() -> None:
    path = Path()
    assert path.stay(0.02, 100 * MBIT) is INTERNET
    assert path.stay(0.02, None, s=300.0) is INTERNET
    assert path.stay(0.02, 2 * GBIT) is HYBRID


def test_a_round_trip_that_becomes_a_datacenters_is_another_path() -> None:
    """What the last one carried and lost says nothing of it."""
    path = Path()
    assert path.stay(0.08, 100 * MBIT, 0.03) is INTERNET
    decision = path.show(0.001)
    assert (decision.mode, decision.tier) == (DATACENTER, 1)
    assert decision.reason == "the round trip of 1ms is below 10ms; what it carries is not known"
    assert path.stay(0.001, s=300.0) is DATACENTER


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ((0.001, 2 * GBIT, 0.0), "the round trip of 1ms is below 10ms; it carries 2Gbit/s, as a link of 1Gbit/s does"),
        ((0.022,), "the round trip of 22ms is above 10ms; what it carries is not known"),
        ((0.0802, 100 * MBIT, 0.0), "the round trip of 80.2ms is above 50ms; it carries 100Mbit/s, less than a link of"
                                    " 1Gbit/s does"),
        ((0.02, 188 * MBIT, 0.016), "it carries 188Mbit/s, less than a link of 1Gbit/s does; of what is sent 1.6% is"
                                    " lost, above 1%"),
    ],
)  # fmt: skip
def test_why(sample: tuple[float, ...], reason: str) -> None:
    path = Path()
    path.stay(*sample)
    assert path.show(*sample).reason == reason


def test_why_still() -> None:
    path = Path()
    path.stay(0.2)
    path.stay(0.045)
    assert path.show(0.045).reason == "the round trip of 45ms is not far enough below 50ms"


def test_thresholds_are_kept_to() -> None:
    thresholds = Thresholds(near_s=0.001, far_s=0.002, fast=10 * GBIT, lossy=0.001)
    assert Path(thresholds).stay(0.0005, 9.4 * GBIT, 0.0) is DATACENTER
    assert Path(thresholds).stay(0.0015, 9.4 * GBIT, 0.0) is HYBRID
    assert Path(thresholds).stay(0.0025, 9.4 * GBIT, 0.0) is INTERNET
    assert Path(thresholds).stay(0.0005, 7 * GBIT, 0.0) is INTERNET
    assert Path(thresholds).stay(0.0005, 9.4 * GBIT, 0.002) is INTERNET


@pytest.mark.parametrize("bounds", [{"near_s": 0.06}, {"near_s": 0.0}, {"fast": 0.0}, {"lossy": 0.0}, {"lossy": 1.0}])
def test_thresholds_that_make_no_sense(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"bytes/s|round trips"):
        Thresholds(**bounds)


@pytest.mark.parametrize(
    ("latency_s", "tier"), [(0.0, 1), (0.00499, 1), (0.005, 2), (0.0499, 2), (0.05, 3), (0.149, 3), (0.15, 4), (9.0, 4)]
)
def test_tiers(latency_s: float, tier: int) -> None:
    assert tier_of(latency_s) == tier
