"""How the window grows: RFC 9438 4.2 to 4.5 and 4.10, by closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amst_cc_cubic.controller import ALPHA, CubicController
from amst_core.interfaces import AckSample

MSS = 1000
C = 0.4


def after_a_loss(sender: Callable[..., Any], segments: int, **options: object) -> Any:
    """At the first acknowledgement of a congestion avoidance stage that a loss at ``segments`` led to."""
    flow = sender(**options)
    flow.grow_to(segments)
    flow.lose()
    assert flow.mode() == "recovery"
    return flow


def test_alpha_is_that_of_the_rfc() -> None:
    assert pytest.approx(9 / 17) == ALPHA


@pytest.mark.parametrize("segments", [50, 1000, 20000])
def test_k_is_the_time_back_to_w_max(sender: Callable[..., Any], segments: int) -> None:
    flow = after_a_loss(sender, segments)
    flow.round()
    assert flow.state("w_max") == segments * MSS
    assert flow.state("k") == pytest.approx(math.cbrt(segments * 0.3 / C))


@pytest.mark.parametrize("segments", [1000, 20000])
def test_the_window_follows_the_cubic_function(sender: Callable[..., Any], segments: int) -> None:
    """Segment by segment the window moves by (target - cwnd)/cwnd, that is d cwnd/dt = (W(t + R) - cwnd)/R.

    For a cubic W its solution is W(t) + W''(t) R²/2 - 2 C R³ once the beginning is forgotten.
    """
    rtt = 0.02
    flow = after_a_loss(sender, segments, rtt=rtt, reno_friendly=False)
    flow.round()
    k = math.cbrt(segments * 0.3 / C)
    seen = []
    for moment in (0.3, 0.6, 1.1, 1.4):
        while flow.state("t") < moment * k:
            window = flow.controller.window
            # What a window brings, in sixteen acknowledgements through the round trip.
            start = flow.now
            flow.send(window)
            for part in range(16):
                flow.now = start + rtt * (part + 1) / 16
                flow.ack(window // 16, sent_at=start - rtt, in_flight=window - window // 16, round_start=part == 0)
        t = flow.state("t")
        expected = segments + C * (t - k) ** 3 + 3 * C * (t - k) * rtt**2 - 2 * C * rtt**3
        assert flow.segments == pytest.approx(expected, abs=2e-4 * segments), f"{moment} K"
        seen.append(flow.controller.state()["region"])
    assert seen == ["concave", "concave", "convex", "convex"]


def test_one_segment_moves_the_window_by_its_share_of_the_way_to_the_target(sender: Callable[..., Any]) -> None:
    flow = after_a_loss(sender, 1000, reno_friendly=False)
    flow.round(flight=700 * MSS)  # ends recovery and begins the stage: t = 0
    before, t = flow.segments, flow.state("t")
    flow.now += 0.1
    flow.ack(MSS, sent_at=flow.now - 0.1, in_flight=699 * MSS)
    k = math.cbrt(300 / C)
    target = C * (t + 0.1 + 0.1 - k) ** 3 + 1000
    assert flow.segments - before == pytest.approx((target - before) / before, abs=1.5 / MSS)


def test_the_target_is_at_most_half_a_window_away(sender: Callable[..., Any]) -> None:
    """With a round trip of 10 s the cubic function is hundreds of segments ahead: a segment brings half a segment."""
    flow = after_a_loss(sender, 10, rtt=10.0, reno_friendly=False)
    flow.send(7 * MSS)
    sent_at = flow.now
    flow.now += 10.0
    flow.ack(MSS, sent_at=sent_at, in_flight=6 * MSS, round_start=True)
    assert flow.controller.window == 7500


@pytest.mark.parametrize("reno_friendly", [True, False])
def test_the_window_does_not_fall_to_a_target_below_it(sender: Callable[..., Any], reno_friendly: bool) -> None:
    """The target is a round trip ahead: when round trips become shorter, it comes back."""
    for segments in (10, 30, 100, 1000):
        flow = after_a_loss(sender, segments, rtt=2.0, reno_friendly=reno_friendly)
        windows = []
        for _ in range(4):
            flow.round(acks=8)
            windows.append(flow.controller.window)
        for _ in range(100):
            flow.round(acks=8, rtt=0.01)
            windows.append(flow.controller.window)
        assert all(later >= earlier for earlier, later in pairwise(windows))


@pytest.mark.parametrize("rtt", [0.1, 0.5])
def test_a_window_acknowledged_at_once_moves_as_its_segments_would_one_by_one(
    sender: Callable[..., Any], rtt: float
) -> None:
    single, together = (after_a_loss(sender, 1000, rtt=rtt, reno_friendly=False) for _ in range(2))
    for _ in range(2):
        single.round(acks=1000)
        together.round(acks=1)
    assert together.segments > 710
    assert together.segments - 700 == pytest.approx(single.segments - 700, rel=0.05)


def test_in_the_reno_friendly_region_a_round_trip_brings_alpha_then_one(sender: Callable[..., Any]) -> None:
    flow = after_a_loss(sender, 40, rtt=0.001)
    assert flow.segments == 28
    steps = []
    while flow.segments < 45:
        before = flow.segments
        flow.round()
        assert flow.controller.state()["region"] == "reno_friendly"
        steps.append((before, flow.segments - before))
    (across,) = [(40 - before, step) for before, step in steps if before < 40 <= before + step]
    assert across[1] == pytest.approx(across[0] + (1 - across[0] / ALPHA), abs=1.1 / MSS)
    below = [step for before, step in steps if before + step < 40]
    above = [step for before, step in steps if before >= 40]
    assert len(below) > 20 and len(above) >= 4
    assert below == pytest.approx([ALPHA] * len(below), abs=1.1 / MSS)
    assert above == pytest.approx([1.0] * len(above), abs=1.1 / MSS)


def test_without_reno_friendliness_the_cubic_function_alone_decides(sender: Callable[..., Any]) -> None:
    friendly, alone = (after_a_loss(sender, 40, rtt=0.001, reno_friendly=choice) for choice in (True, False))
    for _ in range(20):
        friendly.round()
        alone.round()
    assert alone.controller.state()["region"] == "concave"
    assert 28 < alone.segments < friendly.segments - 5


def test_slow_start_grows_by_what_is_acknowledged(sender: Callable[..., Any]) -> None:
    flow = sender()
    assert flow.controller.window == 10 * MSS
    flow.round()
    assert flow.controller.window == 20 * MSS
    flow.round(acks=20)
    assert (flow.controller.window, flow.mode()) == (40 * MSS, "slow_start")


@pytest.mark.parametrize(("pacing", "grown"), [(True, 40), (False, 8)])
def test_unpaced_slow_start_takes_eight_segments_from_one_acknowledgement(
    sender: Callable[..., Any], pacing: bool, grown: int
) -> None:
    flow = sender(initial_window=40, pacing=pacing)
    flow.round()
    assert flow.controller.window == (40 + grown) * MSS


def test_slow_start_ends_at_ssthresh_and_what_is_left_counts_for_what_follows(sender: Callable[..., Any]) -> None:
    flow = sender()
    flow.grow_to(100)
    flow.lose(persistent=True)
    assert flow.state("ssthresh") == 70 * MSS
    while flow.controller.window < 64 * MSS:
        flow.round()
    assert (flow.segments, flow.mode()) == (64, "slow_start")
    flow.round()
    assert flow.mode() == "congestion_avoidance"
    assert 70 < flow.segments < 71  # 6 of 64 segments bring it to ssthresh, the other 58 belong to the new stage


def test_pacing_is_twice_the_window_in_slow_start_and_a_fifth_more_afterwards(sender: Callable[..., Any]) -> None:
    flow = sender(rtt=0.05)
    assert flow.controller.pacing_rate is None
    flow.round()
    assert flow.controller.pacing_rate == pytest.approx(2.0 * flow.controller.window / 0.05)
    flow.lose()
    assert flow.controller.pacing_rate == pytest.approx(1.2 * flow.controller.window / 0.05)
    unpaced = sender(pacing=False)
    unpaced.round()
    assert unpaced.controller.pacing_rate is None


def test_pacing_slackens_at_half_of_ssthresh(sender: Callable[..., Any]) -> None:
    flow = sender()
    flow.grow_to(100)
    flow.lose(persistent=True)
    assert flow.state("ssthresh") == 70 * MSS
    gains = []
    for _ in range(6):
        flow.round()
        gains.append((flow.segments, round(flow.controller.pacing_rate * 0.1 / flow.controller.window, 6)))
    assert gains == [(2, 2.0), (4, 2.0), (8, 2.0), (16, 2.0), (32, 2.0), (64, 1.2)]


def test_the_round_trip_is_smoothed_by_an_eighth(sender: Callable[..., Any]) -> None:
    flow = sender(rtt=0.08)
    flow.round(rtt=0.08)
    flow.round(rtt=0.16)
    assert flow.controller.pacing_rate == pytest.approx(2.0 * flow.controller.window / 0.09)


# ---- time and windows that were not used ---------------------------------------------------------------


def used(flow: Any, rounds: int) -> list[int]:
    windows = []
    for _ in range(rounds):
        flow.round()
        windows.append(flow.controller.window)
    return windows


def test_application_limited_time_is_no_time(sender: Callable[..., Any]) -> None:
    """A stage goes on after a pause at a fifth of the window as if there had been none (RFC 9438 5.8)."""
    paused, steady = (after_a_loss(sender, 1000) for _ in range(2))
    assert used(paused, 20) == used(steady, 20)
    window, t = paused.controller.window, paused.state("t")
    for _ in range(600):
        paused.round(flight=window // 5, app_limited=True)
    assert (paused.controller.window, paused.state("t")) == (window, t)
    assert used(paused, 100) == used(steady, 100)
    assert paused.controller.window > 1000 * MSS


def test_idle_time_is_no_time(sender: Callable[..., Any]) -> None:
    idle, steady = (after_a_loss(sender, 1000) for _ in range(2))
    assert used(idle, 20) == used(steady, 20)
    idle.now += 3600
    assert used(idle, 100) == used(steady, 100)


def test_slow_start_does_not_open_a_window_that_the_application_leaves_unused(sender: Callable[..., Any]) -> None:
    flow = sender()
    for _ in range(50):
        flow.round(flight=8 * MSS, app_limited=True)
    assert flow.controller.window == 10 * MSS
    flow.round(app_limited=True)  # the application's last byte, but it filled the window
    assert flow.controller.window == 20 * MSS


def test_a_window_that_is_not_half_used_stays_whatever_the_driver_says(sender: Callable[..., Any]) -> None:
    flow = sender()
    for _ in range(50):
        flow.round(flight=8 * MSS)
    assert flow.controller.window == 18 * MSS


# ---- fractions ----------------------------------------------------------------------------------------


def grown(segments: int, rtt: float, groups: list[int], *, lose: bool) -> float:
    """The window after each round trip's segments were acknowledged in groups of the sizes given, in turn."""
    controller = CubicController({"hystart": False, "initial_window": segments}, mss=MSS)
    now, delivered, turn = 0.0, 0, 0
    controller.on_sent(now=now, size=MSS, in_flight=segments * MSS, app_limited=False)
    if lose:
        now += rtt
        controller.on_loss(now=now, sent_at=0.0, lost=MSS, in_flight=(segments - 1) * MSS, persistent=False)
    for _ in range(12 if lose else 3):
        flight = controller.window // MSS
        sent_at = now
        controller.on_sent(now=now, size=flight * MSS, in_flight=flight * MSS, app_limited=False)
        now += rtt
        left = flight
        while left:
            group = min(groups[turn % len(groups)], left)
            turn += 1
            prior = left * MSS
            left -= group
            delivered += group * MSS
            controller.on_ack(
                AckSample(
                    now=now, sent_at=sent_at, acked=group * MSS, lost=0, rtt=rtt, in_flight=left * MSS,
                    prior_in_flight=prior, delivered=delivered, prior_delivered=delivered - group * MSS,
                    delivery_rate=None, app_limited=False, round_start=prior == flight * MSS,
                )
            )  # fmt: skip
    return controller.window / MSS


