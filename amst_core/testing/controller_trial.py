"""What the rules of `controllers` are tried with: acknowledgements by hand, and recordings of runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from ..congestion import DeliveryRateSampler, SentPacket
from ..interfaces import AckSample, CongestionController
from .conformance import Trial
from .simulator import Bernoulli, Flow, Link, Simulation

MakeController = Callable[[int], CongestionController]
"""Makes a new controller for packets of so many bytes."""

MSS: Final = 1448
RATE: Final = 1.25e6
"""Bytes/s of the paths that controllers are tried on: 10 Mbit/s, 35 packets in a round trip of 40 ms."""
DELAY: Final = 0.02
BDP: Final = RATE * 2 * DELAY

_GRID: Final = 2.0**20
"""Times of a replay are multiples of 2^-20 s: a shift by a power of two is exact then."""


class ControllerTrial(Trial):
    """One rule of `CongestionController`, tried on controllers that the caller makes."""

    def __init__(self, rule: str, patience_s: float, make_controller: MakeController) -> None:
        super().__init__(rule, patience_s)
        self._make = make_controller

    def controller(self, mss: int = MSS) -> CongestionController:
        """A new one."""
        return self._make(mss)

    def feed(self) -> Feed:
        """A new controller, and what it is told by hand."""
        return Feed(self, self.controller())

    def sane(self, controller: CongestionController, after: str) -> None:
        """Its window and pacing rate are such that a sender can go on."""
        self.window(controller, after)
        self.pacing(controller, after)

    def window(self, controller: CongestionController, after: str) -> None:
        """Its window has room for a packet."""
        window = controller.window
        self.check(
            isinstance(window, int) and window >= MSS,
            f"a window of whole bytes, at least one segment ({MSS}), {after}", f"{window!r}",
        )  # fmt: skip

    def pacing(self, controller: CongestionController, after: str) -> None:
        """Its pacing rate lets packets go."""
        rate = controller.pacing_rate
        self.check(
            rate is None or (isinstance(rate, int | float) and 0 < rate < math.inf),
            f"a pacing rate of None, or finite and above 0, {after}", f"{rate!r}",
        )  # fmt: skip

    def path(self, *, flows: int = 1, apart: float = 0.0, **options: Any) -> tuple[Simulation, list[Flow]]:
        """A path that is tried on, its buffer one bandwidth-delay product, and flows on it that start ``apart``."""
        simulation = Simulation(Link(RATE, DELAY, buffer=BDP), seed=1)
        return simulation, [
            simulation.add_flow(self.controller(), mss=MSS, start=number * apart, **options)
            for number in range(flows)
        ]  # fmt: skip

    def recording(self) -> list[Told]:
        """What a controller is told on a path with everything that may happen to it, and what it made of it."""
        recorder = Recorder(self.controller())
        link = Link(RATE, DELAY, buffer=BDP, loss=Bernoulli(0.002))
        simulation = Simulation(link)
        simulation.add_flow(recorder, mss=MSS)
        simulation.at(4.0, lambda: link.set(loss=Bernoulli(1.0)))
        simulation.at(5.0, lambda: link.set(loss=None))
        simulation.at(9.0, lambda: link.set(back=1.0))
        simulation.at(11.0, lambda: link.set(back=DELAY))
        simulation.run(until=14.0)
        return recorder.told


class Feed:
    """Sends and acknowledges by hand, on a path whose round trip is 50 ms; ``now`` begins at 100."""

    rtt = 0.05

    def __init__(self, trial: ControllerTrial, controller: CongestionController) -> None:
        self.controller = controller
        self.now = 100.0
        self.in_flight = 0
        self.sent = 0
        self.acked = 0
        self.lost = 0
        self._trial = trial
        self._lost_since = 0
        """Bytes that on_loss told of and no sample yet."""
        self._sampler = DeliveryRateSampler()

    def send(self, most: int = 4096) -> list[SentPacket]:
        """As many packets as the window allows, ``most`` at most."""
        packets: list[SentPacket] = []
        while len(packets) < most and self.in_flight + MSS <= self.controller.window:
            packet = SentPacket(MSS)
            self._sampler.on_sent(packet, now=self.now, prior_in_flight=self.in_flight)
            self.in_flight += MSS
            self.sent += MSS
            self.controller.on_sent(now=self.now, size=MSS, in_flight=self.in_flight, app_limited=False)
            packets.append(packet)
        return packets

    def sample(self, packet: SentPacket) -> AckSample:
        """That ``packet`` was acknowledged, not told yet; it found out what was lost since the last one."""
        lost, self._lost_since = self._lost_since, 0
        prior = self.in_flight + lost
        self.in_flight -= MSS
        self.acked += MSS
        self._sampler.on_delivered(packet, now=self.now)
        return self._sampler.sample(now=self.now, lost=lost, in_flight=self.in_flight, prior_in_flight=prior)

    def ack(self, packet: SentPacket) -> None:
        """``packet`` is acknowledged."""
        self.controller.on_ack(self.sample(packet))

    def lose(self, packet: SentPacket) -> None:
        """``packet`` is lost."""
        self.in_flight -= MSS
        self.lost += MSS
        self._lost_since += MSS
        self.controller.on_loss(
            now=self.now, sent_at=packet.sent_at, lost=MSS, in_flight=self.in_flight, persistent=False
        )

    def time_out(self, newest: SentPacket) -> None:
        """Everything under way is lost."""
        lost, self.in_flight, self._lost_since = self.in_flight, 0, 0
        self.lost += lost
        self.controller.on_loss(now=self.now, sent_at=newest.sent_at, lost=lost, in_flight=0, persistent=True)

    def rounds(self, count: int) -> None:
        """So many round trips in which the window is sent and all of it acknowledged."""
        for _ in range(count):
            packets = self.send()
            self.now += self.rtt
            for packet in packets:
                self.now += self.rtt / 8 / len(packets)
                self.ack(packet)


Told = tuple[str, AckSample | Mapping[str, Any], int, float | None]
"""A call: its name, what it was told, and window and pacing rate afterwards."""


class Recorder(CongestionController):
    """Passes on to a controller what it is told, and writes it down."""

    name = "recorder"

    def __init__(self, controller: CongestionController) -> None:
        self._controller = controller
        self.told: list[Told] = []

    @property
    def window(self) -> int:
        return self._controller.window

    @property
    def pacing_rate(self) -> float | None:
        return self._controller.pacing_rate

    def _note(self, call: str, arguments: AckSample | Mapping[str, Any]) -> None:
        tell(self._controller, call, arguments)
        self.told.append((call, arguments, self._controller.window, self._controller.pacing_rate))

    def on_sent(self, **arguments: Any) -> None:
        self._note("on_sent", arguments)

    def on_ack(self, sample: AckSample) -> None:
        self._note("on_ack", sample)

    def on_loss(self, **arguments: Any) -> None:
        self._note("on_loss", arguments)

    def on_spurious_loss(self, **arguments: Any) -> None:
        self._note("on_spurious_loss", arguments)

    def state(self) -> Mapping[str, float | str]:
        return self._controller.state()


def tell(controller: CongestionController, call: str, arguments: AckSample | Mapping[str, Any]) -> None:
    """Make one of the calls of a recording."""
    if isinstance(arguments, AckSample):
        controller.on_ack(arguments)
    else:
        getattr(controller, call)(**arguments)


def shifted(arguments: AckSample | Mapping[str, Any], by: float) -> AckSample | Mapping[str, Any]:
    """The same at other times: on a grid on which differences are exact, and ``by`` seconds later."""

    def move(time: float) -> float:
        return round(time * _GRID) / _GRID + by

    if isinstance(arguments, AckSample):
        now, sent_at = move(arguments.now), move(arguments.sent_at)
        return replace(arguments, now=now, sent_at=sent_at, rtt=None if arguments.rtt is None else now - sent_at)
    return {key: move(value) if key in ("now", "sent_at") else value for key, value in arguments.items()}
