"""What a controller counts of its flow."""

from __future__ import annotations

from amst_core.congestion import FlowAccount
from amst_core.interfaces import AckSample


def ack(acked: int, *, rtt: float | None = None, rate: float | None = None) -> AckSample:
    return AckSample(
        now=1.0, sent_at=0.9, acked=acked, lost=0, rtt=rtt, in_flight=500, prior_in_flight=500 + acked,
        delivered=acked, prior_delivered=0, delivery_rate=rate, app_limited=False, round_start=False,
    )  # fmt: skip


def test_what_is_not_known_is_not_told():
    state = FlowAccount().state("x", window=10, pacing_rate=None)
    assert state == {"algorithm": "x", "cwnd": 10, "in_flight": 0, "sent": 0, "acked": 0, "lost": 0, "loss_rate": 0.0}


def test_everything_adds_up():
    account = FlowAccount()
    account.on_sent(1000, 1000)
    account.on_sent(1000, 2000)
    account.on_ack(ack(1000, rtt=0.2, rate=5000.0))
    account.on_loss(500, 500)
    account.on_ack(ack(500, rtt=0.1, rate=4000.0))
    account.on_ack(ack(0))
    assert account.state("x", window=10, pacing_rate=7.0) == {
        "algorithm": "x", "cwnd": 10, "in_flight": 500, "sent": 2000, "acked": 1500, "lost": 500, "loss_rate": 0.25,
        "rtt": 0.1, "min_rtt": 0.1, "bandwidth": 4000.0, "max_bandwidth": 5000.0, "pacing_rate": 7.0,
    }  # fmt: skip


def test_the_shortest_round_trip_and_the_best_rate_stay():
    account = FlowAccount()
    account.on_ack(ack(1, rtt=0.1, rate=5000.0))
    account.on_ack(ack(1, rtt=0.3, rate=3000.0))
    assert (account.rtt, account.min_rtt) == (0.3, 0.1)
    assert (account.bandwidth, account.max_bandwidth) == (3000.0, 5000.0)
