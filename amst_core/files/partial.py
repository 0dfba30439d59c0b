"""Partial files on disk: their names, who may use them, and what becomes of those nobody comes back for.

A file is received under a name made from its own, beside it, so that the same command finds what an earlier one left.
Whoever uses a partial file holds its lock (flock), which ends with the process. The lock is on the inode: after
locking, the name is looked at again, because an earlier owner may have given that inode its final name meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from .entries import HIDDEN_PREFIX
from .journal import Fsync, Journal, Record, SourceMark, encode_header, sift, warn_given_up
from .source import Descriptor

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LIST: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

PART: Final = b".part"
JOURNAL: Final = b".journal"
LEFTOVER: Final = re.compile(re.escape(HIDDEN_PREFIX.decode()) + r"[0-9a-f]+\.(part|journal)")

_TRIES: Final = 16
"""A name that changes hands this often while it is being locked counts as in use."""

_SWEPT_MAX: Final = 4096
"""Directories a root remembers as clean; then it begins again, which costs a listing each and nothing else."""

Place: TypeAlias = tuple[int, int, bytes]
"""A file whatever its directory is called: st_dev and st_ino of that, and the name in it."""


class Holder(Protocol):
    """Who has a partial file in use."""

    def give_way(self) -> bool:
        """Asked by another that wants the file: True once it has let go."""


@dataclass(frozen=True, slots=True)
class PartialPolicy:
    """How long leftovers of broken copies stay: ``keep_s`` what can be continued, ``orphan_s`` what cannot (seconds).

    ``now`` tells the time that ages are reckoned by, in the seconds of `time.time`, as file times are.
    """

    keep_s: float = 7 * 86400.0
    orphan_s: float = 3600.0
    now: Callable[[], float] = time.time


def temporary_name() -> bytes:
    """A fresh name that no path can reach and no walk shows."""
    return HIDDEN_PREFIX + secrets.token_hex(8).encode() + PART


def partial_names(leaf: bytes) -> tuple[bytes, bytes]:
    """The names beside ``leaf`` of its partial file and of that one's journal: always the same."""
    stem = HIDDEN_PREFIX + hashlib.sha256(leaf).hexdigest()[:32].encode()
    return stem + PART, stem + JOURNAL


