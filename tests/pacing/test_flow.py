"""The lanes of a session as one flow: sums, bandwidth, round trip, and what a controller is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest

from amst_core.interfaces import AckSample, CongestionController, FlowSample
from amst_core.pacing import SessionFlow
from amst_core.pacing.flow import MIN_RTT_WINDOW_S, RATE_ROUNDS

TICK = 0.02
RTT = 0.1
RATE = 1_000_000
Tells = Callable[..., FlowSample]


class Ear(CongestionController):
    """Keeps what it is told, in order."""

    name = "ear"

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    @property
    def window(self) -> int:
        return 10_000

    @property
    def pacing_rate(self) -> float | None:
        return None

    def on_sent(self, **what: Any) -> None:
        self.heard.append(("sent", what))

    def on_ack(self, sample: AckSample) -> None:
        self.heard.append(("ack", sample))

    def on_loss(self, **what: Any) -> None:
        self.heard.append(("loss", what))

    def state(self) -> Mapping[str, float | str]:
        return {}

    def acks(self) -> list[AckSample]:
        return [what for name, what in self.heard if name == "ack"]


@pytest.fixture
def flow() -> SessionFlow:
    return SessionFlow(None, tick_s=TICK)


def ticks(start: float, end: float) -> Iterator[float]:
    """The times of looks, exact to the tick; `end` is the last."""
    return (number * TICK for number in range(round(start / TICK), round(end / TICK) + 1))


def carry(flow: SessionFlow, tells: Tells, start: float, end: float, rate: float, *, rtt_s: float = RTT) -> None:
    """One lane delivers at ``rate`` from what was delivered before on."""
    before, began = flow.delivered, start - TICK
    for now in ticks(start, end):
        flow.observe({1: tells(before + round(rate * (now - began)), rtt_s=rtt_s)}, now, limited=False)


# ---- sums -------------------------------------------------------------------------------------


def test_lanes_are_summed_up(flow: SessionFlow, tells: Tells) -> None:
    one = tells(1000, sent=1500, lost=300, in_flight=200, window=5000, unsent=7)
    two = tells(20_000, sent=25_000, lost=4000, in_flight=1000, window=60_000, unsent=80)
    flow.observe({1: one, 2: two}, 0.0, limited=False)
    assert (flow.delivered, flow.sent, flow.lost) == (21_000, 26_500, 4300)
    assert (flow.in_flight, flow.window, flow.unsent) == (1200, 65_000, 87)


def test_a_new_lane_counts_from_its_start(flow: SessionFlow, tells: Tells) -> None:
    flow.observe({1: tells(1000, lost=10)}, 0.0, limited=False)
    flow.observe({1: tells(1500, lost=10), 2: tells(700, lost=20)}, TICK, limited=False)
    assert (flow.delivered, flow.sent, flow.lost) == (2200, 2200, 30)


def test_a_lane_that_goes_takes_nothing_away_but_what_it_had_under_way(flow: SessionFlow, tells: Tells) -> None:
    flow.observe({1: tells(1000, in_flight=10), 2: tells(700, lost=9, in_flight=50)}, 0.0, limited=False)
    flow.observe({1: tells(1000, in_flight=10)}, TICK, limited=False)
    assert (flow.delivered, flow.sent, flow.lost) == (1700, 1700, 9)
    assert (flow.in_flight, flow.window) == (10, 100_000)
    flow.observe({1: tells(1200)}, 2 * TICK, limited=False)
    assert flow.delivered == 1900


def test_totals_never_fall_when_a_segment_becomes_shorter(flow: SessionFlow, tells: Tells) -> None:
    """The system counts segments: bytes are those times the length of now."""
    flow.observe({1: tells(14_000, lost=1400), 2: tells(500)}, 0.0, limited=False)
    flow.observe({1: tells(12_000, lost=1200), 2: tells(800)}, TICK, limited=False)
    assert (flow.delivered, flow.sent, flow.lost) == (14_800, 14_800, 1400)
    flow.observe({1: tells(13_000, lost=1200), 2: tells(800)}, 2 * TICK, limited=False)
    assert (flow.delivered, flow.sent, flow.lost) == (15_800, 15_800, 1400)


def test_without_lanes_all_stays_as_it_was(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    before = (flow.delivered, flow.bandwidth, flow.min_rtt_s)
    flow.observe({}, 1.0 + TICK, limited=False)
    assert (flow.delivered, flow.bandwidth, flow.min_rtt_s) == before


# ---- bandwidth --------------------------------------------------------------------------------


def test_the_rate_is_that_of_the_last_round_trip(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    assert flow.rate == pytest.approx(RATE)
    carry(flow, tells, 1.0 + TICK, 1.0 + RTT / 2, RATE / 2)
    assert RATE / 2 < flow.rate < RATE
    carry(flow, tells, 1.0 + RTT / 2 + TICK, 1.0 + 2 * RTT, RATE / 2)
    assert flow.rate == pytest.approx(RATE / 2, rel=0.01)


def test_the_bandwidth_is_the_largest_rate_of_ten_round_trips(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    carry(flow, tells, 1.0 + TICK, 1.0 + (RATE_ROUNDS - 1) * RTT, RATE / 2)
    assert flow.rate == pytest.approx(RATE / 2, rel=0.01)
    assert flow.bandwidth == pytest.approx(RATE, rel=0.01)
    carry(flow, tells, 1.0 + (RATE_ROUNDS - 1) * RTT + TICK, 1.0 + (RATE_ROUNDS + 2) * RTT, RATE / 2)
    assert flow.bandwidth == pytest.approx(RATE / 2, rel=0.01)


def test_of_rates_that_fall_the_largest_of_those_left_counts(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    carry(flow, tells, 1.0 + TICK, 1.5, 0.7 * RATE)
    carry(flow, tells, 1.5 + TICK, 2.3, 0.4 * RATE)
    assert flow.bandwidth == pytest.approx(0.7 * RATE, rel=0.02)


def test_a_faster_path_is_known_after_a_round_trip(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    carry(flow, tells, 1.0 + TICK, 1.0 + RTT + TICK, 3 * RATE)
    assert flow.bandwidth == pytest.approx(3 * RATE, rel=0.01)


@pytest.mark.parametrize(
    ("rtt_s", "most"), [(RTT, 1.25), (0.001, 1.4)], ids=["many in a round trip", "round trips shorter than looks"]
)
def test_acknowledgements_that_come_in_bursts_are_hardly_taken_for_bandwidth(
    flow: SessionFlow, tells: Tells, rtt_s: float, most: float
) -> None:
    """At every other look nothing has come: over one look it would be 2 times the rate, over two 1.33 times."""
    for number in range(1, 300):
        flow.observe({1: tells(round(number // 2 * 2 * TICK * RATE), rtt_s=rtt_s)}, number * TICK, limited=False)
    assert 0.99 * RATE < flow.bandwidth < most * RATE


def test_the_first_look_tells_no_rate_nor_does_one_right_after_it(flow: SessionFlow, tells: Tells) -> None:
    flow.observe({1: tells(50_000)}, 0.0, limited=False)
    flow.observe({1: tells(90_000)}, TICK, limited=False)
    assert flow.bandwidth == flow.rate == 0
    assert flow.capacity == pytest.approx(100_000 / RTT)


# ---- round trips ------------------------------------------------------------------------------


def test_the_round_trip_is_that_of_the_lane_whose_is_shortest(flow: SessionFlow, tells: Tells) -> None:
    flow.observe({1: tells(rtt_s=0.3), 2: tells(rtt_s=0.12), 3: tells(rtt_s=0.9)}, 0.0, limited=False)
    assert flow.rtt_s == flow.min_rtt_s == 0.12


def test_the_shortest_round_trip_outlives_a_queue_of_less_than_its_window(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    carry(flow, tells, 1.0 + TICK, 0.9 * MIN_RTT_WINDOW_S, RATE, rtt_s=2 * RTT)
    assert flow.rtt_s == 2 * RTT
    assert flow.min_rtt_s == RTT
    carry(flow, tells, 0.9 * MIN_RTT_WINDOW_S + TICK, 1.1 * MIN_RTT_WINDOW_S + 1, RATE, rtt_s=2 * RTT)
    assert flow.min_rtt_s == 2 * RTT


def test_a_shorter_round_trip_counts_at_once(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    flow.observe({1: tells(flow.delivered, rtt_s=0.6 * RTT)}, 1.0 + TICK, limited=False)
    assert flow.min_rtt_s == pytest.approx(0.6 * RTT)


def test_round_trips_within_a_few_percent_of_the_shortest_confirm_it(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    carry(flow, tells, 1.0 + TICK, 4 * MIN_RTT_WINDOW_S, RATE, rtt_s=1.04 * RTT)
    assert flow.min_rtt_s == RTT
    assert flow.rtt_s == pytest.approx(1.04 * RTT)


def test_the_product_and_the_capacity_are_those_without_a_queue(flow: SessionFlow, tells: Tells) -> None:
    carry(flow, tells, TICK, 1.0, RATE)
    carry(flow, tells, 1.0 + TICK, 2.0, RATE, rtt_s=2 * RTT)
    assert flow.bdp == pytest.approx(RATE * RTT, rel=0.01)
    assert flow.capacity == pytest.approx(100_000 / RTT)


@pytest.mark.parametrize("rtt_s", [0.1, 0.2, 0.4])
def test_rounds_pass_as_round_trips_do(flow: SessionFlow, tells: Tells, rtt_s: float) -> None:
    carry(flow, tells, TICK, 8.0, RATE, rtt_s=rtt_s)
    assert flow.rounds == pytest.approx(8.0 / rtt_s, rel=0.25)
    assert flow.rounds <= 8.0 / rtt_s + 1


# ---- what the controller is told --------------------------------------------------------------


def test_a_controller_hears_of_all_as_of_one_connection(tells: Tells) -> None:
    ear = Ear()
    flow = SessionFlow(ear, tick_s=TICK)
    flow.observe({1: tells(1000, in_flight=3000), 2: tells(500, in_flight=2000)}, 1.0, limited=False)
    ear.heard.clear()
    later = {
        1: tells(3000, sent=3200, lost=200, in_flight=2500, rtt_s=0.104),
        2: tells(500, sent=900, lost=30, in_flight=2400, rtt_s=0.2),
    }
    flow.observe(later, 1.0 + TICK, limited=False)
    now, sent_at = 1.0 + TICK, pytest.approx(1.0 + TICK - 0.104)
    assert ear.heard == [
        ("sent", {"now": now, "size": 2600, "in_flight": 4900, "app_limited": False}),
        ("loss", {"now": now, "sent_at": sent_at, "lost": 230, "in_flight": 4900, "persistent": False}),
        ("ack", AckSample(
            now=now, sent_at=sent_at, acked=2000, lost=230, rtt=RTT, in_flight=4900, prior_in_flight=5000,
            delivered=3500, prior_delivered=1500, delivery_rate=None, app_limited=False, round_start=True,
        )),
    ]  # fmt: skip


def test_a_controller_hears_nothing_of_a_look_at_which_nothing_has_happened(tells: Tells) -> None:
    ear = Ear()
    flow = SessionFlow(ear, tick_s=TICK)
    flow.observe({1: tells(1000)}, 1.0, limited=False)
    ear.heard.clear()
    flow.observe({1: tells(1000)}, 1.0 + TICK, limited=False)
    assert ear.heard == []


def test_a_controller_is_told_the_rate_over_a_round_trip_and_of_each_round_once(tells: Tells) -> None:
    ear = Ear()
    carry(SessionFlow(ear, tick_s=TICK), tells, TICK, 4.0, RATE)
    acks = ear.acks()
    assert all(ack.delivery_rate == pytest.approx(RATE, rel=0.01) for ack in acks[10:])
    starts = [ack.now for ack in acks if ack.round_start]
    apart = [later - sooner for sooner, later in pairwise(starts[2:])]
    assert apart == [pytest.approx(RTT, abs=1.5 * TICK)] * len(apart)
    assert len(apart) > 20
    for ack in acks[10:]:
        assert ack.delivered - ack.prior_delivered == pytest.approx(RATE * RTT, rel=0.25)
        assert ack.now - ack.sent_at == pytest.approx(RTT)


@pytest.mark.parametrize("unsent", [0, 1000])
@pytest.mark.parametrize("limited", [False, True])
def test_what_something_else_limits_is_marked(tells: Tells, limited: bool, unsent: int) -> None:
    """An acknowledgement whenever it is, what leaves only where nothing waits: that fills the window."""
    ear = Ear()
    flow = SessionFlow(ear, tick_s=TICK)
    flow.observe({1: tells(1000, unsent=unsent)}, 1.0, limited=limited)
    (_, sent), (_, ack) = ear.heard
    assert sent["app_limited"] == (limited and not unsent)
    assert ack.app_limited == limited
