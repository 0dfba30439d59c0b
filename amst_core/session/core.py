"""The shared state of one session: the engine under its lock, and who must be woken when it changes.

Three kinds of threads meet here. Lanes (`lanes.py`) ask for chunks and places; the control loop
(`control_loop.py`) carries messages; the worker runs what may block on a disk. Callers (`session.py`)
open transfers. Everything the engine says (`Event`) is turned into work here, once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from ..congestion import FAR_S, CongestionPolicy
from ..engine import Chunk, Engine, Limits, Placement, Verdict
from ..engine.events import (
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
from ..errors import (
    AmstError,
    BrokenError,
    BusyError,
    CancelledError,
    ClosedError,
    DeadlineError,
    IntegrityError,
    ProtocolError,
    RefusedError,
    error_from_kind,
)
from ..files.journal import Fsync
from ..interfaces import Mode, PathStats
from ..memory import MemoryShare
from ..modes import EXPRESS, Profile
from ..pacing import ControllerPacer, GuardPacer, Range, SessionPacer
from ..wire.fields import AttributeValue
from ..wire.frames import FrameHeader, FrameKind, encode_ack
from ..wire.messages import FILE, HOLD, HOLES, MESSAGE, PACK, SIZE_UNKNOWN, Ack, Close, Credit, LaneLost, Message, Open
from .background import Background
from .chunking import STEP_S, ChunkTuner, LaneChunks, LaneLook
from .crew import Crew
from .endpoints import Sink, Source
from .inbox import Inbox
from .loss import LossMeter
from .ordered import OrderedSink, OrderedSource
from .pacing import SessionPacing
from .progress import LaneProgress
from .room import NotYet, Room
from .streams import Streams
from .tickets import Ticket, guarded
from .wakeup import Wakeup

if TYPE_CHECKING:
    from .lanes import LaneWorker

_log = logging.getLogger("amst.session")

FILE_WINDOW: Final = 256 << 20
"""How far a sender may run ahead of what is on disk; nothing is buffered, so it only bounds what is in flight."""

SHOWN_OPEN: Final = 5
"""Files that are named when a session ends before they are finished."""

TICK_S: Final = 0.1
"""While transfers are under way, how often late chunks are looked for."""

QUIET_S: Final = 1.0
"""Streams that fail so soon after another are logged as information, not as warnings."""

IDLE_S: Final = 5.0
"""Without a word from the peer for so long, a session yields its half-done files to another that wants them."""

MAX_DAMAGED_LANES: Final = 3
"""Lanes lost to damaged frames before the session ends: the path, not the lane, is bad."""


class Acceptor(Protocol):
    """Decides about transfers the peer opens: a sink, or an `AmstError` raised to refuse."""

    def __call__(self, opened: Open) -> Sink: ...


class _Work:
    """What the engine's events ask for, to be done without the lock: ``slow`` may wait for a disk."""

    __slots__ = ("quick", "slow")

    def __init__(self) -> None:
        self.quick: list[Callable[[], None]] = []
        self.slow: list[Callable[[], None]] = []

    def run(self) -> None:
        for item in self.quick:
            item()
        for item in self.slow:
            item()


@dataclass(slots=True)
class _Outgoing:
    source: Source
    ticket: Ticket


