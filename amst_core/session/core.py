"""The shared state of one session: the engine under its lock, and who must be woken when it changes.

Three kinds of threads meet here. Lanes (`lanes.py`) ask for chunks and places; the control loop
(`control_loop.py`) carries messages; the worker runs what may block on a disk. Callers (`session.py`)
open transfers. Everything the engine says (`Event`) is turned into work here, once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from ..buffers import Block, BufferPool
from ..engine import Chunk, Engine, Limits, Placement, Verdict
from ..engine.events import Progress, SourceDrained, TransferDone, TransferDropped, TransferOffered, TransferWhole
from ..errors import (
    AmstError,
    BrokenError,
    BusyError,
    ClosedError,
    IntegrityError,
    ProtocolError,
    error_from_kind,
)
from ..wire.fields import AttributeValue
from ..wire.frames import FrameHeader
from ..wire.messages import FILE, MESSAGE, SIZE_UNKNOWN, Close, LaneLost, Message, Open
from .endpoints import MemorySource, Sink, Source
from .inbox import Inbox
from .tickets import Ticket
from .wakeup import Wakeup

if TYPE_CHECKING:
    from .lanes import LaneWorker

_log = logging.getLogger("amst.session")

FILE_WINDOW: Final = 256 << 20
"""How far a sender may run ahead of what is on disk; nothing is buffered, so it only bounds what is in flight."""

LAST_WORD_S: Final = 1.0
"""How long a session without a lane waits for the peer to say why."""

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
        memory: int,
        max_message: int,
        chunk_size: int,
        park_timeout_s: float,
    ) -> None:
        self.peer = peer
        self.is_opener = is_opener
        self.lock = threading.Lock()
        self.engine = Engine(local=local, peer=remote)
        self.lanes: dict[int, LaneWorker] = {}
        self.past_lanes: deque[LaneWorker] = deque(maxlen=64)
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
        self.last_error: AmstError | None = None
        self.first_offered_at: float | None = None
        self.last_done_at: float | None = None
        # half of the memory for messages, a sixth for each direction's scratch, the rest for copies of sends
        self.send_pool = BufferPool(memory // 6)
        self.receive_pool = BufferPool(memory // 6)
        self._scratch_limit = memory // 6
        self._copy_limit = memory // 6
        self._copied = 0
        self._chunk_size = min(chunk_size, remote.max_chunk)
        self.engine.chunk_size = self._chunk_size
        self.inbox = Inbox(
            self.lock,
            self.engine,
            budget=memory // 2 - local.max_open * local.initial_credit,
            on_return=self._block_returned,
            on_change=self._inbox_changed_locked,
            max_message=max_message,
        )
        self._returned: deque[Block] = deque()
        self._park_timeout_s = park_timeout_s
        self._outgoing: dict[int, _Outgoing] = {}
        self._sinks: dict[int, Sink] = {}
        self._idle: list[LaneWorker] = []
        self._outbox: list[Message] = []
        self.draining = False  # what is open may end, nothing new is taken
        self.serving = 0  # requests of the peer under way that take their time
        self._opened = threading.Condition(self.lock)  # an OPEN was accepted
        self.room = threading.Condition(self.lock)  # an outgoing transfer ended, or lanes came or went
        self.ponged = threading.Condition(self.lock)  # a lane's PONG came
        self.on_failed: Callable[[AmstError], None] | None = None
        self.on_released: Callable[[], None] | None = None
        self._acceptors: dict[int, Acceptor] = {}  # by kind of transfer
        self._request_acceptors: dict[int, Acceptor] = {}
        self._worker: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker_thread: threading.Thread | None = None
        self._worker_lock = threading.Lock()
        self._worker_done = False
        self.wakeup = Wakeup()  # of the control loop
        self._sleeps_until: float | None = None  # the control loop's timeout; None: it is awake
        self._ended = threading.Event()
        self._acceptors[MESSAGE] = self.inbox.accept

    # ---- the control loop's side ---------------------------------------------------------------

    def take_messages(self, now: float) -> list[Message]:
        """What is to be written to the control channel now."""
        with self.lock:
            self._sleeps_until = None
            while self._returned:
                self.inbox.take_back_locked(self._returned.popleft())
            # REPLY and CLOSE come after the transfers that they speak of
            out = self.engine.messages(now) + self._outbox
            self._outbox = []
            return out

    def may_sleep(self, until: float) -> float | None:
        """The control loop is about to sleep: until when it may, None if there is something to write."""
        with self.lock:
            if self._outbox or self.engine.has_messages or self._returned:
                return None
            deadline = self.engine.deadline
            if self.doom is not None:
                until = min(until, self.doom[0])
            self._sleeps_until = until if deadline is None else min(until, deadline)
            return self._sleeps_until

    def wake_locked(self) -> None:
        """Wake the control loop if there is something for it before it wakes by itself."""
        if self._sleeps_until is None:
            return
        deadline = self.engine.deadline
        if self._outbox or self.engine.has_messages or (deadline is not None and deadline < self._sleeps_until):
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
            self.engine.receive(message)
            work = self._work_locked()
            self.kick_locked()
        for item in work.quick:
            item()
        for item in work.slow:
            self.later(item)

    # ---- opening transfers -----------------------------------------------------------------------

    def open(
        self,
        kind: int,
        source: Source,
        *,
        size: int,
        flow: Hashable,
        channel: str = "",
        request: int = 0,
        attributes: Mapping[str, AttributeValue] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Ticket:
        """Open a transfer, waiting while the peer takes no more; the source is closed in the end.

        Raises:
            AmstError: the session ended.
        """
        ticket = Ticket(size, cancel=self._cancel)
        ticket.on_progress = on_progress
        try:
            with self.lock:
                while self.error is None and not self.engine.has_turn(flow):
                    self.room.wait()
                self.check_open_locked()
                if self.first_offered_at is None and size:
                    self.first_offered_at = time.monotonic()
                transfer = self.engine.open(
                    kind, size=size, flow=flow, channel=channel, request=request, attributes=attributes
                )
                ticket.transfer = transfer
                self._outgoing[transfer] = _Outgoing(source, ticket)
                work = self._work_locked()
                self.kick_locked()
                self.wake_locked()
        except BaseException:
            source.close()
            raise
        work.run()
        return ticket

    def reserve_copy(self, size: int) -> None:
        """Wait until ``size`` bytes may be copied for sending; pair with `release_copy`."""
        with self.lock:
            while self.error is None and self._copied and self._copied + size > self._copy_limit:
                self.room.wait()
            self.check_open_locked()
            self._copied += size

    def release_copy(self, size: int) -> None:
        """A copy is not needed any more."""
        with self.lock:
            self._copied -= size
            self.room.notify_all()

    def check_open_locked(self) -> None:
        """Raise what the session ended with, if it has."""
        if self.error is not None:
            raise copy(self.error)  # each its own: one that many raise gathers the traces of all

    def _cancel(self, ticket: Ticket) -> None:
        self._reset(ticket.transfer, "cancelled", "the sender cancelled the transfer")

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

    def next_job(self, worker: LaneWorker, last: Chunk | None) -> tuple[Chunk, Source] | FrameHeader | None:
        """Wait for what ``worker`` is to send: a chunk, a frame of the lane's own, or None to stop.

        ``last`` is the chunk it has done with.
        """
        with self.lock:
            if last is not None:
                self.engine.chunk_left(last)
                work = self._work_locked()
                self.wake_locked()
                if work.quick or work.slow:
                    self.lock.release()
                    try:
                        work.run()
                    finally:
                        self.lock.acquire()
            while True:
                if worker.dead or self.error is not None:
                    self.kick_locked()  # a wake-up meant for any lane must not end here
                    return None
                if worker.frames:
                    return worker.frames.popleft()
                if worker.leaving:
                    self.kick_locked()
                    return None
                chunk = self.engine.next_chunk(worker.id)
                if chunk is not None:
                    self.kick_locked()
                    return chunk, self._outgoing[chunk.transfer].source
                self._idle.append(worker)
                worker.ready.wait()

    def chunk_left(self, chunk: Chunk) -> None:
        """A lane that stops sending has done with its last chunk."""
        with self.lock:
            self.engine.chunk_left(chunk)
            work = self._work_locked()
            self.wake_locked()
        work.run()

    def kick_locked(self) -> None:
        """Wake one idle lane if a chunk waits; that one wakes the next."""
        while self._idle and self.engine.has_chunks:
            worker = self._idle.pop()
            if not worker.dead:
                worker.ready.notify()
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

    def place(self, header: FrameHeader) -> tuple[Placement, Sink | None]:
        """Where an arriving chunk goes; waits while its OPEN is still on its way."""
        with self.lock:
            deadline: float | None = None
            while True:
                self.check_open_locked()
                placement = self.engine.place(header.transfer, header.offset, header.length)
                if placement.verdict is not Verdict.PARK:
                    sink = self._sinks.get(header.transfer)
                    if placement.verdict is Verdict.FILL and sink is not None:
                        sink.prepare_locked()
                    return placement, sink
                now = time.monotonic()
                deadline = deadline or now + self._park_timeout_s
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
            self.wake_locked()
            if fill is None:
                return None
            sink = self._sinks[fill.transfer]
            sink.prepare_locked()
            return fill, sink

    # ---- lanes: joining and leaving -----------------------------------------------------------------

    def lane_joined(self, worker: LaneWorker) -> None:
        """A lane was admitted."""
        with self.lock:
            self.check_open_locked()
            self.lanes[worker.id] = worker
            self.total_lanes += 1
            self.most_lanes = max(self.most_lanes, len(self.lanes))
            self.engine.lane_joined(worker.id)
            self.doom = None
            self.coming -= self.is_opener
            if self.most_wanted is not None and len(self.live_lanes_locked()) > self.most_wanted:
                worker.leave_locked()  # it was asked for before fewer were wanted
            self._fit_chunks_locked()
            self.room.notify_all()

    def lane_ended(self, worker: LaneWorker, error: AmstError | None, *, told: bool = False) -> None:
        """A lane left in an orderly way (``error`` None) or died; ``told``: the peer said so itself."""
        with self.lock:
            if worker.dead:
                return
            worker.dead = True
            worker.error = error
            self.lanes.pop(worker.id, None)
            self.past_lanes.append(worker)
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
                    self.damaged_lanes += isinstance(error, IntegrityError)
                    if not told:
                        self._outbox.append(LaneLost(worker.id, error.kind, error.message))
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
            _log.warning("stream %d (%s) to %s failed: %s", worker.id, worker.lane.description, self.peer, error)
        if damaged:
            self.fail(IntegrityError(f"{MAX_DAMAGED_LANES} streams carried damaged frames: {error}", peer=self.peer))
        elif none_left:
            last = error or "the peer closed it"
            self._doom(BrokenError(f"every stream to {self.peer} is gone; the last one: {last}", peer=self.peer))

    def _doom(self, error: BrokenError) -> None:
        """End the session with ``error``, unless a lane joins or the peer's own last word comes in a moment.

        A peer that gives up aborts its lanes and says why on the control channel: either may be seen first.
        """
        with self.lock:
            if self.doom is None and not self.live_lanes_locked():
                self.doom = (time.monotonic() + LAST_WORD_S, error)
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

    def connection_failed(self) -> None:
        """A lane could not be opened."""
        with self.lock:
            self.failed_connections += 1
            self.coming -= 1
            self.room.notify_all()

    def lanes_refused(self, count: int) -> None:
        """So many of the lanes asked for will not come."""
        with self.lock:
            self.refused_lanes += count
            self.coming -= count * self.is_opener
            self.room.notify_all()

    def _fit_chunks_locked(self) -> None:
        """Keep chunk size × lanes inside the scratch memory of sealing."""
        share = self._scratch_limit // max(1, len(self.lanes)) - 8192
        size = min(self._chunk_size, max(64 << 10, share & ~0xFFFF))
        if any(worker.needs_scratch for worker in self.lanes.values()) and size != self.engine.chunk_size:
            if size < self._chunk_size:
                _log.info("chunks of %d KiB for %d streams to fit limits.memory", size >> 10, len(self.lanes))
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
                    case TransferWhole(transfer, total):
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
                        elif dropped is not None:
                            work.slow.append(partial(dropped.abort, reason))
                    case SourceDrained(transfer):
                        if isinstance(self._outgoing[transfer].source, MemorySource):
                            self.engine.end(transfer)  # nobody changes it meanwhile
                            continue
                        work.slow.append(partial(self._drained, transfer))
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
                        where = work.quick if isinstance(done.source, MemorySource) else work.slow
                        where.append(partial(self._done, done, kind, message))
        return work

    def _offered_locked(self, opened: Open) -> None:
        try:
            if self.draining:
                raise BusyError("this side is stopping and takes nothing new")
            if opened.request:
                acceptor = self._request_acceptors.get(opened.request)
            else:
                acceptor = self._acceptors.get(opened.kind)
            if acceptor is None:
                raise error_from_kind("refused", "nobody here takes this kind of transfer")
            if opened.kind == FILE and opened.size == SIZE_UNKNOWN:
                raise ProtocolError("a file of unknown size")
            sink = acceptor(opened)
        except ProtocolError:
            raise
        except AmstError as err:
            self.engine.refuse(opened.transfer, err.kind, err.message)
            return
        self._sinks[opened.transfer] = sink
        if not self.inbox.owns(sink):
            self.engine.accept(opened.transfer, window=FILE_WINDOW)
        self._opened.notify_all()

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

    def _inbox_changed_locked(self) -> None:
        self.room.notify_all()
        self.wake_locked()

    def _block_returned(self, block: Block) -> None:
        # Called by whoever drops the last view, maybe inside the garbage collector with the lock held.
        self._returned.append(block)
        self.wakeup.set()

    # ---- the worker ------------------------------------------------------------------------------------

    def later(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the session's worker thread, in order; for what the control loop must not wait for."""
        with self._worker_lock:
            if not self._worker_done:
                if self._worker_thread is None:
                    self._worker_thread = threading.Thread(target=self._run_worker, name="amst-worker", daemon=True)
                    self._worker_thread.start()
                self._worker.put(work)
                return
        work()

    def _run_worker(self) -> None:
        while (work := self._worker.get()) is not None:
            try:
                work()
            except Exception as err:
                _log.exception("session with %s: unexpected error", self.peer)
                self.fail(AmstError(f"unexpected error, please report it: {err!r}", peer=self.peer))

    # ---- the end -----------------------------------------------------------------------------------------

    def fail(self, error: AmstError) -> None:
        """End the session: every wait ends with ``error``. The first call counts. Never blocks for long."""
        with self.lock:
            if self.error is not None:
                return
            error = self.closing or error
            self.error = error
            lanes = list(self.lanes.values())
            outgoing = list(self._outgoing.values())
            self._outgoing.clear()
            sinks = [s for s in self._sinks.values() if not self.inbox.owns(s)]
            self._sinks.clear()
            self.room.notify_all()
            self.ponged.notify_all()
            self._opened.notify_all()
            self.inbox.end_locked(error)
            self.wakeup.set()
        self.send_pool.close()
        self.receive_pool.close()
        for worker in lanes:
            self.lane_ended(worker, error)
        if self.on_failed is not None:
            self.on_failed(error)
        # sources and sinks go when no lane touches them any more
        self.later(lambda: self._release(lanes, outgoing, sinks, error))

    def _release(
        self, lanes: list[LaneWorker], outgoing: list[_Outgoing], sinks: list[Sink], error: AmstError
    ) -> None:
        for worker in lanes:
            worker.join()
        for sink in sinks:
            sink.abort(error)
        for out in outgoing:
            out.source.close()
            out.ticket.complete(error)
        with self._worker_lock:
            self._worker_done = True
            self._worker.put(None)
        if self.on_released is not None:
            self.on_released()
        self._ended.set()

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
