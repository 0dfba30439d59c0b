"""How much more than expected is acknowledged at once (Linux 5.x, bbr_update_ack_aggregation)."""

from __future__ import annotations

from typing import Final

_WINDOW_ROUNDS: Final = 5
_MAX_SEGMENTS: Final = 1 << 20


class AckAggregation:
    """The most that was acknowledged beyond what the bandwidth explains, in the last 5 to 10 round trips.

    Wi-Fi, cable and receivers that merge segments acknowledge in bursts. Between them a window of the
    bandwidth-delay product would run empty; so much more keeps the sender going.
    """

    __slots__ = ("_acked", "_current", "_max_acked", "_rounds", "_since", "_windows")

    def __init__(self, mss: int) -> None:
        self._max_acked = _MAX_SEGMENTS * mss
        self._since = 0.0
        self._acked = 0
        self._rounds = 0
        self._current = 0
        self._windows = [0, 0]

    @property
    def extra(self) -> int:
        """Bytes."""
        return max(self._windows)

    def restart(self, now: float) -> None:
        """Begin a new epoch: what was sent before an idle period says nothing about what is acknowledged after it."""
        self._since = now
        self._acked = 0

    def update(self, now: float, *, acked: int, bandwidth: float, window: int, round_start: bool) -> None:
        """``acked`` bytes were acknowledged, while ``bandwidth`` (bytes/s) was expected and ``window`` allowed."""
        if round_start:
            self._rounds += 1
            if self._rounds >= _WINDOW_ROUNDS:
                self._rounds = 0
                self._current ^= 1
                self._windows[self._current] = 0
        expected = int(bandwidth * (now - self._since))
        if self._acked <= expected or self._acked + acked >= self._max_acked:
            self.restart(now)
            expected = 0
        self._acked = min(self._acked + acked, self._max_acked)
        extra = min(self._acked - expected, window)
        self._windows[self._current] = max(self._windows[self._current], extra)