class SessionCore:
    """State of one session. Methods named ``..._locked`` expect `lock` to be held; the others take it."""

    def __init__(
        self,
        *,
        peer: str,
        is_opener: bool,
        local: Limits,
        remote: Limits,
        memory: MemoryShare,
        max_message: int,
        profile: Profile,
        park_timeout_s: float,
        session_timeout_s: float,
        fsync: Fsync,
        congestion: CongestionPolicy,
        paced: bool,
    ) -> None:
        self.peer = peer
        self.is_opener = is_opener
        self.fsync = fsync
        self.congestion = congestion
        self.lock = threading.Lock()
        self.engine = Engine(local=local, peer=remote)
        self.lanes: dict[int, LaneWorker] = {}
        self.streams = Streams()
        self.total_lanes = 0
        self.most_lanes = 0
        self.lane_failures = 0
        self.damaged_lanes = 0
        self.failed_connections = 0
        self.refused_lanes = 0  # asked for and not granted
        self.coming = 0  # asked for and neither joined nor failed nor refused yet (at the opener)
        self.most_wanted: int | None = None  # lanes, by this side's last wish
        self.bytes_sent = 0  # by lanes that are gone
        self.bytes_received = 0
        self.error: AmstError | None = None
        self.closing: ClosedError | None = None  # this side said CLOSE: whatever ends the session now is this
        self.doom: tuple[float, BrokenError] | None = None  # no lane is left: when the session ends, and with what
        self.control_up = True
        self.heard_at = time.monotonic()  # on the control channel
        self.lanes_in_doubt = False  # something failed: the monitor is to look at once
        self.last_error: AmstError | None = None
        self.first_offered_at: float | None = None
        self.last_done_at: float | None = None
        self.memory = memory
        self.send_pool = memory.send_pool
        self.receive_pool = memory.receive_pool
        self._most_chunk = min(remote.max_chunk, memory.max_chunk)
        self._profile = profile
        congestion.mode = profile.mode
        self._chunks = self._chunks_of(profile)
        self._lane_chunks = LaneChunks()
        self._loss = LossMeter()
        self._path_looked_at = 0.0
        self.engine.chunk_size = self._chunks.size
        self.inbox = Inbox(
            self.lock,
            self.engine,
            memory=memory,
            on_change=self._inbox_changed_locked,
            max_message=max_message,
        )
        self._park_timeout_s = park_timeout_s
        self._session_timeout_s = session_timeout_s
        self._late_looked_at = 0.0
        self._warned_at = -QUIET_S
        self._rates: list[float | None] = [None, None]  # this side's limit, and the peer's
        self._paced: LaneWorker | None = None  # the one that waits for the rate limit
        self._outgoing: dict[int, _Outgoing] = {}
        self._sinks: dict[int, Sink] = {}
        self._idle: list[LaneWorker] = []
        self._crew = Crew()
        self._progress = LaneProgress()
        self._outbox: list[Message] = []
        self.draining = False  # what is open may end, nothing new is taken
        self.serving = 0  # requests of the peer under way that take their time
        self._opened = threading.Condition(self.lock)  # an OPEN was accepted
        self.room = Room(self.lock)  # an outgoing transfer ended, or lanes came or went
        self.ponged = threading.Condition(self.lock)  # a lane's PONG came
        self.on_failed: Callable[[AmstError], None] | None = None
        self.on_lane_died: Callable[[LaneWorker], None] | None = None
        self.on_released: Callable[[], None] | None = None
        self._acceptors: dict[int, Acceptor] = {}  # by kind of transfer
        self._request_acceptors: dict[int, Acceptor] = {}
        self.background = Background(on_crash=self._crashed)
        self._soon: deque[Callable[[], None]] = deque()
        self.wakeup = Wakeup()  # of the control loop
        memory.on_room = self.wakeup.set
        self._sleeps_until: float | None = None  # the control loop's timeout; None: it is awake
        self.on_streams_wanted: Callable[[int], None] | None = None
        self._pacing: SessionPacing | None = None
        self._streams_range = profile.streams
        self._streams_said = False  # by `fix_streams`
        self._may_pace = paced
        self._is_alone = False  # it cannot be paced
        self._chunk_bound: int | None = None
        self._ended = threading.Event()
        self._end_callbacks: list[Callable[[], None]] = []
        self._acceptors[MESSAGE] = self.inbox.accept

    def _chunks_of(self, profile: Profile) -> ChunkTuner:
        most = self._most_chunk
        return ChunkTuner(
            min(profile.chunk_size, most), most=min(most, profile.longest_chunk), least=profile.shortest_chunk
        )

    # ---- the control loop's side ---------------------------------------------------------------

    def take_messages(self, now: float) -> list[Message]:
        """What is to be written to the control channel now."""
        self._do_what_waits()
        with self.lock:
            self._sleeps_until = None
            self.inbox.reclaim_locked()
            # REPLY and CLOSE come after the transfers that they speak of
            out = self.engine.messages(now) + self._outbox
            self._outbox = []
            return out

    def may_sleep(self, until: float) -> float | None:
        """The control loop is about to sleep: until when it may, None if there is something to write."""
        with self.lock:
            if self._soon or self.memory.has_news or self._has_news_locked():
                return None
            if self.doom is not None:
                until = min(until, self.doom[0])
            if self.engine.sending:
                until = min(until, self._late_looked_at + TICK_S)
            deadline = self.engine.deadline
            self._sleeps_until = until if deadline is None else min(until, deadline)
            return self._sleeps_until

    def take_reports(self, now: float) -> list[Ack | Credit]:
        """Of what is to be told, what a lane can carry; for while there is no control channel."""
        self._do_what_waits()
        with self.lock:
            self._sleeps_until = None
            self.inbox.reclaim_locked()
            return self.engine.reports(now)

    def soon(self, act: Callable[[], None]) -> None:
        """Have the control loop call ``act``, without a lock; may be called in the garbage collector."""
        self._soon.append(act)
        self.wakeup.set()

    def _do_what_waits(self) -> None:
        while self._soon:
            self._soon.popleft()()

    def report_by_lane(self, reports: list[Ack | Credit]) -> None:
        """Have the lane that was heard last carry acknowledgements and credit; without one they are dropped."""
        if not reports:
            return
        with self.lock:
            lanes = self.live_lanes_locked()
            if not lanes:
                return
            lane = max(lanes, key=lambda worker: (not worker.frames, worker.heard_at))
            for report in reports:
                if isinstance(report, Ack):
                    payload = encode_ack(report, Credit(()))
                else:
                    payload = encode_ack(Ack(()), report)
                lane.send_frame_locked(FrameHeader(FrameKind.ACK, length=len(payload)), payload)

    def receive_reports(self, ack: Ack, credit: Credit) -> None:
        """Acknowledgements and credit came over a lane. Raises `ProtocolError` when they must not have."""
        if ack.held:
            self.receive(ack)
        if credit.limits:
            self.receive(credit)

    def control_lost(self, error: AmstError) -> None:
        """The control channel is gone; what is under way goes on over the lanes."""
        with self.lock:
            self.control_up = False
            self.last_error = error
            self.engine.control_lost()
            self.lanes_in_doubt = True

    def control_resumed(self) -> None:
        """There is a control channel again: the peer will be told the whole state of what it sends."""
        with self.lock:
            self.control_up = True
            self.engine.control_resumed()
            self.kick_locked()
            self.room.notify_all()

    @property
    def is_idle(self) -> bool:
        """The peer is silent: gone, perhaps."""
        heard_at = max([self.heard_at, *(worker.heard_at for worker in list(self.lanes.values()))])
        return (not self.control_up and not self.lanes) or time.monotonic() - heard_at > IDLE_S

    def is_gone(self, for_s: float) -> bool:
        """Neither the control channel nor any lane connects the two sides, and nothing was heard for ``for_s``."""
        return not self.control_up and not self.lanes and time.monotonic() - self.heard_at > for_s

    def describe_open_locked(self) -> str:
        """What is under way, for people: names of files and how far they are, numbers of the rest."""
        parts = [f"{out.source.name} ({out.ticket.acknowledged} of {out.ticket.size} bytes sent)"
                 for out in self._outgoing.values() if out.source.name]  # fmt: skip
        for transfer, sink in self._sinks.items():
            if sink.name:
                held, size = self.engine.progress_in(transfer)
                parts.append(f"{sink.name} ({held} of {size} bytes received)")
        named = len(parts)
        if named > SHOWN_OPEN:
            parts[SHOWN_OPEN:] = [f"{named - SHOWN_OPEN} more files"]
        others = self.engine.sending + self.engine.receiving - named
        if others > 0:
            parts.append(f"{others} other transfers")
        return ", ".join(parts) or "a walk through a directory"

    def look_for_late(self, now: float) -> None:
        """Have the last chunks of slow lanes sent again over others; cheap when called too often."""
        if now - self._late_looked_at < TICK_S / 2:
            return
        self._late_looked_at = now
        paths: dict[int, PathStats] = {}
        if self.engine.sending and now - self._path_looked_at >= STEP_S / 5:
            # without the lock, for of some hundred lanes it takes its time
            self._path_looked_at = now
            paths = {lane.id: lane.lane.path_stats() for lane in list(self.lanes.values())}
        with self.lock:
            late = [self.lanes[lane] for lane in self.engine.late_lanes(now) if lane in self.lanes]
            soon_through = self._progress.soon_through(late, self.engine.chunk_takes_s, now)
            self.engine.resend_late(now, soon_through)
            path = max(self.lanes.values(), key=lambda lane: lane.bytes_sent, default=None)
            self._crew.found_path(None if path is None else path.lane.path_stats().min_rtt_s)
            changed = self._chunks.observe(self.engine.bytes_acknowledged, now)
            if paths:
                changed |= self._saw_paths_locked(paths, now)
            if changed:
                self._fit_chunks_locked()
            work = self._work_locked()
            self.kick_locked()
        self._begin(work)

    def _saw_paths_locked(self, paths: Mapping[int, PathStats], now: float) -> bool:
        """Whether chunks are to be of other sizes, by how the lanes stand."""
        changed = False
        if self._chunks.follows_path:
            rtts = [stats.rtt_s for stats in paths.values() if stats.rtt_s is not None]
            rtt_s = sum(rtts) / len(rtts) if rtts else None
            changed = self._chunks.observe_path(self._loss.look(paths), rtt_s, now)
        idle = {lane.id for lane in (*self._idle, self._paced) if lane is not None}
        looks = {
            lane.id: LaneLook(paths[lane.id], lane.bytes_sent, lane.id in idle)
            for lane in self.live_lanes_locked()
            if lane.id in paths
        }
        return self._lane_chunks.observe(looks, self.engine.chunk_size, now) or changed

    def adopt(self, profile: Profile) -> None:
        """Have what this side sends follow ``profile`` from now on; the lanes go on, and come and go to suit it."""
        with self.lock:
            self._profile = profile
            self.congestion.mode = profile.mode
            self._chunks = self._chunks_of(profile)
            if not self._streams_said:
                self._streams_range = profile.streams
            self.set_express_locked()
            self._fit_chunks_locked()
            workers = self.live_lanes_locked()
        for worker in workers:
            worker.choose_congestion()
        with self.lock:
            if self._pacing is not None and workers:
                self._pacing.change(self._pacer_locked(workers[0]))
            elif workers:
                self._pace_locked(workers[0])
            self.kick_locked()

    def set_express_locked(self) -> None:
        """In hybrid mode the oldest lanes are for short transfers, while there are some for the others."""
        lanes = self.live_lanes_locked() if self._profile.mode is Mode.HYBRID else []
        self.engine.set_express(lane.id for lane in lanes[: min(EXPRESS, len(lanes) // 2)])

    @property
    def is_rate_limited(self) -> bool:
        """Somebody has asked for a limit to what this side sends."""
        return any(rate is not None for rate in self._rates)

    def moved(self) -> tuple[int, int]:
        """Payload bytes sent and received so far, over all lanes there ever were."""
        with self.lock:
            live = self.lanes.values()
            return (
                self.bytes_sent + sum(worker.bytes_sent for worker in live),
                self.bytes_received + sum(worker.bytes_received for worker in live),
            )

    def limit_rate(self, rate: float | None) -> None:
        """Send at most ``rate`` bytes/s in all from now on; None: as fast as the lanes take it."""
        self._rates[0] = rate
        self._apply_rates()

    def limit_rate_for_peer(self, rate: float | None) -> None:
        """The same by wish of the peer; the lower limit holds."""
        self._rates[1] = rate
        self._apply_rates()

    def _apply_rates(self) -> None:
        limits = [rate for rate in self._rates if rate is not None]
        with self.lock:
            self.engine.limit_rate(min(limits, default=None), now=time.monotonic())
            if self._paced is not None:
                self._paced.ready.notify()
            self.kick_locked()

    def _has_news_locked(self) -> bool:
        """Something is to be told, and there is a way for it."""
        if not self.control_up:
            return self.engine.has_credits and bool(self.lanes)
        return bool(self._outbox) or self.engine.has_messages

    def wake_locked(self) -> None:
        """Wake the control loop if there is something for it before it wakes by itself."""
        if self._sleeps_until is None:
            return
        deadline = self.engine.deadline
        if self._has_news_locked() or (deadline is not None and deadline < self._sleeps_until):
            self._sleeps_until = None
            self.wakeup.set()

    def tell(self, *messages: Message) -> None:
        """Queue control messages."""
        with self.lock:
            self.tell_locked(*messages)

    def tell_locked(self, *messages: Message) -> None:
        self._outbox += messages
        self.wake_locked()

    def receive(self, message: Message) -> None:
        """A control message about transfers arrived. Raises `ProtocolError` when it must not have."""
        with self.lock:
            self.engine.receive(message, time.monotonic())
            work = self._work_locked()
            self.kick_locked()
        self._begin(work)

    # ---- opening transfers -----------------------------------------------------------------------

    def open(
        self,
        kind: int,
        source: Source,
        *,
        size: int | None,
        flow: Hashable,
        channel: str = "",
        request: int = 0,
        attributes: Mapping[str, AttributeValue] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        on_hold: bool = False,
        given_up: Callable[[], bool] | None = None,
        when_room: Callable[[], None] | None = None,
    ) -> Ticket:
        """Open a transfer, waiting while the peer takes no more; the source is closed in the end.

        ``size`` is None for an `OrderedSource`, which offers its bytes as they come. A file ``on_hold`` is first
        compared with what the peer has of it. ``given_up`` is asked whenever `room` is notified. With ``when_room``
        this never waits, for the peer or for a disk: see `Room`.

        Raises:
            AmstError: the session ended.
            CancelledError: it was given up while it waited.
            NotYet: the peer takes no more now, and ``when_room`` will be called; the source is not closed.
        """
        ticket = Ticket(size or 0, cancel=self._cancel)
        ticket.on_progress = on_progress
        try:
            with self.lock:
                while self.error is None and not self.engine.has_turn(flow):
                    if given_up is not None and given_up():
                        raise CancelledError("given up before the peer took it")
                    self.room.wait_or_watch(when_room)
                self.check_open_locked()
                if self.first_offered_at is None and size:
                    self.first_offered_at = time.monotonic()
                transfer = self.engine.open(
                    kind,
                    size=size,
                    flow=flow,
                    channel=channel,
                    request=request,
                    attributes=attributes,
                    on_hold=on_hold,
                    steady=source.steady,
                    holes=source.holes,
                )
                ticket.transfer = transfer
                if isinstance(source, OrderedSource):
                    source.opened(ticket)
                self._outgoing[transfer] = _Outgoing(source, ticket)
                if self._pacing is not None:
                    self._pacing.wake()
                work = self._work_locked()
                self.kick_locked()
                self.wake_locked()
        except NotYet:
            raise  # nothing has happened, to the source either
        except BaseException:
            source.close()
            raise
        if when_room is None:
            work.run()
        else:
            self._begin(work)
        return ticket

    def reserve_copy(self, size: int, *, when_room: Callable[[], None] | None = None) -> bool:
        """Wait until ``size`` bytes may be copied for sending; pair with `release_copy`.

        False when only others could make room, who may never: this session has no copies to wait for (pipes keep
        theirs for as long as they like).

        Raises:
            AmstError: the session ended.
            NotYet: it would have to wait, and ``when_room`` will be called instead.
        """
        with self.lock:
            while True:
                self.check_open_locked()
                if self.memory.reserve_copy(size):
                    return True
                if self.memory.copied == self.memory.piped:
                    return False
                self.room.wait_or_watch(when_room)

    def release_copy(self, size: int) -> None:
        """A copy is not needed any more."""
        with self.lock:
            self.memory.release_copy(size)
            self.room.notify_all()

    def check_open_locked(self) -> None:
        """Raise what the session ended with, if it has."""
        if self.error is not None:
            raise copy(self.error)  # each its own: one that many raise gathers the traces of all

    def _cancel(self, ticket: Ticket) -> None:
        with self.lock:
            self.engine.reset(ticket.transfer, CancelledError.kind, "the sender cancelled the transfer")
            work = self._work_locked()
            self.wake_locked()
        self._begin(work)

    def drop(self, transfer: int, error: AmstError) -> None:
        """Give up an incoming transfer, if it is not whole yet: what there is of it is removed, the sender told why."""
        with self.lock:
            if transfer not in self._sinks:
                return
            self.engine.refuse(transfer, error.kind, error.message)
            work = self._work_locked()
            self.wake_locked()
        self._begin(work)

    def _reset(self, transfer: int, kind: str, message: str) -> None:
        with self.lock:
            self.engine.reset(transfer, kind, message)
            work = self._work_locked()
            self.wake_locked()
        work.run()

    def accept_kind(self, kind: int, acceptor: Acceptor) -> None:
        """Have ``acceptor`` decide about transfers of ``kind`` that answer no request."""
        with self.lock:
            self._acceptors[kind] = acceptor

    def accept_request(self, request: int, acceptor: Acceptor | None) -> None:
        """Have ``acceptor`` decide about transfers that answer ``request``; None: no longer."""
        with self.lock:
            if acceptor is None:
                self._request_acceptors.pop(request, None)
            else:
                self._request_acceptors[request] = acceptor

    def unfinished(self) -> list[Ticket]:
        """Tickets under way."""
        with self.lock:
            return [out.ticket for out in self._outgoing.values()]

    # ---- lanes: sending -----------------------------------------------------------------------------

    def next_job(
        self, worker: LaneWorker, last: Chunk | None
    ) -> tuple[Chunk, Source] | tuple[FrameHeader, bytes] | None:
        """Wait for what ``worker`` is to send: a chunk, a frame of the lane's own, or None to stop.

        ``last`` is the chunk it has done with.
        """
        with self.lock:
            if last is not None:
                self._crew.ended(worker.id)
                self.engine.chunk_left(last)
                work = self._work_locked()
                self.wake_locked()
                if work.quick or work.slow:
                    self.lock.release()
                    try:
                        work.run()
                    finally:
                        self.lock.acquire()
                del work  # it holds on to what has ended, and the wait may be long
            while True:
                if worker.dead or self.error is not None:
                    self.kick_locked()  # a wake-up meant for any lane must not end here
                    return None
                if worker.frames:
                    if worker.leaving:
                        self.kick_locked()  # it takes no more chunks
                    return worker.frames.popleft()
                if worker.leaving:
                    self.kick_locked()
                    return None
                now = time.monotonic()
                if self._crew.is_full(now):
                    self._idle.append(worker)
                    worker.ready.wait()
                    continue
                chunk = self.engine.next_chunk(worker.id, now)
                if chunk is not None:
                    self._crew.began(worker.id, now)
                    self.kick_locked()
                    return chunk, self._outgoing[chunk.transfer].source
                paced_until = self.engine.paced_until(now) if self._paced is None else None
                if paced_until is not None and self.engine.may_send(worker.id):
                    self._paced = worker  # one waits for the time; it wakes the next
                    worker.ready.wait(paced_until - now)
                    self._paced = None
                    continue
                if not self.engine.may_send(worker.id):
                    self.kick_locked()  # it has left its place to another
                self._idle.append(worker)
                worker.ready.wait()

    def chunk_left(self, chunk: Chunk) -> None:
        """A lane that stops sending has done with its last chunk."""
        with self.lock:
            self._crew.ended(chunk.lane)
            self.engine.chunk_left(chunk)
            work = self._work_locked()
            self.kick_locked()
            self.wake_locked()
        work.run()

    def kick_locked(self) -> None:
        """Wake one idle lane if a chunk waits; that one wakes the next."""
        if not self.engine.has_chunks or self._paced is not None or self._crew.is_full(time.monotonic()):
            return
        for at in range(len(self._idle) - 1, -1, -1):
            worker = self._idle[at]
            if worker.dead or self.engine.has_chunk_for(worker.id):
                del self._idle[at]
                worker.ready.notify()
                if not worker.dead:
                    return

    def poke_locked(self, worker: LaneWorker) -> None:
        """Wake ``worker``'s sending thread, whatever for."""
        if worker in self._idle:
            self._idle.remove(worker)
        worker.ready.notify()

    def source_failed(self, chunk: Chunk, error: AmstError) -> None:
        """A chunk's source cannot be read: only its transfer ends."""
        self._reset(chunk.transfer, error.kind, error.message)

    # ---- lanes: receiving --------------------------------------------------------------------------

    def place(self, lane: int, header: FrameHeader) -> tuple[Placement, Sink | None]:
        """Where a chunk that arrives on ``lane`` goes; waits while its OPEN is still on its way."""
        with self.lock:
            deadline: float | None = None
            while True:
                self.check_open_locked()
                placement = self.engine.place(lane, header.transfer, header.offset, header.length)
                if placement.verdict is not Verdict.PARK:
                    sink = self._sinks.get(header.transfer)
                    if placement.verdict is Verdict.FILL and sink is not None:
                        sink.prepare_locked()
                    return placement, sink
                now = time.monotonic()
                deadline = deadline or now + self._park_timeout_s
                if not self.control_up:
                    deadline = now + self._park_timeout_s  # it cannot come now
                if now >= deadline:
                    raise ProtocolError(f"data for transfer {header.transfer}, which was not opened in time")
                self._opened.wait(deadline - now)

    def placed(self, placement: Placement, *, intact: bool, failure: AmstError | None = None) -> None:
        """A FILL ended; ``failure`` fails its transfer (its sink cannot keep the bytes)."""
        with self.lock:
            self.engine.placed(placement, intact=intact, now=time.monotonic())
            if failure is not None:
                self.engine.refuse(placement.transfer, failure.kind, failure.message)
            work = self._work_locked()
            self.wake_locked()
        work.run()

    def copied(self, placement: Placement) -> tuple[Placement, Sink] | None:
        """A verified COPY: where it is needed after all, if it is."""
        with self.lock:
            self.check_open_locked()
            fill = self.engine.copied(placement)
            work = self._work_locked()
            self.wake_locked()
            if fill is not None:
                sink = self._sinks[fill.transfer]
                sink.prepare_locked()
        work.run()
        return None if fill is None else (fill, sink)

    # ---- lanes: joining and leaving -----------------------------------------------------------------

    def lane_joined(self, worker: LaneWorker) -> None:
        """A lane was admitted."""
        with self.lock:
            self.check_open_locked()
            self.lanes[worker.id] = worker
            worker.stream = self.streams.joined(worker)
            self.total_lanes += 1
            self.most_lanes = max(self.most_lanes, len(self.lanes))
            self.engine.lane_joined(worker.id)
            self.doom = None
            self.coming -= self.is_opener
            if self.most_wanted is not None:  # it may have been asked for before fewer were wanted
                for newest in self.live_lanes_locked()[self.most_wanted :]:
                    newest.leave_locked()  # not who came last: that may be another one on the other side
            self.set_express_locked()
            self._fit_chunks_locked()
            self._pace_locked(worker)
            self.kick_locked()
            self.room.notify_all()
        if worker.stream.reconnects:
            _log.info("stream %d to %s is back over %s", worker.stream.id, self.peer, worker.lane.description)

    def _pace_locked(self, worker: LaneWorker) -> None:
        """Have the session paced, from the first lane on that needs it."""
        if self._pacing is not None or self._is_alone:
            return
        pacer = self._pacer_locked(worker)
        if pacer is not None:
            self._pacing = SessionPacing(self, pacer)
            self._pacing.start()

    def _pacer_locked(self, worker: LaneWorker) -> SessionPacer | None:
        """What paces a session of lanes as ``worker`` is one; None where each does all that is needed by itself."""
        name = worker.congestion.controller
        if name is not None and self._may_pace:
            try:
                controller = self.congestion.make_controller(name)
            except AmstError as err:
                self._pace_not_locked(str(err))
                return None
            return ControllerPacer(controller, self._streams_range, polite=self.congestion.polite)
        if self.congestion.polite:
            self._pace_not_locked(worker.congestion.reason)
            return None
        flow = worker.lane.flow_sample()
        is_near = flow is not None and flow.min_rtt_s < FAR_S and self._profile.mode is not Mode.INTERNET
        near = is_near or not self._may_pace
        if flow is None or (near and self._streams_range.fixed):
            return None
        return GuardPacer(self._streams_range, near=near)

    def _pace_not_locked(self, why: str) -> None:
        """It cannot be paced; a polite session then has one lane, which is one flow by itself."""
        self._is_alone = True
        _log.warning("%s: the session is not paced: %s", self.peer, why)
        if self.congestion.polite:
            self.background.later(lambda: self.be_alone(why))

    def be_alone(self, why: str) -> None:
        """Have one lane from now on."""
        _log.warning("%s: polite with one stream: %s", self.peer, why)
        self.fix_streams(1)
        self.want_streams(1)

    @property
    def streams_reason(self) -> str:
        """Why there are as many lanes as there are."""
        pacing = self._pacing
        return self._streams_range.reason if pacing is None else pacing.streams_reason

    def fix_streams(self, count: int) -> None:
        """There are to be ``count`` lanes, whatever the path needs: somebody has said so."""
        with self.lock:
            self._streams_said = True
            self._streams_range = Range(count, count, count)
            if self._pacing is not None:
                self._pacing.fix_streams(self._streams_range)

    def bound_chunks(self, nbytes: int | None) -> None:
        """Chunks are to be no longer than ``nbytes``, for what a lane has taken on cannot go by another; None: lift."""
        if nbytes != self._chunk_bound:
            with self.lock:
                self._chunk_bound = nbytes
                self._fit_chunks_locked()

    def want_streams(self, count: int) -> None:
        """So many lanes are the ones to have; they come and go meanwhile."""
        if self.on_streams_wanted is not None:
            self.on_streams_wanted(count)

    def lane_ended(self, worker: LaneWorker, error: AmstError | None, *, told: bool = False) -> None:
        """A lane left in an orderly way (``error`` None) or died; ``told``: the peer said so itself."""
        with self.lock:
            if worker.dead:
                return
            worker.dead = True
            self.lanes.pop(worker.id, None)
            stream = worker.stream
            if stream is not None and (error is None or worker.leaving):
                self.streams.left(stream)
            elif stream is not None:
                stream.ended(error)
            self.bytes_sent += worker.bytes_sent
            self.bytes_received += worker.bytes_received
            self.poke_locked(worker)
            if error is None:
                self.engine.lane_left(worker.id)
            else:
                self.engine.lane_lost(worker.id)
                if self.error is None and self.closing is None:
                    self.last_error = error
                    self.lane_failures += 1
                    self.lanes_in_doubt = True
                    self.damaged_lanes += isinstance(error, IntegrityError)
                    if not told:
                        self._outbox.append(LaneLost(worker.id, error.kind, error.message))
            self.set_express_locked()
            self._fit_chunks_locked()
            work = self._work_locked()
            self.kick_locked()
            self.wake_locked()
            self.room.notify_all()
            self.ponged.notify_all()
            none_left = not self.live_lanes_locked()
            damaged = self.damaged_lanes >= MAX_DAMAGED_LANES
        worker.lane.close() if error is None else worker.lane.abort()
        work.run()
        if self.error is not None:
            return
        if error is not None and self.closing is None:
            # when a peer goes, all go at once: the first says it
            now = time.monotonic()
            level = logging.INFO if now - self._warned_at < QUIET_S else logging.WARNING
            self._warned_at = now
            number = worker.stream.id if worker.stream is not None else worker.id
            _log.log(level, "stream %d (%s) to %s failed: %s", number, worker.lane.description, self.peer, error)
        if damaged:
            self.fail(IntegrityError(f"{MAX_DAMAGED_LANES} streams carried damaged frames: {error}", peer=self.peer))
            return
        if none_left:
            last = error or "the peer closed it"
            self._doom(
                BrokenError(
                    f"every stream to {self.peer} is gone and none came back for {self._session_timeout_s:g} s "
                    f"(limits.session_timeout); the last one: {last}",
                    peer=self.peer,
                )
            )
        if error is not None and not worker.leaving and self.on_lane_died is not None:
            self.on_lane_died(worker)

    def _doom(self, error: BrokenError) -> None:
        """End the session with ``error`` after the session's timeout, unless a lane joins before."""
        with self.lock:
            if self.doom is None and not self.live_lanes_locked():
                self.doom = (time.monotonic() + self._session_timeout_s, error)
                self.wakeup.set()

    def lane_given_up(self, incarnation: int, error: AmstError) -> None:
        """The peer says that it lost a lane."""
        worker = self.lanes.get(incarnation)
        if worker is not None:
            self.lane_ended(worker, error, told=True)
            return
        with self.lock:  # here it had ended in an orderly way, but its last chunks did not get through
            self.engine.lane_lost(incarnation)
            self.kick_locked()

    def live_lanes_locked(self) -> list[LaneWorker]:
        """Lanes that take chunks, oldest first: both sides, asked to keep some, keep the same ones."""
        return sorted((w for w in self.lanes.values() if not w.leaving), key=lambda w: w.id)

    def connection_failed(self, unused: LaneLost) -> None:
        """A lane could not be opened; the peer is told that its grant was not used."""
        with self.lock:
            self.failed_connections += 1
            self.coming -= 1
            self.tell_locked(unused)
            self.room.notify_all()

    def lanes_wanted(self, count: int) -> int:
        """How many of ``count`` dead lanes to replace: none beyond what was last wished for."""
        with self.lock:
            if self.error is not None or self.closing is not None:
                return 0
            if self.most_wanted is None:
                return count
            wanted = max(0, min(count, self.most_wanted - len(self.live_lanes_locked()) - self.coming))
            if wanted < count:
                self.streams.drop_vacant()
            return wanted

    def lanes_refused(self, count: int) -> None:
        """So many of the lanes asked for will not come."""
        with self.lock:
            self.refused_lanes += count
            self.coming -= count * self.is_opener
            self.room.notify_all()

    def _fit_chunks_locked(self) -> None:
        """Keep chunk size × lanes inside the scratch memory that sealing, and files, need, and each below the bound."""
        share = self.send_pool.limit // max(1, len(self.lanes)) - 8192
        most = max(64 << 10, share & ~0xFFFF)
        if not any(worker.needs_scratch for worker in self.lanes.values()):
            most = max(most, self._chunks.configured)  # only files do, and can wait for each other
        why = "to fit limits.memory"
        if self._chunk_bound is not None and self._chunk_bound < most:
            most, why = self._chunk_bound, "for what a stream has taken on cannot go by another"
        size = min(self._chunks.size, most)
        self.engine.set_chunk_sizes(self._lane_chunks.sizes(size))
        if size == self.engine.chunk_size:
            return
        if size < self._chunks.size:
            _log.info("chunks of %d KiB for %d streams, %s", size >> 10, len(self.lanes), why)
        else:
            _log.debug("chunks of %d KiB", size >> 10)
        self.engine.chunk_size = size

    # ---- what the engine says ------------------------------------------------------------------------

    def _work_locked(self) -> _Work:
        """Turn the engine's events into state, and into work to be done without the lock."""
        work = _Work()
        while events := self.engine.events():
            if self.error is not None:
                continue  # the end of the session was the end of every transfer
            for event in events:
                match event:
                    case TransferOffered(opened):
                        self._offered_locked(opened)
                    case PrefixGrew(transfer, end):
                        ordered = self._sinks.get(transfer)
                        if isinstance(ordered, OrderedSink):
                            ordered.prefix_grew_locked(end)
                    case TransferWhole(transfer, total):
                        if isinstance(ordered := self._sinks[transfer], OrderedSink):
                            ordered.whole_locked(total)  # and says when it is `confirmed_locked`
                            continue
                        sink = self._sinks.pop(transfer)
                        if self.inbox.owns(sink):
                            sink.finish(total)  # the inbox confirms it
                            self.room.notify_all()
                        else:
                            work.slow.append(partial(self._finish, transfer, sink, total))
                    case TransferDropped(transfer, kind, message):
                        self.room.notify_all()
                        dropped = self._sinks.pop(transfer, None)
                        reason = error_from_kind(kind, message, peer=self.peer)
                        if dropped is not None and self.inbox.owns(dropped):
                            dropped.abort(reason)
                        elif isinstance(dropped, OrderedSink):
                            work.quick.append(partial(dropped.abort, reason))
                        elif dropped is not None:
                            work.slow.append(partial(dropped.abort, reason))
                    case SourceDrained(transfer):
                        if self._outgoing[transfer].source.steady:
                            self.engine.end(transfer)  # nobody changes it meanwhile
                            continue
                        work.slow.append(partial(self._drained, transfer))
                    case SourceReleased(transfer, end):
                        released = self._outgoing[transfer].source
                        if isinstance(released, OrderedSource):
                            released.release_locked(end)
                    case SameAsked(transfer, digest):
                        source = self._outgoing[transfer].source
                        comparison = partial(self._compare, transfer, source, digest)
                        work.quick.append(partial(self.background.aside, comparison))
                    case SameAnswered(transfer, same):
                        asked = self._sinks.get(transfer)
                        if asked is not None:
                            work.slow.append(partial(self._answered, transfer, asked, same))
                    case LaneOvertaken(lane):
                        work.quick.append(partial(self._overtaken, lane))
                    case Progress(transfer, acknowledged):
                        out = self._outgoing.get(transfer)
                        if out is not None:
                            out.ticket.record(acknowledged)
                            if out.ticket.on_progress is not None:
                                work.quick.append(partial(out.ticket.report, acknowledged))
                    case TransferDone(transfer, kind, message):
                        done = self._outgoing.pop(transfer)
                        self.last_done_at = time.monotonic()
                        self.room.notify_all()
                        # closing a file may wait for its disk, and nobody waits for that
                        where = work.quick if done.source.steady else work.slow
                        where.append(partial(self._done, done, kind, message))
        return work

    def _offered_locked(self, opened: Open) -> None:
        try:
            if self.draining:
                raise BusyError("this side is stopping and takes nothing new")
            if opened.request and opened.kind not in (FILE, PACK):
                raise RefusedError("only files answer a request")
            if opened.request:
                acceptor = self._request_acceptors.get(opened.request)
            else:
                acceptor = self._acceptors.get(opened.kind)
            if acceptor is None:
                raise error_from_kind("refused", "nobody here takes this kind of transfer")
            if opened.request and opened.size == SIZE_UNKNOWN:
                raise ProtocolError("a file of unknown size answers a request")
            sink = acceptor(opened)
            if HOLES in opened.attributes and not sink.sparse:
                raise ProtocolError(f"transfer {opened.transfer} has holes, which nobody asked to be told of")
        except ProtocolError:
            raise
        except AmstError as err:
            self.engine.refuse(opened.transfer, err.kind, err.message)
        else:
            self._sinks[opened.transfer] = sink
            if opened.attributes.get(HOLD) is True:
                self.background.aside(partial(self._recover, opened.transfer, sink))
            elif isinstance(sink, OrderedSink):
                self.engine.accept(opened.transfer, window=None, ordered=True)
            elif not self.inbox.owns(sink):
                self.engine.accept(opened.transfer, window=FILE_WINDOW)
        self._opened.notify_all()  # lanes wait for the answer, whatever it is

    def confirmed_locked(self, transfer: int) -> None:
        """An `OrderedSink` has all of it: tell the peer."""
        del self._sinks[transfer]
        self.engine.finish(transfer)
        self.room.notify_all()

    def _recover(self, transfer: int, sink: Sink) -> None:
        """Look what is there of a file from an earlier try, and tell the sender."""
        try:
            found = sink.recover()
        except AmstError as err:
            self.settle(partial(self.engine.refuse, transfer, err.kind, err.message))
            return
        if found.digest:
            self.settle(partial(self.engine.claim, transfer, found.digest))
        else:
            self.settle(partial(self.engine.accept, transfer, window=FILE_WINDOW, held=found.held))

    def _compare(self, transfer: int, source: Source, digest: bytes) -> None:
        """Is the whole file that the peer has the source?"""
        try:
            same = source.digest(lambda: self.error is not None or transfer not in self._outgoing) == digest
        except AmstError as err:
            self._reset(transfer, err.kind, err.message)
            return
        self.settle(partial(self.engine.answer_same, transfer, same))

    def _answered(self, transfer: int, sink: Sink, same: bool) -> None:
        if not same:
            self.settle(partial(self.engine.accept, transfer, window=FILE_WINDOW))
            return
        try:
            sink.adopt()
        except AmstError as err:
            self.settle(partial(self.engine.refuse, transfer, err.kind, err.message))
            return
        self.settle(partial(self.engine.adopted, transfer))

    def settle(self, tell_engine: Callable[[], None]) -> None:
        """Tell the engine something from a thread that holds no lock, and do what follows from it."""
        with self.lock:
            if self.error is not None:
                return
            tell_engine()
            work = self._work_locked()
            self._opened.notify_all()
            self.kick_locked()
            self.wake_locked()
        work.run()

    def _overtaken(self, lane: int) -> None:
        worker = self.lanes.get(lane)
        if worker is not None:
            self.lane_ended(
                worker, DeadlineError("what it carried came sooner as a copy over another", stream=lane, peer=self.peer)
            )

    def _finish(self, transfer: int, sink: Sink, total: int) -> None:
        failure: AmstError | None = None
        try:
            sink.finish(total)
        except AmstError as err:
            failure = err
            sink.abort(err)
        with self.lock:
            if failure is None:
                self.engine.finish(transfer)
                self.room.notify_all()
            else:
                self.engine.refuse(transfer, failure.kind, failure.message)
            work = self._work_locked()
            self.wake_locked()
        work.run()

    def _drained(self, transfer: int) -> None:
        with self.lock:
            out = self._outgoing.get(transfer)
        if out is None:
            return
        try:
            out.source.verify()
        except AmstError as err:
            self._reset(transfer, err.kind, err.message)
            return
        with self.lock:
            self.engine.end(transfer)
            self.wake_locked()

    def _done(self, out: _Outgoing, kind: str, message: str) -> None:
        out.source.close()
        out.ticket.complete(error_from_kind(kind, message, peer=self.peer) if kind else None)

    def _begin(self, work: _Work) -> None:
        """Do what is quick, and have the worker do the rest."""
        for item in work.quick:
            item()
        for item in work.slow:
            self.background.later(item)

    def _inbox_changed_locked(self) -> None:
        self.room.notify_all()
        self.wake_locked()

    def _crashed(self, err: Exception) -> None:
        _log.error("session with %s: unexpected error", self.peer, exc_info=err)
        self.fail(AmstError(f"unexpected error, please report it: {err!r}", peer=self.peer))

    # ---- the end -----------------------------------------------------------------------------------------

    def fail(self, error: AmstError) -> None:
        """End the session: every wait ends with ``error``. The first call counts. Never blocks for long."""
        with self.lock:
            if self.error is not None:
                return
            error = self.closing or error
            if self._outgoing or self.engine.sending:
                error.delivery = self.engine.delivery()
            self.error = error
            lanes = list(self.lanes.values())
            outgoing = list(self._outgoing.values())
            self._outgoing.clear()
            sinks = [s for s in self._sinks.values() if not self.inbox.owns(s)]
            self._sinks.clear()
            for sink in sinks:
                if isinstance(sink, OrderedSink):
                    sink.wake_locked()
            self.room.notify_all()
            self.ponged.notify_all()
            self._opened.notify_all()
            self.inbox.end_locked(error)
            self.wakeup.set()
        if self._pacing is not None:
            self._pacing.end()
        self.send_pool.close()
        self.receive_pool.close()
        for worker in lanes:
            self.lane_ended(worker, error)
        if self.on_failed is not None:
            self.on_failed(error)
        # sources and sinks go when no lane touches them any more
        self.background.later(lambda: self._release(lanes, outgoing, sinks, error))

    def _release(
        self, lanes: list[LaneWorker], outgoing: list[_Outgoing], sinks: list[Sink], error: AmstError
    ) -> None:
        for worker in lanes:
            worker.join()
        for sink in sinks:
            sink.abort(error, keep=True)
        for out in outgoing:
            out.source.close()
            out.ticket.complete(error)
        self.background.close()
        self.memory.close()
        if self.on_released is not None:
            self.on_released()
        with self.lock:
            self._ended.set()
            callbacks, self._end_callbacks = self._end_callbacks, []
        for callback in callbacks:
            guarded(callback)

    def add_end_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called once when everything `fail` set in motion has come to its end; at once if it has."""
        with self.lock:
            if not self._ended.is_set():
                self._end_callbacks.append(callback)
                return
        guarded(callback)

    def wait_ended(self, timeout: float | None) -> bool:
        """Everything `fail` set in motion has come to its end."""
        return self._ended.wait(timeout)

    def close(self, wait_s: float) -> None:
        """End the session in an orderly way: CLOSE goes first, so that the peer does not take it for a fault."""
        with self.lock:
            if self.error is None and self.closing is None:
                self.closing = ClosedError(f"this side closed the session with {self.peer}", peer=self.peer)
                self._outbox.append(Close("", ""))
                self.wake_locked()
        if not self._ended.wait(wait_s):
            self.fail(ClosedError(f"this side closed the session with {self.peer}", peer=self.peer))
