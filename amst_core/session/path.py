"""What is seen of a session's path, two times a second: the samples that a mode detector decides by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..interfaces import PathSample, PathStats
from .loss import LossMeter

SAMPLE_S: Final = 0.5
"""From one sample to the next; a session that is idle takes fewer."""

_STALE_S: Final = 4 * SAMPLE_S
"""After so long what was delivered meanwhile is no rate."""

_MOST_LIMITED: Final = 0.5
"""Part of the bytes, or of the time, that something else than the path may have limited."""

_SETTLING_ROUNDS: Final = 10
"""Round trips after the first byte whose losses are those of the senders' search for the path's rate."""


class PathMeter:
    """Sums the lanes of a session up. Sans-IO; the caller serialises calls.

    The round trip is that of the lane with the shortest of those that delivered something: queues are common to all,
    what else delays one is not the path's. It is the smoothed one, for the shortest that a kernel remembers may be that
    of another path of minutes ago. The bandwidth is what all lanes delivered since the last sample, unless most of it
    went over lanes that had not always something to send (TCP's mark at its own rate samples), or the peer had no room.
    """

    def __init__(self) -> None:
        self._before: dict[int, PathStats] = {}
        self._at: float | None = None
        self._loss = LossMeter()
        self._settled_at: float | None = None

    def sample(self, lanes: Mapping[int, PathStats], now: float, *, limited: bool) -> PathSample:
        """The ``lanes`` at ``now``; ``limited``: something that was asked for limits what they send."""
        elapsed = None if self._at is None else now - self._at
        moved = {id: moved for id, stats in lanes.items() if (moved := self._moved(id, stats)) > 0}
        latency_s = min((rtt for id in moved if (rtt := lanes[id].rtt_s) is not None), default=None)
        bandwidth = None
        if elapsed is not None and elapsed <= _STALE_S and not limited and self._by_path(lanes, moved, elapsed):
            bandwidth = sum(moved.values()) / elapsed
        if self._settled_at is None and latency_s is not None:
            self._settled_at = now + _SETTLING_ROUNDS * latency_s
        loss = self._loss.look(lanes)
        if self._settled_at is None or now < self._settled_at:
            loss = None
        self._before, self._at = dict(lanes), now
        return PathSample(latency_s, bandwidth, loss)

    def _moved(self, id: int, stats: PathStats) -> int:
        """Bytes that a lane delivered since the last sample."""
        before = self._before.get(id)
        if before is None or stats.bytes_acknowledged is None or before.bytes_acknowledged is None:
            return 0
        return stats.bytes_acknowledged - before.bytes_acknowledged

    def _by_path(self, lanes: Mapping[int, PathStats], moved: Mapping[int, int], elapsed: float) -> bool:
        """Whether the path limited what was delivered."""
        total = sum(moved.values())
        idle = sum(amount for id, amount in moved.items() if lanes[id].app_limited is not False)
        held_up = 0.0
        for id, amount in moved.items():
            now, before = lanes[id].peer_limited_s, self._before[id].peer_limited_s
            if now is not None and before is not None:
                held_up += (now - before) / elapsed * amount
        return total > 0 and idle < _MOST_LIMITED * total and held_up < _MOST_LIMITED * total
