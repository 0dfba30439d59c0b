"""A file being received: under a temporary name beside its target until it is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Callable
from typing import Final

from ..errors import AmstError, ClosedError, ProtocolError, StorageError, error_from_os
from .entries import HIDDEN_PREFIX, Entry
from .source import Descriptor

_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def temporary_name() -> bytes:
    """A fresh name that no path can reach and no walk shows."""
    return HIDDEN_PREFIX + secrets.token_hex(8).encode() + b".part"


def target_error(err: OSError, what: str, *, path: str) -> AmstError:
    """`error_from_os` for a target: what is missing there vanished, it was not "not found"."""
    if err.errno == errno.ENOENT:
        return StorageError(f"{what} {path}: its directory or temporary file was removed meanwhile", path=path)
    return error_from_os(err, what, path=path)


def set_times(fd: int, *, mtime_ns: int) -> None:
    """Set the modification time of what ``fd`` is open on and leave the access time."""
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))


class FileSink:
    """Where one received file goes. Any number of threads may write at once.

    The disk is not touched before the first `write` or `finish`. ``open_parent`` then opens the directory,
    which stays held: whatever happens to its name, the file is finished in that directory. ``size`` is the
    number of bytes announced, None when unknown.
    """

    def __init__(self, open_parent: Callable[[], tuple[int, bytes]], *, shown: str, size: int | None) -> None:
        self._open_parent = open_parent
        self._shown = shown
        self._size = size
        self._lock = threading.Lock()
        self._descriptor: Descriptor | None = None
        self._parent_fd = -1
        self._leaf = b""
        self._temporary = b""
        self._finished = False
        self._aborted = False

    def write(self, offset: int, view: memoryview) -> None:
        """Put ``view`` at ``offset``.

        Raises:
            RefusedError: no permission, a symbolic link on the way, a directory under the file's name.
            StorageError: the disk is full, the name too long, the directory vanished.
            ProtocolError: the bytes pass the announced size.
            ClosedError: the sink was finished or aborted.
        """
        done, size = 0, view.nbytes
        if offset < 0 or (self._size is not None and offset + size > self._size):
            raise ProtocolError(f"bytes {offset}+{size} of {self._shown} pass its announced size {self._size}")
        with self._opened() as fd:
            while done < size:
                try:
                    done += os.pwrite(fd, view[done:], offset + done)
                except OSError as err:
                    raise target_error(err, "cannot write", path=self._shown) from err

    def finish(self, entry: Entry) -> None:
        """Give the file its exact size, mode and modification time, then its final name. Idempotent.

        Whatever file or symbolic link had that name is replaced, never written through. ``entry.size`` is the
        total; of ``entry.mode`` the permissions count. When it fails (other than with BusyError) nothing is left.

        Raises:
            RefusedError, StorageError: as `write`.
            ProtocolError: the total is not the announced size.
            BusyError: a write is still in progress.
            ClosedError: the sink was aborted.
        """
        if self._size is not None and entry.size != self._size:
            raise ProtocolError(f"{self._shown} was announced with {self._size} bytes and ended with {entry.size}")
        descriptor = self._opened() if not self._finished else None
        with self._lock:
            if self._finished:
                return
            if self._aborted or descriptor is None:
                raise ClosedError(f"{self._shown} was given up already", path=self._shown)
            fd = descriptor.take()
            try:
                try:
                    os.ftruncate(fd, entry.size)
                    os.fchmod(fd, entry.mode & 0o777)
                    set_times(fd, mtime_ns=entry.mtime_ns)
                finally:
                    os.close(fd)  # before the rename: some file systems report a failed write only here
                os.rename(self._temporary, self._leaf, src_dir_fd=self._parent_fd, dst_dir_fd=self._parent_fd)
            except OSError as err:
                self._drop()
                raise target_error(err, "cannot finish", path=self._shown) from err
            self._finished = True
            os.close(self._parent_fd)

    def abort(self) -> None:
        """Remove the temporary file; the target stays as it was. Idempotent, nothing after `finish`."""
        with self._lock:
            if self._finished or self._aborted:
                return
            if self._descriptor is None:
                self._aborted = True
                return
            self._descriptor.close()
            self._drop()

    def _opened(self) -> Descriptor:
        if self._descriptor is not None:
            return self._descriptor
        with self._lock:
            if self._aborted:
                raise ClosedError(f"{self._shown} was given up already", path=self._shown)
            if self._descriptor is None:
                self._descriptor = self._create()
            return self._descriptor

    def _create(self) -> Descriptor:
        parent_fd, leaf = self._open_parent()
        try:
            with contextlib.suppress(FileNotFoundError):
                # The rename would refuse a directory too, but only after all the bytes have come.
                if stat.S_ISDIR(os.stat(leaf, dir_fd=parent_fd, follow_symlinks=False).st_mode):
                    raise IsADirectoryError(errno.EISDIR, "a directory has that name")
            temporary = temporary_name()
            fd = os.open(temporary, _CREATE, 0o600, dir_fd=parent_fd)
        except OSError as err:
            os.close(parent_fd)
            raise target_error(err, "cannot create", path=self._shown) from err
        self._parent_fd, self._leaf, self._temporary = parent_fd, leaf, temporary
        return Descriptor(fd, shown=self._shown)

    def _drop(self) -> None:
        self._aborted = True
        # The transfer has failed already and that is what gets reported; a leftover is unreachable by name.
        with contextlib.suppress(OSError):
            os.unlink(self._temporary, dir_fd=self._parent_fd)
        os.close(self._parent_fd)
