"""HyStart++ (RFC 9406): when slow start becomes conservative, goes on, and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from amst_core.interfaces import AckSample

MSS = 1000


def slow_start(sender: Callable[..., Any], rtt: float, **options: object) -> Any:
    """Two round trips of at least eight samples at ``rtt``."""
    flow = sender(rtt=rtt, **options)
    flow.round(acks=10)
    flow.round(acks=10)
    assert flow.mode() == "slow_start"
    return flow


@pytest.mark.parametrize(
    ("rtt", "threshold"),
    [(0.001, 0.004), (0.032, 0.004), (0.064, 0.008), (0.128, 0.016), (1.0, 0.016)],
)
def test_the_threshold_is_an_eighth_of_the_last_round_within_4_and_16_ms(
    sender: Callable[..., Any], rtt: float, threshold: float
) -> None:
    below, above = slow_start(sender, rtt), slow_start(sender, rtt)
    below.round(acks=8, rtt=rtt + threshold - 1e-6)
    above.round(acks=8, rtt=rtt + threshold + 1e-6)
    assert (below.mode(), above.mode()) == ("slow_start", "css")


@pytest.mark.parametrize(("samples", "mode"), [(7, "slow_start"), (8, "css")])
def test_it_takes_eight_samples(sender: Callable[..., Any], samples: int, mode: str) -> None:
    flow = slow_start(sender, 0.1)
    flow.round(acks=samples, rtt=0.15)
    assert flow.mode() == mode


def test_one_short_round_trip_among_eight_is_enough_to_go_on(sender: Callable[..., Any]) -> None:
    flow = slow_start(sender, 0.1)
    sent_at = flow.now
    flow.send(40 * MSS)
    for part in range(8):
        flow.now = sent_at + 0.15
        flow.ack(
            MSS, sent_at=sent_at, in_flight=(39 - part) * MSS, rtt=0.1 if part == 3 else 0.15, round_start=part == 0
        )
    assert flow.mode() == "slow_start"


def test_the_round_before_counts_not_the_shortest_of_all(sender: Callable[..., Any]) -> None:
    """A delay that rises slowly, by less than the threshold a round, is no reason."""
    flow = slow_start(sender, 0.1)
    for step in range(1, 6):
        flow.round(acks=8, rtt=0.1 + 0.012 * step)
        assert flow.mode() == "slow_start"


def css(sender: Callable[..., Any], **options: object) -> Any:
    flow = slow_start(sender, 0.1, **options)
    flow.round(acks=8, rtt=0.15)
    assert flow.mode() == "css"
    return flow


def test_conservative_slow_start_grows_a_quarter_as_fast(sender: Callable[..., Any]) -> None:
    flow = css(sender)
    before = flow.controller.window
    flow.round(acks=1, rtt=0.15)
    assert flow.controller.window == before + before // 4
    unpaced = css(sender, pacing=False)
    before = unpaced.controller.window
    unpaced.round(acks=1, rtt=0.15)
    assert unpaced.controller.window == before + 2 * MSS


def test_it_lasts_five_rounds_of_which_the_one_it_began_in_is_the_first(sender: Callable[..., Any]) -> None:
    flow = css(sender)
    for _ in range(4):
        flow.round(acks=8, rtt=0.15)
        assert flow.mode() == "css"
        assert "ssthresh" not in flow.controller.state()
    window = flow.controller.window
    flow.round(acks=8, rtt=0.15)
    assert flow.mode() == "congestion_avoidance"
    assert flow.state("ssthresh") == flow.state("cwnd_prior") == flow.state("w_max") == window
    assert flow.state("k") == 0


def test_a_delay_that_falls_below_where_it_began_resumes_slow_start(sender: Callable[..., Any]) -> None:
    flow = css(sender)
    flow.round(acks=7, rtt=0.149)
    assert flow.mode() == "css"
    flow.round(acks=8, rtt=0.149)
    assert flow.mode() == "slow_start"
    before = flow.controller.window
    flow.round(acks=1, rtt=0.149)
    assert flow.controller.window == 2 * before


def test_slow_start_that_was_resumed_has_five_rounds_again(sender: Callable[..., Any]) -> None:
    flow = css(sender)
    for _ in range(3):
        flow.round(acks=8, rtt=0.15)
    flow.round(acks=8, rtt=0.1)
    assert flow.mode() == "slow_start"
    flow.round(acks=8, rtt=0.15)
    for _ in range(4):
        assert flow.mode() == "css"
        flow.round(acks=8, rtt=0.15)
    assert flow.mode() == "css"
    flow.round(acks=8, rtt=0.15)
    assert flow.mode() == "congestion_avoidance"


@pytest.mark.parametrize("how", ["loss", "mark"])
def test_congestion_ends_it(sender: Callable[..., Any], how: str) -> None:
    flow = css(sender)
    before = flow.controller.window
    if how == "loss":
        flow.lose()
    else:
        flow.round(ecn_ce=MSS)
    assert flow.controller.window == flow.state("ssthresh") == pytest.approx(0.7 * before, abs=1)


def test_a_later_slow_start_is_an_ordinary_one(sender: Callable[..., Any]) -> None:
    """RFC 9406 4.3: ssthresh, not the delay, ends those that follow a timeout."""
    flow = css(sender)
    flow.grow_to(400)
    flow.lose(persistent=True)
    windows = []
    for turn in range(8):
        assert flow.mode() in ("recovery", "slow_start")
        flow.round(acks=8, rtt=0.1 * (turn + 1))
        windows.append(flow.segments)
    assert windows == [2, 4, 8, 16, 32, 64, 128, 256]
    flow.round(acks=8, rtt=1.0)
    assert flow.mode() == "congestion_avoidance"
    assert flow.state("ssthresh") == pytest.approx(280 * MSS, abs=1)


def test_it_can_be_turned_off(sender: Callable[..., Any]) -> None:
    flow = slow_start(sender, 0.1, hystart=False)
    for step in range(1, 7):
        before = flow.controller.window
        flow.round(acks=10, rtt=0.1 + 0.1 * step)
        assert (flow.controller.window, flow.mode()) == (2 * before, "slow_start")


def test_what_was_sent_twice_gives_no_sample(sender: Callable[..., Any]) -> None:
    """Seven samples and acknowledgements without one: not enough."""
    flow = slow_start(sender, 0.1)
    sent_at = flow.now
    flow.send(40 * MSS)
    flow.now += 0.15
    for part in range(7):
        flow.ack(MSS, sent_at=sent_at, in_flight=(39 - part) * MSS, rtt=0.15, round_start=part == 0)
    for part in range(7, 20):
        flow.controller.on_ack(
            AckSample(
                now=flow.now, sent_at=sent_at, acked=MSS, lost=0, rtt=None, in_flight=(39 - part) * MSS,
                prior_in_flight=(40 - part) * MSS, delivered=0, prior_delivered=0, delivery_rate=None,
                app_limited=False, round_start=False,
            )
        )  # fmt: skip
    assert flow.mode() == "slow_start"