def look(name: bytes, *, dir_fd: int) -> os.stat_result | None:
    """What has that name, not followed; None when nothing has."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def is_ours(status: os.stat_result) -> bool:
    """Whether a file found under one of our names can be one that this user made: nobody else can write to it.

    Anything else was planted, and is not touched.
    """
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and status.st_nlink == 1
        and not status.st_mode & 0o022
    )


def sync_directory(dir_fd: int) -> None:
    """Force the names in a directory, which ``dir_fd`` may be open on without reading it, to the disk.

    Raises:
        OSError: it cannot be read, or not written.
    """
    fd = os.open(b".", _LIST, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def has_partial(leaf: bytes, *, dir_fd: int) -> bool:
    """Whether a partial file of ``leaf`` with a journal lies in that directory."""
    found = [look(name, dir_fd=dir_fd) for name in partial_names(leaf)]
    return all(status is not None and is_ours(status) for status in found)


def remove_orphan(leaf: bytes, *, dir_fd: int) -> None:
    """Remove the journal of ``leaf`` when there is no partial file to it.

    Raises:
        OSError: it cannot be removed.
    """
    part, journal = partial_names(leaf)
    status = look(journal, dir_fd=dir_fd)
    if status is not None and is_ours(status) and look(part, dir_fd=dir_fd) is None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(journal, dir_fd=dir_fd)


def claim(name: bytes, *, dir_fd: int, create: bool) -> tuple[int, bool] | None:
    """Open and lock the partial file ``name``: its descriptor and whether it was made just now.

    The lock lasts until all duplicates of the descriptor are closed. None: it is in use, or was planted, or (without
    ``create``) there is none, or the file system knows no locks.

    Raises:
        OSError: it cannot be opened or made.
    """
    for _ in range(_TRIES):
        created = False
        if create:
            with contextlib.suppress(FileExistsError):
                fd = os.open(name, _CREATE, 0o600, dir_fd=dir_fd)
                created = True
        if not created:
            status = look(name, dir_fd=dir_fd)
            if status is None and create:
                continue
            if status is None or not is_ours(status):
                return None
            try:
                fd = os.open(name, _OPEN, dir_fd=dir_fd)
            except FileNotFoundError:
                continue
            except OSError as err:
                if err.errno in (errno.ELOOP, errno.EACCES, errno.ENXIO):
                    return None  # swapped since it was looked at, or nothing one may open
                raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named, opened = look(name, dir_fd=dir_fd), os.fstat(fd)
            if named is not None and os.path.samestat(named, opened) and (created or is_ours(opened)):
                return fd, created
        except OSError as err:
            if created and not isinstance(err, BlockingIOError):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=dir_fd)
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    return None


class Part:
    """A partial file in use. It owns the locked ``fd`` and borrows ``parent_fd``.

    ``journal_name`` is None for one with a name of its own, which nobody continues. ``on_closed`` is called when the
    lock was given up and no thread writes any more.
    """

    def __init__(
        self,
        fd: int,
        *,
        parent_fd: int,
        name: bytes,
        journal_name: bytes | None,
        shown: str,
        on_closed: Callable[[], None],
    ) -> None:
        self.name = name
        self.journal: Journal | None = None
        self.descriptor = Descriptor(fd, shown=shown, on_closed=self.close_journal)
        self._parent_fd = parent_fd
        self._journal_name = journal_name
        self._shown = shown
        self._on_closed = on_closed
        self._sifting = False
        self._renamed = False
        self._removed = False

    @property
    def resumable(self) -> bool:
        """Whether a later try could continue from it."""
        return self._sifting or (self.journal is not None and self.journal.count > 0)

    def resume(self, mark: SourceMark, *, keep: Callable[[Record], bool], fsync: Fsync) -> bool:
        """Go on with the journal if there is one of ``mark``, leaving in it the records that ``keep`` wants.

        Raises:
            OSError: the journal cannot be read or written.
        """
        assert self._journal_name is not None, "only a part that can be found again has a journal"
        status = look(self._journal_name, dir_fd=self._parent_fd)
        if status is None or not is_ours(status):
            return False
        fd = os.open(self._journal_name, _OPEN, dir_fd=self._parent_fd)
        try:
            self._sifting = True
            count = sift(fd, mark=mark, keep=keep) if is_ours(os.fstat(fd)) else None
            self._sifting = False
            if count is not None:
                self.journal = Journal(fd, shown=self._shown, fsync=fsync, count=count)
        finally:
            if self.journal is None:
                os.close(fd)
        return self.journal is not None

    def restart(self, mark: SourceMark | None, *, fsync: Fsync, fresh: bool) -> bool:
        """Begin with an empty file (``fresh``: it is that already) and, given a mark, an empty journal.

        False, and nothing is changed, when something was planted under the journal's name. A journal that cannot be
        made is gone without, and logged.

        Raises:
            OSError: the file cannot be cut.
        """
        if mark is None and fresh:
            return True  # a journal left without its file says nothing about this one, and is cleaned up some day
        assert self._journal_name is not None, "only a part that can be found again has a journal"
        status = look(self._journal_name, dir_fd=self._parent_fd)
        if status is not None and not is_ours(status):
            return False
        self._sifting = False
        if not fresh:
            with self.descriptor as fd:
                os.ftruncate(fd, 0)
        if status is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._journal_name, dir_fd=self._parent_fd)
        if mark is not None:
            self._make_journal(mark, fsync)
        return True

    def rename(self, leaf: bytes) -> None:
        """Give the file its final name; the lock stays.

        Raises:
            OSError: it cannot have that name.
        """
        os.rename(self.name, leaf, src_dir_fd=self._parent_fd, dst_dir_fd=self._parent_fd)
        self._renamed = True

    def remove(self) -> None:
        """Remove file and journal; after `rename` the journal alone. Once; to be called while the lock is held.

        Nobody is told when that fails: what is left is unreachable by a path, and cleaned up some day.
        """
        if self._removed:
            return
        self._removed = True
        with contextlib.suppress(OSError):
            if self._journal_name is not None and not (self._renamed and self.journal is None):
                status = look(self._journal_name, dir_fd=self._parent_fd)
                # Once the part has its final name, another one may have been begun, with a journal of its own.
                if status is not None and is_ours(status) and (not self._renamed or self._is_journal(status)):
                    os.unlink(self._journal_name, dir_fd=self._parent_fd)
        if not self._renamed:
            with contextlib.suppress(OSError):
                os.unlink(self.name, dir_fd=self._parent_fd)

    def close_journal(self) -> None:
        """The file's descriptor is closed: let the journal go and say so."""
        if self.journal is not None:
            self.journal.close()
        self._on_closed()

    def _is_journal(self, status: os.stat_result) -> bool:
        return self.journal is not None and self.journal.is_at(status)

    def _make_journal(self, mark: SourceMark, fsync: Fsync) -> None:
        assert self._journal_name is not None
        try:
            fd = os.open(self._journal_name, _CREATE, 0o600, dir_fd=self._parent_fd)
        except OSError as err:
            warn_given_up(self._shown, err)
            return
        try:
            header = encode_header(mark)
            if os.write(fd, header) != len(header):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if fsync is Fsync.ALWAYS:
                sync_directory(self._parent_fd)
            self.journal = Journal(fd, shown=self._shown, fsync=fsync)
        except OSError as err:
            warn_given_up(self._shown, err)
            os.close(fd)
            with contextlib.suppress(OSError):
                os.unlink(self._journal_name, dir_fd=self._parent_fd)


