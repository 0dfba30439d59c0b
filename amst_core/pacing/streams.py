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


class StreamTuner(ABC):
    """Chooses the number of lanes within ``range``; ``reason`` says why it is that of now."""

    def __init__(self, range: Range) -> None:
        self.range = range
        self.wanted = range.start
        self.reason = "as many as were asked for" if range.fixed else "as many as the mode begins with"

    @property
    def wants_more(self) -> bool:
        """The lanes are too few, and more are coming: what they deliver says too little about the path."""
        return False

    @abstractmethod
    def look(self, flow: SessionFlow, live: int, now: float, *, settled: bool, idle: bool) -> int:
        """How many lanes there should be at ``now``, of which ``live`` carry.

        ``settled``: the bandwidth of the path is known; ``idle``: the application has nothing more to send.
        """

    def choose(self, wanted: int, reason: str) -> int:
        """Have ``wanted`` lanes, as far as the range goes, for ``reason``."""
        wanted = max(self.range.least, min(self.range.most, wanted))
        if wanted != self.wanted:
            self.wanted, self.reason = wanted, reason
        return self.wanted


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

    def look(self, flow: SessionFlow, live: int, now: float, *, settled: bool, idle: bool) -> int:
        if idle or not flow.bandwidth or not live:
            return self.wanted
        self._short = flow.capacity < HEADROOM * flow.bandwidth
        if now < self._next or self.range.fixed:
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
                return self.choose(self.wanted - 1, _windows(flow))
        else:
            self._surplus_since = None
        return self.wanted

    def _more(self, flow: SessionFlow, there: int, capacity: float) -> int:
        at_once = max(2, there // 2)
        step = math.ceil(there * (HEADROOM * flow.bandwidth / capacity - 1)) if capacity else at_once
        step = max(1, min(step, at_once))
        if flow.bandwidth > _HELPED * self._bandwidth_before:
            step = max(step, at_once)  # the last ones helped, and how much more there is nobody knows
        self._bandwidth_before = flow.bandwidth
        return self.choose(there + step, _windows(flow))


def _windows(flow: SessionFlow) -> str:
    return f"the streams' windows allow {flow.capacity / flow.bandwidth:.1f} times the bandwidth"


# ---- lanes that find the bandwidth by themselves ----------------------------------------------

PER_LANE: Final = 160 << 10
"""Bytes of the path's bandwidth-delay product for each lane, to begin with (requirements D1)."""

KEPT: Final = 0.97
"""Fewer lanes are kept if they carry so much of what more did; more are if they carry more by as much."""

LOSSY: Final = 0.005
_STEP_DOWN: Final = 0.75
_SETTLE_ROUNDS: Final = 10
_MEASURE_ROUNDS: Final = 8
_LEAST_SETTLE_S: Final = 0.5
_LEAST_MEASURE_S: Final = 1.0
_HOLD_S: Final = 10.0
_LONGEST_HOLD_S: Final = 80.0
_CHANGED: Final = 0.3
_MOST_IDLE: Final = 0.1


class RateTuner(StreamTuner):
    """For lanes whose own congestion control finds the bandwidth (the kernel's BBR): how many is measured.

    It begins with the path's bandwidth-delay product, `PER_LANE` of it each. Then it tries: on a path that loses, more
    (a lane that waits for what it lost leaves the path to others), else fewer. What a try brought is measured once the
    lanes have settled, and undone if it was not worth it; the next comes after a pause that grows with each in vain.
    A rate that has changed by `_CHANGED` begins anew.
    """

    def __init__(self, range: Range) -> None:
        super().__init__(range)
        self._since: float | None = None  # when the measurement began, or will begin
        self._delivered = self._sent = self._lost = 0
        self._looks = self._idle_looks = 0
        self._tried_from: tuple[int, float] | None = None  # lanes and rate before the try under way
        self._rate = 0.0
        self._hold_until = 0.0
        self._hold_s = _HOLD_S
        self._by_product = False

    def look(self, flow: SessionFlow, live: int, now: float, *, settled: bool, idle: bool) -> int:
        if not settled or self.range.fixed or not live:
            return self.wanted
        if self._since is None or (live != self.wanted and now < self._since):
            self._measure_from(flow, now)
        elif now < self._since:
            self._delivered, self._sent, self._lost = flow.delivered, flow.sent, flow.lost
            self._looks = self._idle_looks = 0
        else:
            self._looks += 1
            self._idle_looks += idle
            elapsed = now - self._since
            if elapsed >= max(_LEAST_MEASURE_S, _MEASURE_ROUNDS * flow.min_rtt_s):
                if self._idle_looks <= _MOST_IDLE * self._looks:
                    self._judge(flow, elapsed, now)
                self._measure_from(flow, now)
        return self.wanted

    def _measure_from(self, flow: SessionFlow, now: float) -> None:
        """Measure anew, once what has changed has settled."""
        unsettled = self._tried_from is not None or self._since is None
        self._since = now + (max(_LEAST_SETTLE_S, _SETTLE_ROUNDS * flow.min_rtt_s) if unsettled else 0.0)
        self._delivered, self._sent, self._lost = flow.delivered, flow.sent, flow.lost
        self._looks = self._idle_looks = 0

    def _judge(self, flow: SessionFlow, elapsed: float, now: float) -> None:
        """So many lanes carried that much: keep them, go back, or try another number."""
        rate = (flow.delivered - self._delivered) / elapsed
        sent = flow.sent - self._sent
        loss = (flow.lost - self._lost) / sent if sent else 0.0
        if self._tried_from is not None:
            self._conclude(rate, now)
            return
        if not self._by_product:
            self._by_product = True
            lanes = round(flow.bdp / PER_LANE)
            if lanes > self.wanted:
                self._try(lanes, rate, f"one for each {PER_LANE >> 10} KiB of the path's {_kib(flow.bdp)} KiB")
                return
        if self._rate and abs(rate - self._rate) > _CHANGED * self._rate:
            self._hold_until, self._hold_s, self._by_product = now, _HOLD_S, False
            self._rate = rate
            return
        self._rate = rate
        if now < self._hold_until:
            return
        if loss >= LOSSY and self.wanted < self.range.most:
            self._try(2 * self.wanted, rate, f"tried, for {loss:.1%} is lost")
        elif loss < LOSSY and self.wanted > self.range.least:
            self._try(int(self.wanted * _STEP_DOWN), rate, "tried, for fewer may do")
        else:
            self._hold_until = now + self._hold_s

    def _try(self, lanes: int, rate: float, reason: str) -> None:
        before = self.wanted
        if self.choose(lanes, reason) != before:
            self._tried_from = before, rate

    def _conclude(self, rate: float, now: float) -> None:
        assert self._tried_from is not None, "a try is under way"
        before, rate_before = self._tried_from
        self._tried_from = None
        change = f"{before} to {self.wanted} streams changed {_mbit(rate_before)} to {_mbit(rate)} Mbit/s"
        if rate >= (KEPT * rate_before if self.wanted < before else rate_before / KEPT):
            self._rate = rate
            self._hold_s = _HOLD_S
            self.reason = change
            return
        self._hold_until = now + self._hold_s
        self._hold_s = min(2 * self._hold_s, _LONGEST_HOLD_S)
        self.choose(before, change)


def _kib(nbytes: float) -> int:
    return round(nbytes / 1024)


def _mbit(rate: float) -> str:
    return f"{rate * 8 / 1e6:.1f}"
