"""Delivery-rate samples, as draft-cheng-iccrg-delivery-rate-estimation defines them."""

from __future__ import annotations

import pytest

from amst_core.congestion import DeliveryRateSampler, SentPacket
from amst_core.interfaces import AckSample


class Path:
    """A sender of packets of 1000 bytes, told of by hand."""

    def __init__(self) -> None:
        self.sampler = DeliveryRateSampler()
        self.in_flight = 0

    def send(self, now: float, *, retransmission: bool = False) -> SentPacket:
        packet = SentPacket(1000, retransmission=retransmission)
        self.sampler.on_sent(packet, now=now, prior_in_flight=self.in_flight)
        self.in_flight += 1000
        return packet

    def ack(self, now: float, *packets: SentPacket, lost: int = 0) -> AckSample:
        prior = self.in_flight
        for packet in packets:
            self.sampler.on_delivered(packet, now=now)
            self.in_flight -= 1000
        self.in_flight -= lost
        return self.sampler.sample(now=now, lost=lost, in_flight=self.in_flight, prior_in_flight=prior)


def test_a_sample_says_what_is_known() -> None:
    path = Path()
    first, second = path.send(1.0), path.send(1.01)
    assert path.ack(1.1, first) == AckSample(
        now=1.1, sent_at=1.0, acked=1000, lost=0, rtt=pytest.approx(0.1), in_flight=1000, prior_in_flight=2000,
        delivered=1000, prior_delivered=0, delivery_rate=pytest.approx(1000 / 0.1), app_limited=False, round_start=True,
    )  # fmt: skip
    sample = path.ack(1.11, second)
    assert (sample.delivered, sample.prior_delivered, sample.in_flight) == (2000, 0, 0)
    assert sample.delivery_rate == pytest.approx(2000 / 0.11)


def test_a_steady_flow_is_delivered_at_the_rate_at_which_it_is_sent() -> None:
    path = Path()
    sent = [path.send(number / 100) for number in range(10)]
    rates = []
    for number in range(10, 100):
        rates.append(path.ack(number / 100, sent.pop(0)).delivery_rate)
        sent.append(path.send(number / 100))
    assert rates[10:] == [pytest.approx(100_000)] * 80


def test_acknowledgements_that_were_held_back_do_not_make_the_path_faster() -> None:
    path = Path()
    sent = [path.send(number / 100) for number in range(30)]
    path.ack(0.30, sent[0])
    last = path.send(0.30)
    path.ack(0.31, *sent[1:])
    # 30 packets were acknowledged within 0.1 s, but it took 0.3 s to send them.
    assert path.ack(0.40, last).delivery_rate == pytest.approx(100_000)


def test_the_newest_packet_of_an_acknowledgement_counts() -> None:
    path = Path()
    old, new = path.send(1.0), path.send(1.05)
    sample = path.ack(1.2, new, old)
    assert sample.sent_at == 1.05
    assert sample.rtt == pytest.approx(0.15)
    assert sample.acked == 2000


def test_of_a_retransmission_no_round_trip_can_be_told() -> None:
    path = Path()
    path.ack(1.1, path.send(1.0))
    sample = path.ack(1.3, path.send(1.2, retransmission=True))
    assert sample.rtt is None
    assert sample.delivery_rate is not None
    assert path.sampler.min_rtt == pytest.approx(0.1)


def test_less_than_the_shortest_round_trip_is_no_estimate() -> None:
    path = Path()
    path.ack(1.1, path.send(1.0))
    sent = path.send(1.2, retransmission=True)  # acknowledged for the copy before it
    assert path.ack(1.21, sent).delivery_rate is None


def test_what_leaves_after_a_gap_is_marked_until_what_was_under_way_is_acknowledged() -> None:
    path = Path()
    first, second = path.send(1.0), path.send(1.0)
    assert not path.sampler.app_limited
    path.sampler.on_app_limited(path.in_flight)
    third = path.send(1.05)
    marks = [path.ack(1.1, first).app_limited, path.ack(1.1, second).app_limited]
    assert path.sampler.app_limited
    marks.append(path.ack(1.15, third).app_limited)
    assert not path.sampler.app_limited
    marks.append(path.ack(1.3, path.send(1.2)).app_limited)
    assert marks == [False, False, True, False]


def test_a_gap_with_nothing_under_way_is_one_too() -> None:
    path = Path()
    path.sampler.on_app_limited(0)
    assert path.ack(1.1, path.send(1.0)).app_limited
    assert not path.ack(1.3, path.send(1.2)).app_limited


def test_the_time_in_which_nothing_was_under_way_does_not_count() -> None:
    path = Path()
    path.ack(1.1, path.send(1.0))
    assert path.ack(60.1, path.send(60.0)).delivery_rate == pytest.approx(10_000)


def test_a_round_trip_begins_when_what_was_sent_in_it_is_acknowledged() -> None:
    path = Path()
    flight = [path.send(1.0) for _ in range(3)]
    starts = []
    for number in range(3):
        for packet in flight:
            starts.append(path.ack(1.1 + number / 10, packet).round_start)
        flight = [path.send(1.1 + number / 10) for _ in range(3)]
    assert starts == [True, False, False] * 3


def test_a_sample_needs_a_delivery() -> None:
    path = Path()
    path.send(1.0)
    with pytest.raises(ValueError, match="on_delivered"):
        path.sampler.sample(now=1.1, lost=0, in_flight=0, prior_in_flight=1000)
