"""What congestion does to the window: RFC 9438 4.6 to 4.9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amst_cc_cubic.controller import CubicController
from amst_core.interfaces import AckSample

MSS = 1000


def variables(flow: Any) -> dict[str, object]:
    """What RFC 9438 4.9.2 saves and restores."""
    known = flow.controller.state()
    names = ("cwnd", "cwnd_prior", "ssthresh", "w_max", "k", "w_est", "mode")
    return {name: known.get(name) for name in names}


def steady(sender: Callable[..., Any], **options: object) -> Any:
    """In congestion avoidance, ten round trips after a loss at 1000 segments."""
    flow = sender(**options)
    flow.grow_to(1000)
    flow.lose()
    for _ in range(10):
        flow.round()
    assert flow.mode() == "congestion_avoidance"
    return flow


def test_a_loss_leaves_seven_tenths(sender: Callable[..., Any]) -> None:
    flow = sender()
    flow.grow_to(1000)
    flow.lose()
    assert flow.controller.window == flow.state("ssthresh") == 700 * MSS
    assert flow.state("cwnd_prior") == flow.state("w_max") == 1000 * MSS
    assert flow.mode() == "recovery"


@pytest.mark.parametrize(("enabled", "factor"), [(True, 0.85), (False, 1.0)])
def test_fast_convergence_remembers_85_percent_of_a_window_that_fell_short(
    sender: Callable[..., Any], enabled: bool, factor: float
) -> None:
    flow = steady(sender, fast_convergence=enabled)
    before = flow.controller.window
    assert before < 1000 * MSS
    flow.lose()
    assert flow.state("w_max") == pytest.approx(factor * before, abs=1)
    assert flow.controller.window == pytest.approx(0.7 * before, abs=1)


def test_fast_convergence_leaves_a_window_alone_that_outgrew_the_last(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    while flow.segments < 1100:
        flow.round()
    before = flow.controller.window
    flow.lose()
    assert flow.state("w_max") == pytest.approx(before, abs=1)


def test_a_reduction_begins_a_stage_of_its_own(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    assert flow.state("t") > 0.5
    flow.lose()
    assert "t" not in flow.controller.state()
    after = flow.controller.window
    flow.round()
    assert flow.state("t") == 0
    assert flow.state("k") == pytest.approx(((flow.state("w_max") - after) / MSS / 0.4) ** (1 / 3), rel=1e-6)


def test_a_round_trip_has_one_reduction(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    before = flow.controller.window
    sent_at = flow.now
    flow.send(before)
    flow.now += 0.1
    for lost in range(5):
        flow.controller.on_loss(
            now=flow.now + lost / 1000, sent_at=sent_at + lost / 1000, lost=MSS, in_flight=before, persistent=False
        )
    assert flow.controller.window == pytest.approx(0.7 * before, abs=1)


def test_what_left_after_a_reduction_may_cause_the_next(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    flow.lose()
    window = flow.controller.window
    flow.controller.on_loss(now=flow.now + 0.1, sent_at=flow.now, lost=MSS, in_flight=window, persistent=False)
    assert flow.controller.window == pytest.approx(0.7 * window, abs=1)


def test_recovery_ends_with_what_left_after_the_reduction(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    flow.lose()
    window, reduced_at = flow.controller.window, flow.now
    flow.now += 0.05
    flow.ack(10 * MSS, sent_at=reduced_at - 0.01, in_flight=window)
    assert (flow.controller.window, flow.mode()) == (window, "recovery")
    flow.now += 0.06
    flow.ack(10 * MSS, sent_at=reduced_at + 0.01, in_flight=window)
    assert flow.mode() == "congestion_avoidance"
    assert flow.controller.window > window


def test_the_reduction_is_of_what_was_in_flight(sender: Callable[..., Any]) -> None:
    """An application that used 100 of 1000 segments for two round trips has shown no more (RFC 9438 4.6)."""
    flow = sender()
    flow.grow_to(1000)
    for _ in range(3):
        flow.round(flight=100 * MSS, app_limited=True)
    flow.lose(flight=100 * MSS)
    assert flow.controller.window == flow.state("ssthresh") == 70 * MSS
    assert flow.state("w_max") == 1000 * MSS


def test_what_was_in_flight_a_round_trip_ago_still_counts(sender: Callable[..., Any]) -> None:
    """The flight that is being acknowledged, not the one that has just begun."""
    flow = sender()
    flow.grow_to(1000)
    flow.round()  # slow start makes it 2000
    flow.round()
    window, sent_at = flow.controller.window, flow.now
    flow.send(window)
    flow.now += 0.1
    flow.ack(window - 10 * MSS, sent_at=sent_at, in_flight=10 * MSS, round_start=True)
    grown = flow.controller.window
    flow.controller.on_loss(now=flow.now, sent_at=sent_at, lost=MSS, in_flight=9 * MSS, persistent=False)
    assert grown > 1.9 * window
    assert flow.controller.window == pytest.approx(0.7 * window, abs=1)


def test_how_acknowledgements_are_gathered_does_not_change_the_reduction(sender: Callable[..., Any]) -> None:
    """The whole flight but the lost segment is acknowledged before the loss is told: nothing is in flight then."""
    flow = steady(sender)
    before = flow.controller.window
    sent_at = flow.now
    flow.send(before)
    flow.now += 0.1
    flow.controller.on_loss(now=flow.now, sent_at=sent_at, lost=MSS, in_flight=0, persistent=False)
    assert flow.controller.window == pytest.approx(0.7 * before, abs=1)


def test_a_loss_leaves_two_segments_at_least(sender: Callable[..., Any]) -> None:
    flow = sender(initial_window=2)
    for _ in range(5):
        flow.lose()
    assert (flow.controller.window, flow.state("ssthresh")) == (2 * MSS, 2 * MSS)


# ---- explicit congestion notification ------------------------------------------------------------------


def test_a_mark_counts_as_a_loss_once_per_round_trip(sender: Callable[..., Any]) -> None:
    marked, lossy = steady(sender), steady(sender)
    before = marked.controller.window
    marked.round(acks=4, ecn_ce=MSS)
    lossy.lose()
    assert variables(marked) == variables(lossy)
    window = marked.controller.window
    assert window == pytest.approx(0.7 * before, abs=1)
    marked.ack(MSS, sent_at=marked.now - 0.01, in_flight=window, ecn_ce=MSS)
    assert marked.controller.window == window
    marked.round(ecn_ce=MSS)
    assert marked.controller.window == pytest.approx(0.7 * window, abs=1)


def test_marks_go_on_to_one_segment_and_leave_ssthresh_at_two(sender: Callable[..., Any]) -> None:
    flow = sender(initial_window=2)
    for _ in range(5):
        flow.round(ecn_ce=MSS)
    assert (flow.controller.window, flow.state("ssthresh")) == (MSS, 2 * MSS)


# ---- timeouts -----------------------------------------------------------------------------------------


def test_a_timeout_leaves_one_segment_and_slow_start_to_seven_tenths(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    before = flow.controller.window
    flow.lose(persistent=True)
    assert flow.controller.window == MSS
    assert flow.state("ssthresh") == pytest.approx(0.7 * before, abs=1)
    flow.round()
    assert (flow.controller.window, flow.mode()) == (2 * MSS, "slow_start")


def test_the_stage_after_a_timeout_begins_at_its_own_plateau(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    flow.lose(persistent=True)
    while flow.mode() != "congestion_avoidance":
        flow.round()
    assert flow.state("k") == 0
    assert flow.state("w_max") == flow.state("ssthresh")
    assert flow.state("w_max") <= flow.controller.window < flow.state("w_max") + MSS


def test_a_timeout_of_the_retransmission_leaves_ssthresh_alone(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    flow.lose(persistent=True)
    ssthresh = flow.state("ssthresh")
    for _ in range(3):
        flow.lose(persistent=True)
        assert (flow.controller.window, flow.state("ssthresh")) == (MSS, ssthresh)
    flow.round()
    flow.round()
    flow.lose(persistent=True)
    assert flow.state("ssthresh") < ssthresh


def test_a_timeout_in_recovery_is_the_same_congestion_event(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    sent_at = flow.now
    flow.lose()
    ssthresh = flow.state("ssthresh")
    flow.controller.on_loss(now=flow.now + 1, sent_at=sent_at, lost=MSS, in_flight=0, persistent=True)
    assert (flow.controller.window, flow.state("ssthresh")) == (MSS, ssthresh)


def test_a_timeout_for_what_left_long_ago_ends_the_stage_too(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    ssthresh = flow.state("ssthresh")
    flow.controller.on_loss(now=flow.now, sent_at=0.0, lost=MSS, in_flight=0, persistent=True)
    assert (flow.controller.window, flow.state("ssthresh")) == (MSS, ssthresh)
    while flow.mode() != "congestion_avoidance":
        flow.round()
    assert (flow.state("k"), flow.state("w_max"), flow.state("t")) == (0, ssthresh, 0)


# ---- spurious losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("persistent", [False, True])
def test_a_spurious_congestion_event_is_taken_back_whole(sender: Callable[..., Any], persistent: bool) -> None:
    flow = steady(sender)
    before = variables(flow)
    flow.lose(persistent=persistent)
    assert variables(flow) != before
    flow.controller.on_spurious_loss(now=flow.now)
    assert variables(flow) == before
    flow.round()
    assert flow.controller.window > before["cwnd"]


def test_a_spurious_loss_in_the_first_slow_start_resumes_it(sender: Callable[..., Any]) -> None:
    flow = sender()
    flow.round()
    flow.lose()
    flow.controller.on_spurious_loss(now=flow.now)
    assert (flow.controller.window, flow.mode()) == (20 * MSS, "slow_start")
    assert "ssthresh" not in flow.controller.state()
    flow.round()
    assert flow.controller.window == 40 * MSS


def test_a_congestion_event_is_taken_back_once(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    flow.lose()
    flow.controller.on_spurious_loss(now=flow.now)
    for _ in range(3):
        flow.round()
    now = variables(flow)
    flow.controller.on_spurious_loss(now=flow.now)
    assert variables(flow) == now


def test_a_window_that_has_outgrown_the_event_stays(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    before = flow.controller.window
    flow.lose()
    while flow.controller.window <= before:
        flow.round()
    now = variables(flow)
    flow.controller.on_spurious_loss(now=flow.now)
    assert variables(flow) == now


def test_a_mark_is_never_spurious(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    flow.round(ecn_ce=MSS)
    now = variables(flow)
    flow.controller.on_spurious_loss(now=flow.now)
    assert variables(flow) == now


def test_a_loss_that_is_real_counts_after_one_that_was_not(sender: Callable[..., Any]) -> None:
    flow = steady(sender)
    before, sent_at = flow.controller.window, flow.now
    flow.lose()
    flow.controller.on_spurious_loss(now=flow.now)
    flow.controller.on_loss(now=flow.now, sent_at=sent_at, lost=MSS, in_flight=before - MSS, persistent=False)
    assert flow.controller.window == pytest.approx(0.7 * before, abs=1)


# ---- whatever happens ---------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ack", "ack", "ack", "loss", "mark", "timeout", "spurious", "pause"]),
        st.integers(0, 100),
        st.booleans(),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(events=EVENTS, initial=st.integers(1, 50), rtt=st.sampled_from([0.0005, 0.03, 0.6]))
def test_only_congestion_makes_the_window_smaller_and_nothing_makes_it_less_than_a_segment(
    events: list[tuple[str, int, bool]], initial: int, rtt: float
) -> None:
    controller = CubicController({"initial_window": initial}, mss=MSS)
    now, delivered = 0.0, 0
    for event, percent, app_limited in events:
        before = controller.window
        flight = max(MSS, before * percent // 100)
        controller.on_sent(now=now, size=flight, in_flight=flight, app_limited=app_limited)
        sent_at, now = now, now + rtt
        if event in ("ack", "mark"):
            delivered += flight
            controller.on_ack(
                AckSample(
                    now=now, sent_at=sent_at, acked=flight, lost=0, rtt=rtt, in_flight=0, prior_in_flight=flight,
                    delivered=delivered, prior_delivered=delivered - flight, delivery_rate=flight / rtt,
                    app_limited=app_limited, round_start=True, ecn_ce=MSS if event == "mark" else 0,
                )
            )  # fmt: skip
            assert controller.window >= before if event == "ack" else controller.window <= before
        elif event in ("loss", "timeout"):
            controller.on_loss(now=now, sent_at=sent_at, lost=flight, in_flight=0, persistent=event == "timeout")
            assert controller.window <= before
        elif event == "spurious":
            controller.on_spurious_loss(now=now)
            assert controller.window >= before
        else:
            now += 1000 * rtt
        assert controller.window >= MSS
        state = controller.state()
        assert state["cwnd"] == controller.window
        assert all(isinstance(value, str) or 0 <= value < float("inf") for value in state.values())
        assert state.get("ssthresh", 2 * MSS) >= 2 * MSS
