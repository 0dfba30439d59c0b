"""Slow told from stuck: which lanes will be through with what they carry about as soon as a copy over another would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .lanes import LaneWorker

WATCHED_S: Final = 0.3
"""A lane is watched for so long before it is judged; a copy can wait for that."""


class LaneProgress:
    """Watches lanes whose chunks are late. The caller serialises calls."""

    def __init__(self) -> None:
        self._since: dict[int, tuple[float, int]] = {}  # by lane: when it began to be watched, and its counter then

    def soon_through(self, late: Iterable[LaneWorker], within_s: float, now: float) -> set[int]:
        """Those of the ``late`` lanes that move, and will be through ``within_s`` from now as they do.

        A lane of which nothing is known is none of them, nor is one whose path took everything: there it is the peer
        who does not answer.
        """
        watched: dict[int, tuple[float, int]] = {}
        soon: set[int] = set()
        for worker in late:
            acknowledged = worker.lane.path_stats().bytes_acknowledged
            if acknowledged is None:
                continue
            since, before = watched[worker.id] = self._since.get(worker.id, (now, acknowledged))
            elapsed, moved, left = now - since, acknowledged - before, worker.bytes_handed - acknowledged
            if elapsed < WATCHED_S or (left > 0 and left * elapsed <= moved * within_s):
                soon.add(worker.id)
        self._since = watched
        return soon
