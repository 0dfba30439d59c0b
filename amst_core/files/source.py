"""A file being sent: read at any offset by several threads, and checked to be the same at the end."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Self

from ..errors import BusyError, ClosedError, SourceChangedError, error_from_os


class Descriptor:
    """A file descriptor that one thread may close while others use it: ``with descriptor as fd``.

    The number is given back to the system only after the last user has left, so that no read or write
    can land in an unrelated file that got the same number meanwhile.
    """

    def __init__(self, fd: int, *, shown: str) -> None:
        self._fd = fd
        self._shown = shown
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
            os.close(self._fd)

    def close(self) -> None:
        """Refuse new users; close at once or when the last user leaves. Idempotent."""
        with self._lock:
            last = not self._closed and not self._users
            self._closed = True
        if last:
            os.close(self._fd)

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
        self._shown = shown
        self._descriptor = Descriptor(fd, shown=shown)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the file's bytes from ``offset``.

        Raises:
            SourceChangedError: the file ends before that.
            StorageError: the file system cannot read it.
            ClosedError: the source was closed.
        """
        done, size = 0, view.nbytes
        with self._descriptor as fd:
            while done < size:
                try:
                    step = os.preadv(fd, [view[done:]], offset + done)
                except OSError as err:
                    raise error_from_os(err, "cannot read", path=self._shown) from err
                if not step:
                    raise SourceChangedError(
                        f"{self._shown} shrank below {offset + size} bytes while it was read; send it again",
                        path=self._shown,
                    )
                done += step

    def verify(self) -> None:
        """Return if the file has the size and modification time it was opened with.

        A file that was replaced under its name meanwhile is the old one here, whole, and passes.

        Raises:
            SourceChangedError: it was written to.
            ClosedError: the source was closed.
        """
        with self._descriptor as fd:
            status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise SourceChangedError(f"{self._shown} changed while it was read; send it again", path=self._shown)

    def close(self) -> None:
        """Close the file, once reads in progress have returned. Idempotent, returns at once."""
        self._descriptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