class Partials:
    """What one root knows of the partial files below it: who uses which, and which directories were cleaned up.

    Any thread.
    """

    def __init__(self, policy: PartialPolicy | None = None) -> None:
        self._policy = PartialPolicy() if policy is None else policy
        self._lock = threading.Lock()
        self._holders: dict[Place, Holder] = {}
        self._swept: set[tuple[int, int]] = set()

    def holder(self, place: Place) -> Holder | None:
        """Who holds the partial file of ``place``, if somebody of this root does."""
        with self._lock:
            return self._holders.get(place)

    def hold(self, place: Place, holder: Holder) -> None:
        """Note that ``holder`` has locked it."""
        with self._lock:
            self._holders[place] = holder

    def release(self, place: Place, holder: Holder) -> None:
        """Forget ``holder``, unless another has the place already."""
        with self._lock:
            if self._holders.get(place) is holder:
                del self._holders[place]

    def sweep(self, parent_fd: int, directory: tuple[int, int]) -> None:
        """Remove old leftovers from the directory, the first time it is called for that one.

        What is locked, recent or not ours stays. Nothing is raised: cleaning up is no reason to fail.
        """
        with self._lock:
            if directory in self._swept:
                return
            if len(self._swept) >= _SWEPT_MAX:
                self._swept.clear()
            self._swept.add(directory)
        with contextlib.suppress(OSError):
            fd = os.open(b".", _LIST, dir_fd=parent_fd)
            try:
                with os.scandir(fd) as found:
                    for entry in found:
                        if LEFTOVER.fullmatch(entry.name):
                            with contextlib.suppress(OSError):
                                self._clean(entry.name.encode(), dir_fd=fd)
            finally:
                os.close(fd)

    def _clean(self, name: bytes, *, dir_fd: int) -> None:
        stem, part = name.rpartition(b".")[0], name.endswith(PART)
        if not part:
            if look(stem + PART, dir_fd=dir_fd) is None and self._is_old(name, None, dir_fd=dir_fd):
                os.unlink(name, dir_fd=dir_fd)
            return
        journal = stem + JOURNAL
        if not self._is_old(name, journal, dir_fd=dir_fd):
            return
        locked = claim(name, dir_fd=dir_fd, create=False)
        if locked is None:
            return
        try:
            if self._is_old(name, journal, dir_fd=dir_fd):  # still, now that nobody else can be using it
                os.unlink(name, dir_fd=dir_fd)
                status = look(journal, dir_fd=dir_fd)
                if status is not None and is_ours(status):
                    os.unlink(journal, dir_fd=dir_fd)
        finally:
            os.close(locked[0])

    def _is_old(self, name: bytes, journal: bytes | None, *, dir_fd: int) -> bool:
        """Whether ``name`` is ours and nobody came back for it, or for its journal, in time.

        By the change time, which nobody can set: finishing a file sets the modification time of the source.
        """
        status = look(name, dir_fd=dir_fd)
        if status is None or not is_ours(status):
            return False
        changed, limit_s = status.st_ctime, self._policy.orphan_s
        beside = None if journal is None else look(journal, dir_fd=dir_fd)
        if beside is not None and is_ours(beside):
            changed, limit_s = max(changed, beside.st_ctime), self._policy.keep_s
        return self._policy.now() - changed > limit_s
