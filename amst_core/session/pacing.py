"""The loop that paces a session: looks at its lanes, asks the law, and has the lanes keep to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ..errors import AmstError
from ..interfaces import FlowSample
from ..pacing import Pace, Range, SessionPacer

if TYPE_CHECKING:
    from .core import SessionCore
    from .lanes import LaneWorker

_log = logging.getLogger("amst.session")

_LEAST_CHANGE: Final = 0.02
"""A cap that differs by less from the one in force is not worth a system call."""

_REST_S: Final = 0.5
"""How often a session without anything to send is looked at; what begins to be sent ends the rest."""

_UNSENT_S: Final = 0.1
"""So much time of what a lane sends may wait in it: what waits in one lane cannot go by another."""

_LEAST_UNSENT: Final = 32 << 10

_TOLD_S: Final = 0.25
"""How often the state is logged, at debug level."""


class SessionPacing:
    """Runs a `SessionPacer` over the lanes of ``core``, on one thread, while there is something to send."""

    def __init__(self, core: SessionCore, pacer: SessionPacer) -> None:
        self._core = core
        self._pacer = pacer
        self._caps: dict[int, float | None] = {}
        self._unsent: dict[int, int] = {}
        self._told_at = 0.0
        self._awake = threading.Event()
        self._ended = False
        self._streams = pacer.tuner.wanted
        self._told_streams: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self._run, name="amst-pacing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        self._awake.set()

    @property
    def streams_reason(self) -> str:
        """Why there are as many lanes as there are."""
        return self._pacer.tuner.reason

    def fix_streams(self, range: Range) -> None:
        """There is nothing to choose any more."""
        self._streams = range.start
        self._pacer.tuner.fix(range)

    def end(self) -> None:
        """The session has ended."""
        self._ended = True
        self._awake.set()

    def _run(self) -> None:
        try:
            self._pace()
        except Exception:  # of a controller, which may be anybody's: the lanes go on by themselves
            _log.exception("%s: the session is paced no more", self._core.peer)
            with self._core.lock:
                workers = list(self._core.lanes.values())
            self._apply(dict.fromkeys(self._caps), workers)

    def _pace(self) -> None:
        core, pacer = self._core, self._pacer
        patient_until = time.monotonic() + pacer.patience_s
        while not self._ended:
            with core.lock:
                workers = list(core.lanes.values())  # those that leave as well: they send what they have taken on
                live = len(core.live_lanes_locked())
                busy = core.engine.sending > 0
                idle = not core.engine.has_chunks
            if not (busy and workers):
                self._apply(dict.fromkeys(self._caps), workers)  # what answers the peer is not held back
                self._awake.wait(_REST_S)
                self._awake.clear()
                patient_until = time.monotonic() + pacer.patience_s
                continue
            if time.monotonic() < patient_until:
                time.sleep(pacer.tick_s)
                continue
            samples = {worker.id: sample for worker in workers if (sample := worker.lane.flow_sample()) is not None}
            now = time.monotonic()
            pace = pacer.look(samples, live, now, idle=idle)
            if now >= self._told_at and _log.isEnabledFor(logging.DEBUG):
                self._told_at = now + _TOLD_S
                _log.debug("%s", self._told(pace, live))
            if pacer.bounds:
                self._bound_unsent(samples, workers)
            self._apply(pace.caps, workers)
            self._tell_streams(pace)
            time.sleep(pacer.tick_s)

    def _bound_unsent(self, samples: dict[int, FlowSample], workers: list[LaneWorker]) -> None:
        """Keep what waits in each lane, and cannot be moved to another, near what it sends in `_UNSENT_S`."""
        unsent: dict[int, int] = {}
        for worker in workers:
            sample = samples.get(worker.id)
            if sample is None:
                continue
            wanted = _power_of_two(int(sample.window / sample.rtt_s * _UNSENT_S))
            unsent[worker.id] = wanted
            if wanted != self._unsent.get(worker.id):
                worker.lane.limit_unsent(wanted)
        self._unsent = unsent
        bandwidth = self._pacer.flow.bandwidth
        if bandwidth and samples:
            self._core.bound_chunks(_power_of_two(int(bandwidth / len(samples) * 2 * _UNSENT_S)))

    def _apply(self, caps: Mapping[int, float | None], workers: list[LaneWorker]) -> None:
        """Have each lane keep to its cap."""
        in_force: dict[int, float | None] = {}
        for worker in workers:
            if worker.id not in caps:
                continue
            cap, before = caps[worker.id], self._caps.get(worker.id)
            if cap == before or (cap and before and abs(cap - before) < _LEAST_CHANGE * before):
                in_force[worker.id] = before
                continue
            try:
                worker.lane.set_pacing(cap)
            except AmstError as err:
                _log.debug("stream %d is not paced: %s", worker.id, err)
                continue
            in_force[worker.id] = cap
        self._caps = in_force

    def _tell_streams(self, pace: Pace) -> None:
        """Have as many lanes as are wanted; say so when that changes."""
        tuner = self._pacer.tuner
        if (tuner.goal, tuner.reason) != self._told_streams:
            self._told_streams = tuner.goal, tuner.reason
            _log.info("%d streams to %s: %s", tuner.goal, self._core.peer, tuner.reason)
        if pace.streams != self._streams:
            self._streams = pace.streams
            self._core.want_streams(pace.streams)

    def _told(self, pace: Pace, lanes: int) -> str:
        flow, controller = self._pacer.flow, self._pacer.controller
        state = {} if controller is None else controller.state()
        total = "free" if pace.total is None else f"{pace.total * 8e-6:.1f}"
        return (
            f"{self._core.peer}: {lanes} of {pace.streams} streams, {state.get('mode', 'kernel')},"
            f" rate {flow.rate * 8e-6:.1f} of {flow.bandwidth * 8e-6:.1f} Mbit/s, windows {flow.capacity * 8e-6:.1f},"
            f" pace {total}, round trip {flow.rtt_s * 1e3:.1f} of {flow.min_rtt_s * 1e3:.1f} ms,"
            f" in flight {flow.in_flight / max(1.0, flow.bdp):.2f}{' draining' if self._pacer.guard.draining else ''}"
        )


def _power_of_two(nbytes: int) -> int:
    """The power of two not above ``nbytes``: a limit that follows a rate is not to be set anew all the time."""
    return max(_LEAST_UNSENT, 1 << max(0, nbytes.bit_length() - 1))
