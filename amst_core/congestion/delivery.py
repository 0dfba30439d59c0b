"""Delivery-rate samples: how fast a flow's bytes arrive, estimated from every acknowledgement.

The algorithm is that of draft-cheng-iccrg-delivery-rate-estimation (Linux: tcp_rate.c): each packet takes along what
had been delivered when it left; the acknowledgement of it then tells how much was delivered, and in what time.
"""

from __future__ import annotations

from ..interfaces import AckSample

__all__ = ["DeliveryRateSampler", "SentPacket"]


class SentPacket:
    """What must be remembered of a packet until it is acknowledged. Drivers may derive their own record from it.

    Attributes:
        size: bytes; ``retransmission``: it was sent before under the same number, so its acknowledgement may be the
            first one's and tells no round-trip time. The driver sets both before `DeliveryRateSampler.on_sent`.
        sent_at: when it left.
        delivered, delivered_at, first_sent_at, app_limited: the sampler's variables when it left.
    """

    __slots__ = ("app_limited", "delivered", "delivered_at", "first_sent_at", "retransmission", "sent_at", "size")

    size: int
    retransmission: bool
    sent_at: float
    delivered: int
    delivered_at: float
    first_sent_at: float
    app_limited: bool

    def __init__(self, size: int, *, retransmission: bool = False) -> None:
        self.size = size
        self.retransmission = retransmission


class DeliveryRateSampler:
    """Turns what was sent and acknowledged into the `AckSample` that controllers are fed. Pure: ``now`` is passed in.

    For each packet that leaves `on_sent`; for each acknowledgement `on_delivered` once per packet that it covers for
    the first time, then `sample`. When there is room to send and nothing to send, `on_app_limited`.

    A sample's rate is the smaller of the rate at which the packets left and the rate at which they were acknowledged
    (section 2.2 of the draft: acknowledgements that were held back and came at once say nothing of the path); one over
    less than the shortest round trip is no estimate (section 3.3).

    Attributes:
        delivered: bytes acknowledged so far; ``delivered_at``: when the last of them were.
        min_rtt: the shortest round trip ever seen, None before the first. Linux forgets it after 300 s
            (``tcp_min_rtt_wlen``), here it stays: where a path becomes longer, rates over less than its new round trip
            pass.
    """

    __slots__ = (
        "_acked", "_app_limited_until", "_first_sent_at", "_newest", "_round_ends_at", "delivered", "delivered_at",
        "min_rtt",
    )  # fmt: skip

    def __init__(self) -> None:
        self.delivered = 0
        self.delivered_at = 0.0
        self.min_rtt: float | None = None
        self._first_sent_at = 0.0
        self._app_limited_until = 0
        self._round_ends_at = 0
        self._acked = 0
        self._newest: SentPacket | None = None

    @property
    def app_limited(self) -> bool:
        """Whether packets that leave now are marked: the gap in which nothing was sent is still under way."""
        return self._app_limited_until > 0

    def on_sent(self, packet: SentPacket, *, now: float, prior_in_flight: int) -> None:
        """``packet`` leaves; ``prior_in_flight`` does not count it.

        When nothing is in flight, the time that counts begins anew. Linux (``tcp_rate_skb_sent``) asks for nothing
        outstanding instead, what is known to be lost included: after a loss of all that was under way it goes on.
        """
        if not prior_in_flight:
            self._first_sent_at = self.delivered_at = now
        packet.sent_at = now
        packet.delivered = self.delivered
        packet.delivered_at = self.delivered_at
        packet.first_sent_at = self._first_sent_at
        packet.app_limited = self._app_limited_until > 0

    def on_app_limited(self, in_flight: int) -> None:
        """The application has nothing to send although the window has room, and nothing lost waits to be sent again.

        What leaves from now on is marked until all that is under way now has been acknowledged.
        """
        self._app_limited_until = self.delivered + in_flight or 1

    def on_delivered(self, packet: SentPacket, *, now: float) -> None:
        """``packet`` is acknowledged for the first time."""
        self.delivered += packet.size
        self.delivered_at = now
        self._acked += packet.size
        newest = self._newest
        if newest is None or packet.sent_at >= newest.sent_at:
            self._newest = packet

    def sample(self, *, now: float, lost: int, in_flight: int, prior_in_flight: int, ecn_ce: int = 0) -> AckSample:
        """The sample of one acknowledgement, after `on_delivered` for at least one packet.

        Raises:
            ValueError: nothing was delivered since the last sample.
        """
        packet = self._newest
        if packet is None:
            raise ValueError("a sample without a delivered packet; call on_delivered first")
        self._newest = None
        acked, self._acked = self._acked, 0
        sent_at = packet.sent_at
        self._first_sent_at = sent_at
        delivered = self.delivered
        if self._app_limited_until and delivered > self._app_limited_until:
            self._app_limited_until = 0
        min_rtt = self.min_rtt
        if packet.retransmission:
            rtt = None
        else:
            rtt = now - sent_at
            if min_rtt is None or rtt < min_rtt:
                self.min_rtt = min_rtt = rtt
        interval = sent_at - packet.first_sent_at
        elapsed = now - packet.delivered_at
        if elapsed > interval:
            interval = elapsed
        prior_delivered = packet.delivered
        if interval <= 0 or (min_rtt is not None and interval < min_rtt):
            rate = None
        else:
            rate = (delivered - prior_delivered) / interval
        round_start = prior_delivered >= self._round_ends_at
        if round_start:
            self._round_ends_at = delivered
        return AckSample(
            now, sent_at, acked, lost, rtt, in_flight, prior_in_flight, delivered, prior_delivered, rate,
            packet.app_limited, round_start, ecn_ce,
        )  # fmt: skip
