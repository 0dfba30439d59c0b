"""The clock of a simulation: events in the order of their times."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush, heappushpop
from random import Random

from ...errors import UsageError
from ...interfaces import CongestionController
from .flow import Flow
from .link import Link

__all__ = ["Simulation"]


class Simulation:
    """Flows over one `Link`, from time 0. The same link, flows and seed give the same outcome to the last bit.

    What is random has a generator of its own for each purpose and flow, made from ``seed``: another flow changes
    nothing about which of a flow's packets are lost on the wire.

    Args:
        trace_interval: seconds between the records of `Flow.trace`.

    Raises:
        UsageError: the interval is not above 0, or the link belongs to another simulation.
    """

    def __init__(self, link: Link, *, seed: int = 1, trace_interval: float = 0.1) -> None:
        if not trace_interval > 0:
            raise UsageError(f"simulation: trace_interval is {trace_interval!r}; it is seconds, above 0")
        if link._taken:
            raise UsageError(
                "simulation: this link belongs to another simulation, with what is in its queue; "
                "make a new Link for each simulation"
            )
        link._taken = True
        self.link = link
        self.seed = seed
        self.flows: list[Flow] = []
        self.now = 0.0
        self.trace_interval = trace_interval
        self._events: list[tuple[float, int, Callable[[float], float | None]]] = []
        self._scheduled = 0
        link._retime = self._retime
        link._reseed = self._reseed

    def random(self, purpose: str) -> Random:
        """A generator that depends on the seed and on ``purpose``, and on nothing else."""
        return Random(f"{self.seed}/{purpose}")

    def add_flow(
        self,
        controller: CongestionController,
        *,
        mss: int = 1448,
        start: float = 0.0,
        size: int | None = None,
        app_rate: float | None = None,
        extra_delay: float = 0.0,
    ) -> Flow:
        """Let ``controller``, which is this flow's only, send over the link.

        Args:
            mss: bytes of a full packet; headers are not counted.
            start: when it begins.
            size: bytes it sends in all, None: without end.
            app_rate: bytes/s at which the application has something to send, None: always.
            extra_delay: seconds that its round trip is longer than the link's.

        Raises:
            UsageError: a value that makes no sense, or a start in the past.
        """
        flow = Flow(
            self, controller, index=len(self.flows), mss=mss, start=start, size=size, app_rate=app_rate,
            extra_delay=extra_delay,
        )  # fmt: skip
        self.flows.append(flow)
        return flow

    def at(self, time: float, action: Callable[[], object]) -> None:
        """Call ``action`` at ``time``; of several at the same time, the one that was told of first comes first.

        Raises:
            UsageError: ``time`` is in the past.
        """

        def call(now: float) -> None:
            action()

        self.schedule(time, call)

    def run(self, *, until: float) -> None:
        """Let everything happen up to and including ``until``; may be called again with a later time.

        Raises:
            UsageError: ``until`` is in the past.
        """
        if until < self.now:
            raise UsageError(f"simulation: it is {self.now:g} s already; it cannot run until {until:g} s")
        events = self._events
        while events and events[0][0] <= until:
            event = heappop(events)
            while True:
                now, _, call = event
                if now > until:
                    heappush(events, event)
                    break
                self.now = now
                again = call(now)
                if again is None:
                    break
                self._scheduled += 1
                event = heappushpop(events, (again, self._scheduled, call))
        self.now = until

    def fairness(self, start: float, end: float) -> float:
        """Jain's index of the flows' goodput between two times: 1 when all are equal, 1/n when one has everything.

        Raises:
            UsageError: there is no flow, nothing was delivered, or the times are none to ask about.
        """
        rates = [flow.goodput(start, end) for flow in self.flows]
        if not any(rates):
            raise UsageError(f"simulation: nothing was delivered from {start:g} to {end:g} s")
        return float(sum(rates) ** 2 / (len(rates) * sum(rate * rate for rate in rates)))

    def schedule(self, time: float, call: Callable[[float], float | None]) -> None:
        """Call ``call`` with the time at ``time``, and again at each time that it returns.

        Raises:
            UsageError: ``time`` is in the past.
        """
        if not time >= self.now:
            raise UsageError(f"simulation: {time!r} s is in the past, it is {self.now:g} s")
        self._scheduled += 1
        heappush(self._events, (time, self._scheduled, call))

    def _reseed(self) -> None:
        for flow in self.flows:
            flow.restart_losses()

    def _retime(self, old_rate: float) -> None:
        """The rate or a delay has changed: what has not left the queue leaves, and arrives, at other times."""
        link, now = self.link, self.now
        waiting = sorted(
            ((flow, packet) for flow in self.flows for packet in flow.queued(now)), key=lambda pair: pair[1].departs
        )
        free = now
        for number, (flow, packet) in enumerate(waiting):
            # Only the first is partly on the wire; the others wait for a whole packet's time each.
            size = packet.size if number else (packet.departs - now) * old_rate
            free += size / link.rate
            flow.retime(packet, free)
        link.idle_at = free
        for flow in self.flows:
            flow.rearm()
