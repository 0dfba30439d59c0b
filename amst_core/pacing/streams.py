"""How many lanes a session needs on the path it has: as few as carry what the path takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from .flow import SessionFlow


@dataclass(frozen=True, slots=True)
class Range:
    """A session begins with ``start`` lanes, and has ``least`` to ``most``."""

    start: int
    least: int
    most: int

    @property
    def fixed(self) -> bool:
        """There is nothing to choose."""
        return self.least == self.most

    @property
    def reason(self) -> str:
        """Why it begins with so many."""
        return "as many as were asked for" if self.fixed else "as many as the mode begins with"


class StreamTuner(ABC):
    """Chooses the number of lanes within ``range``; ``reason`` says why it is that of now."""

    def __init__(self, range: Range) -> None:
        self.range = range
        self._apart_since: float | None = None  # there are not as many lanes as wanted, and nothing is under way
        self.wanted = range.start
        self.reason = range.reason

    @property
    def goal(self) -> int:
        """What `wanted` is on its way to."""
        return self.wanted

    @property
    def wants_more(self) -> bool:
        """The lanes are too few, and more are coming: what they deliver says too little about the path."""
        return False

    @abstractmethod
    def look(self, flow: SessionFlow, live: int, now: float, *, settled: bool, idle: bool) -> int:
        """How many lanes there should be at ``now``, of which ``live`` carry.

        ``settled``: the bandwidth of the path is known; ``idle``: the application has nothing more to send.
        """

    def fix(self, range: Range) -> None:
        """Have so many lanes from now on: somebody has said so."""
        self.range = range
        self.choose(range.start, range.reason)

    def bound(self, range: Range) -> None:
        """Stay within ``range`` from now on."""
        self.range = range
        self.choose(self.wanted, BOUNDED)

    def rest(self) -> None:
        """Nothing is sent for a while: what was being measured says nothing."""

    def take_as_they_are(self, live: int, now: float) -> bool:
        """Whether ``live`` lanes have differed from what is wanted for so long that they are what is wanted now.

        Lanes may not come, and the peer, which sends as well, may have others go or come.
        """
        if live == self.wanted:
            self._apart_since = None
        elif self._apart_since is None:
            self._apart_since = now
        elif now - self._apart_since > COMING_S:
            self._apart_since = None
            self.choose(live, f"no more than {live} came" if live < self.wanted else "the peer has as many")
            return True
        return False

    def choose(self, wanted: int, reason: str) -> int:
        """Have ``wanted`` lanes, as far as the range goes, for ``reason``."""
        wanted = max(self.range.least, min(self.range.most, wanted))
        if wanted != self.wanted:
            self.wanted, self.reason = wanted, reason
        return self.wanted


BOUNDED: Final = "as many as the mode allows"

COMING_S: Final = 5.0
"""So long lanes are waited for."""


# ---- lanes whose windows collapse under loss --------------------------------------------------

HEADROOM: Final = 1.3
"""Lanes whose windows allow less than so many times the bandwidth are too few: each backs off now and then."""

SURPLUS: Final = 2.5
"""With so many times the bandwidth, some can go."""

_LEAST_PAUSE_S: Final = 0.1
_SURPLUS_S: Final = 2.0
_ONE_MORE_GONE_S: Final = 0.5
_HELPED: Final = 1.15


class WindowTuner(StreamTuner):
    """For lanes whose windows collapse under random loss (the kernel's CUBIC, Reno): their number makes up for it.

    A controller in user space can only hold lanes back. Where their windows together allow less than `HEADROOM` times
    what it found the path to carry, more lanes are the only way to use it; where they allow more than `SURPLUS` times
    that for a while, the path needs fewer.
    """

    def __init__(self, range: Range) -> None:
        super().__init__(range)
        self._next = 0.0
        self._short = False
        self._surplus_since: float | None = None
        self._bandwidth_before = 0.0

    @property
    def wants_more(self) -> bool:
        return self._short and self.wanted < self.range.most

    def rest(self) -> None:
        self._surplus_since = None

    def look(self, flow: SessionFlow, live: int, now: float, *, settled: bool, idle: bool) -> int:
        if self.range.fixed:
            return self.range.start
        if idle or not flow.bandwidth or not live:
            return self.wanted
        self.take_as_they_are(live, now)
        self._short = flow.capacity < HEADROOM * flow.bandwidth
        if now < self._next:
            return self.wanted
        self._next = now + max(2 * flow.min_rtt_s, _LEAST_PAUSE_S)
        there = max(self.wanted, live)
        capacity = flow.capacity * there / live  # those that come will have what those have that are there
        if capacity < HEADROOM * flow.bandwidth:
            self._surplus_since = None
            return self._more(flow, there, capacity)
        if flow.capacity > SURPLUS * flow.bandwidth and settled:
            if self._surplus_since is None:
                self._surplus_since = now
            elif now - self._surplus_since > _SURPLUS_S:
                self._surplus_since = now - _SURPLUS_S + _ONE_MORE_GONE_S
                return self.choose(min(live, self.wanted) - 1, _windows(flow))
        else:
            self._surplus_since = None
        return self.wanted

    def _more(self, flow: SessionFlow, there: int, capacity: float) -> int:
        at_once = max(2, there // 2)
        step = math.ceil(there * (HEADROOM * flow.bandwidth / capacity - 1)) if capacity else at_once
        step = max(1, min(step, at_once))
        if flow.bandwidth > _HELPED * self._bandwidth_before:
            step = max(step, there)  # the last ones helped, and how much more there is nobody knows
        self._bandwidth_before = flow.bandwidth
        return self.choose(there + step, _windows(flow))


def _windows(flow: SessionFlow) -> str:
    return f"the streams' windows allow {flow.capacity / flow.bandwidth:.1f} times the bandwidth"


# ---- lanes that find the bandwidth by themselves ----------------------------------------------

PER_LANE: Final = 160 << 10
"""Bytes of the path's bandwidth-delay product for each lane, where there are too few (requirements D1)."""

KEPT: Final = 0.97
"""Fewer lanes are kept if they carry so much of what more did; more are if they carry more by as much."""

FULL: Final = 1.08
"""With a mean round trip of so many times the shortest one packets wait: more lanes would make them wait longer."""

LOSSY: Final = 0.005
"""Where so much is lost, fewer lanes are tried only after a first pause: there each makes up for others that wait."""

_STEP_UP: Final = 2
_STEP_DOWN: Final = 0.75
_SETTLE_ROUNDS: Final = 10
_MEASURE_ROUNDS: Final = 8
_LEAVE_ROUNDS: Final = 3
_LEAST_SETTLE_S: Final = 0.5
_LEAST_MEASURE_S: Final = 1.0
_LEAST_LEAVE_S: Final = 0.1
_HOLD_S: Final = 10.0
_LONGEST_HOLD_S: Final = 80.0
_CHANGED: Final = 0.3
_MOST_LIMITED: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Measured:
    """What so many lanes carried: bytes/s, the mean round trip in shortest ones, and the part that was lost."""

    rate: float
    queue: float
    loss: float


class RateTuner(StreamTuner):
    """For lanes whose own congestion control finds the bandwidth (the kernel's BBR): how many is measured.

    Where packets wait the path is full, and fewer lanes may do; where none do, more may carry more (a lane that waits
    for what it lost leaves the path to the others, and a window may be too small for the path), or they always did.
    What a try brought is measured once the lanes have settled, and undone if it was not worth it; the next one comes
    after a pause that grows with each in vain, and goes the other way. Lanes leave one by one, so that the others can
    take over what they carried. A rate that has changed by `_CHANGED` begins anew.

    ``upwards``: which way to try first where nothing says.
    """

    def __init__(self, range: Range, *, upwards: bool = True) -> None:
        super().__init__(range)
        self._upwards = upwards
        self._target = range.start
        self._next_leave = 0.0
        self._not_before: float | None = None  # when the lanes have settled
        self._since: float | None = None  # when the measurement began
        self._delivered = self._sent = self._lost = 0
        self._looks = self._limited_looks = 0
        self._waited = 0.0
        self._tried_from: tuple[int, _Measured] | None = None  # lanes and what they carried before the try under way
        self._rate = 0.0
        self._best = 0.0
        self._hold_until = 0.0
        self._pause_s = 0.0  # that begins once the lanes are back
        self._hold_s = _HOLD_S
        self._has_waited = False

    @property
    def goal(self) -> int:
        return self._target

    def fix(self, range: Range) -> None:
        super().fix(range)
        self._target = self.wanted

    def bound(self, range: Range) -> None:
        self.range = range
        if not range.least <= self._target <= range.most:
            self._tried_from = None
            self._aim(self._target, BOUNDED)

    def look(self, flow: SessionFlow, live: int, now: float, *, settled: bool, idle: bool) -> int:
        if self.range.fixed:
            return self.range.start
        if not settled or not live:
            return self.wanted
        if self._target < self.wanted and now >= self._next_leave:
            self._next_leave = now + max(_LEAST_LEAVE_S, _LEAVE_ROUNDS * flow.min_rtt_s)
            self.choose(self.wanted - 1, self.reason)
        if self._not_before is None or live != self._target:
            if self._target == self.wanted and self.take_as_they_are(live, now):
                self._target = self.wanted
                if self._tried_from is not None and self._tried_from[0] == self.wanted:
                    self._tried_from = None
                    self._hold(now)
            self._hold_until = now + self._pause_s
            self._measure_from(now + max(_LEAST_SETTLE_S, _SETTLE_ROUNDS * flow.min_rtt_s))
            return self.wanted
        self._apart_since = None
        if now < self._not_before:
            return self.wanted
        if self._since is None:
            self._since = now
            self._delivered, self._sent, self._lost = flow.delivered, flow.sent, flow.lost
            return self.wanted
        self._looks += 1
        self._limited_looks += idle or not flow.unsent
        self._waited += flow.rtt_s / flow.min_rtt_s
        elapsed = now - self._since
        if elapsed >= max(_LEAST_MEASURE_S, _MEASURE_ROUNDS * flow.min_rtt_s):
            measured = _Measured(
                (flow.delivered - self._delivered) / elapsed,
                self._waited / self._looks,
                (flow.lost - self._lost) / max(1, flow.sent - self._sent),
            )
            limited = self._limited_looks > _MOST_LIMITED * self._looks
            self._measure_from(now)
            if not limited:
                self._judge(flow, measured, now)
        return self.wanted

    def rest(self) -> None:
        self._not_before = None

    def _measure_from(self, when: float) -> None:
        self._not_before, self._since = when, None
        self._looks = self._limited_looks = 0
        self._waited = 0.0

    def _judge(self, flow: SessionFlow, measured: _Measured, now: float) -> None:
        """So many lanes carried that much: keep them, go back, or try another number."""
        if self._tried_from is not None:
            self._conclude(*self._tried_from, measured, now)
            return
        rate, self._rate = self._rate, measured.rate
        if rate and abs(measured.rate - rate) > _CHANGED * rate:
            self._hold_until, self._hold_s, self._best = now, _HOLD_S, measured.rate
            return
        self._best = max(self._best, measured.rate)
        if now < self._hold_until:
            return
        upwards = self._upwards and measured.queue < FULL
        if upwards and self.wanted < self.range.most:
            lanes = max(_STEP_UP * self.wanted, min(round(flow.bdp / PER_LANE), 2 * _STEP_UP * self.wanted))
            self._try(lanes, measured, "to try whether more carry more", now)
        elif measured.loss >= LOSSY and not self._has_waited:
            self._has_waited = True
            self._hold_until = now + self._hold_s
        elif not upwards and self.wanted > self.range.least:
            self._try(int(self.wanted * _STEP_DOWN), measured, "to try whether fewer do", now)
        else:
            self._hold(now)

    def _try(self, lanes: int, before: _Measured, reason: str, now: float) -> None:
        self._tried_from = self.wanted, before
        self._pause_s = 0.0
        self._aim(lanes, reason)

    def _aim(self, lanes: int, reason: str) -> None:
        self._target = max(self.range.least, min(self.range.most, lanes))
        self.reason = reason
        self._apart_since = None
        if self._target > self.wanted:
            self.choose(self._target, reason)

    def _conclude(self, lanes: int, before: _Measured, after: _Measured, now: float) -> None:
        self._tried_from = None
        change = f"{lanes} to {self.wanted} streams changed {_mbit(before.rate)} to {_mbit(after.rate)} Mbit/s"
        self._best = max(self._best, before.rate)
        if after.rate >= (KEPT * self._best if self.wanted < lanes else before.rate / KEPT):
            self._rate = after.rate
            self._hold_s = _HOLD_S
            self.reason = change
            return
        self._hold(now)
        self._aim(lanes, change)

    def _hold(self, now: float) -> None:
        """Nothing more to try this way for now."""
        self._upwards = not self._upwards
        self._pause_s = self._hold_s
        self._hold_until = now + self._pause_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)


def _mbit(rate: float) -> str:
    return f"{rate * 8 / 1e6:.1f}"
