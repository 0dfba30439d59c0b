"""A session that is paced, over a simulated path: what a `SessionPacer` says is obeyed, in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from amst_core.interfaces import AckSample, CongestionController, FlowSample
from amst_core.pacing import Pace, SessionPacer
from amst_core.testing.simulator import Flow, Link, Simulation

MSS = 1448
OPENING_ROUNDS = 3
"""Round trips until a lane that is wanted carries."""

_UNSENT = 1 << 20


class Capped(CongestionController):
    """What a system has under a cap on the pacing rate (SO_MAX_PACING_RATE)."""

    name = "capped"

    def __init__(self, own: CongestionController) -> None:
        self.own = own
        self.cap: float | None = None

    @property
    def window(self) -> int:
        return self.own.window

    @property
    def pacing_rate(self) -> float | None:
        own = self.own.pacing_rate
        return self.cap if own is None else own if self.cap is None else min(own, self.cap)

    def on_sent(self, *, now: float, size: int, in_flight: int, app_limited: bool) -> None:
        self.own.on_sent(now=now, size=size, in_flight=in_flight, app_limited=app_limited)

    def on_ack(self, sample: AckSample) -> None:
        self.own.on_ack(sample)

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        self.own.on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=in_flight, persistent=persistent)

    def on_spurious_loss(self, *, now: float) -> None:
        self.own.on_spurious_loss(now=now)

    def state(self) -> Mapping[str, float | str]:
        return self.own.state()


class PacedSession:
    """Lanes with the congestion control that ``make`` makes, over ``link``, looked at by ``pacer``, in `simulation`.

    Without a pacer there are ``lanes`` lanes that nobody paces. The session always has something to send.

    Attributes:
        looks: time and what the pacer said, at each look.
        round_trips: the round trip of each packet that was heard of last, at each look, over all lanes.
    """

    def __init__(
        self,
        link: Link,
        make: Callable[[], CongestionController],
        pacer: SessionPacer | None,
        *,
        lanes: int = 0,
        seed: int = 1,
    ) -> None:
        self.link = link
        self.pacer = pacer
        self.simulation = Simulation(link, seed=seed, trace_interval=1.0)
        self.looks: list[tuple[float, Pace]] = []
        self.round_trips: list[tuple[float, float]] = []
        self._make = make
        self._lanes: dict[int, tuple[Flow, Capped]] = {}
        self._leaving: set[int] = set()
        for _ in range(lanes if pacer is None else pacer.tuner.wanted):
            self._open(0.0)
        self.simulation.schedule(0.0, self._look)

    def run(self, until: float) -> None:
        self.simulation.run(until=until)

    def utilisation(self, start: float, end: float) -> float:
        """What part of the link's rate was used for what arrived, between two whole seconds."""
        return sum(flow.goodput(start, end) for flow in self.simulation.flows) / self.link.rate

    def round_trip(self, start: float, end: float, *, part: float = 0.5) -> float:
        """The ``part`` of round trips was no longer, in those of the path without a queue; the median at first."""
        found = sorted(rtt for now, rtt in self.round_trips if start <= now <= end)
        return found[int(part * len(found))] / self.link.round_trip

    def streams(self, start: float, end: float) -> list[int]:
        """How many were wanted, at each look."""
        return [pace.streams for now, pace in self.looks if start <= now <= end]

    def _open(self, start: float) -> None:
        own = Capped(self._make())
        flow = self.simulation.add_flow(own, mss=MSS, start=start)
        self._lanes[len(self.simulation.flows)] = flow, own

    def _look(self, now: float) -> float:
        pacer, lanes = self.pacer, self._lanes
        for id in [id for id in self._leaving if not lanes[id][0].in_flight]:
            self._leaving.discard(id)
            del lanes[id]
        self.round_trips += [(now, flow.rtt) for flow, _ in lanes.values() if flow.rtt is not None]
        if pacer is None:
            return now + 0.02
        there = {id: lane for id, lane in lanes.items() if lane[0].start <= now}
        samples = {id: self._sample(flow, id) for id, (flow, _) in there.items()}
        pace = pacer.look(samples, len(there.keys() - self._leaving), now, idle=False)
        self.looks.append((now, pace))
        for id, cap in pace.caps.items():
            there[id][1].cap = cap
        staying = [id for id in lanes if id not in self._leaving]
        for _ in range(pace.streams - len(staying)):
            self._open(now + OPENING_ROUNDS * self.link.round_trip)
        for id in staying[pace.streams :]:
            lanes[id][0].stop()
            self._leaving.add(id)
        return now + pacer.tick_s

    def _sample(self, flow: Flow, id: int) -> FlowSample:
        rtt_s = flow.srtt or self.link.round_trip
        unsent = 0 if id in self._leaving else _UNSENT
        return FlowSample(
            flow.delivered, flow.sent, flow.retransmitted, flow.in_flight, flow.controller.window, unsent, rtt_s,
            self.link.round_trip, MSS,
        )  # fmt: skip
