"""How long chunks are: as configured, and longer on a path so fast that their number would be what limits it."""

from __future__ import annotations

from typing import Final

MOST_TIMES: Final = 4
"""How many times the configured size a chunk may become."""

_PER_SECOND: Final = 700
"""Chunks a second, over all lanes, that do not limit a session yet: each costs about 100 µs of Python on a side."""

_STEP: Final = 256 << 10
_LEAST_CHANGE: Final = 4  # a quarter: a rate always varies a little
_LEAST_S: Final = 0.05


class ChunkTuner:
    """Chooses the size of chunks (bytes) from the rate at which the peer acknowledges them.

    Never less than what is ``configured``, never more than ``most``. Sans-IO; the caller serialises calls.
    """

    def __init__(self, configured: int, *, most: int) -> None:
        self.configured = configured
        self._most = max(configured, min(most, MOST_TIMES * configured))
        self._since: float | None = None
        self._acknowledged = 0
        self.size = configured

    def observe(self, acknowledged: int, now: float) -> bool:
        """So many bytes were acknowledged in all; whether `size` has changed."""
        if self._since is None:
            self._since, self._acknowledged = now, acknowledged
        elapsed = now - self._since
        if elapsed < _LEAST_S:
            return False
        wanted = (acknowledged - self._acknowledged) / elapsed / _PER_SECOND
        self._since, self._acknowledged = now, acknowledged
        size = min(max(self.configured, round(wanted / _STEP) * _STEP), self._most)
        if abs(size - self.size) * _LEAST_CHANGE < self.size:
            return False
        self.size = size
        return True
