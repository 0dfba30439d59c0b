"""One session's state machine, the same on both sides: transfers out, transfers in, what to tell the peer.

Inputs are method calls (a lane joined, a chunk arrived, a control message came); outputs are return
values, `Engine.messages` (control messages to write) and `Engine.events` (things to do). Time comes in as
``now``. The caller serialises all calls.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final

from ..errors import BrokenError, ProtocolError
from ..wire.fields import AttributeValue, Span
from ..wire.frames import MAX_CHUNK, MAX_OFFSET
from ..wire.messages import (
    FILE,
    MESSAGE,
    PIPE,
    SIZE_UNKNOWN,
    Ack,
    Credit,
    End,
    Message,
    Missing,
    Open,
    Reset,
    Result,
)
from .events import (
    Event,
    Progress,
    SourceDrained,
    TransferDone,
    TransferDropped,
    TransferOffered,
    TransferWhole,
)
from .incoming import Incoming
from .outgoing import Flows, Outgoing

ACK_INTERVAL_S: Final = 0.005
"""Acknowledgements go at most this often: each costs a TLS record and a wake-up on both sides."""

ACK_SPANS: Final = 64
"""Most spans beyond the prefix that one ACK names per transfer; the rest follows as the prefix grows."""

ACK_ENTRIES: Final = 4096
"""Most transfers and spans in one ACK, which keeps it far below the longest record."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side takes: longest chunk, transfers open at once, credit that comes with each OPEN (bytes)."""

    max_chunk: int
    max_open: int
    initial_credit: int

    def __post_init__(self) -> None:
        if not (1 <= self.max_chunk <= MAX_CHUNK and self.max_open >= 1 and 1 <= self.initial_credit <= MAX_OFFSET):
            raise ProtocolError(f"limits make no sense: {self}")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span of an outgoing transfer handed to a lane."""

    transfer: int
    offset: int
    length: int
    again: bool  # a retransmission: its source may have changed since it was first read


class Verdict(enum.Enum):
    """Where an arriving chunk goes."""

    FILL = "fill"  # straight into its place; this lane is now its only writer
    COPY = "copy"  # a duplicate: aside, verified, then shown to `Engine.copied`
    PARK = "park"  # its OPEN has not arrived yet: wait, then ask again


@dataclass(frozen=True, slots=True)
class Placement:
    """The engine's answer to a DATA header; ``end`` is exclusive."""

    verdict: Verdict
    transfer: int
    start: int
    end: int


