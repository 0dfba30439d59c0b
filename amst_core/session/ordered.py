"""Bytes in order, of which nobody knows beforehand how many there will be: the sender keeps them until they are
acknowledged, the receiver puts them in order within a window. Pipes are made of both; a file that is read from a stream
of bytes, or written to one, of one of them.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from ..buffers import fresh_memory
from ..errors import AmstError, ClosedError, DeadlineError
from ..wire.messages import SIZE_UNKNOWN, Open
from .endpoints import Sink, Source
from .room import Room

if TYPE_CHECKING:
    from .core import SessionCore
    from .tickets import Ticket

MOST_KEPT: Final = 32 << 20
"""Bytes that a sender keeps at most: 3 GB/s for the 10 ms that acknowledgements take on a short path."""

MOST_AHEAD: Final = 64 << 20
"""Bytes that a receiver lets its peer send ahead at most. Both are less where `limits.memory` has no room for it."""

LEAST_BLOCK: Final = 64 << 10
_MIB: Final = 1 << 20

_VERDICT_S: Final = 5.0
"""How long the reason may take to be known, once lanes have let go of a transfer that failed."""

_start: Final = attrgetter("start")
_end: Final = attrgetter("end")


class _Over(Exception):
    """The transfer has ended; its ticket knows why, or will in a moment."""


@dataclass(slots=True, eq=False)
class _Segment:
    """The bytes from ``start`` to ``end`` of a transfer, at the beginning of ``memory``."""

    start: int
    end: int
    memory: memoryview
    is_block: bool  # ours, to be used again


class OrderedSource(Source):
    """What was written and is not acknowledged: in blocks that are used again, or borrowed from the writer.

    One thread writes at a time. Less than a chunk is offered to the lanes only while nothing is on its way (Nagle's
    algorithm, RFC 896): many small writes make few chunks, and none waits for longer than an acknowledgement takes.
    """

    steady = True

    def __init__(self, core: SessionCore) -> None:
        self._core = core
        self._ticket: Ticket | None = None
        self._gate = threading.Lock()  # over the list, which lanes look at without the session's lock
        self._segments: list[_Segment] = []
        self._tail: _Segment | None = None  # the last one, while it has room
        self._spare: list[memoryview] = []
        self._reserved = 0  # bytes of blocks
        self._written = 0
        self._offered = 0
        self._released = 0
        self._ended = False
        self._closed = False

    def opened(self, ticket: Ticket) -> None:
        """The transfer is open: bytes may come. Called once."""
        self._ticket = ticket

    # ---- the writer's thread -----------------------------------------------------------------------

    def write(self, view: memoryview, *, is_steady: bool) -> None:
        """Take all of ``view``, waiting for room; what ``is_steady``, for nobody can change it, is not copied.

        Raises:
            AmstError: the transfer or the session has ended.
        """
        try:
            while view.nbytes:
                size, lent = self._take(view, is_steady)
                if lent is not None:
                    self._await_release(lent)
                view = view[size:]
        except _Over:
            raise self._verdict() from None

    def write_some(
        self, view: memoryview, *, is_steady: bool, when_room: Callable[[], None]
    ) -> tuple[int, int | None]:
        """Take the first of ``view``, without waiting: how many bytes.

        And, where `limits.memory` had no room for a copy, the end for which to `await_release` before they may change.

        Raises:
            NotYet: there is room for nothing, and ``when_room`` will be called.
            ClosedError: the transfer has ended; its ticket knows why, or will in a moment.
            AmstError: the session has ended.
        """
        try:
            return self._take(view, is_steady, when_room)
        except _Over:
            raise ClosedError("the transfer has ended") from None

    def await_release(self, end: int, *, when_room: Callable[[], None]) -> None:
        """Return when nobody reads what was borrowed up to ``end``; raises as `write_some`."""
        try:
            self._await_release(end, when_room)
        except _Over:
            raise ClosedError("the transfer has ended") from None

    def _take(
        self, view: memoryview, is_steady: bool, when_room: Callable[[], None] | None = None
    ) -> tuple[int, int | None]:
        size = min(view.nbytes, self._core.engine.chunk_size)
        if is_steady and size >= LEAST_BLOCK:
            self._borrow(view[:size], when_room)
        elif (room := self._room(when_room)) is not None:
            size = min(size, room.nbytes)
            room[:size] = view[:size]
            self.filled(size)
        else:
            end = self._borrow(view[:size], when_room)
            if not is_steady:
                return size, end
        return size, None

    def room(self) -> memoryview | None:
        """Memory for what comes next, to be filled from its beginning (`filled`); waits while all is in use.

        None when `limits.memory` has no room for any, and nothing of this transfer's own would make some.

        Raises:
            AmstError: the transfer or the session has ended.
        """
        try:
            return self._room()
        except _Over:
            raise self._verdict() from None

    def filled(self, size: int) -> None:
        """``size`` bytes were written to `room`."""
        self._core.settle(partial(self._filled_locked, size))

    def flush(self) -> None:
        """Have everything that was written sent now."""
        self._core.settle(partial(self._offer_locked, at_once=True))

    def end(self) -> None:
        """What was written is all."""
        self._core.settle(self._end_locked)

    def _room(self, when_room: Callable[[], None] | None = None) -> memoryview | None:
        with self._core.lock:
            self._require_open()
            if self._tail is None:
                while (block := self._block_locked()) is None:
                    if self._written == self._released and not self._reserved:
                        return None
                    self._wait_locked(when_room)
                self._tail = _Segment(self._written, self._written, block, is_block=True)
                with self._gate:
                    self._segments.append(self._tail)
            return self._tail.memory[self._tail.end - self._tail.start :]

    def _block_locked(self) -> memoryview | None:
        if self._spare:
            return self._spare.pop()
        size = self._core.engine.chunk_size
        while size >= LEAST_BLOCK and self._written - self._released < MOST_KEPT:
            if self._core.memory.reserve_pipe(size, own=self._reserved):
                self._reserved += size
                return fresh_memory(size)
            if self._reserved:
                return None  # one of its own comes back
            size //= 2
        return None

    def _borrow(self, view: memoryview, when_room: Callable[[], None] | None) -> int:
        """Send ``view`` from where it lies; where it ends."""
        with self._core.lock:
            self._require_open()
            while self._written - self._released >= MOST_KEPT:
                self._wait_locked(when_room)
        self._core.settle(partial(self._borrowed_locked, view))
        return self._written

    def _await_release(self, end: int, when_room: Callable[[], None] | None = None) -> None:
        """Wait until nobody reads what was borrowed up to ``end``; given up if that is interrupted."""
        try:
            with self._core.lock:
                while self._released < end:
                    self._wait_locked(when_room)
        except (KeyboardInterrupt, SystemExit):
            if self._ticket is not None:
                self._ticket.cancel()
            raise

    def _wait_locked(self, when_room: Callable[[], None] | None) -> None:
        self._core.room.wait_or_watch(when_room)
        self._require_open()

    def _require_open(self) -> None:
        self._core.check_open_locked()
        if self._closed or self._ended:
            raise _Over

    def _verdict(self) -> AmstError:
        if self._ticket is not None and not self._ended:
            try:
                self._ticket.wait(_VERDICT_S)
            except AmstError as err:
                return err
        return ClosedError("the transfer has been ended by this side; it takes no more bytes")

    # ---- with the session's lock held --------------------------------------------------------------

    def _filled_locked(self, size: int) -> None:
        tail = self._tail
        if tail is None:
            return  # it failed meanwhile
        tail.end += size
        if tail.end - tail.start == tail.memory.nbytes:
            self._tail = None
        self._wrote_locked(size)

    def _borrowed_locked(self, view: memoryview) -> None:
        if self._closed:
            return
        self._tail = None
        with self._gate:
            self._segments.append(_Segment(self._written, self._written + view.nbytes, view, is_block=False))
        self._wrote_locked(view.nbytes)

    def _wrote_locked(self, size: int) -> None:
        self._written += size
        if self._ticket is not None:
            self._ticket.size = self._written
        self._offer_locked()

    def _offer_locked(self, *, at_once: bool = False) -> None:
        available = self._written
        if self._released < self._offered and not at_once:
            available -= available % self._core.engine.chunk_size
        if available > self._offered and self._ticket is not None and not self._ended:
            if self._core.first_offered_at is None:
                self._core.first_offered_at = time.monotonic()
            self._offered = available
            self._core.engine.offer(self._ticket.transfer, available)

    def _end_locked(self) -> None:
        if self._ticket is not None and not self._ended:
            self._ended = True
            self._offered = self._written
            self._core.engine.offer(self._ticket.transfer, self._written, last=True)

    def release_locked(self, end: int) -> None:
        """The bytes up to ``end`` are needed no more: the peer holds them and no lane reads them."""
        self._released = end
        with self._gate:
            gone = bisect_right(self._segments, end, key=_end)
            gone -= bool(gone) and self._segments[gone - 1] is self._tail
            segments = self._segments[:gone]
            del self._segments[:gone]
        self._spare += [segment.memory for segment in segments if segment.is_block]
        if end == self._written:  # nothing is on its way: one block is enough to go on with
            for block in self._spare[1:]:
                self._reserved -= block.nbytes
                self._core.memory.release_pipe(block.nbytes)
            del self._spare[1:]
        self._offer_locked()
        self._core.room.notify_all()

    # ---- lanes -------------------------------------------------------------------------------------

    def view(self, offset: int, length: int) -> memoryview | None:
        with self._gate:
            segment = self._segments[bisect_right(self._segments, offset, key=_start) - 1]
        at = offset - segment.start
        return segment.memory[at : at + length] if offset + length <= segment.end else None

    def read_into(self, offset: int, view: memoryview) -> None:
        """A chunk that lies in several pieces."""
        with self._gate:
            segments = self._segments[bisect_right(self._segments, offset, key=_start) - 1 :]
        for segment in segments:
            piece = segment.memory[offset - segment.start : segment.end - segment.start][: view.nbytes]
            view[: piece.nbytes] = piece
            offset += piece.nbytes
            view = view[piece.nbytes :]
            if not view.nbytes:
                return

    def close(self) -> None:
        with self._core.lock:
            self._closed = True
            self._tail = None
            with self._gate:
                self._segments = []
            self._spare = []
            reserved, self._reserved = self._reserved, 0
            self._core.room.notify_all()
        self._core.memory.release_pipe(reserved)


class OrderedSink(Sink):
    """Puts in order what comes in any order, within a window behind which the peer may not send.

    The window is a ring of memory; it moves on as one thread at a time consumes (`ready`, `consumed`). Before it is
    opened (`open_window_locked`) there is only the credit that came with the OPEN, whose memory is promised anyway.

    The peer is told that it is whole when this side can keep it for as long as it takes: when the memory of the
    window is reserved, or everything has been consumed. Until then it is one of the transfers that may be open.
    """

    def __init__(self, core: SessionCore, opened: Open, *, forget: Callable[[OrderedSink], None] | None = None) -> None:
        self.transfer = opened.transfer
        self._core = core
        self._forget = forget
        self._size = None if opened.size == SIZE_UNKNOWN else opened.size
        self._credit = core.memory.initial_credit
        self._capacity = MOST_AHEAD  # what offsets are taken modulo of, in the ring
        self._window = 0  # how far the peer may be ahead; 0 before it is opened
        self._granted = self._credit
        self._reserved = 0
        self._ring: memoryview | None = None
        self._prefix = 0
        self._consumed = 0
        self._total: int | None = None  # all of it is here
        self._confirmed = False
        self._error: AmstError | None = None
        self.changed = Room(core.lock)

    @property
    def total(self) -> int | None:
        """How many bytes it has, once all of them are here and verified."""
        return self._total

    # ---- the consumer's thread ---------------------------------------------------------------------

    def ready(self, timeout: float | None = None, *, when_ready: Callable[[], None] | None = None) -> memoryview:
        """The next bytes in order, waiting for some; none at the end, when all were there and verified.

        They are valid until `consumed`.

        Raises:
            DeadlineError: none within ``timeout`` seconds.
            NotYet: there are none now, and ``when_ready`` will be called (`Room`) instead of waiting.
            AmstError: the sender gave it up, this side did, or the session ended before it was whole.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._core.lock:
            while True:
                if self._error is not None:
                    raise copy(self._error)
                if self._total is None:
                    self._core.check_open_locked()
                if self._prefix > self._consumed:
                    assert self._ring is not None, "what was received lies in the ring"
                    at = self._consumed % self._capacity
                    return self._ring[at : min(at + self._prefix - self._consumed, self._capacity)]
                if self._total is not None:
                    return memoryview(b"")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineError(f"nothing came within {timeout} s", peer=self._core.peer)
                self.changed.wait_or_watch(when_ready, left)

    def consumed(self, size: int) -> None:
        """The first ``size`` bytes that were `ready` are needed no more: the peer may send as many again."""
        with self._core.lock:
            self._consumed += size
            if self._consumed == self._total:
                self._let_go_locked()
            if self._core.error is None:
                if self._total is None:
                    self._grant_locked(least=self._window // 4)
                else:
                    self._confirm_locked()
                self._core.wake_locked()

    def close(self) -> None:
        """Take no more of it; the peer is told so if it was not whole yet. Idempotent, never blocks."""
        with self._core.lock:
            if self._error is not None:
                return
            self._error = ClosedError(f"this side closed it after {self._consumed} bytes")
            self.changed.notify_all()
            if self._confirmed or self._core.error is not None:
                self._let_go_locked()
        if not self._confirmed:
            reason = f"the receiver closed it after {self._consumed} bytes"
            self._core.settle(lambda: self._core.engine.refuse(self.transfer, ClosedError.kind, reason))

    def drop(self) -> None:
        """`close` from the garbage collector: takes no lock."""
        if self._confirmed:
            reserved, self._reserved = self._reserved, 0
            if reserved:
                self._core.memory.drop_pipe(reserved)
        elif self._error is None:
            self._core.soon(self.close)

    # ---- with the session's lock held --------------------------------------------------------------

    def open_window_locked(self) -> None:
        """Somebody takes it: let the peer send ahead as much as there is memory for."""
        window = MOST_AHEAD if self._size is None else min(MOST_AHEAD, max(self._size, self._credit + 1))
        while window > self._credit:
            if self._core.memory.reserve_pipe(window, own=0):
                self._reserved = window
                break
            window = window * 3 // 4
            window -= window % (_MIB if window >= _MIB else LEAST_BLOCK)
        # what lies in the ring already came within the credit, and so keeps its place
        self._window = self._capacity = max(window, self._credit)
        self._grant_locked(least=1)
        self._confirm_locked()

    def _grant_locked(self, *, least: int) -> None:
        limit = self._consumed + self._window
        if limit - self._granted >= least:
            self._granted = limit
            self._core.engine.grant(self.transfer, limit)

    def _confirm_locked(self) -> None:
        if self._confirmed or self._total is None or not self._window:
            return
        if self._reserved or self._consumed == self._total:
            self._confirmed = True
            self._core.confirmed_locked(self.transfer)

    def _let_go_locked(self) -> None:
        self._ring = None
        if self._reserved:
            self._core.memory.release_pipe(self._reserved)
            self._reserved = 0

    def prefix_grew_locked(self, end: int) -> None:
        """Everything up to ``end`` is here."""
        self._prefix = end
        self.changed.notify_all()

    def whole_locked(self, total: int) -> None:
        """Everything is here, and verified, and it was all."""
        self._total = total
        self._confirm_locked()
        self.changed.notify_all()

    def wake_locked(self) -> None:
        self.changed.notify_all()

    def prepare_locked(self) -> None:
        if self._ring is None:
            self._ring = fresh_memory(self._capacity, sparse=not self._window)

    # ---- lanes -------------------------------------------------------------------------------------

    def place(self, start: int, end: int) -> memoryview | None:
        ring, at = self._ring, start % self._capacity
        assert ring is not None, "a span was placed before memory was taken, or after the end"
        return ring[at : at + end - start] if at + end - start <= self._capacity else None

    def store(self, start: int, view: memoryview, crc: int | None = None) -> None:
        """A span that goes around the end of the ring."""
        ring, at = self._ring, start % self._capacity
        assert ring is not None, "a span was stored after the end"
        first = self._capacity - at
        ring[at : self._capacity] = view[:first]
        ring[: view.nbytes - first] = view[first:]

    def finish(self, total: int) -> None:
        raise AssertionError("it is told by whole_locked")

    def abort(self, reason: AmstError, *, keep: bool = False) -> None:
        with self._core.lock:
            if self._error is None:
                self._error = reason
            self._let_go_locked()
            self.changed.notify_all()
            if self._forget is not None:
                self._forget(self)
