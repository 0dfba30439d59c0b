"""A file of the peer from or to a descriptor of this process: what a shell's ``>`` and ``<`` are, over a session."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import threading
import time
from typing import TYPE_CHECKING, Final

from ..errors import AmstError, BusyError, NotFoundError, ProtocolError, RefusedError, error_from_os
from ..files.entries import Entry, EntryType, display_path, from_attributes, to_attributes
from ..wire import requests as ops
from ..wire.messages import FILE, HOLD, Open
from .copying import Account, CopyResult, ProgressCallback, with_partial
from .core import SessionCore
from .ordered import OrderedSink, OrderedSource
from .requests import PendingRequest
from .wakeup import Wakeup

if TYPE_CHECKING:
    from .session import Session

PIPE_BUFFER: Final = 1 << 20
"""What a pipe between processes is asked to hold, where it may: it is 64 KiB otherwise, a system call for each."""

MOST_AT_ONCE: Final = 1 << 20
"""Bytes that are written in one go: behind each the peer may send again."""

_LOOK_EVERY_S: Final = 0.2


def upload_from(
    session: Session, descriptor: int, remote: bytes, *, mode: int, progress: ProgressCallback | None = None
) -> CopyResult:
    """Copy what is read from ``descriptor`` to the file ``remote``, which appears when all of it has arrived.

    Its time is that of the beginning. Nothing of it stays when it fails; what failed is in the result's ``failed``.

    Raises:
        AmstError: the session ended; its ``partial`` attribute holds the `CopyResult` so far.
    """
    core = session.core
    account = Account(session, progress)
    entry = Entry(remote, EntryType.FILE, mode, time.time_ns())
    source = OrderedSource(core)
    seen = 0

    def progressed(acknowledged: int, size: int) -> None:
        nonlocal seen
        more, seen = acknowledged - seen, max(seen, acknowledged)
        if more > 0:
            account.moved(more)

    try:
        ticket = core.open(
            FILE, source, size=None, flow=("files", 0), attributes=to_attributes(entry), on_progress=progressed
        )
        account.begin()
        over = Wakeup()
        try:
            ticket.add_done_callback(lambda _: over.set())
            _read_all(descriptor, source, over)
            source.end()
            ticket.wait()
        except BaseException:
            ticket.cancel()
            raise
        finally:
            over.close()
        account.done(Entry(remote, EntryType.FILE, mode, entry.mtime_ns, ticket.size))
    except AmstError as err:
        if session.error is not None:
            raise with_partial(err, account) from None
        account.failed(b"-", err)
    return account.result()


def _read_all(descriptor: int, source: OrderedSource, over: Wakeup) -> None:
    """Read to the end, straight into the memory that is sent from; no longer than the transfer lasts."""
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        _widen(descriptor)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.register(over, select.POLLIN)
    while True:
        room = source.room()
        if room is None:
            raise BusyError("too little memory is left for what is to be read (limits.memory)")
        used, size = 0, room.nbytes
        while used < size:
            # what is there goes together; what is not there is not waited for while there is something to send
            ready = poll.poll(0 if used else None)
            if not ready:
                break
            if any(found == over.fileno() for found, _ in ready):
                source.filled(used)
                source.room()  # raises why it is over
            try:
                got = os.readv(descriptor, [room[used:]])
            except BlockingIOError:
                continue
            except OSError as err:
                raise error_from_os(err, "cannot read", path="standard input") from err
            if not got:
                source.filled(used)
                return
            used += got
        source.filled(used)


def download_to(
    session: Session, remote: bytes, descriptor: int, *, progress: ProgressCallback | None = None
) -> CopyResult:
    """Copy the file ``remote`` to ``descriptor``, in order, each part once it is verified.

    Raises:
        BrokenPipeError: nobody reads what is written.
        AmstError: the session ended; its ``partial`` attribute holds the `CopyResult` so far.
    """
    account = Account(session, progress)
    taking = _Taking(session.core)
    try:
        entry = session.stat(remote)
        _require_file(remote, entry)
        if entry is not None:
            account.expect(entry.size, 1)
        account.begin()
        asked = session.requests.ask(ops.FETCH, {ops.PATH: remote, HOLD: False}, acceptor=taking.accept)
        sink = taking.wait(asked)
        try:
            total = _write_all(sink, descriptor, account)
        finally:
            sink.close()
        asked.wait()
        account.done(Entry(remote, EntryType.FILE, 0, 0, total))
    except AmstError as err:
        if session.error is not None:
            raise with_partial(err, account) from None
        account.failed(remote, err)
    return account.result()


def _require_file(remote: bytes, entry: Entry | None) -> None:
    shown = display_path(remote)
    if entry is None:
        raise NotFoundError(f"{shown} does not exist on the server", path=shown)
    if entry.type is not EntryType.FILE:
        what = "a directory" if entry.type is EntryType.DIRECTORY else "a symbolic link, which is not followed"
        raise RefusedError(f"{shown} is {what}; only a file can go to standard output", path=shown)


def _write_all(sink: OrderedSink, descriptor: int, account: Account) -> int:
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        _widen(descriptor)
    total = 0
    while ready := sink.ready():
        written = _write(descriptor, ready[:MOST_AT_ONCE])
        sink.consumed(written)
        account.moved(written)
        total += written
    return total


def _write(descriptor: int, view: memoryview) -> int:
    while True:
        try:
            return os.write(descriptor, view)
        except BlockingIOError:
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()
        except BrokenPipeError:
            raise
        except OSError as err:
            raise error_from_os(err, "cannot write", path="standard output") from err


def _widen(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BUFFER)


class _Taking:
    """Takes the one file that answers a FETCH."""

    def __init__(self, core: SessionCore) -> None:
        self._core = core
        self._sink: OrderedSink | None = None
        self._offered = threading.Event()

    def accept(self, opened: Open) -> OrderedSink:
        entry = from_attributes(opened.attributes, size=opened.size)
        if self._sink is not None:
            raise ProtocolError("a second answer where one file was asked for")
        if entry.type is not EntryType.FILE or entry.path:
            raise RefusedError("only a file can go to standard output")
        self._sink = OrderedSink(self._core, opened)
        self._sink.open_window_locked()
        self._offered.set()
        return self._sink

    def wait(self, asked: PendingRequest) -> OrderedSink:
        """What the peer offers.

        Raises:
            AmstError: it offers nothing, and why.
        """
        while not self._offered.wait(_LOOK_EVERY_S):
            if asked.answered_within(0) and not self._offered.is_set():
                asked.wait()
                raise ProtocolError(f"{self._core.peer} says that it sent the file, and sent nothing")
        assert self._sink is not None, "an offer comes with what takes it"
        return self._sink
