"""The two threads of a lane: one sends what the session has, one receives and puts it where it belongs.

Per chunk they take the session's lock twice and touch nothing else that is shared.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from ..engine import Chunk, Placement, Verdict
from ..errors import AmstError, BrokenError, ProtocolError, release_frames
from ..files.source import Descriptor
from ..interfaces import CongestionInForce, FileSpan, Lane
from ..security.seal import BareSealer, FrameOpener, FrameSealer, Protection
from ..wire.frames import FrameHeader, FrameKind, decode_ack
from .core import SessionCore
from .endpoints import Sink, Source
from .health import Probe
from .streams import Stream

_log = logging.getLogger("amst.session")
_NOTHING = memoryview(b"")
_MAX_OWN_FRAMES = 1024

SPAN_FROM: Final = 64 << 10
"""Shorter chunks of files are read and sent: what a lane does for a span costs more than their copy."""


class LaneWorker:
    """An admitted lane at work. ``id`` is its incarnation."""

    def __init__(
        self,
        core: SessionCore,
        lane: Lane,
        *,
        id: int,
        transport: str,
        takes_spans: bool,
        protection: Protection,
        sealer: FrameSealer,
        opener: FrameOpener,
    ) -> None:
        self.id = id
        self.lane = lane
        self.transport = transport
        self.protection = protection
        self.needs_scratch = protection is Protection.AEAD
        self.ready = threading.Condition(core.lock)  # something for the sending thread
        self.frames: deque[tuple[FrameHeader, bytes]] = deque()  # PING, PONG, FIN, ACK to send before any chunk
        self.leaving = False  # our FIN is queued or sent
        self.dead = False
        self.stream: Stream | None = None  # once it has joined
        self.congestion: CongestionInForce = core.congestion.apply(lane)
        self.bytes_sent = 0
        self.bytes_handed = 0  # payload that the lane got, or is getting, to send
        self.bytes_received = 0
        self.joined_at = time.monotonic()
        self.last_active = self.joined_at
        self.heard_at = self.joined_at
        self.probe: Probe | None = None  # the monitor's question that has no answer yet
        self.suspect = False
        self.pings: dict[int, float | None] = {}  # token asked → when its answer came
        self._core = core
        self._sealer = sealer
        # a check or a tag is made of bytes that are then sent: the file's may change between
        self._span_sealer = sealer if takes_spans and isinstance(sealer, BareSealer) else None
        self._opener = opener
        self._fin_received = False
        self._ended_halves = 0
        self._arriving: _Arriving | None = None
        self._threads = (
            threading.Thread(target=self._run, args=(self._send,), name=f"amst-send-{id}", daemon=True),
            threading.Thread(target=self._run, args=(self._receive,), name=f"amst-recv-{id}", daemon=True),
        )

    def start(self) -> None:
        """Begin to carry chunks; the core must know the lane already."""
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until no thread touches a source or a sink any more; the lane must have been aborted."""
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def choose_congestion(self) -> None:
        """Have the congestion control that the session's mode calls for now."""
        try:
            self.congestion = self._core.congestion.apply(self.lane)
        except AmstError as err:  # it is about to go
            _log.debug("stream %d keeps its congestion control: %s", self.id, err)

    def send_frame_locked(self, header: FrameHeader, payload: bytes = b"") -> None:
        """Have a PING, PONG, FIN or ACK sent soon (the session's lock held)."""
        self.frames.append((header, payload))
        self._core.poke_locked(self)

    @property
    def chunk_size(self) -> int:
        """Longest chunk that it is given, in bytes."""
        return self._core.engine.chunk_size_of(self.id)

    @property
    def lived_s(self) -> float:
        return time.monotonic() - self.joined_at

    def _run(self, loop: Callable[[], None]) -> None:
        error: AmstError | None
        try:
            loop()
            return
        except AmstError as err:
            error = err
        except Exception as err:
            _log.exception("stream %d to %s: unexpected error", self.id, self._core.peer)
            error = BrokenError(f"unexpected error, please report it: {err!r}")
        release_frames(error)
        error.stream = self.id
        self._core.lane_ended(self, error)

    # ---- sending ---------------------------------------------------------------------------------

    def _send(self) -> None:
        last: Chunk | None = None
        try:
            while True:
                done, last = last, None
                job = self._core.next_job(self, done)
                if job is None:
                    return
                if isinstance(job[0], FrameHeader):
                    header, payload = job[0], job[1]
                    assert isinstance(payload, bytes), "a frame of the lane's own comes with its payload"
                    self.lane.send_frame(*self._sealer.seal(header, memoryview(payload)))
                    if header.kind is FrameKind.FIN:
                        self._half_closed()
                        return
                else:
                    last, source = job[0], job[1]
                    assert isinstance(source, Source), "a chunk comes with its source"
                    self._send_chunk(last, source)
                    del job, source  # while it waits, a lane holds nobody's memory
        finally:
            if last is not None:
                self._core.chunk_left(last)

    def _send_chunk(self, chunk: Chunk, source: Source) -> None:
        header = FrameHeader(FrameKind.DATA, chunk.transfer, chunk.offset, chunk.length)
        view = source.view(chunk.offset, chunk.length)
        overhead = self._sealer.overhead
        self.bytes_handed += chunk.length
        if self._span_sealer is not None and source.descriptor is not None and chunk.length >= SPAN_FROM:
            self._send_span(self._span_sealer.seal_unseen(header), chunk, source, source.descriptor)
        elif view is not None and not overhead:
            self.lane.send_frame(*self._sealer.seal(header, view))
        else:
            pool = self._core.send_pool
            buffer = pool.acquire(chunk.length + overhead)
            try:
                if view is None:
                    view = buffer[: chunk.length]
                    try:
                        source.read_into(chunk.offset, view)
                        if chunk.again:
                            source.verify()
                    except AmstError as err:
                        self._core.source_failed(chunk, err)
                        return
                sealed = self._sealer.seal(header, view, buffer=buffer)
                view, chunk.free = None, True  # the buffer has it
                self.lane.send_frame(*sealed)
            finally:
                pool.release(buffer)
        self.bytes_sent += chunk.length
        self.last_active = time.monotonic()

    def _send_span(self, header: bytes, chunk: Chunk, source: Source, file: Descriptor) -> None:
        """Have the lane send from the file itself."""
        failed = False

        def read(offset: int, view: memoryview) -> None:
            nonlocal failed
            try:
                source.read_into(offset, view)
            except AmstError as err:
                view[:] = bytes(view.nbytes)
                if not failed:  # told before they are sent: the peer must not take these zeros for the file's
                    self._core.source_failed(chunk, err)
                failed = True

        chunk.lent = True
        with file as fd:
            self.lane.send_span(header, FileSpan(fd, chunk.offset, chunk.length, read))

    # ---- receiving -------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while True:
                header = self.lane.recv_frame(self._place)
                if header is None:
                    if self._fin_received:
                        return
                    raise BrokenError("the peer closed the stream")
                self._received(header)
                if self._fin_received:
                    self._half_closed()
                    return
        finally:
            arriving, self._arriving = self._arriving, None
            if arriving is not None:
                arriving.release()
                if arriving.placement is not None and arriving.placement.verdict is Verdict.FILL:
                    self._core.placed(arriving.placement, intact=False)

    def _place(self, raw: memoryview) -> memoryview:
        """Where the payload of the frame that is arriving goes (called by the lane)."""
        header = FrameHeader.unpack(raw)
        size = self._opener.expected_wire_length(header)
        arriving = self._arriving = _Arriving(self._core, header)
        if header.kind is not FrameKind.DATA:
            arriving.placed = memoryview(bytearray(size))
            return arriving.placed
        placement, sink = self._core.place(self.id, header)
        arriving.placement = placement
        if placement.verdict is Verdict.FILL:
            assert sink is not None, "an accepted transfer has a sink"
            arriving.sink = sink
            arriving.target = sink.place(placement.start, placement.end)
            if arriving.target is not None and not self._opener.overhead and placement.claim(in_place=True):
                arriving.placed = arriving.target
                return arriving.placed
        arriving.borrow(size)
        return arriving.placed

    def _received(self, raw: bytes) -> None:
        arriving = self._arriving
        assert arriving is not None, "recv_frame returned without having asked for a place"
        self.heard_at = self.last_active = time.monotonic()
        if arriving.header.kind is not FrameKind.DATA:
            payload = self._opener.open(raw, arriving.placed)
            self._arriving = None
            self._own_frame(arriving.header, payload)
            return
        placement, sink, target = arriving.placement, arriving.sink, arriving.target
        assert placement is not None, "DATA has a placement"
        # memory is written while it is received, or now; a copy over another lane may have come first
        in_place = arriving.buffer is None
        fills = placement.verdict is Verdict.FILL and (in_place or placement.claim())
        plain = self._opener.open(raw, arriving.placed, into=target if fills and not in_place else None)
        self.bytes_received += arriving.header.length
        if not fills:
            needed = self._core.copied(placement)
            if needed is not None:
                placement, sink = needed
                arriving.placement = placement  # from here on it is filled by this lane
                fills = True
                target = sink.place(placement.start, placement.end)
                if target is not None:
                    target[:] = plain
        failure: AmstError | None = None
        if fills and sink is not None and target is None:
            try:
                crc = self._opener.payload_crc(raw, plain.nbytes) if sink.wants_crc else None
                sink.store(placement.start, plain, crc)
            except AmstError as err:
                failure = err
        self._arriving = None
        arriving.target = target = None
        arriving.release()
        if fills:
            self._core.placed(placement, intact=failure is None, failure=failure)

    def _own_frame(self, header: FrameHeader, payload: memoryview) -> None:
        """A frame about the lane itself."""
        match header.kind:
            case FrameKind.PING:
                with self._core.lock:
                    if len(self.frames) >= _MAX_OWN_FRAMES:
                        raise ProtocolError(f"more than {_MAX_OWN_FRAMES} pings without taking the answers")
                    self.send_frame_locked(FrameHeader(FrameKind.PONG, offset=header.offset))
            case FrameKind.PONG:
                with self._core.lock:
                    if header.offset in self.pings:
                        self.pings[header.offset] = time.monotonic()
                        self._core.ponged.notify_all()
            case FrameKind.ACK:
                self._core.receive_reports(*decode_ack(bytes(payload)))
            case FrameKind.FIN:
                self._fin_received = True
                with self._core.lock:
                    if not self.leaving:
                        self.leave_locked()
            case _:
                raise ProtocolError(f"{header.kind.name} frame on an admitted lane")

    # ---- leaving ---------------------------------------------------------------------------------

    def leave_locked(self) -> None:
        """Stop taking chunks, send FIN, and close when the peer's FIN is here too (lock held)."""
        self.leaving = True
        self._core.engine.lane_left(self.id)
        self._core.set_express_locked()
        self.send_frame_locked(FrameHeader(FrameKind.FIN))

    def _half_closed(self) -> None:
        """One direction has ended; with the second one the lane is closed."""
        with self._core.lock:
            self._ended_halves += 1
            both = self._ended_halves == 2
        if both:
            self._core.lane_ended(self, None)


class _Arriving:
    """The frame that a lane is receiving right now, and the scratch it needed."""

    __slots__ = ("_core", "buffer", "header", "placed", "placement", "sink", "target")

    def __init__(self, core: SessionCore, header: FrameHeader) -> None:
        self._core = core
        self.header = header
        self.placed = _NOTHING
        self.placement: Placement | None = None
        self.sink: Sink | None = None
        self.target: memoryview | None = None  # the sink's own memory for the span
        self.buffer: memoryview | None = None

    def borrow(self, size: int) -> None:
        self.buffer = self._core.receive_pool.acquire(size)
        self.placed = self.buffer[:size]

    def release(self) -> None:
        if self.buffer is not None:
            self.placed = _NOTHING
            self._core.receive_pool.release(self.buffer)
            self.buffer = None
