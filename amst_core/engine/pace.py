"""How fast and how long: the token bucket of a rate limit, and when an acknowledgement is late. No clock."""

from __future__ import annotations

from typing import Final

BURST_S: Final = 0.05
"""A limited sender runs ahead of its rate, and cuts chunks, by so many seconds' worth of bytes."""

MIN_CHUNK: Final = 4 << 10
"""Smallest chunk that a rate limit asks for."""

_FIRST_S: Final = 1.0
_LEAST_S: Final = 0.2
_ALPHA: Final = 1 / 8
_BETA: Final = 1 / 4


class TokenBucket:
    """Bytes that may go, at ``rate`` bytes/s. A chunk may go while there are tokens, and may leave a debt.

    So the rate holds over any time much longer than a chunk takes, whatever the size of the chunks. Each byte costs the
    time that the rate of the moment gives it: a change of the rate begins nothing anew.
    """

    def __init__(self, rate: float, *, now: float) -> None:
        self.rate = rate
        self._tokens = 0.0
        self._at = now

    @property
    def chunk(self) -> int:
        """Longest chunk that keeps the traffic smooth, in bytes."""
        return max(MIN_CHUNK, int(self.rate * BURST_S))

    def change(self, rate: float, *, now: float) -> None:
        """``rate`` bytes/s from now on. What is owed takes as long to pay as it would have, and no burst comes with it.

        The debt is kept as a time: as bytes, one chunk of a fast path would hold up a slow rate for minutes.
        """
        self._settle(now)
        self._tokens *= rate / self.rate
        self.rate = rate

    def ready_at(self, now: float) -> float:
        """When the next chunk may go; ``now`` or before when it may at once."""
        self._settle(now)
        return now if self._tokens >= 0 else now - self._tokens / self.rate

    def take(self, size: int) -> None:
        """``size`` bytes go."""
        self._tokens -= size

    def _settle(self, now: float) -> None:
        self._tokens = min(self.rate * BURST_S, self._tokens + (now - self._at) * self.rate)
        self._at = now


class AckTimer:
    """How long a chunk takes from being handed to a lane until it is acknowledged: RFC 6298's estimator.

    Chunks that were sent twice give no sample (Karn's algorithm): nobody knows which copy was acknowledged.
    """

    def __init__(self) -> None:
        self._smoothed: float | None = None
        self._variation = 0.0

    def sample(self, elapsed_s: float) -> None:
        if self._smoothed is None:
            self._smoothed, self._variation = elapsed_s, elapsed_s / 2
        else:
            self._variation += _BETA * (abs(self._smoothed - elapsed_s) - self._variation)
            self._smoothed += _ALPHA * (elapsed_s - self._smoothed)

    @property
    def smoothed_s(self) -> float:
        """The mean, the latest counting most; 0 before the first sample."""
        return self._smoothed or 0.0

    @property
    def late_after_s(self) -> float:
        """After so long without an acknowledgement a chunk is late."""
        if self._smoothed is None:
            return _FIRST_S
        return max(_LEAST_S, self._smoothed + 4 * self._variation)
