"""The sending side's ledger: what of each transfer is unsent, in flight, acknowledged, to be sent again."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Final

from ..errors import ProtocolError
from ..wire.fields import Span
from .intervals import IntervalSet

SHORT: Final = 1 << 20
"""Transfers of fewer bytes are short (requirements F1)."""

BUSY_TIMES: Final = 4
"""So many times later than otherwise is late while there is something else to send, or on a lane that moves."""

MAX_DOUBLINGS: Final = 6
"""How often the patience for the next copy of a late span doubles."""


@dataclass(slots=True, eq=False)
class Chunk:
    """A span of an outgoing transfer handed to a lane.

    ``free``: set by the lane once it holds no view of the source any more, though it still sends what it read.
    ``lent``: set by a lane that has the system send from the source itself, which may read it until it has arrived.
    """

    transfer: int
    offset: int
    length: int
    again: bool  # a retransmission: its source may have changed since it was first read
    lane: int
    free: bool = False
    lent: bool = False


@dataclass(slots=True)
class InFlight:
    """A span handed to a lane and not acknowledged yet."""

    end: int
    lane: int
    sent_at: float
    copies: int = 0  # went to other lanes, this one being slow


class Outgoing:
    """One transfer this side sends.

    ``size`` is None until it is known, ``available`` how many bytes the source has offered (the size, when known),
    ``limit`` the peer's credit, ``cursor`` the next offset that was never sent before and that the peer does not hold
    from an earlier try. ``on_hold``: it waits for the peer's OPENED. ``in_line``: behind others of its flow, and longer
    than the credit that comes with OPEN, it waits for more: a chunk now would take memory of the peer long before the
    rest may come.
    """

    __slots__ = (
        "acked", "asked", "available", "concluded_at", "cursor", "ended", "flow", "id", "in_flight", "in_line",
        "lent", "limit", "lost", "on_hold", "open_ended", "opened", "queued", "reading", "released", "resends",
        "resumed", "size", "steady", "turn", "unread", "verdict",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        *,
        flow: Hashable,
        turn: Hashable,
        size: int | None,
        limit: int,
        on_hold: bool = False,
        in_line: bool = False,
        opened: bool = True,
        steady: bool = False,
    ) -> None:
        self.id = id
        self.flow = flow
        self.turn = turn
        self.size = size
        self.open_ended = size is None  # its source keeps bytes only until they are released
        self.released = 0
        self.available = size or 0
        self.limit = limit
        self.cursor = 0
        self.acked = IntervalSet()
        self.lost = IntervalSet()  # sent, and to be sent again
        self.in_flight: dict[int, InFlight] = {}  # by offset
        self.on_hold = on_hold
        self.in_line = in_line and size is not None and size > limit
        self.asked = False  # the peer asks whether a file that it has is the same
        self.opened = opened  # the peer hears of it as soon as it hears anything
        self.resumed = 0  # bytes the peer held from an earlier try
        self.reading: set[Chunk] = set()  # that a lane is reading or sending right now
        self.lent = False  # a chunk of it was
        self.steady = steady  # the source cannot change
        self.unread = True  # SourceDrained not told yet
        self.ended = False
        self.queued = False
        self.verdict: tuple[str, str] | None = None
        self.concluded_at: float | None = None  # about when the verdict was known
        self.resends = 0  # bytes taken a second time

    @property
    def is_short(self) -> bool:
        """It has fewer bytes than `SHORT`."""
        return self.size is not None and not self.open_ended and self.size < SHORT

    def take(self, most: int) -> tuple[int, int, bool] | None:
        """The next span to send and whether it is a retransmission; None when nothing may go now."""
        while self.lost:
            first, last = next(iter(self.lost))
            start, end = next(self.acked.gaps(first, last), (last, last))
            end = min(end, start + most)
            self.lost.remove(first, end)
            if start < end:
                return start, end, True
        if self.open_ended:
            most -= self.cursor % most  # a source in blocks of that size then has each chunk in one piece
        start, end = self.cursor, min(self.cursor + most, self.available, self.limit)
        if end <= start:
            return None
        _, end = next(self.acked.gaps(start, end))  # the cursor stands on a byte that the peer does not hold
        self.cursor = end
        self._skip_held()
        return start, end, False

    def credited(self, limit: int) -> bool:
        """The peer takes bytes up to ``limit``, and it is this one's turn; true when either is news."""
        news = self.in_line or limit > self.limit
        self.in_line = False
        self.limit = max(self.limit, limit)
        return news

    def sendable(self) -> bool:
        if self.verdict is not None or not self.opened or self.on_hold or self.asked or self.in_line:
            return False  # credit can come over a lane, and so before OPENED
        return bool(self.lost) or self.cursor < min(self.available, self.limit)

    def resume(self, spans: tuple[Span, ...]) -> None:
        """The peer holds ``spans`` from an earlier try."""
        for start, end in spans:
            self.resumed += self.acked.add(start, end)
        self._skip_held()

    def leave_out(self, holes: tuple[Span, ...]) -> None:
        """The peer has ``holes`` as soon as it takes the rest."""
        for start, end in holes:
            self.acked.add(start, end)
        self._skip_held()

    def _skip_held(self) -> None:
        self.cursor = self.acked.end_of_span(self.cursor)

    def drained(self) -> bool:
        """Every byte of a transfer of known size has been handed out, and read for the last time if it could change."""
        if self.size is None or self.cursor != self.size:
            return False
        return self.steady or self.acked.total == self.size or (self.is_free() and not self.lent)

    def is_free(self) -> bool:
        """No lane holds a view of the source."""
        return all(chunk.free for chunk in self.reading)

    def release(self) -> bool:
        """Whether more bytes from the start on are needed no more: held by the peer, and read by no lane."""
        released = min([self.acked.prefix, *(chunk.offset for chunk in self.reading if not chunk.free)])
        if released <= self.released:
            return False
        self.released = released
        return True

    def acknowledge(self, spans: tuple[Span, ...]) -> bool:
        """Mark spans as held by the peer; true when any byte of them is news."""
        news = False
        for start, end in spans:
            if not (start < end <= self.cursor or (start < end and self.acked.covers(start, end))):
                raise ProtocolError(f"ACK of {start}–{end} of transfer {self.id}, of which {self.cursor} were sent")
            news |= self.acked.add(start, end) > 0
        return news

    def pop_acknowledged(self) -> list[InFlight]:
        """Take out of flight what is acknowledged."""
        return [self.in_flight.pop(o) for o, s in list(self.in_flight.items()) if self.acked.covers(o, s.end)]

    def lose_lane(self, lane: int) -> None:
        """Queue again what was in flight on ``lane``."""
        for offset in sorted((o for o, span in self.in_flight.items() if span.lane == lane), reverse=True):
            self.lost.add(offset, self.in_flight.pop(offset).end)

    def late_lanes(self, late_after_s: float, now: float) -> set[int]:
        """The lanes with spans that `resend_late` would send again."""
        return {span.lane for _, span in self._late(late_after_s, now, ())}

    def resend_late(self, late_after_s: float, now: float, patient_with: Collection[int]) -> list[int]:
        """Queue copies of the last spans that may go, sent so long ago that their lanes must be slow; returns those.

        Each further copy waits twice as long (RFC 6298, 5.5): where it is the answers that do not come, copies help
        nobody.
        """
        late = self._late(late_after_s, now, patient_with)
        for offset, span in late:
            span.sent_at = now  # the copy may be late as well
            span.copies += 1
            self.lost.add(offset, span.end)
        return [span.lane for _, span in late]

    def _late(self, late_after_s: float, now: float, patient_with: Collection[int]) -> list[tuple[int, InFlight]]:
        if self.verdict is not None or self.cursor < min(self.available, self.limit):
            return []
        late = []
        for offset, span in self.in_flight.items():
            times = 2 ** min(span.copies, MAX_DOUBLINGS) * (BUSY_TIMES if span.lane in patient_with else 1)
            if span.sent_at <= now - late_after_s * times:
                late.append((offset, span))
        return late

    def lose_span(self, start: int, end: int) -> None:
        """Queue again what of ``[start, end)`` was sent and is not acknowledged."""
        end = min(end, self.cursor)
        for offset, span in [(o, span) for o, span in self.in_flight.items() if o < end and start < span.end]:
            del self.in_flight[offset]
            # what of it is not missing is on its way still, and must not be forgotten
            for first, last in ((offset, start), (end, span.end)):
                there = self.in_flight.get(first)
                if first < last and (there is None or there.end < last):
                    self.in_flight[first] = InFlight(last, span.lane, span.sent_at, span.copies)
        for gap in self.acked.gaps(start, end):
            self.lost.add(*gap)


class Flows:
    """Fair turns: round robin among flows, first come first served inside a flow.

    A flow (`Outgoing.turn`) is a channel of messages, the files of one job, or one pipe. A transfer sits in its
    flow only while it has something to send, so that `next` never walks over blocked ones.
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
        flow = self._flows.get(transfer.turn)
        if flow is None:
            flow = self._flows[transfer.turn] = deque()
            self._turns.append(transfer.turn)
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
                span = transfer.take(most) if transfer.sendable() else None
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