class Engine:
    """Exactly-once delivery of transfers over lanes that come and go.

    Args:
        local: what this side takes (told to the peer).
        peer: what the peer takes (told by it).
    """

    def __init__(self, *, local: Limits, peer: Limits) -> None:
        self._local = local
        self._peer = peer
        self._outgoing: dict[int, Outgoing] = {}
        self._open_by_flow: dict[Hashable, int] = {}
        self._incoming: dict[int, Incoming] = {}
        self._ending = 0  # of the incoming: told to the peer as failed, or by it, and not settled yet
        self._opened_out = 0  # highest id this side opened
        self._opened_in = 0  # highest id the peer opened
        self._flows = Flows()
        self._lanes: set[int] = set()
        self._outbox: list[Message] = []
        self._events: list[Event] = []
        self._dirty: dict[int, None] = {}  # incoming transfers with something to acknowledge, in order
        self._ack_due: float | None = None
        self.chunk_size = peer.max_chunk
        self.bytes_acknowledged = 0
        self.bytes_verified = 0
        self.bytes_retransmitted = 0

    # ---- outputs ---------------------------------------------------------------------------

    def messages(self, now: float) -> list[Message]:
        """Control messages to write now, in order. ACKs come out only when due (`deadline`)."""
        if self._ack_due is not None and now >= self._ack_due:
            self._ack_due = None
            self._acknowledge()
        out, self._outbox = self._outbox, []
        return out

    @property
    def has_messages(self) -> bool:
        """Messages wait that are not bound to the deadline."""
        return bool(self._outbox)

    @property
    def deadline(self) -> float | None:
        """When to call `messages` again even if nothing happens."""
        return self._ack_due

    def events(self) -> list[Event]:
        """What happened since the last call."""
        out, self._events = self._events, []
        return out

    # ---- sending ---------------------------------------------------------------------------

    @property
    def can_open(self) -> bool:
        """The peer takes another transfer now."""
        return len(self._outgoing) < self._peer.max_open

    def has_turn(self, flow: Hashable) -> bool:
        """``flow`` may open another one now: it leaves the last place, and a quarter, to flows that have fewer.

        So a channel that nobody reads does not keep the others from being opened.
        """
        free = self._peer.max_open - len(self._outgoing)
        own = self._open_by_flow.get(flow, 0)
        return free > 0 and (not own or own < 3 * (free - 1))

    @property
    def sending(self) -> int:
        """Outgoing transfers without a verdict."""
        return len(self._outgoing)

    @property
    def receiving(self) -> int:
        """Incoming transfers that have not ended."""
        return len(self._incoming)

    @property
    def has_chunks(self) -> bool:
        """`next_chunk` may have something; false means certainly not."""
        return bool(self._flows)

    def open(
        self,
        kind: int,
        *,
        size: int | None,
        flow: Hashable,
        channel: str = "",
        request: int = 0,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> int:
        """Begin a transfer and return its id. A known ``size`` makes all its bytes available at once."""
        if not self.can_open:
            raise BrokenError(f"{len(self._outgoing)} transfers are open, the peer takes {self._peer.max_open}")
        self._opened_out += 1
        transfer = Outgoing(self._opened_out, flow=flow, size=size, limit=self._peer.initial_credit)
        self._outgoing[transfer.id] = transfer
        self._open_by_flow[flow] = self._open_by_flow.get(flow, 0) + 1
        wire_size = SIZE_UNKNOWN if size is None else size
        self._outbox.append(Open(transfer.id, kind, wire_size, request, channel, dict(attributes or {})))
        self._flows.wake(transfer)
        self._tell_drained(transfer)
        return transfer.id

    def offer(self, transfer: int, available: int) -> None:
        """A transfer of unknown size now has ``available`` bytes in all."""
        out = self._outgoing.get(transfer)
        if out is not None and out.size is None and available > out.available:
            out.available = available
            self._flows.wake(out)

    def end(self, transfer: int) -> None:
        """The source was whole when its last byte was read; what has been offered is all."""
        out = self._outgoing.get(transfer)
        if out is not None and not out.ended and out.verdict is None:
            out.ended = True
            self._outbox.append(End(transfer, out.available))

    def reset(self, transfer: int, kind: str, message: str) -> None:
        """Give an outgoing transfer up; `TransferDone` follows when no lane reads it any more."""
        out = self._outgoing.get(transfer)
        if out is not None and out.verdict is None:
            self._outbox.append(Reset(transfer, kind, message))
            self._conclude(out, kind, message)

    def next_chunk(self, lane: int) -> Chunk | None:
        """The next span for ``lane`` to send; pair each with `chunk_left`."""
        if lane not in self._lanes:
            return None
        found = self._flows.next(self.chunk_size)
        if found is None:
            return None
        transfer, start, end, again = found
        transfer.in_flight[start] = (end, lane)
        transfer.reading += 1
        if again:
            transfer.resends += end - start
            self.bytes_retransmitted += end - start
        return Chunk(transfer.id, start, end - start, again)

    def chunk_left(self, chunk: Chunk) -> None:
        """The lane holds no view of the chunk's source any more, sent or not."""
        out = self._outgoing[chunk.transfer]
        out.reading -= 1
        self._tell_drained(out)
        self._settle(out)

    # ---- lanes -----------------------------------------------------------------------------

    def lane_joined(self, lane: int) -> None:
        """``lane`` may carry chunks from now on."""
        self._lanes.add(lane)

    def lane_left(self, lane: int) -> None:
        """``lane`` takes no more chunks; what it carries still arrives (a graceful removal)."""
        self._lanes.discard(lane)

    def lane_lost(self, lane: int) -> None:
        """``lane`` is dead: what was in flight on it goes again. Its receives end with `placed`."""
        self._lanes.discard(lane)
        for out in self._outgoing.values():
            out.lose_lane(lane)
            self._flows.wake(out)

    # ---- receiving -------------------------------------------------------------------------

    def place(self, transfer: int, offset: int, length: int) -> Placement:
        """Where an arriving chunk belongs; pair FILL with `placed`, an intact COPY with `copied`.

        Raises:
            ProtocolError: no honest peer would send it (unknown id, past the end, past the credit, too long).
        """
        start, end = offset, offset + length
        if not 1 <= length <= self._local.max_chunk:
            raise ProtocolError(f"chunk of {length} bytes; this side takes up to {self._local.max_chunk}")
        if transfer > self._opened_in:
            # However far beyond: transfers that were opened and reset meanwhile still have OPENs on their way.
            return Placement(Verdict.PARK, transfer, start, end)
        incoming = self._incoming.get(transfer)
        if incoming is None:  # it has ended: a late duplicate
            if not transfer:
                raise ProtocolError("data for transfer 0, which never exists")
            return Placement(Verdict.COPY, transfer, start, end)
        incoming.check_span(start, end)
        if incoming.verdict is not None:
            return Placement(Verdict.COPY, transfer, start, end)
        if not incoming.accepted:
            return Placement(Verdict.PARK, transfer, start, end)
        if not incoming.is_free(start, end):
            return Placement(Verdict.COPY, transfer, start, end)
        incoming.filling[start] = end
        return Placement(Verdict.FILL, transfer, start, end)

    def placed(self, placement: Placement, *, intact: bool, now: float) -> None:
        """A FILL ended; ``intact`` says that its bytes are in their place and verified."""
        incoming = self._incoming.get(placement.transfer)
        start, end = placement.start, placement.end
        if incoming is None or not incoming.filling.pop(start, 0):
            raise AssertionError(f"{placement} was not being filled")
        if intact and incoming.verdict is None:
            self.bytes_verified += incoming.held.add(start, end)
            self._dirty[placement.transfer] = None
            if self._ack_due is None:
                self._ack_due = now + ACK_INTERVAL_S
            self._extend_credit(incoming)
        self._ask_for_copies(incoming, start, end)
        self._tell_whole(incoming)
        self._settle_incoming(incoming)

    def copied(self, placement: Placement) -> Placement | None:
        """A verified COPY lies aside. If it is needed after all, the answer is a FILL to store it as.

        That is so when the lane that was filling the span has failed meanwhile. While it still fills, the
        copy is dropped and remembered: if that lane then fails, the peer is asked to send it again.
        """
        incoming = self._incoming.get(placement.transfer)
        start, end = placement.start, placement.end
        if incoming is None or incoming.verdict is not None or incoming.held.covers(start, end):
            return None
        if incoming.is_free(start, end):
            incoming.filling[start] = end
            return Placement(Verdict.FILL, placement.transfer, start, end)
        incoming.dropped_copies.append((start, end))
        self._ask_for_copies(incoming, start, end)
        return None

    def accept(self, transfer: int, *, window: int | None) -> None:
        """Take an offered transfer. With ``window`` credit follows what is held; None: by `grant` only."""
        incoming = self._incoming.get(transfer)
        if incoming is None or incoming.verdict is not None:
            return
        incoming.accepted = True
        incoming.window = window
        self._extend_credit(incoming)
        self._tell_whole(incoming)

    def grant(self, transfer: int, limit: int) -> None:
        """Let the peer send up to offset ``limit`` of an accepted transfer."""
        incoming = self._incoming.get(transfer)
        if incoming is not None and limit > incoming.limit:
            incoming.limit = limit
            self._outbox.append(Credit(((transfer, limit),)))

    def finish(self, transfer: int) -> None:
        """What `TransferWhole` told of is available to the user: tell the peer."""
        incoming = self._incoming.pop(transfer, None)
        if incoming is not None:
            self._dirty.pop(transfer, None)
            self._outbox.append(Result(transfer, "", ""))

    def refuse(self, transfer: int, kind: str, message: str) -> None:
        """End an incoming transfer without success; `TransferDropped` follows when no lane fills it."""
        incoming = self._incoming.get(transfer)
        if incoming is not None and incoming.verdict is None:
            self._outbox.append(Result(transfer, kind, message))
            self._drop(incoming, kind, message)

    # ---- control messages ------------------------------------------------------------------

    def receive(self, message: Message) -> None:
        """Take in a control message about transfers.

        Raises:
            ProtocolError: it contradicts what came before; the session must end.
        """
        match message:
            case Open():
                self._receive_open(message)
            case Ack():
                for transfer, prefix, spans in message.held:
                    self._receive_ack(transfer, ((0, prefix), *spans) if prefix else spans)
            case Credit():
                for transfer, limit in message.limits:
                    out = self._known_outgoing(transfer)
                    if limit > MAX_OFFSET:
                        raise ProtocolError(f"CREDIT of {limit} passes the largest offset")
                    if out is not None and limit > out.limit:
                        out.limit = limit
                        self._flows.wake(out)
            case End():
                incoming = self._known_incoming(message.transfer)
                if incoming is not None and incoming.verdict is None:
                    incoming.set_total(message.total)
                    self._tell_whole(incoming)
            case Result():
                out = self._known_outgoing(message.transfer)
                if out is not None and out.verdict is None:
                    if not message.kind and not (out.ended and out.cursor == out.available):
                        raise ProtocolError(f"RESULT says transfer {message.transfer} is whole; it was not all sent")
                    if not message.kind:
                        self._acknowledged(out, ((0, out.available),))
                    self._conclude(out, message.kind, message.message)
            case Reset():
                incoming = self._known_incoming(message.transfer)
                if incoming is not None and incoming.verdict is None:
                    self._drop(incoming, message.kind or "cancelled", message.message)
            case Missing():
                out = self._known_outgoing(message.transfer)
                if out is not None and out.verdict is None:
                    out.lose_span(message.offset, message.offset + message.length)
                    self._flows.wake(out)
            case _:
                raise ProtocolError(f"{type(message).__name__.upper()} is not expected here")

    # ---- inside ----------------------------------------------------------------------------

    def _receive_open(self, message: Open) -> None:
        if message.transfer != self._opened_in + 1:
            raise ProtocolError(f"OPEN of transfer {message.transfer} after {self._opened_in}")
        # a transfer whose end was told counts no more, even while a lane still fills a span of it
        if len(self._incoming) - self._ending >= self._local.max_open:
            raise ProtocolError(f"more than {self._local.max_open} transfers open")
        if message.kind not in (MESSAGE, PIPE, FILE):
            raise ProtocolError(f"transfer kind {message.kind} is unknown")
        if message.size != SIZE_UNKNOWN and message.size > MAX_OFFSET:
            raise ProtocolError(f"transfer of {message.size} bytes passes the largest offset")
        self._opened_in = message.transfer
        self._incoming[message.transfer] = Incoming(message, limit=self._local.initial_credit)
        self._events.append(TransferOffered(message))

    def _receive_ack(self, transfer: int, spans: tuple[Span, ...]) -> None:
        out = self._known_outgoing(transfer)
        if out is not None:
            self._acknowledged(out, spans)

    def _acknowledged(self, out: Outgoing, spans: tuple[Span, ...]) -> None:
        before = out.acked.total
        if spans and spans[0][1] and out.acknowledge(spans):
            self.bytes_acknowledged += out.acked.total - before
            self._events.append(Progress(out.id, out.acked.total))

    def _known_outgoing(self, transfer: int) -> Outgoing | None:
        if not 0 < transfer <= self._opened_out:
            raise ProtocolError(f"transfer {transfer} was never opened by this side")
        return self._outgoing.get(transfer)

    def _known_incoming(self, transfer: int) -> Incoming | None:
        if not 0 < transfer <= self._opened_in:
            raise ProtocolError(f"transfer {transfer} was never opened by the peer")
        return self._incoming.get(transfer)

    def _conclude(self, out: Outgoing, kind: str, message: str) -> None:
        out.verdict = (kind, message)
        out.lost.clear()
        out.in_flight.clear()
        self._settle(out)

    def _settle(self, out: Outgoing) -> None:
        if out.verdict is not None and not out.reading and self._outgoing.pop(out.id, None) is not None:
            self._open_by_flow[out.flow] -= 1
            if not self._open_by_flow[out.flow]:
                del self._open_by_flow[out.flow]
            self._events.append(TransferDone(out.id, *out.verdict))

    def _tell_drained(self, out: Outgoing) -> None:
        if out.unread and out.verdict is None and out.drained():
            out.unread = False
            self._events.append(SourceDrained(out.id))

    def _ask_for_copies(self, incoming: Incoming, start: int, end: int) -> None:
        if incoming.dropped_copies:
            for gap in incoming.copies_left_missing(start, end):
                self._outbox.append(Missing(incoming.open.transfer, gap[0], gap[1] - gap[0]))

    def _extend_credit(self, incoming: Incoming) -> None:
        limit = incoming.next_limit()
        if limit is not None:
            self._outbox.append(Credit(((incoming.open.transfer, limit),)))

    def _tell_whole(self, incoming: Incoming) -> None:
        if incoming.accepted and not incoming.told and incoming.verdict is None and incoming.is_whole():
            incoming.told = True
            self._events.append(TransferWhole(incoming.open.transfer, incoming.held.total))

    def _drop(self, incoming: Incoming, kind: str, message: str) -> None:
        incoming.verdict = (kind, message)
        self._ending += 1
        self._dirty.pop(incoming.open.transfer, None)
        self._settle_incoming(incoming)

    def _settle_incoming(self, incoming: Incoming) -> None:
        if incoming.verdict is not None and not incoming.filling:
            del self._incoming[incoming.open.transfer]
            self._ending -= 1
            self._events.append(TransferDropped(incoming.open.transfer, *incoming.verdict))

    def _acknowledge(self) -> None:
        held: list[tuple[int, int, tuple[Span, ...]]] = []
        weight = 0
        for transfer in self._dirty:
            spans = self._incoming[transfer].held
            prefix = spans.prefix
            beyond = spans.spans(prefix, ACK_SPANS)
            weight += 1 + len(beyond)
            if weight > ACK_ENTRIES:
                self._outbox.append(Ack(tuple(held)))
                held, weight = [], 1 + len(beyond)
            held.append((transfer, prefix, beyond))
        self._dirty.clear()
        if held:
            self._outbox.append(Ack(tuple(held)))