@settings(deadline=None, max_examples=60)
@given(
    segments=st.integers(4, 200),
    rtt=st.sampled_from([0.001, 0.02, 0.2]),
    groups=st.lists(st.integers(1, 64), min_size=1, max_size=5),
    lose=st.booleans(),
)
def test_it_grows_alike_whether_segments_are_acknowledged_singly_or_together(
    segments: int, rtt: float, groups: list[int], lose: bool
) -> None:
    single, together = (grown(segments, rtt, way, lose=lose) for way in ([1], groups))
    assert together == pytest.approx(single, rel=0.02, abs=1.0)
    if not lose:
        assert together == single == 8 * segments


def test_nothing_of_a_window_is_lost_to_rounding(sender: Callable[..., Any]) -> None:
    """A round trip's growth arrives whole when it comes in pieces of a thousandth of a segment."""
    flow = after_a_loss(sender, 1000, reno_friendly=False)
    flow.round(flight=700 * MSS)
    before, sent_at = flow.controller.window, flow.now
    k, t = math.cbrt(300 / C), flow.state("t")
    flow.now += 0.1
    for _ in range(MSS):
        flow.ack(1, sent_at=sent_at, in_flight=before)
    target = C * (t + 0.2 - k) ** 3 + 1000
    assert flow.controller.window - before == pytest.approx((target * MSS - before) / (before / MSS), abs=1.5)
