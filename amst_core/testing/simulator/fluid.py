"""Flows too large for a packet each: acknowledgements come in portions, a fixed number in each round trip."""

from __future__ import annotations

import math
from collections import deque
from random import Random

from ...congestion import DeliveryRateSampler, SentPacket
from ...errors import UsageError
from ...interfaces import CongestionController
from .loss import LossModel

__all__ = ["FluidFlow"]

_GAIN = 1.2
"""How much faster than window / round trip an unpaced controller may send: spreads its portions (Linux: 120 %)."""


class FluidFlow:
    """One flow over a path of a fixed round trip, without a bottleneck, that loses one packet now and then.

    For response functions at loss rates of 1e-6 and less, where a round trip is 10^4 to 10^6 packets: the cost is that
    of ``acks_per_round`` acknowledgements in each round trip, whatever the window. The controller is told of the same
    things in the same order as by `Flow`; a portion is at least one packet, so that windows below ``acks_per_round``
    packets are acknowledged packet by packet. A loss is told of with the rest of the portion that it was in. There are
    no timeouts.

    `Periodic` loses at equal distances, which is how the tables of RFC 9438 section 5.1 are derived; other models draw.

    Args:
        rtt: seconds.
        loss: None: nothing is lost.
        mss: bytes of a packet.

    Raises:
        UsageError: a value that makes no sense.

    Attributes:
        now: seconds since the start.
        sent, delivered, lost, in_flight: bytes; the first is the sum of the others. What is lost is not sent again.
        losses: how many packets were lost so far.
    """

    def __init__(
        self,
        controller: CongestionController,
        *,
        rtt: float,
        loss: LossModel | None = None,
        mss: int = 1448,
        acks_per_round: int = 64,
        seed: int = 1,
    ) -> None:
        if not 0 < rtt < math.inf:
            raise UsageError(f"fluid flow: rtt is {rtt!r}; it is seconds, above 0")
        if mss < 1 or acks_per_round < 1:
            raise UsageError(f"fluid flow: mss is {mss!r}, acks_per_round {acks_per_round!r}; both are 1 or more")
        self.controller = controller
        self.rtt = rtt
        self.mss = mss
        self.acks_per_round = acks_per_round
        self.now = 0.0
        self.sent = 0
        self.delivered = 0
        self.lost = 0
        self.losses = 0
        self.in_flight = 0
        self._sampler = DeliveryRateSampler()
        self._pipe: deque[tuple[SentPacket, int]] = deque()
        """Portions under way, each with the bytes of it that are gone."""
        self._send_at = 0.0
        self._gaps = iter(()) if loss is None else iter(loss.gaps(Random(f"{seed}/loss/0/0")))
        self._survive = next(self._gaps, math.inf)

    def run(self, *, seconds: float = math.inf, losses: float = math.inf) -> float:
        """Go on for so many ``seconds``, or until so many more packets were told lost, whichever is first.

        Returns:
            The controller's window on the average of that time, in bytes.

        Raises:
            UsageError: neither is given.
        """
        if not 0 < min(seconds, losses) < math.inf:
            raise UsageError("fluid flow: run needs seconds or losses, above 0")
        start, end, told = self.now, self.now + seconds, self.losses + losses
        area = 0.0
        controller, mss, pipe = self.controller, self.mss, self._pipe
        while self.losses < told:
            window = controller.window
            portion = max(1, window // (mss * self.acks_per_round)) * mss
            heard_at = pipe[0][0].sent_at + self.rtt if pipe else math.inf
            send_at = max(self.now, self._send_at) if self.in_flight + portion <= window or not pipe else math.inf
            time = min(heard_at, send_at)
            if time > end:
                area += window * (end - self.now)
                self.now = end
                break
            area += window * (time - self.now)
            self.now = time
            if send_at < heard_at:
                self._send(time, window, portion)
            else:
                self._hear(time)
        return area / (self.now - start)

    def _send(self, now: float, window: int, size: int) -> None:
        rate = self.controller.pacing_rate
        self._send_at = now + size / (_GAIN * window / self.rtt if rate is None else rate)
        packet = SentPacket(size)
        self._sampler.on_sent(packet, now=now, prior_in_flight=self.in_flight)
        self.sent += size
        self.in_flight += size
        left, gone = size // self.mss, 0
        while self._survive < left:
            left -= int(self._survive) + 1
            gone += 1
            self._survive = next(self._gaps, math.inf)
        self._survive -= left
        self._pipe.append((packet, gone))
        self.controller.on_sent(now=now, size=size, in_flight=self.in_flight, app_limited=False)

    def _hear(self, now: float) -> None:
        packet, gone = self._pipe.popleft()
        prior, lost = self.in_flight, gone * self.mss
        self.in_flight -= packet.size
        packet.size -= lost
        if lost:
            self.losses += gone
            self.lost += lost
            self.controller.on_loss(
                now=now, sent_at=packet.sent_at, lost=lost, in_flight=self.in_flight, persistent=False
            )
        if packet.size:
            self.delivered += packet.size
            self._sampler.on_delivered(packet, now=now)
            sample = self._sampler.sample(now=now, lost=lost, in_flight=self.in_flight, prior_in_flight=prior)
            self.controller.on_ack(sample)
