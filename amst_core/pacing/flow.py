"""The lanes of a session seen as one flow: what they delivered, lost and have under way together."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

from ..congestion import WindowedMin
from ..interfaces import AckSample, CongestionController, FlowSample

MIN_RTT_WINDOW_S: Final = 10.0
"""The shortest round trip of so long is that of the path without a queue (as BBR has it)."""

RATE_ROUNDS: Final = 10
"""The bandwidth is the largest delivery rate of so many round trips."""

_SAME_RTT: Final = 1.05
"""A smoothed round trip so near to the shortest one shows that there still is no queue."""

_LEAST_SPAN: Final = 0.6  # of the span that a rate is measured over: with less behind it, it is noise


class SessionFlow:
    """Sums what the lanes tell at each look, and feeds a controller as if one connection had been acknowledged.

    A sample of the delivery rate spans a round trip, or two looks where that is shorter: over less, the bursts in which
    acknowledgements come would be taken for bandwidth. The round trip is that of the lane whose is shortest: queues at
    the bottleneck delay all of them alike, what else delays one (a loss, a slow peer) is not the path's.

    Attributes:
        delivered, lost, sent: bytes, over all lanes there ever were.
        in_flight: bytes under way; ``window``: bytes that the lanes' own windows allow; ``unsent``: bytes in lanes that
            wait for either.
        rtt_s: the round trip now; ``min_rtt_s``: without a queue. 0 before the first look.
        rate: bytes/s delivered over the last round trip; ``bandwidth``: the largest of `RATE_ROUNDS` round trips.
        rounds: round trips so far.
    """

    def __init__(self, controller: CongestionController | None, *, tick_s: float) -> None:
        """``controller`` is fed at each `observe`, None where there is none; looks come every ``tick_s``."""
        self._controller = controller
        self._tick_s = tick_s
        self._last: dict[int, FlowSample] = {}
        self._history: deque[tuple[float, int]] = deque()
        self._rates: deque[tuple[float, float]] = deque()
        self._min_rtt = WindowedMin(MIN_RTT_WINDOW_S)
        self._round_ends_at = 0
        self.delivered = self.lost = self.sent = 0
        self.in_flight = self.window = self.unsent = 0
        self.rtt_s = self.min_rtt_s = 0.0
        self.rate = self.bandwidth = 0.0
        self.rounds = 0

    @property
    def bdp(self) -> float:
        """Bytes that fill the path without a queue."""
        return self.bandwidth * self.min_rtt_s

    @property
    def capacity(self) -> float:
        """Bytes/s that the lanes' windows allow on the path without a queue.

        Over the shortest round trip, for over that of now a queue would look as if there were too few lanes.
        """
        return self.window / self.min_rtt_s if self.min_rtt_s else 0.0

    def rest(self) -> None:
        """Nothing is sent for a while: what was delivered meanwhile is no rate of the path's."""
        self._history.clear()
        self._rates.clear()
        self.rate = self.bandwidth = 0.0

    def observe(self, lanes: Mapping[int, FlowSample], now: float, *, limited: bool) -> None:
        """The lanes at ``now``; ``limited``: something else than the path limits what they deliver."""
        if not lanes:
            self._last = {}
            return
        prior_in_flight = self.in_flight
        before = {id: lane.delivered for id, lane in self._last.items()}
        acked, lost, sent = self._add(lanes)
        # One that sends nothing tells the round trip of long ago.
        moved = [lane.rtt_s for id, lane in lanes.items() if lane.delivered != before.get(id)]
        rtt_s = min(moved or [lane.rtt_s for lane in lanes.values()])
        if self.min_rtt_s and rtt_s <= self.min_rtt_s * _SAME_RTT:
            self._min_rtt.update(min(rtt_s, self.min_rtt_s), now)
            self.rtt_s = rtt_s
            rtt_s = min(rtt_s, self.min_rtt_s)
        else:
            self.rtt_s = rtt_s
        self.min_rtt_s = self._min_rtt.update(rtt_s, now)
        since, delivered_before = self._measure(now, acked)
        new_round = delivered_before >= self._round_ends_at
        if new_round:
            self._round_ends_at = self.delivered
            self.rounds += 1
        controller = self._controller
        if controller is None:
            return
        if sent:
            controller.on_sent(now=now, size=sent, in_flight=self.in_flight, app_limited=limited and not self.unsent)
        sent_at = now - self.rtt_s
        if lost:
            controller.on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=self.in_flight, persistent=False)
        if acked:
            rate = None if since is None else self.rate
            sample = AckSample(
                now, sent_at, acked, lost, rtt_s, self.in_flight, prior_in_flight,
                self.delivered, delivered_before, rate, limited, new_round,
            )  # fmt: skip
            controller.on_ack(sample)

    def _add(self, lanes: Mapping[int, FlowSample]) -> tuple[int, int, int]:
        """Sum up; what was acknowledged, lost and sent since the last look. A new lane counts from its start."""
        acked = lost = sent = in_flight = window = unsent = 0
        for id, lane in lanes.items():
            before = self._last.get(id)
            if before is None:
                acked += lane.delivered
                lost += lane.lost
                sent += lane.sent
            else:  # a segment that has become shorter makes what was counted in segments less
                acked += max(0, lane.delivered - before.delivered)
                lost += max(0, lane.lost - before.lost)
                sent += max(0, lane.sent - before.sent)
            in_flight += lane.in_flight
            window += lane.window
            unsent += lane.unsent
        self._last = dict(lanes)
        self.delivered += acked
        self.lost += lost
        self.sent += sent
        self.in_flight, self.window, self.unsent = in_flight, window, unsent
        return acked, lost, sent

    def _measure(self, now: float, acked: int) -> tuple[float | None, int]:
        """The delivery rate over a round trip; since when it counts, and what had been delivered a round trip ago."""
        history = self._history
        history.append((now, self.delivered))
        span = max(self.min_rtt_s, 2 * self._tick_s)
        while len(history) > 2 and history[1][0] <= now - span:
            history.popleft()
        since, before = history[0]
        elapsed = now - since
        if elapsed < span * _LEAST_SPAN:
            return None, before
        self.rate = (self.delivered - before) / elapsed
        rates = self._rates
        while rates and rates[-1][1] <= self.rate:
            rates.pop()
        rates.append((now, self.rate))
        horizon = now - max(RATE_ROUNDS * self.min_rtt_s, RATE_ROUNDS * self._tick_s)
        while rates[0][0] < horizon:
            rates.popleft()
        self.bandwidth = rates[0][1]
        return since, before
