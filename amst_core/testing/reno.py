"""A small controller that keeps every rule: NewReno, to start from and to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..congestion import FlowAccount
from ..interfaces import AckSample, CongestionController

__all__ = ["RenoController"]

_INITIAL_WINDOW: Final = 10
"""Segments (RFC 6928)."""


class RenoController(CongestionController):
    """Slow start and congestion avoidance by bytes (RFC 5681, RFC 3465 with L = 2), one halving per flight (RFC 6582).

    What is halved is the window, as in Linux (``tcp_reno_ssthresh``), not what is in flight (RFC 5681, equation 4): it
    grows only while half of it is used. A mark counts as a loss (RFC 3168 6.1.2).

    Args:
        mss: bytes of a full packet.
    """

    name = "reno"
    kernel_name = "reno"

    def __init__(self, mss: int) -> None:
        self._mss = mss
        self._window = _INITIAL_WINDOW * mss
        self._ssthresh: int | None = None
        self._avoided = 0
        """Bytes acknowledged in congestion avoidance since the window last grew."""
        self._recovery_from = float("-inf")
        self._timed_out = False
        """Nothing was acknowledged since the last timeout."""
        self._account = FlowAccount()

    @property
    def window(self) -> int:
        return self._window

    @property
    def pacing_rate(self) -> float | None:
        return None

    def on_sent(self, *, now: float, size: int, in_flight: int, app_limited: bool) -> None:
        self._account.on_sent(size, in_flight)

    def on_ack(self, sample: AckSample) -> None:
        self._account.on_ack(sample)
        self._timed_out = False
        if sample.sent_at < self._recovery_from:
            return
        if sample.ecn_ce:
            self._halve(sample.now)
            return
        if sample.prior_in_flight + self._mss <= self._window // 2:
            return
        if self._ssthresh is None or self._window < self._ssthresh:
            self._window += min(sample.acked, 2 * self._mss)
            return
        self._avoided += sample.acked
        if self._avoided >= self._window:
            self._avoided -= self._window
            self._window += self._mss

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        self._account.on_loss(lost, in_flight)
        if persistent:
            if not self._timed_out:  # else what was sent again is lost again: ssthresh stays (RFC 5681 3.1)
                self._halve(now)
            self._window = self._mss
            self._recovery_from = now
            self._timed_out = True
        elif sent_at >= self._recovery_from:
            self._halve(now)

    def _halve(self, now: float) -> None:
        self._ssthresh = self._window = max(self._window // 2, 2 * self._mss)
        self._recovery_from = now
        self._avoided = 0

    def state(self) -> Mapping[str, float | str]:
        known = self._account.state(self.name, window=self._window, pacing_rate=None)
        return known if self._ssthresh is None else {**known, "ssthresh": self._ssthresh}
