"""A controller fed by hand: what a driver would tell it, one acknowledgement at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amst_cc_bbr.controller import BbrController
from amst_core.interfaces import AckSample


class Feed:
    """A path of 1 MB/s and 100 ms, as far as its controller can tell. Every method may be told otherwise."""

    MSS = 1000
    RATE = 1e6
    RTT = 0.1
    BDP = 100_000

    def __init__(self, options: dict[str, object]) -> None:
        self.cc = BbrController(options, mss=self.MSS)
        self.now = 100.0
        self.delivered = 0
        self.sent(in_flight=10_000)

    def __getitem__(self, name: str) -> float | str:
        return self.cc.state()[name]

    @property
    def mode(self) -> float | str:
        return self["mode"]

    def sent(self, *, size: int = MSS, in_flight: int = BDP, app_limited: bool = False) -> None:
        self.cc.on_sent(now=self.now, size=size, in_flight=in_flight, app_limited=app_limited)

    def ack(
        self,
        acked: int = MSS,
        *,
        rate: float | None = RATE,
        rtt: float | None = RTT,
        after: float = 0.001,
        lost: int = 0,
        in_flight: int = BDP,
        prior_in_flight: int | None = None,
        sent_at: float | None = None,
        prior_delivered: int = 0,
        app_limited: bool = False,
    ) -> None:
        """An acknowledgement ``after`` seconds, of what left early in this round trip unless told otherwise."""
        self.now += after
        self.delivered += acked
        self.cc.on_ack(
            AckSample(
                now=self.now,
                sent_at=self.now - self.RTT if sent_at is None else sent_at,
                acked=acked,
                lost=lost,
                rtt=rtt,
                in_flight=in_flight,
                prior_in_flight=in_flight + acked + lost if prior_in_flight is None else prior_in_flight,
                delivered=self.delivered,
                prior_delivered=prior_delivered,
                delivery_rate=rate,
                app_limited=app_limited,
                round_start=False,
            )
        )

    def round(self, rate: float | None = RATE, *, acked: int = MSS, after: float = RTT, **more: object) -> None:
        """The first acknowledgement of a new round trip."""
        self.ack(acked, rate=rate, after=after, prior_delivered=self.delivered, **more)

    def lose(
        self, lost: int = MSS, *, in_flight: int = BDP, sent_at: float | None = None, persistent: bool = False
    ) -> None:
        self.cc.on_loss(
            now=self.now,
            sent_at=self.now - self.RTT if sent_at is None else sent_at,
            lost=lost,
            in_flight=in_flight,
            persistent=persistent,
        )

    def fill(self) -> None:
        """To the end of Startup: the bandwidth is reached and does not grow for three rounds."""
        for _ in range(4):
            self.round(in_flight=3 * self.BDP)
        assert self.mode == "drain"

    def drain(self) -> None:
        """On to ProbeBW."""
        self.fill()
        self.ack()
        assert self.mode == "probe_bw"

    def cruise(self) -> None:
        """On to the first phase of ProbeBW with gain 1, with a window as large as it gets."""
        self.drain()
        self.settle()

    def settle(self) -> None:
        while self["pacing_gain"] != 1:
            self.round(in_flight=int(1.5 * self.BDP))
        self.ack(3 * self.BDP)
        assert self.mode == "probe_bw"
        assert self["pacing_gain"] == 1

    def probe_rtt(self) -> None:
        """On to ProbeRTT: 10 s with a queue, so no round trip is as short as the first was."""
        self.cruise()
        for _ in range(103):
            self.round(rtt=0.12)
            if self.mode == "probe_rtt":
                return
        raise AssertionError("no ProbeRTT in 10.3 s")


@pytest.fixture
def feed() -> Feed:
    return Feed({})


@pytest.fixture
def feeds() -> Callable[..., Feed]:
    """Makes them with options."""
    return lambda **options: Feed(options)
