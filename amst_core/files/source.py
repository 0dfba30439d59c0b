"""A file being sent: read at any offset by several threads, and checked to be the same at the end."""

from __future__ import annotations

import errno
import hashlib
import heapq
import os
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from types import TracebackType
from typing import Final, Self

from ..errors import BusyError, CancelledError, ClosedError, SourceChangedError, error_from_os
from ..wire.messages import MAX_HOLES

PIECE: Final = 1 << 20
"""Bytes that are read at once where a whole file or span is gone through."""

MIN_HOLE: Final = 64 << 10
"""Bytes of a hole that is worth telling of."""

_MAX_LOOKED_AT: Final = 1 << 16
"""Holes of a file that are found at most; the `MAX_HOLES` longest of them are told of."""

_IDENTITY: Final = struct.Struct("!QQq")


def pieces(fd: int, start: int, end: int, *, buffer: bytearray) -> Iterator[memoryview]:
    """The bytes of ``fd`` from ``start`` to ``end`` in order; ends early where the file does.

    Each piece lies in ``buffer``, which the next one overwrites.
    """
    view = memoryview(buffer)
    while start < end:
        step = os.preadv(fd, [view[: end - start]], start)
        if not step:
            return
        yield view[:step]
        start += step


def sha256_of(fd: int, *, size: int, cancelled: Callable[[], bool]) -> bytes | None:
    """The SHA-256 of the first ``size`` bytes of ``fd``; None when it has fewer, or ``cancelled()`` became true.

    Other threads run meanwhile: reading and hashing release the interpreter's lock.
    """
    digest = hashlib.sha256()
    done = 0
    for piece in pieces(fd, 0, size, buffer=bytearray(PIECE)):
        if cancelled():
            return None
        digest.update(piece)
        done += len(piece)
    return digest.digest() if done == size else None


def source_changed(shown: str) -> SourceChangedError:
    """A file was written to while it was read."""
    return SourceChangedError(f"{shown} changed while it was read; send it again", path=shown)


def _holes(fd: int, size: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < size:
        start = os.lseek(fd, at, os.SEEK_HOLE)  # the end of the file counts as one
        try:
            at = min(size, os.lseek(fd, start, os.SEEK_DATA))
        except OSError as err:
            if err.errno != errno.ENXIO:
                raise
            at = size  # no data from there on
        if start < at:
            yield start, at


class Descriptor:
    """A file descriptor that one thread may close while others use it: ``with descriptor as fd``.

    The number is given back to the system only after the last user has left, so that no read or write
    can land in an unrelated file that got the same number meanwhile. ``on_closed`` is called right after that, by
    the thread that left last; not when the number was handed out by `take`.
    """

    def __init__(self, fd: int, *, shown: str, on_closed: Callable[[], None] | None = None) -> None:
        self._fd = fd
        self._shown = shown
        self._on_closed = on_closed
        self._users = 0
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> int:
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._shown} is closed already", path=self._shown)
            self._users += 1
            return self._fd

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            self._give_back()

    def close(self) -> None:
        """Refuse new users; close at once or when the last user leaves. Idempotent."""
        with self._lock:
            last = not self._closed and not self._users
            self._closed = True
        if last:
            self._give_back()

    def take(self) -> int:
        """Hand the descriptor to the caller alone, who closes it; it counts as closed here.

        Raises:
            BusyError: another thread is using it; nothing changed.
            ClosedError: it was closed before.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._shown} is closed already", path=self._shown)
            if self._users:
                raise BusyError(f"{self._shown} is still in use by {self._users} threads", path=self._shown)
            self._closed = True
            return self._fd

    def _give_back(self) -> None:
        os.close(self._fd)
        if self._on_closed is not None:
            self._on_closed()


class FileSource:
    """An open file to send. Any number of threads may read it.

    ``size`` (bytes), ``mtime_ns`` and ``mode`` (permission bits) are those of the moment it was opened. It
    owns ``fd`` and closes it; ``shown`` is its name in messages.
    """

    def __init__(self, fd: int, *, shown: str) -> None:
        status = os.fstat(fd)
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns
        self.mode = status.st_mode & 0o7777
        self._may_have_holes = status.st_blocks * 512 < status.st_size
        self._identity = _IDENTITY.pack(status.st_dev, status.st_ino, status.st_ctime_ns)
        self.name = shown
        self.descriptor = Descriptor(fd, shown=shown)

    @property
    def identity(self) -> bytes:
        """32 bytes that name this file in this state: with equal identity, size and modification time, equal bytes.

        They are the SHA-256 over device, inode and change time. The modification time alone would not do, because
        programs set it back (tar, rsync, touch -r); the change time they cannot set. It moves for a rename or chmod
        too: then the file is sent anew for nothing, which is the safe side. It is as fine as the file system's clock:
        before Linux 6.13 two changes within one tick (4 ms) may share it.
        """
        return hashlib.sha256(self._identity).digest()

    def holes(self) -> tuple[tuple[int, int], ...]:
        """Spans (start, end) that take no place on the disk and read as zeros: in order, apart, of `MIN_HOLE` bytes
        at least. None where the file system does not tell (lseek(2), SEEK_HOLE).

        Raises:
            StorageError: the file system cannot look.
            ClosedError: the source was closed.
        """
        if not self._may_have_holes:
            return ()
        with self.descriptor as fd:
            try:
                found = islice(_holes(fd, self.size), _MAX_LOOKED_AT)
                long = [hole for hole in found if hole[1] - hole[0] >= MIN_HOLE]
            except OSError as err:
                if err.errno == errno.EINVAL:
                    return ()
                raise error_from_os(err, "cannot look for holes in", path=self.name) from err
        return tuple(sorted(heapq.nlargest(MAX_HOLES, long, key=lambda hole: hole[1] - hole[0])))

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the file's bytes from ``offset``.

        Raises:
            SourceChangedError: the file ends before that.
            StorageError: the file system cannot read it.
            ClosedError: the source was closed.
        """
        done, size = 0, view.nbytes
        with self.descriptor as fd:
            while done < size:
                try:
                    step = os.preadv(fd, [view[done:]], offset + done)
                except OSError as err:
                    raise error_from_os(err, "cannot read", path=self.name) from err
                if not step:
                    raise SourceChangedError(
                        f"{self.name} shrank below {offset + size} bytes while it was read; send it again",
                        path=self.name,
                    )
                done += step

    def digest(self, cancelled: Callable[[], bool] = lambda: False) -> bytes:
        """The SHA-256 of the whole file, read from beginning to end; may take long.

        Raises:
            SourceChangedError: it was written to since it was opened.
            StorageError: the file system cannot read it.
            CancelledError: ``cancelled()`` became true.
            ClosedError: the source was closed before.
        """
        with self.descriptor as fd:
            try:
                found = sha256_of(fd, size=self.size, cancelled=cancelled)
            except OSError as err:
                raise error_from_os(err, "cannot read", path=self.name) from err
        if found is None and cancelled():
            raise CancelledError(f"reading {self.name} was cancelled", path=self.name)
        self.verify()
        if found is None:
            raise source_changed(self.name)
        return found

    def verify(self) -> None:
        """Return if the file has the size and modification time it was opened with.

        A file that was replaced under its name meanwhile is the old one here, whole, and passes.

        Raises:
            SourceChangedError: it was written to.
            ClosedError: the source was closed.
        """
        with self.descriptor as fd:
            status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise source_changed(self.name)

    def close(self) -> None:
        """Close the file, once reads in progress have returned. Idempotent, returns at once."""
        self.descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
