"""The two ends of a pipe, for coroutines."""

from __future__ import annotations

import asyncio
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from ..errors import ClosedError
from ..session.core import SessionCore
from ..session.pipes import PipeReader as BlockingReader
from ..session.pipes import PipeWriter as BlockingWriter
from .room import when_room
from .threads import GRACE_S
from .tickets import Ticket

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIECE: Final = 1 << 20
"""Most bytes that an iteration over a reader gives at once."""

_VERDICT_S: Final = 5.0
"""How long the reason may take to be known, once lanes have let go of a pipe that failed."""


class PipeWriter:
    """The end that writes; made by `Session.open_pipe`.

    ``async with`` closes it at the end of the block, and gives it up when the block raises.
    """

    def __init__(self, writer: BlockingWriter, core: SessionCore) -> None:
        self._writer = writer
        self._core = core
        self._ticket = Ticket(writer.ticket)
        self._writing = asyncio.Lock()
        self.channel = writer.channel

    @property
    def transfer(self) -> int:
        """The pipe's number, as in ``error.delivery``."""
        return self._writer.transfer

    @property
    def acknowledged(self) -> int:
        """Bytes the peer holds, verified."""
        return self._writer.acknowledged

    @property
    def closed(self) -> bool:
        """It was closed or given up by this side."""
        return self._writer.closed

    async def write(self, data: ReadableBuffer) -> int:
        """Take all of ``data``; waits while this side's memory has no room, because the peer does not read.

        Large ``bytes`` are sent from where they are, all else is copied first; where `limits.memory` has no room for
        a copy, this returns when the peer has what was written. Writes of several coroutines do not mix. A coroutine
        that is cancelled here has written nothing, or the pipe is given up.

        Raises:
            ClosedError: the pipe was closed or given up, by whichever side.
            AmstError: the session has ended.
        """
        view = memoryview(data)
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        view = view.cast("B")
        size, is_steady = view.nbytes, isinstance(data, bytes)
        async with self._writing:
            try:
                while view.nbytes:
                    attempt = partial(self._writer.write_some, view, is_steady=is_steady)
                    taken, lent = await when_room(attempt, self._core.lock, self._core.room)
                    view = view[taken:]
                    if lent is not None:
                        attempt_release = partial(self._writer.await_release, lent)
                        await when_room(attempt_release, self._core.lock, self._core.room)
            except asyncio.CancelledError:
                if view.nbytes < size:
                    self.abort()
                    await self._ticket.wait_done(GRACE_S)  # until then `data` may be read
                raise
            except ClosedError:
                await self._verdict()
                raise
        return size

    def flush(self) -> None:
        """Have everything that was written sent now; without it a little waits until what is on its way has arrived."""
        self._writer.flush()

    async def close(self, timeout: float | None = None) -> None:
        """End the pipe, and wait until the peer holds all of it, verified. Idempotent; cancelled, it gives the pipe up.

        Raises:
            DeadlineError: not within ``timeout`` seconds; it goes on, and ``close`` may be called again.
            AmstError: the peer closed it before, or the session ended: what was written may not have arrived.
        """
        if self.closed:
            return
        try:
            async with self._writing:
                self._writer.end()
            await self._ticket.wait_only(timeout)
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            if self._ticket.done and not self.closed:
                self._writer.abort()  # nothing is under way: this only marks it as closed

    def abort(self) -> None:
        """Give the pipe up: its reader gets an error. Never blocks; nothing once it is closed."""
        self._writer.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            self.abort()

    async def _verdict(self) -> None:
        """Raise why the pipe has ended, where that is known better than that it has."""
        if not self.closed and await self._ticket.wait_done(_VERDICT_S) and self._ticket.error is not None:
            await self._ticket.wait_only()


class PipeReader:
    """The end that reads; made by `Session.accept_pipe`. ``async for piece in reader`` gives all of it as it comes.

    ``async with`` closes it at the end of the block.
    """

    def __init__(self, reader: BlockingReader, core: SessionCore) -> None:
        self._reader = reader
        self._core = core
        self._reading = asyncio.Lock()
        self.channel = reader.channel

    @property
    def closed(self) -> bool:
        """This side reads no more."""
        return self._reader.closed

    async def read(self, size: int = -1) -> bytes:
        """The next bytes, at least one and at most ``size``; b"" at the end, when all had come and was verified.

        Negative: all up to the end. A coroutine that is cancelled here has taken nothing, or, of a read up to the end,
        what it had is lost and the pipe is closed.

        Raises:
            CancelledError: the writer gave the pipe up; nothing more of it can be read.
            ClosedError: this side has closed it.
            AmstError: the session ended before all of it had come.
        """
        async with self._reading:
            if size >= 0:
                return await self._some(size) if size else b""
            parts = bytearray()
            try:
                while piece := await self._some(PIECE):
                    parts += piece
            except asyncio.CancelledError:
                if parts:
                    self.close()
                raise
            return bytes(parts)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.read(PIECE)
        if not piece:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Read no more. A writer that has not ended yet gets a `ClosedError`. Idempotent, never blocks."""
        self._reader.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _some(self, size: int) -> bytes:
        return await when_room(partial(self._reader.read_some, size), self._core.lock, self._reader.changed)
