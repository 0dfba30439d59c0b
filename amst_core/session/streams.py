"""The streams of a session as its users count them: a lane that dies is replaced, and its stream goes on."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from ..errors import AmstError
from ..interfaces import CongestionInForce, PathStats, StreamHealth

if TYPE_CHECKING:
    from .lanes import LaneWorker

SETTLED_S: Final = 1.0
"""A lane that has lived so long was no failed attempt, whatever ends it."""

_REMEMBERED: Final = 64


class Stream:
    """One stream: the lane that carries it now, and what became of those before."""

    __slots__ = (
        "_chunk_size", "_congestion", "_failures", "_path", "_received", "_sent", "error", "id", "lane", "last_active",
        "reconnects", "transport",
    )  # fmt: skip

    def __init__(self, id: int, lane: LaneWorker) -> None:
        self.id = id
        self.lane: LaneWorker | None = lane
        self.transport = lane.transport
        self.reconnects = 0
        self.error: AmstError | None = None
        self._failures = 0
        self._sent = 0  # by the lanes before
        self._received = 0
        self.last_active = lane.joined_at
        self._path = PathStats()
        self._chunk_size = 0
        self._congestion: CongestionInForce | None = None

    def replaced_by(self, lane: LaneWorker) -> None:
        self.lane = lane
        self.transport = lane.transport
        self.reconnects += 1

    def ended(self, error: AmstError | None) -> None:
        """The lane is gone: died, or left in an orderly way."""
        lane, self.lane = self.lane, None
        if lane is None:
            return
        self._sent += lane.bytes_sent
        self._received += lane.bytes_received
        self.last_active = lane.last_active
        self._path = lane.lane.path_stats()
        self._chunk_size = lane.chunk_size
        self._congestion = lane.congestion
        if error is not None:
            self.error = error
            self._failures = 1 if lane.lived_s >= SETTLED_S else self._failures + 1

    def health(self) -> StreamHealth:
        """The stream's numbers now (any thread)."""
        lane = self.lane
        return StreamHealth(
            id=self.id,
            transport=self.transport,
            healthy=lane is not None and not lane.dead and not lane.suspect,
            bytes_sent=self._sent + (lane.bytes_sent if lane is not None else 0),
            bytes_received=self._received + (lane.bytes_received if lane is not None else 0),
            last_active=lane.last_active if lane is not None else self.last_active,
            last_error=None if self.error is None else self.error.message,
            reconnects=self.reconnects,
            consecutive_failures=0 if lane is not None and lane.lived_s >= SETTLED_S else self._failures,
            path=lane.lane.path_stats() if lane is not None else self._path,
            chunk_size=lane.chunk_size if lane is not None else self._chunk_size,
            congestion=lane.congestion if lane is not None else self._congestion,
        )


class Streams:
    """All streams of a session, numbered from 1. Its lock must be held by who calls."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._past: deque[Stream] = deque(maxlen=_REMEMBERED)
        self._last_id = 0

    def joined(self, lane: LaneWorker) -> Stream:
        """``lane`` takes the place of one that died, the longest dead first, or begins a stream."""
        vacant = [stream for stream in self._streams if stream.lane is None]
        if vacant:
            stream = min(vacant, key=lambda candidate: candidate.last_active)
            stream.replaced_by(lane)
            return stream
        self._last_id += 1
        stream = Stream(self._last_id, lane)
        self._streams.append(stream)
        return stream

    def left(self, stream: Stream) -> None:
        """The stream was taken away in an orderly way."""
        stream.ended(None)
        self._streams.remove(stream)
        self._past.append(stream)

    def drop_vacant(self) -> None:
        """Nobody waits for the dead lanes to be replaced any more."""
        for stream in [s for s in self._streams if s.lane is None]:
            self._streams.remove(stream)
            self._past.append(stream)

    def shown(self) -> list[Stream]:
        """Those there are; after the end, the last that there were."""
        live = [s for s in self._streams if s.lane is None or not s.lane.leaving]
        return live or list(self._past)


