"""One pace for all lanes of a session: the laws that hold kernel connections to what the path carries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ..interfaces import CongestionController, FlowSample
from .flow import SessionFlow
from .queue import DRAIN_GAIN, QueueGuard
from .sharing import shares
from .streams import Range, RateTuner, StreamTuner, WindowTuner

TICK_S: Final = 0.02
"""How often the lanes are looked at; half of it on paths shorter than `SHORT_PATH_S`."""

SHORT_PATH_S: Final = 0.02

NEAR_TICK_S: Final = 0.2
NEAR_PATIENCE_S: Final = 1.0

FREE: Final = 1.6
"""Lanes whose windows allow less than so many times what the path carries, and the controller allows, are not paced.

A window grows only while it is what limits its lane (RFC 7661), so pacing would keep it from coming back.
"""

PROBE: Final = 1.25
_LOSSY_S: Final = 2.0
_LOSSY_ROUNDS: Final = 20
_SEGMENT: Final = 1400
_FULL_PATH: Final = 1.15
_LOSSES: Final = 3  # segments; fewer may be the last of a queue that overflowed long ago
_SHORT_QUEUE: Final = 0.1  # of the shortest round trip
_LONG_QUEUE: Final = 1.5  # shortest round trips
_LEAST_WAIT_S: Final = 0.002
_FULL_GROWTH: Final = 1.25
_FULL_ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Pace:
    """What follows from one look.

    Attributes:
        caps: bytes/s that each lane may send; None: as fast as it will.
        total: bytes/s that the session may send; None: no limit.
        streams: how many lanes there should be.
    """

    caps: Mapping[int, float | None]
    total: float | None
    streams: int


class SessionPacer(ABC):
    """Says how fast the lanes of one session may send, and how many there should be, each time it looks at them.

    Attributes:
        patience_s: what is sent in less time is not looked at.
        bounds: lanes are to hold little that waits, so that it can go by whichever has room.
    """

    patience_s: float = 0.0
    bounds: bool = True

    def __init__(
        self, tuner: StreamTuner, controller: CongestionController | None = None, *, tick_s: float = TICK_S
    ) -> None:
        self.tuner = tuner
        self.controller = controller
        self.flow = SessionFlow(controller, tick_s=tick_s)
        self.guard = QueueGuard()
        self._tick_s = tick_s

    @property
    def tick_s(self) -> float:
        """When to look again."""
        short = self.bounds and 0 < self.flow.min_rtt_s <= SHORT_PATH_S
        return self._tick_s / 2 if short else self._tick_s

    def goes_on_as(self, other: SessionPacer) -> bool:
        """Whether ``other`` would do the same, but for the number of lanes that it may have."""
        return (
            type(self) is type(other) and self.bounds == other.bounds and self._controls == other._controls
        )

    @property
    def _controls(self) -> object:
        """By what it paces."""
        return None if self.controller is None else self.controller.name

    def rest(self) -> None:
        """Nothing is sent for a while."""
        self.flow.rest()
        self.guard.rest()
        self.tuner.rest()

    @abstractmethod
    def look(self, lanes: Mapping[int, FlowSample], live: int, now: float, *, idle: bool) -> Pace:
        """The ``lanes`` at ``now``, of which ``live`` go on; ``idle``: the application has nothing more to send."""

    def caps(self, lanes: Mapping[int, FlowSample], total: float) -> dict[int, float | None]:
        """Share ``total`` out; lanes that have nothing to send lend their share, and find room when they have."""
        rtt_s = self.flow.min_rtt_s
        busy = {id: lane for id, lane in lanes.items() if lane.unsent or lane.in_flight}
        return dict.fromkeys(lanes, shares(total, {id: PROBE * lane.window / rtt_s for id, lane in busy.items()}))


class ControllerPacer(SessionPacer):
    """Paces lanes by ``controller``, which the system does not have, and has as many as make up for their windows.

    A ``polite`` session sends what the controller says and never more, with a fixed number of lanes: whatever that is,
    it takes from others what one flow of the controller takes.
    """

    def __init__(self, controller: CongestionController, range: Range, *, polite: bool = False) -> None:
        if polite:
            range = Range(range.start, range.start, range.start)
        super().__init__(WindowTuner(range), controller)
        self._controller = controller
        self._polite = polite
        self._losses: deque[tuple[float, int]] = deque()

    def look(self, lanes: Mapping[int, FlowSample], live: int, now: float, *, idle: bool) -> Pace:
        flow, tuner = self.flow, self.tuner
        flow.observe(lanes, now, limited=idle or tuner.wants_more)
        mode = self._controller.state().get("mode")
        streams = tuner.look(flow, live, now, settled=mode != "startup", idle=idle)
        if self._polite and flow.min_rtt_s:
            total = self._allowed()
            return Pace(self.caps(lanes, total), total, streams)
        if not flow.bandwidth:
            return Pace(dict.fromkeys(lanes), None, streams)
        lossy = self._is_lossy(now)
        drains = self.guard.look(flow, now) and mode == "probe_bw"
        if lossy and flow.rtt_s < _LONG_QUEUE * flow.min_rtt_s:
            drains = False  # each loss leaves some of the path idle, and a short queue makes up for it
        total = min(self._allowed(), DRAIN_GAIN * flow.bandwidth) if drains else self._allowed()
        if lossy and not drains and self._has_no_queue():
            total = max(total, PROBE * flow.bandwidth)
        if flow.capacity < FREE * min(flow.bandwidth, total / DRAIN_GAIN) and not drains:
            return Pace(dict.fromkeys(lanes), total, streams)
        return Pace(self.caps(lanes, total), total, streams)

    def _allowed(self) -> float:
        """Bytes/s that the controller allows now."""
        allowed = self._controller.window / self.flow.rtt_s  # so no more than the window is under way
        rate = self._controller.pacing_rate
        return allowed if rate is None else min(allowed, rate)

    def _is_lossy(self, now: float) -> bool:
        """More has been lost lately than what a queue that overflowed leaves behind."""
        flow, losses = self.flow, self._losses
        losses.append((now, flow.lost))
        while losses[0][0] < now - max(_LOSSY_S, _LOSSY_ROUNDS * flow.min_rtt_s):
            losses.popleft()
        return flow.lost - losses[0][1] >= _LOSSES * _SEGMENT

    def _has_no_queue(self) -> bool:
        """What is lost is lost at random: holding the lanes back would not help, and cost what they have left."""
        flow = self.flow
        waits_s = flow.rtt_s - flow.min_rtt_s
        return waits_s < max(_SHORT_QUEUE * flow.min_rtt_s, _LEAST_WAIT_S) and flow.in_flight < _FULL_PATH * flow.bdp


class GuardPacer(SessionPacer):
    """Leaves lanes to the system's congestion control, which paces each by itself, but for the queue that they make.

    Several BBR flows each take the others' queue for their own round trip, and keep up to the path's product waiting.
    On a ``near`` path queues are too short to tell from a busy machine: there only the number of lanes is chosen.
    """

    def __init__(self, range: Range, *, near: bool = False) -> None:
        super().__init__(RateTuner(range, upwards=not near), tick_s=NEAR_TICK_S if near else TICK_S)
        self._near = near
        self.bounds = not near
        self.patience_s = NEAR_PATIENCE_S if near else 0.0
        self._full_bandwidth = 0.0
        self._full_rounds = 0
        self._round = -1

    def look(self, lanes: Mapping[int, FlowSample], live: int, now: float, *, idle: bool) -> Pace:
        flow = self.flow
        flow.observe(lanes, now, limited=idle)
        settled = self._settled()
        streams = self.tuner.look(flow, live, now, settled=settled, idle=idle)
        if settled and not self._near and self.guard.look(flow, now):
            total = DRAIN_GAIN * flow.bandwidth
            return Pace(self.caps(lanes, total), total, streams)
        return Pace(dict.fromkeys(lanes), None, streams)

    def _settled(self) -> bool:
        """The bandwidth has grown by less than 25 % in three round trips (BBR's end of Startup)."""
        flow = self.flow
        if self._full_rounds < _FULL_ROUNDS and flow.rounds != self._round and flow.bandwidth:
            self._round = flow.rounds
            if flow.bandwidth >= _FULL_GROWTH * self._full_bandwidth:
                self._full_bandwidth, self._full_rounds = flow.bandwidth, 0
            else:
                self._full_rounds += 1
        return self._full_rounds >= _FULL_ROUNDS
