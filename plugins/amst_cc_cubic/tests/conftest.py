"""A sender over a path in memory, which tells a controller what happens to what it sends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amst_cc_cubic.controller import CubicController
from amst_core.interfaces import AckSample

MSS = 1000


class Sender:
    """Sends by round trips: a flight leaves at once, and is acknowledged at once a round trip later."""

    def __init__(self, rtt: float = 0.1, **options: object) -> None:
        self.controller = CubicController(options, mss=MSS)
        self.rtt = rtt
        self.now = 0.0
        self.delivered = 0

    @property
    def segments(self) -> float:
        """The window in segments."""
        return self.controller.window / MSS

    def state(self, key: str) -> float:
        value = self.controller.state()[key]
        assert isinstance(value, float | int)
        return value

    def mode(self) -> object:
        return self.controller.state()["mode"]

    def send(self, flight: int, *, app_limited: bool = False) -> None:
        self.controller.on_sent(now=self.now, size=flight, in_flight=flight, app_limited=app_limited)

    def ack(
        self, acked: int, *, sent_at: float, in_flight: int, rtt: float | None = None, round_start: bool = False,
        app_limited: bool = False, ecn_ce: int = 0,
    ) -> None:  # fmt: skip
        before = self.delivered
        self.delivered += acked
        self.controller.on_ack(
            AckSample(
                now=self.now, sent_at=sent_at, acked=acked, lost=0, rtt=self.rtt if rtt is None else rtt,
                in_flight=in_flight, prior_in_flight=in_flight + acked, delivered=self.delivered,
                prior_delivered=before, delivery_rate=None, app_limited=app_limited, round_start=round_start,
                ecn_ce=ecn_ce,
            )
        )  # fmt: skip

    def round(
        self, *, acks: int = 1, rtt: float | None = None, flight: int | None = None, app_limited: bool = False,
        ecn_ce: int = 0,
    ) -> None:  # fmt: skip
        """A flight (by default a whole window), acknowledged in ``acks`` parts of the same size."""
        flight = self.controller.window if flight is None else flight
        sent_at = self.now
        self.send(flight, app_limited=app_limited)
        self.now += self.rtt if rtt is None else rtt
        for part in range(acks):
            acked = flight * (part + 1) // acks - flight * part // acks
            left = flight - flight * (part + 1) // acks
            self.ack(
                acked, sent_at=sent_at, in_flight=left, rtt=rtt, round_start=part == 0, app_limited=app_limited,
                ecn_ce=0 if part else ecn_ce,
            )  # fmt: skip

    def lose(self, *, flight: int | None = None, persistent: bool = False) -> None:
        """A flight of which a segment is lost, or all of it when ``persistent``."""
        flight = self.controller.window if flight is None else flight
        sent_at = self.now
        self.send(flight)
        self.now += self.rtt
        lost = flight if persistent else MSS
        self.controller.on_loss(
            now=self.now, sent_at=sent_at, lost=lost, in_flight=flight - lost, persistent=persistent
        )
        if not persistent:
            self.ack(flight - lost, sent_at=sent_at, in_flight=0, round_start=True)

    def grow_to(self, segments: int) -> None:
        """Slow start up to a window of just that size; HyStart++ does not notice, the path has no queue."""
        while self.controller.window < segments * MSS:
            wanted = min(self.controller.window, segments * MSS - self.controller.window)
            self.send(self.controller.window)
            sent_at, left = self.now, self.controller.window - wanted
            self.now += self.rtt
            self.ack(wanted, sent_at=sent_at, in_flight=left, round_start=True)


@pytest.fixture
def sender() -> Callable[..., Sender]:
    """Makes a sender with a controller of its own: ``sender(rtt=0.1, hystart=False, ...)``."""
    return Sender
