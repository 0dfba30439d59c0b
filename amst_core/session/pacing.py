"""The loop that paces a session: looks at its lanes, asks the law, and has the lanes keep to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from ..errors import AmstError
from ..interfaces import FlowSample
from ..pacing import GuardPacer, Pace, Range, SessionPacer

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
_UNBOUNDED: Final = 1 << 30
_LEAST_CHUNK: Final = 64 << 10
"""A block of a pipe is no shorter."""

_QUIET_S: Final = 1.0
"""After so long without anything under way a transfer that is open is no reason to look."""

_AGAIN_S: Final = 1.0
"""How often lanes are asked for, or sent away, that have not come or gone."""

_TOLD_S: Final = 0.25
"""How often the state is logged, at debug level."""


class SessionPacing:
    """Runs a `SessionPacer` over the lanes of ``core``, on one thread, while there is something to send."""

    def __init__(self, core: SessionCore, pacer: SessionPacer) -> None:
        self._core = core
        self._pacer = pacer
        self._next: SessionPacer | None = None
        self._caps: dict[int, float | None] = {}
        self._unsent: dict[int, int] = {}
        self._chunk: int | None = None
        self._again_at = time.monotonic() + _AGAIN_S
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
        if self._next is not None:
            self._next.tuner.fix(range)

    def change(self, pacer: SessionPacer | None) -> None:
        """Have ``pacer`` pace the session from the next look on; None: each lane by itself, as many as there are.

        One that would do what the last one does only says how many lanes there may be: that knows the path already.
        """
        wanted = self._pacer.tuner.wanted
        self._next = pacer or GuardPacer(Range(wanted, wanted, wanted), near=True)
        self._awake.set()

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
            self._core.bound_chunks(None)
            if self._core.congestion.polite:
                self._core.be_alone("its controller failed")

    def _pace(self) -> None:
        core, pacer = self._core, self._pacer
        patient_until = time.monotonic() + pacer.patience_s
        quiet_since: float | None = None
        while not self._ended:
            now = time.monotonic()
            if self._next is not None:
                pacer = self._take_next()
                patient_until = now + pacer.patience_s
            with core.lock:
                workers = list(core.lanes.values())  # those that leave as well: they send what they have taken on
                live = len(core.live_lanes_locked())
                busy = core.engine.sending > 0
                idle = not core.engine.has_chunks or core.engine.paced_until(now) is not None
            samples = {worker.id: sample for worker in workers if (sample := worker.lane.flow_sample()) is not None}
            if not idle or any(sample.in_flight or sample.unsent for sample in samples.values()):
                quiet_since = None
            elif quiet_since is None:
                quiet_since = now
            if not (busy and workers) or (quiet_since is not None and now - quiet_since > _QUIET_S):
                pacer.rest()
                self._apply(dict.fromkeys(self._caps), workers)  # what answers the peer is not held back
                self._awake.wait(_REST_S)
                self._awake.clear()
                patient_until = time.monotonic() + pacer.patience_s
                continue
            if now < patient_until:
                time.sleep(pacer.tick_s)
                continue
            pace = pacer.look(samples, live, now, idle=idle)
            if now >= self._told_at and _log.isEnabledFor(logging.DEBUG):
                self._told_at = now + _TOLD_S
                _log.debug("%s", self._told(pace, live))
            if pacer.bounds:
                self._bound_unsent(samples, workers)
            self._apply(pace.caps, workers)
            self._tell_streams(pace, live, now)
            time.sleep(pacer.tick_s)

    def _take_next(self) -> SessionPacer:
        """Go on with another pacer; what the last one bounded is free again."""
        pacer, self._next = self._next, None
        assert pacer is not None, "there is another one"
        if self._pacer.goes_on_as(pacer):
            self._pacer.tuner.bound(pacer.tuner.range)
            return self._pacer
        self._pacer = pacer
        with self._core.lock:
            workers = list(self._core.lanes.values())
        for worker in workers:
            worker.lane.limit_unsent(_UNBOUNDED)
        self._unsent = {}
        self._chunk = None
        self._core.bound_chunks(None)
        self._streams, self._told_streams = -1, None  # so that both are told
        return pacer

    def _bound_unsent(self, samples: dict[int, FlowSample], workers: list[LaneWorker]) -> None:
        """Keep what waits in each lane, and cannot be moved to another, near what it sends in `_UNSENT_S`."""
        unsent: dict[int, int] = {}
        for worker in workers:
            sample = samples.get(worker.id)
            if sample is None:
                continue
            before = self._unsent.get(worker.id)
            unsent[worker.id] = _bound(sample.window / sample.rtt_s * _UNSENT_S, before, _LEAST_UNSENT)
            if unsent[worker.id] != before:
                worker.lane.limit_unsent(unsent[worker.id])
        self._unsent = unsent
        bandwidth = self._pacer.flow.bandwidth
        if bandwidth and samples:
            self._chunk = _bound(bandwidth / len(samples) * 2 * _UNSENT_S, self._chunk, _LEAST_CHUNK)
            self._core.bound_chunks(self._chunk)

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

    def _tell_streams(self, pace: Pace, live: int, now: float) -> None:
        """Have as many lanes as are wanted; say so when that changes."""
        tuner = self._pacer.tuner
        if (tuner.goal, tuner.reason) != self._told_streams:
            self._told_streams = tuner.goal, tuner.reason
            _log.info("%d streams to %s: %s", tuner.goal, self._core.peer, tuner.reason)
        if pace.streams != self._streams or (pace.streams != live and now >= self._again_at):
            self._streams = pace.streams
            self._again_at = now + _AGAIN_S
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


def _bound(wanted: float, before: int | None, least: int) -> int:
    """The power of two not above ``wanted`` bytes; the one ``before`` as long as it is about that.

    What follows a rate is not to be set anew at each look.
    """
    if before is not None and 0.75 * before <= wanted < 2.5 * before:
        return before
    return max(least, 1 << max(0, int(wanted).bit_length() - 1))
