"""How long chunks are: as the profile has them, longer where their number would limit a session, by loss and delay."""

from __future__ import annotations

from typing import Final

MOST_TIMES: Final = 4
"""How many times the configured size a chunk may become."""

STEP_S: Final = 5.0
"""Loss and delay change the size by one step in so long at most (requirements D3)."""

_PER_SECOND: Final = 700
"""Chunks a second, over all lanes, that do not limit a session yet: each costs about 100 µs of Python on a side."""

_LONG_STEP: Final = 256 << 10
_SHORT_STEP: Final = 16 << 10
_LEAST_CHANGE: Final = 4  # a quarter: a rate always varies a little
_LEAST_S: Final = 0.05
_MUCH_LOSS: Final = 0.05
_LITTLE_LOSS: Final = 0.01
_SHORT_DELAY_S: Final = 0.1


class ChunkTuner:
    """Chooses the size of chunks (bytes) by how fast the peer acknowledges them, and by what the path does to them.

    It begins with ``configured`` and is never more than ``most``. With a ``least`` below that it shrinks on a path that
    loses much, so that less waits behind a chunk that is held up, and grows on one that loses little; without, only the
    rate changes it, and never below ``configured``. Sans-IO; the caller serialises calls.
    """

    def __init__(self, configured: int, *, most: int, least: int | None = None) -> None:
        self.configured = configured
        self._most = max(configured, min(most, MOST_TIMES * configured))
        self._least = configured if least is None else min(least, configured)
        self._suits_path = configured  # by loss and delay
        self._suits_rate = 0  # so many would keep the number of chunks bearable
        self._since: float | None = None
        self._acknowledged = 0
        self._stepped_at: float | None = None
        self.size = configured

    @property
    def follows_path(self) -> bool:
        """Loss and delay matter."""
        return self._least < self.configured

    def observe(self, acknowledged: int, now: float) -> bool:
        """So many bytes were acknowledged in all; whether `size` has changed."""
        if self._since is None:
            self._since, self._acknowledged = now, acknowledged
        elapsed = now - self._since
        if elapsed < _LEAST_S:
            return False
        wanted = (acknowledged - self._acknowledged) / elapsed / _PER_SECOND
        self._since, self._acknowledged = now, acknowledged
        step = _LONG_STEP if wanted >= _LONG_STEP / 2 else _SHORT_STEP
        self._suits_rate = round(wanted / step) * step
        return self._choose()

    def observe_path(self, loss: float | None, rtt_s: float | None, now: float) -> bool:
        """A share of ``loss`` and a round trip, None where they are not known; whether `size` has changed."""
        if self._stepped_at is not None and now - self._stepped_at < STEP_S:
            return False
        before = self._suits_path
        if loss is not None and loss > _MUCH_LOSS:
            self._suits_path = max(self._least, before // 2)
        elif loss is not None and loss < _LITTLE_LOSS and rtt_s is not None and rtt_s < _SHORT_DELAY_S:
            self._suits_path = min(self._most, before * 2)
        if self._suits_path != before:
            self._stepped_at = now
        return self._choose()

    def _choose(self) -> bool:
        size = min(max(self._suits_path, self._suits_rate), self._most)
        if abs(size - self.size) * _LEAST_CHANGE < self.size:
            return False
        self.size = size
        return True
