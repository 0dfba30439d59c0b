"""One session's state machine, the same on both sides: transfers out, transfers in, what to tell the peer.

Inputs are method calls (a lane joined, a chunk arrived, a control message came); outputs are return
values, `Engine.messages` (control messages to write) and `Engine.events` (things to do). Time comes in as
``now``. The caller serialises all calls.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from ..errors import BrokenError, ProtocolError
from ..wire.fields import SPANS, AttributeValue, Span, are_in_order
from ..wire.frames import MAX_CHUNK, MAX_OFFSET
from ..wire.messages import (
    FILE,
    HOLD,
    HOLES,
    MESSAGE,
    PACK,
    PIPE,
    SIZE_UNKNOWN,
    Ack,
    Credit,
    End,
    Message,
    Missing,
    Open,
    Opened,
    Reset,
    Result,
    Same,
    holes_of,
)
from .events import (
    Event,
    LaneOvertaken,
    PrefixGrew,
    Progress,
    SameAnswered,
    SameAsked,
    SourceDrained,
    SourceReleased,
    TransferDone,
    TransferDropped,
    TransferOffered,
    TransferWhole,
)
from .incoming import Incoming, Placement, Verdict
from .intervals import IntervalSet
from .outgoing import BUSY_TIMES, Chunk, InFlight, Outgoing
from .pace import AckTimer, TokenBucket
from .queues import SendQueues

ACK_INTERVAL_S: Final = 0.005
"""Acknowledgements go at most this often: each costs a TLS record and a wake-up on both sides."""

ACK_SPANS: Final = 64
"""Most spans beyond the prefix that one ACK names per transfer; the rest follows as the prefix grows."""

ACK_ENTRIES: Final = 2048
"""Most transfers and spans in one ACK, and transfers in one CREDIT: at 20 bytes each they fit an ACK frame too."""

MAX_CHANNEL: Final = 255
"""Longest name of a channel, in bytes of UTF-8."""

DIGEST_SIZE: Final = 32
"""Bytes of the SHA-256 in OPENED."""


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
class Delivery:
    """What became of the transfers of a side whose session has ended, by their ids.

    ``delivered``: spans of ids that the peer confirmed, whole. ``unknown``: everything was sent, and the answer
    did not come: the peer may have it. ``undelivered``: the peer cannot have it whole.
    """

    delivered: tuple[Span, ...]
    unknown: tuple[int, ...]
    undelivered: tuple[int, ...]


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
        self._queues = SendQueues()
        self._lanes: set[int] = set()
        self._express: frozenset[int] = frozenset()  # lanes for short transfers
        self._carrying: set[int] = set()  # lanes that have a chunk
        self._slow: set[int] = set()  # lanes whose chunks were late, and were sent again over another
        self._ack_timer = AckTimer()
        self._bucket: TokenBucket | None = None
        self._control_up = True
        self._outbox: list[Message] = []
        self._events: list[Event] = []
        self._dirty: dict[int, None] = {}  # incoming transfers with something to acknowledge, in order
        self._credits: dict[int, int] = {}  # what the peer is to be told
        self._ack_due: float | None = None
        self._delivered = IntervalSet()  # ids
        self.chunk_size = peer.max_chunk
        self._chunk_sizes: dict[int, int] = {}  # of lanes whose chunks are shorter
        self.bytes_acknowledged = 0
        self.bytes_verified = 0
        self.bytes_retransmitted = 0
        self.bytes_resumed = 0  # held by the receiver from an earlier try, in both directions

    # ---- outputs ---------------------------------------------------------------------------

    def messages(self, now: float) -> list[Message]:
        """Control messages to write now, in order. ACKs come out only when due (`deadline`)."""
        out, self._outbox = self._outbox, []
        return out + list(self.reports(now))

    def reports(self, now: float) -> list[Ack | Credit]:
        """Of `messages`, those that may go over a lane as well: what is held (if due), and credit."""
        out: list[Ack | Credit] = []
        if self._credits:
            limits = tuple(self._credits.items())
            self._credits = {}
            out += [Credit(limits[i : i + ACK_ENTRIES]) for i in range(0, len(limits), ACK_ENTRIES)]
        if self._ack_due is not None and now >= self._ack_due:
            self._ack_due = None
            out += self._acknowledge(self._dirty, ACK_SPANS)
            self._dirty = {}
        return out

    def control_lost(self) -> None:
        """The peer hears nothing now: what is opened meanwhile sends no data, for which the peer had no place.

        Credit that was told last may be lost with the connection, and a sender that waits for it sends nothing that
        would have more told: it goes again, over a lane.
        """
        self._control_up = False
        self._tell_limits()
        for message in self._outbox:
            if isinstance(message, Open) and message.transfer in self._outgoing:
                self._outgoing[message.transfer].opened = False

    def control_resumed(self) -> None:
        """The peer hears again: behind what waits to be said, it is told the whole state of what it sends."""
        self._control_up = True
        for out in self._outgoing.values():
            out.opened = True
            self._queues.wake(out)
        live = {id: None for id, incoming in self._incoming.items() if incoming.verdict is None}
        self._tell_limits()
        self._dirty = {}
        self._ack_due = None
        # an OPENED among what waits goes first: it says that this side holds what was never sent
        self._outbox += self._acknowledge({id: None for id in live if self._incoming[id].held.total}, None)

    @property
    def has_messages(self) -> bool:
        """Messages wait that are not bound to the deadline."""
        return bool(self._outbox or self._credits)

    @property
    def has_credits(self) -> bool:
        """Credit is to be told, by whatever way there is."""
        return bool(self._credits)

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
        return bool(self._queues)

    def open(
        self,
        kind: int,
        *,
        size: int | None,
        flow: Hashable,
        channel: str = "",
        request: int = 0,
        attributes: Mapping[str, AttributeValue] | None = None,
        on_hold: bool = False,
        steady: bool = False,
        holes: tuple[Span, ...] = (),
    ) -> int:
        """Begin a transfer and return its id. A known ``size`` makes all its bytes available at once.

        Transfers of one ``flow`` share a place among those that take turns; a pipe has a place of its own. A file
        ``on_hold`` waits to hear what the peer has of it already. A ``steady`` source cannot change while it is read.
        The ``holes`` of a file, in order and apart, are zeros that are told of and not sent.
        """
        if not self.can_open:
            raise BrokenError(f"{len(self._outgoing)} transfers are open, the peer takes {self._peer.max_open}")
        self._opened_out += 1
        transfer = Outgoing(
            self._opened_out,
            flow=flow,
            turn=(flow, self._opened_out) if kind == PIPE else flow,
            size=size,
            limit=0 if on_hold else self._peer.initial_credit,
            on_hold=on_hold,
            in_line=flow in self._open_by_flow,
            opened=self._control_up,
            steady=steady,
        )
        self._outgoing[transfer.id] = transfer
        self._open_by_flow[flow] = self._open_by_flow.get(flow, 0) + 1
        wire_size = SIZE_UNKNOWN if size is None else size
        told = dict(attributes or {})
        if on_hold:
            told[HOLD] = True
        if holes:
            told[HOLES] = SPANS.encode(holes)
            transfer.leave_out(holes)
            self._events.append(Progress(transfer.id, transfer.acked.total))
        self._outbox.append(Open(transfer.id, kind, wire_size, request, channel, told))
        self._queues.wake(transfer)
        self._tell_drained(transfer)
        return transfer.id

    def offer(self, transfer: int, available: int, *, last: bool = False) -> None:
        """A transfer of unknown size now has ``available`` bytes in all; ``last``: and that is its size."""
        out = self._outgoing.get(transfer)
        if out is None or out.size is not None or out.verdict is not None:
            return
        out.available = max(out.available, available)
        if last:
            out.size = out.available
            self._tell_drained(out)
        self._queues.wake(out)

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

    def answer_same(self, transfer: int, same: bool) -> None:
        """Answer `SameAsked`: the peer's file is the source, byte for byte, or it is not."""
        out = self._outgoing.get(transfer)
        if out is None or out.verdict is not None or not out.asked:
            return
        out.asked = False
        self._outbox.append(Same(transfer, same))
        self._resume(out, ((0, out.size),) if same and out.size is not None else ())

    def limit_rate(self, rate: float | None, *, now: float) -> None:
        """Send at most ``rate`` bytes/s from now on, over all lanes; None: as fast as they go.

        One limit after another is no way around either: what went under the first is paid for before more goes.
        """
        if rate is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(rate, now=now)
        else:
            self._bucket.change(rate, now=now)

    def paced_until(self, now: float) -> float | None:
        """When the rate limit lets the next chunk go, if it holds one back now."""
        if self._bucket is None or not self._queues:
            return None
        ready_at = self._bucket.ready_at(now)
        return ready_at if ready_at > now else None

    def set_chunk_sizes(self, sizes: Mapping[int, int]) -> None:
        """Cut chunks of so many bytes at most for each of these lanes from now on, of `chunk_size` for all others."""
        self._chunk_sizes = dict(sizes)

    def chunk_size_of(self, lane: int) -> int:
        """Longest chunk that is cut for ``lane``, in bytes."""
        return min(self.chunk_size, self._chunk_sizes.get(lane, self.chunk_size))

    def may_send(self, lane: int) -> bool:
        """``lane`` takes chunks: a slow one only while there is no other."""
        return lane in self._lanes and (lane not in self._slow or self._slow >= self._lanes)

    def set_express(self, lanes: Iterable[int]) -> None:
        """Have ``lanes`` carry short transfers and nothing else, which the others then do only while these are at work.

        None: any lane carries anything.
        """
        self._express = frozenset(lanes)
        self._queues.split_by_size(bool(self._express), self._outgoing.values())

    @property
    def _has_free_express(self) -> bool:
        return any(lane not in self._carrying and self.may_send(lane) for lane in self._express)

    def has_chunk_for(self, lane: int) -> bool:
        """Whether ``lane`` may be given something by `next_chunk` now."""
        return self.may_send(lane) and self._queues.has_for(
            express=lane in self._express, help=not self._has_free_express
        )

    def next_chunk(self, lane: int, now: float) -> Chunk | None:
        """The next span for ``lane`` to send; pair each with `chunk_left`."""
        if not self.may_send(lane) or self.paced_until(now) is not None:
            return None
        most = self.chunk_size_of(lane)
        if self._bucket is not None:
            most = min(most, self._bucket.chunk)
        found = self._queues.next(most, express=lane in self._express, help=not self._has_free_express)
        if found is None:
            return None
        self._carrying.add(lane)
        transfer, start, end, again = found
        if self._bucket is not None:
            self._bucket.take(end - start)
        flying = transfer.in_flight.get(start)
        # the copy of a late chunk, or of a part of it, counts for the lane of the first: no byte may be forgotten
        if flying is None or flying.end < end:
            transfer.in_flight[start] = InFlight(end, lane, now)
        if again:
            transfer.resends += end - start
            self.bytes_retransmitted += end - start
        chunk = Chunk(transfer.id, start, end - start, again, lane)
        transfer.reading.add(chunk)
        return chunk

    def chunk_left(self, chunk: Chunk) -> None:
        """The lane has done with the chunk, sent or not."""
        self._carrying.discard(chunk.lane)
        out = self._outgoing.get(chunk.transfer)
        if out is None:
            assert chunk.free, f"{chunk} was viewed after the end of its transfer"
            return
        out.reading.remove(chunk)
        out.lent = out.lent or chunk.lent
        self._tell_drained(out)
        self._tell_released(out)
        self._settle(out)

    # ---- lanes -----------------------------------------------------------------------------

    def lane_joined(self, lane: int) -> None:
        """``lane`` may carry chunks from now on."""
        self._lanes.add(lane)

    def lane_left(self, lane: int) -> None:
        """``lane`` takes no more chunks; what it carries still arrives (a graceful removal)."""
        self._lanes.discard(lane)
        self._slow.discard(lane)

    def late_lanes(self, now: float) -> set[int]:
        """The lanes with chunks of which `resend_late` would send copies now."""
        late_after_s = self._late_after_s
        return {lane for out in self._outgoing.values() for lane in out.late_lanes(late_after_s, now)}

    @property
    def chunk_takes_s(self) -> float:
        """From being handed to a lane to its acknowledgement, about; 0 while that is not known."""
        return self._ack_timer.smoothed_s

    @property
    def _late_after_s(self) -> float:
        return self._ack_timer.late_after_s * (BUSY_TIMES if self._queues else 1)

    def resend_late(self, now: float, patient_with: Collection[int] = ()) -> None:
        """Send the last chunks of a transfer again over other lanes, where their acknowledgement is late.

        Its end thus does not wait for its slowest lane; and that one gets no more until nothing on it is late. While
        there is something else to send, copies take the path from it: then a chunk must be later still, and so it must
        be on the lanes to be ``patient_with``.
        """
        late_after_s = self._late_after_s
        self._slow &= {
            span.lane for out in self._outgoing.values() for span in out.in_flight.values() if span.copies
        }  # what was late may have been asked for again, given up, or have gone whole over another lane
        for out in list(self._outgoing.values()):
            lanes = out.resend_late(late_after_s, now, patient_with) if len(self._lanes) > 1 else []
            self._slow.update(lane for lane in lanes if lane in self._lanes)
            if lanes:
                self._queues.wake(out)
            # a lane that is stuck in sending tells of nothing
            self._tell_drained(out)
            self._settle(out)
            if out.verdict is not None and not out.verdict[0]:
                out.concluded_at = out.concluded_at if out.concluded_at is not None else now
                if now - out.concluded_at >= late_after_s:
                    self._events += [LaneOvertaken(chunk.lane) for chunk in out.reading if not chunk.free]

    def lane_lost(self, lane: int) -> None:
        """``lane`` is dead: what was in flight on it goes again. Its receives end with `placed`."""
        self.lane_left(lane)
        for out in self._outgoing.values():
            out.lose_lane(lane)
            self._queues.wake(out)
        if not self._control_up:
            self._tell_limits()  # what this lane carried of them may be lost

    # ---- receiving -------------------------------------------------------------------------

    def place(self, lane: int, transfer: int, offset: int, length: int) -> Placement:
        """Where a chunk that arrives on ``lane`` belongs; pair FILL with `placed`, an intact COPY with `copied`.

        Raises:
            ProtocolError: no honest peer would send it (unknown id, past the end, past the credit, too long).
        """
        start, end = offset, offset + length
        if not 1 <= length <= self._local.max_chunk:
            raise ProtocolError(f"chunk of {length} bytes; this side takes up to {self._local.max_chunk}")
        if transfer > self._opened_in:
            # However far beyond: transfers that were opened and reset meanwhile still have OPENs on their way.
            return Placement(Verdict.PARK, transfer, start, end, lane)
        incoming = self._incoming.get(transfer)
        if incoming is None:  # it has ended: a late duplicate
            if not transfer:
                raise ProtocolError("data for transfer 0, which never exists")
            return Placement(Verdict.COPY, transfer, start, end, lane)
        incoming.check_span(start, end)
        if incoming.verdict is not None:
            return Placement(Verdict.COPY, transfer, start, end, lane)
        if not incoming.accepted:
            return Placement(Verdict.PARK, transfer, start, end, lane)
        if not incoming.is_free(start, end):
            return Placement(Verdict.COPY, transfer, start, end, lane)
        return self._fill(incoming, start, end, lane)

    def placed(self, placement: Placement, *, intact: bool, now: float) -> None:
        """A FILL ended; ``intact`` says that its bytes are in their place and verified.

        One that was overtaken by a copy must not be intact: what it brought is shown to `copied`.
        """
        incoming = self._incoming.get(placement.transfer)
        start, end = placement.start, placement.end
        if incoming is None or incoming.filling.get(start) is not placement:
            assert not intact, f"{placement} was not being filled"
            return
        del incoming.filling[start]
        if intact and incoming.verdict is None:
            self.bytes_verified += incoming.held.add(start, end)
            self._dirty[placement.transfer] = None
            if self._ack_due is None:
                self._ack_due = now + ACK_INTERVAL_S
            self._extend_credit(incoming)
            self._tell_prefix(incoming)
        self._ask_for_copies(incoming, start, end)
        self._tell_whole(incoming)
        self._settle_incoming(incoming)

    def copied(self, placement: Placement) -> Placement | None:
        """A verified COPY lies aside. If it is needed after all, the answer is a FILL to store it as.

        That is so when the lane that was filling the span has failed meanwhile, or has not begun to write to the
        place. If it has, the copy is dropped; and if it is a lane that writes as it receives, that lane too, which
        lets the span be asked for again.
        """
        incoming = self._incoming.get(placement.transfer)
        start, end = placement.start, placement.end
        if incoming is None or incoming.verdict is not None or incoming.held.covers(start, end):
            return None
        incoming.check_span(start, end)  # again: the END that came meanwhile may have cut it off
        stuck = incoming.take_over(start, end)
        if not stuck and incoming.is_free(start, end):
            fill = self._fill(incoming, start, end, placement.lane)
            fill.claim()  # its bytes are here: another copy must not take it over while they are stored
            return fill
        self._events += [LaneOvertaken(fill.lane) for fill in stuck if fill.in_place]
        incoming.dropped_copies.append((start, end))
        self._ask_for_copies(incoming, start, end)
        return None

    def accept(
        self, transfer: int, *, window: int | None, held: tuple[Span, ...] = (), ordered: bool = False
    ) -> None:
        """Take an offered transfer, of which ``held`` is kept from an earlier try and verified again.

        With ``window`` credit follows what is held; None: by `grant` only. With ``ordered``, `PrefixGrew` tells how
        far it goes without a gap.
        """
        incoming = self._incoming.get(transfer)
        if incoming is None or incoming.verdict is not None:
            return
        self._tell_opened(incoming, held, b"")
        incoming.accepted = True
        incoming.ordered = ordered
        incoming.window = window
        for start, end in incoming.holes:
            incoming.held.add(start, end)
        for start, end in held:
            self.bytes_resumed += incoming.held.add(start, end)
        if window is not None and incoming.size is not None and incoming.size > incoming.limit:
            self._credits[transfer] = incoming.limit  # one in line waits to hear of it, however little it is
        self._extend_credit(incoming)
        self._tell_whole(incoming)

    def claim(self, transfer: int, digest: bytes) -> None:
        """A whole file with this SHA-256 is there under the name: `SameAnswered` will tell whether it is the one."""
        incoming = self._incoming.get(transfer)
        if incoming is not None and incoming.verdict is None:
            self._tell_opened(incoming, (), digest)
            incoming.claimed = True

    def adopted(self, transfer: int) -> None:
        """The file that was there is the one that is sent."""
        incoming = self._incoming.get(transfer)
        if incoming is not None and incoming.verdict is None and incoming.size is not None:
            incoming.accepted = True
            self.bytes_resumed += incoming.held.add(0, incoming.size)
            self._tell_whole(incoming)

    def grant(self, transfer: int, limit: int) -> None:
        """Let the peer send up to offset ``limit`` of an accepted transfer."""
        incoming = self._incoming.get(transfer)
        if incoming is not None and limit > incoming.limit:
            incoming.limit = limit
            self._credits[transfer] = limit

    def finish(self, transfer: int) -> None:
        """What `TransferWhole` told of is available to the user: tell the peer."""
        incoming = self._incoming.pop(transfer, None)
        if incoming is not None:
            self._dirty.pop(transfer, None)
            self._credits.pop(transfer, None)
            self._outbox.append(Result(transfer, "", ""))

    def refuse(self, transfer: int, kind: str, message: str) -> None:
        """End an incoming transfer without success; `TransferDropped` follows when no lane fills it."""
        incoming = self._incoming.get(transfer)
        if incoming is not None and incoming.verdict is None:
            self._outbox.append(Result(transfer, kind, message))
            self._drop(incoming, kind, message)

    # ---- control messages ------------------------------------------------------------------

    def receive(self, message: Message, now: float) -> None:
        """Take in a control message about transfers, or one of the two from an ACK frame.

        Raises:
            ProtocolError: it contradicts what came before; the session must end.
        """
        match message:
            case Open():
                self._receive_open(message)
            case Ack():
                for transfer, prefix, spans in message.held:
                    self._receive_ack(transfer, ((0, prefix), *spans) if prefix else spans, now)
            case Credit():
                for transfer, limit in message.limits:
                    out = self._known_outgoing(transfer)
                    if limit > MAX_OFFSET:
                        raise ProtocolError(f"CREDIT of {limit} passes the largest offset")
                    if out is not None and out.credited(limit):
                        self._queues.wake(out)
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
                        self._acknowledged(out, ((0, out.available),) if out.available else (), now)
                        self._delivered.add(out.id, out.id + 1)
                    self._conclude(out, message.kind, message.message)
            case Reset():
                incoming = self._known_incoming(message.transfer)
                if incoming is not None and incoming.verdict is None:
                    self._drop(incoming, message.kind or "cancelled", message.message)
            case Opened():
                self._receive_opened(message)
            case Same():
                incoming = self._known_incoming(message.transfer)
                if incoming is not None and incoming.verdict is None:
                    if not incoming.claimed:
                        raise ProtocolError(f"SAME for transfer {message.transfer}, which was not asked about")
                    incoming.claimed = False
                    self._events.append(SameAnswered(message.transfer, message.same))
            case Missing():
                out = self._known_outgoing(message.transfer)
                if out is not None and out.verdict is None:
                    out.lose_span(message.offset, message.offset + message.length)
                    self._queues.wake(out)
            case _:
                raise ProtocolError(f"{type(message).__name__.upper()} is not expected here")

    # ---- inside ----------------------------------------------------------------------------

    def _receive_open(self, message: Open) -> None:
        if message.transfer != self._opened_in + 1:
            raise ProtocolError(f"OPEN of transfer {message.transfer} after {self._opened_in}")
        # a transfer whose end was told counts no more, even while a lane still fills a span of it
        if len(self._incoming) - self._ending >= self._local.max_open:
            raise ProtocolError(f"more than {self._local.max_open} transfers open")
        if len(message.channel.encode("utf-8", "surrogatepass")) > MAX_CHANNEL:
            raise ProtocolError(f"OPEN of transfer {message.transfer} names a channel of more than {MAX_CHANNEL} bytes")
        if message.kind not in (MESSAGE, PIPE, FILE, PACK):
            raise ProtocolError(f"transfer kind {message.kind} is unknown")
        is_unknown = message.size == SIZE_UNKNOWN
        if not is_unknown and message.size > MAX_OFFSET:
            raise ProtocolError(f"transfer of {message.size} bytes passes the largest offset")
        on_hold = message.attributes.get(HOLD, False)
        if type(on_hold) is not bool or (on_hold and (message.kind != FILE or is_unknown)):
            raise ProtocolError(f"OPEN of transfer {message.transfer} with an attribute {HOLD!r} that makes no sense")
        holes = holes_of(message)
        if message.kind == PACK and is_unknown:
            raise ProtocolError(f"OPEN of a pack without its size (transfer {message.transfer})")
        if message.kind == PIPE and not is_unknown:
            raise ProtocolError(f"OPEN of a pipe of {message.size} bytes; nobody knows that beforehand")
        self._opened_in = message.transfer
        limit = 0 if on_hold else self._local.initial_credit
        # who takes it keeps what it needs of the attributes, which may be long
        self._incoming[message.transfer] = Incoming(
            replace(message, attributes={}), limit=limit, on_hold=on_hold, holes=holes
        )
        self._events.append(TransferOffered(message))

    def _receive_opened(self, message: Opened) -> None:
        out = self._known_outgoing(message.transfer)
        if out is None or out.verdict is not None:
            return
        if not out.on_hold or out.size is None:
            raise ProtocolError(f"OPENED for transfer {out.id}, which does not wait for it")
        if not are_in_order(message.held, out.size):
            raise ProtocolError(f"OPENED of transfer {out.id} with spans out of order or past its {out.size} bytes")
        if message.digest and (len(message.digest) != DIGEST_SIZE or message.held):
            raise ProtocolError(f"OPENED of transfer {out.id} with a digest of {len(message.digest)} bytes")
        out.on_hold = False
        if message.digest:
            out.asked = True
            self._events.append(SameAsked(out.id, message.digest))
        else:
            self._resume(out, message.held)

    def _resume(self, out: Outgoing, spans: tuple[Span, ...]) -> None:
        out.resume(spans)
        self.bytes_resumed += out.resumed
        if out.resumed:
            self._events.append(Progress(out.id, out.acked.total))
        self._tell_drained(out)
        self._queues.wake(out)

    def _receive_ack(self, transfer: int, spans: tuple[Span, ...], now: float) -> None:
        out = self._known_outgoing(transfer)
        if out is not None:
            self._acknowledged(out, spans, now)

    def _acknowledged(self, out: Outgoing, spans: tuple[Span, ...], now: float) -> None:
        before = out.acked.total
        if not out.acknowledge(spans):
            return
        self.bytes_acknowledged += out.acked.total - before
        self._events.append(Progress(out.id, out.acked.total))
        for span in out.pop_acknowledged():
            if not span.copies:
                self._ack_timer.sample(now - span.sent_at)
            self._slow.discard(span.lane)
        self._tell_drained(out)
        self._tell_released(out)

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
        if out.verdict is not None and out.is_free() and self._outgoing.pop(out.id, None) is not None:
            self._open_by_flow[out.flow] -= 1
            if not self._open_by_flow[out.flow]:
                del self._open_by_flow[out.flow]
            self._events.append(TransferDone(out.id, *out.verdict))

    def _tell_drained(self, out: Outgoing) -> None:
        if out.unread and out.verdict is None and not out.on_hold and out.drained():
            out.unread = False
            self._events.append(SourceDrained(out.id))

    def _tell_released(self, out: Outgoing) -> None:
        if out.open_ended and out.verdict is None and out.release():
            self._events.append(SourceReleased(out.id, out.released))

    def _ask_for_copies(self, incoming: Incoming, start: int, end: int) -> None:
        if incoming.dropped_copies:
            for gap in incoming.copies_left_missing(start, end):
                self._outbox.append(Missing(incoming.open.transfer, gap[0], gap[1] - gap[0]))

    def _fill(self, incoming: Incoming, start: int, end: int, lane: int) -> Placement:
        fill = incoming.filling[start] = Placement(Verdict.FILL, incoming.open.transfer, start, end, lane)
        return fill

    def _tell_opened(self, incoming: Incoming, held: tuple[Span, ...], digest: bytes) -> None:
        if incoming.on_hold:
            incoming.on_hold = False
            self._outbox.append(Opened(incoming.open.transfer, held, digest))

    def _tell_limits(self) -> None:
        """Tell all credit again."""
        for id, incoming in self._incoming.items():
            if incoming.accepted and incoming.verdict is None:
                self._credits[id] = incoming.limit

    def _extend_credit(self, incoming: Incoming) -> None:
        limit = incoming.next_limit()
        if limit is not None:
            self._credits[incoming.open.transfer] = limit

    def _tell_prefix(self, incoming: Incoming) -> None:
        if incoming.ordered and incoming.held.prefix > incoming.prefix_told:
            incoming.prefix_told = incoming.held.prefix
            self._events.append(PrefixGrew(incoming.open.transfer, incoming.prefix_told))

    def _tell_whole(self, incoming: Incoming) -> None:
        if incoming.accepted and not incoming.told and incoming.verdict is None and incoming.is_whole():
            incoming.told = True
            self._events.append(TransferWhole(incoming.open.transfer, incoming.held.total))

    def _drop(self, incoming: Incoming, kind: str, message: str) -> None:
        incoming.verdict = (kind, message)
        self._ending += 1
        self._dirty.pop(incoming.open.transfer, None)
        self._credits.pop(incoming.open.transfer, None)
        self._settle_incoming(incoming)

    def _settle_incoming(self, incoming: Incoming) -> None:
        if incoming.verdict is not None and not incoming.filling:
            del self._incoming[incoming.open.transfer]
            self._ending -= 1
            self._events.append(TransferDropped(incoming.open.transfer, *incoming.verdict))

    def _acknowledge(self, transfers: Iterable[int], most: int | None) -> list[Ack | Credit]:
        """What is held of ``transfers``, at most ``most`` spans of each, in ACKs of bounded size."""
        out: list[Ack | Credit] = []
        held: list[tuple[int, int, tuple[Span, ...]]] = []
        weight = 0
        for transfer in transfers:
            spans = self._incoming[transfer].held
            prefix = spans.prefix
            beyond = spans.spans(prefix, most)
            # without ``most`` there may be any number of them: entries that claim no prefix add to the first
            for at in range(0, max(1, len(beyond)), ACK_SPANS):
                part = beyond[at : at + ACK_SPANS]
                weight += 1 + len(part)
                if weight > ACK_ENTRIES:
                    out.append(Ack(tuple(held)))
                    held, weight = [], 1 + len(part)
                held.append((transfer, 0 if at else prefix, part))
        if held:
            out.append(Ack(tuple(held)))
        return out

    def progress_in(self, transfer: int) -> tuple[int, int | None]:
        """Bytes held of an incoming transfer, and of how many."""
        incoming = self._incoming.get(transfer)
        return (0, None) if incoming is None else (incoming.held.total, incoming.size)

    def delivery(self) -> Delivery:
        """What became of this side's transfers, if nothing more is heard of the peer."""
        open_ = [out for out in self._outgoing.values() if out.verdict is None]
        return Delivery(
            self._delivered.spans(),
            tuple(out.id for out in open_ if out.ended),
            tuple(out.id for out in open_ if not out.ended),
        )
