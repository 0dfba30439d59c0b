"""The sending side's ledger: what of each transfer is unsent, in flight, acknowledged, to be sent again."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from ..errors import ProtocolError
from ..wire.fields import Span
from .intervals import IntervalSet


class Outgoing:
    """One transfer this side sends.

    ``available`` is how many bytes the source has offered (the size, when known), ``limit`` the peer's
    credit, ``cursor`` the next offset never sent before.
    """

    __slots__ = (
        "acked", "available", "cursor", "ended", "flow", "id", "in_flight", "limit", "lost", "queued", "reading",
        "resends", "size", "unread", "verdict",
    )  # fmt: skip

    def __init__(self, id: int, *, flow: Hashable, size: int | None, limit: int) -> None:
        self.id = id
        self.flow = flow
        self.size = size
        self.available = size or 0
        self.limit = limit
        self.cursor = 0
        self.acked = IntervalSet()
        self.lost: deque[Span] = deque()
        self.in_flight: dict[int, tuple[int, int]] = {}  # offset → (end, lane)
        self.reading = 0  # chunks of it that a lane is reading or sending right now
        self.unread = True  # SourceDrained not told yet
        self.ended = False
        self.queued = False
        self.verdict: tuple[str, str] | None = None
        self.resends = 0  # bytes taken a second time

    def take(self, most: int) -> tuple[int, int, bool] | None:
        """The next span to send and whether it is a retransmission; None when nothing may go now."""
        while self.lost:
            start, end = self.lost.popleft()
            gap = next(self.acked.gaps(start, end), None)
            if gap is None:
                continue
            if gap[1] < end:
                self.lost.appendleft((gap[1], end))
            start, end = gap
            if end - start > most:
                self.lost.appendleft((start + most, end))
                end = start + most
            return start, end, True
        end = min(self.cursor + most, self.available, self.limit)
        if end > self.cursor:
            start, self.cursor = self.cursor, end
            return start, end, False
        return None

    def sendable(self) -> bool:
        return self.verdict is None and (bool(self.lost) or self.cursor < min(self.available, self.limit))

    def drained(self) -> bool:
        """Every byte of a transfer of known size has been handed out and read."""
        return self.size is not None and self.cursor == self.size and not self.reading

    def acknowledge(self, spans: tuple[Span, ...]) -> bool:
        """Mark spans as held by the peer; true when any byte of them is news."""
        news = False
        for start, end in spans:
            if not start < end <= self.cursor:
                raise ProtocolError(f"ACK of {start}–{end} of transfer {self.id}, of which {self.cursor} were sent")
            news |= self.acked.add(start, end) > 0
        if news:
            for offset in [o for o, (end, _) in self.in_flight.items() if self.acked.covers(o, end)]:
                del self.in_flight[offset]
        return news

    def lose_lane(self, lane: int) -> None:
        """Queue again what was in flight on ``lane``."""
        for offset in sorted((o for o, (_, on) in self.in_flight.items() if on == lane), reverse=True):
            end, _ = self.in_flight.pop(offset)
            self.lost.appendleft((offset, end))

    def lose_span(self, start: int, end: int) -> None:
        """Queue again what of ``[start, end)`` was sent and is not acknowledged."""
        end = min(end, self.cursor)
        for offset in [o for o, (stop, _) in self.in_flight.items() if o < end and start < stop]:
            del self.in_flight[offset]
        for gap in self.acked.gaps(start, end):
            self.lost.append(gap)


class Flows:
    """Fair turns: round robin among flows, first come first served inside a flow.

    A flow is a channel of messages, the files of one job, or one pipe. A transfer sits in its flow only
    while it has something to send, so that `next` never walks over blocked ones.
    """

    def __init__(self) -> None:
        self._flows: dict[Hashable, deque[Outgoing]] = {}
        self._turns: deque[Hashable] = deque()

    def __bool__(self) -> bool:
        return bool(self._turns)

    def wake(self, transfer: Outgoing) -> None:
        """Queue ``transfer`` if it has something to send and is not queued yet."""
        if transfer.queued or not transfer.sendable():
            return
        transfer.queued = True
        flow = self._flows.get(transfer.flow)
        if flow is None:
            flow = self._flows[transfer.flow] = deque()
            self._turns.append(transfer.flow)
        if flow and transfer.id < flow[0].id:
            flow.appendleft(transfer)
        else:
            flow.append(transfer)

    def next(self, most: int) -> tuple[Outgoing, int, int, bool] | None:
        """The next span in turn, at most ``most`` bytes: transfer, start, end, retransmission."""
        while self._turns:
            key = self._turns[0]
            flow = self._flows[key]
            while flow:
                transfer = flow[0]
                span = transfer.take(most) if transfer.verdict is None else None
                if not transfer.sendable():
                    flow.popleft()
                    transfer.queued = False
                if span is not None:
                    self._turns.rotate(-1)
                    self._tidy(key)
                    return transfer, *span
            self._tidy(key)
        return None

    def _tidy(self, key: Hashable) -> None:
        if not self._flows[key]:
            del self._flows[key]
            self._turns.remove(key)
