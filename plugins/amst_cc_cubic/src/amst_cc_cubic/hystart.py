"""HyStart++ (RFC 9406): leaves slow start when the delay rises, before the queue overflows."""

from __future__ import annotations

from typing import Final

MIN_RTT_THRESH: Final = 0.004
MAX_RTT_THRESH: Final = 0.016
MIN_RTT_DIVISOR: Final = 8
N_RTT_SAMPLE: Final = 8
CSS_GROWTH_DIVISOR: Final = 4
CSS_ROUNDS: Final = 5
L_UNPACED: Final = 8
"""The constants of RFC 9406 4.3, in seconds where they are times. L is unlimited for a sender that is paced."""


class HyStart:
    """Watches the round-trip times of slow start, round by round; the window is its owner's.

    A round trip much longer than those of the round before leads to Conservative Slow Start (CSS), which grows a
    quarter as fast. It takes that back when the delay falls again, and else ends slow start after five rounds.
    """

    __slots__ = ("_baseline", "_css_rounds", "_current", "_last", "_samples")

    def __init__(self) -> None:
        self._last: float | None = None
        self._current: float | None = None
        self._samples = 0
        self._baseline: float | None = None
        self._css_rounds = 0

    @property
    def in_css(self) -> bool:
        """Whether slow start is conservative now."""
        return self._baseline is not None

    def on_round(self) -> bool:
        """A round trip begins. True: CSS has had its rounds, and congestion avoidance follows.

        A round in the middle of which CSS began counts (RFC 9406 4.2).
        """
        self._last, self._current, self._samples = self._current, None, 0
        if self._baseline is None:
            return False
        self._css_rounds += 1
        return self._css_rounds >= CSS_ROUNDS

    def on_rtt(self, rtt: float) -> None:
        """One sample of this round, in seconds."""
        self._samples += 1
        shortest = self._current = rtt if self._current is None else min(self._current, rtt)
        if self._samples < N_RTT_SAMPLE:
            return
        if self._baseline is not None:
            if shortest < self._baseline:
                self._baseline = None
        elif self._last is not None:
            threshold = max(MIN_RTT_THRESH, min(self._last / MIN_RTT_DIVISOR, MAX_RTT_THRESH))
            if shortest >= self._last + threshold:
                self._baseline = shortest
                self._css_rounds = 0
