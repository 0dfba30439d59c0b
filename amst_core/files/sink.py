"""A file being received: under a temporary name beside its target until it is whole.

That name follows from the target's, and a larger file has a journal beside it (see `journal`): a copy that was cut
short is continued by the same command. `partial` says what is on the disk, this module what happens to it when.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from crc32c import crc32c

from ..engine.intervals import IntervalSet
from ..errors import AmstError, ClosedError, ProtocolError, StorageError, error_from_os
from .entries import Entry
from .journal import Fsync, Record, SourceMark
from .partial import (
    Part,
    Partials,
    Place,
    claim,
    look,
    partial_names,
    remove_orphan,
    sync_directory,
    temporary_name,
)
from .source import PIECE, pieces, sha256_of

JOURNAL_FROM: Final = 1 << 20
"""Files up to this many bytes have no journal: they are sent again whole."""

MAX_HELD: Final = 1 << 14
"""Separate spans that are taken up again at most; a copy has no more gaps than lanes."""

GIVE_WAY_S: Final = 5.0
"""How long a file's next sink waits for writes of the one before it, which may hang in a sick disk."""

_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_PART_MAY_NOT: Final = 0o022
_PART_MUST: Final = 0o600
"""Permissions that a partial file may not have, or must have, so that it can be continued."""


def target_error(err: OSError, what: str, *, path: str) -> AmstError:
    """`error_from_os` for a target: what is missing there vanished, it was not "not found"."""
    if err.errno == errno.ENOENT:
        return StorageError(f"{what} {path}: its directory or temporary file was removed meanwhile", path=path)
    return error_from_os(err, what, path=path)


def set_times(fd: int, *, mtime_ns: int) -> None:
    """Set the modification time of what ``fd`` is open on and leave the access time."""
    os.utime(fd, ns=(os.fstat(fd).st_atime_ns, mtime_ns))


@dataclass(frozen=True, slots=True)
class Recovered:
    """What is there of a file: spans (start, end) that an earlier try left, sorted, apart, read again and found good;
    or the SHA-256 of a whole file of that size and time that has the name already; or neither.
    """

    held: tuple[tuple[int, int], ...] = ()
    digest: bytes = b""


class _State(enum.Enum):
    NEW = enum.auto()
    OPEN = enum.auto()
    ADOPTED = enum.auto()
    FINISHING = enum.auto()
    FINISHED = enum.auto()
    ABORTED = enum.auto()
    SUPERSEDED = enum.auto()


_LIVE: Final = (_State.NEW, _State.OPEN, _State.ADOPTED)


class FileSink:
    """Where one received file goes. Any number of threads may write at once.

    The disk is not touched before the first `write`, `recover` or `finish`. ``open_parent`` then opens the directory,
    which stays held: whatever happens to its name, the file is finished in that directory. ``size`` is the number of
    bytes announced, None when unknown. ``source`` names what the file is copied from; without it nothing is recovered
    and nothing kept. ``partials`` is shared by all sinks below one root.

    ``is_idle`` says whether whoever feeds this sink has lost its peer. Then another sink for the same file may
    continue in its place, and this one is over. It is called from that sink's threads, without a lock of ours.
    """

    def __init__(
        self,
        open_parent: Callable[[], tuple[int, bytes]],
        *,
        shown: str,
        size: int | None,
        source: SourceMark | None = None,
        fsync: Fsync = Fsync.NEVER,
        is_idle: Callable[[], bool] | None = None,
        partials: Partials | None = None,
    ) -> None:
        if source is not None and source.size != size:
            raise ValueError(f"{shown}: the source has {source.size} bytes and {size} are announced")
        self._open_parent = open_parent
        self._shown = shown
        self._size = size
        self._source = source
        self._fsync = fsync
        self._is_idle = is_idle
        self._partials = Partials() if partials is None else partials
        # `_turn` is held by whoever does what may take long: making, recovering, finishing. Never by `abort`. `_lock`
        # guards the state. Who ends the sink lets go of everything, unless somebody has the turn: then that one does.
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._state = _State.NEW
        self._busy = False
        self._keep = False
        self._parent_fd = -1
        self._directory = 0, 0
        self._leaf = b""
        self._part: Part | None = None
        self._ready: Part | None = None  # the same, once it may be written to
        self._place: Place | None = None
        self._target: int | None = None
        self._target_status: os.stat_result | None = None
        self._has_released = False
        self._released: threading.Event | None = None  # made for who waits: most sinks never need one

    # ---- before the first byte ------------------------------------------------------------

    def recover(self) -> Recovered:
        """Find out what is there of this file, from an earlier try or whole. Called once, before any `write`.

        May take long, because it reads what it reports; ends early when the sink is aborted meanwhile.

        Raises:
            RefusedError, StorageError: as `write`.
            ClosedError: the sink was aborted.
        """
        with _Turn(self):
            self._require_live()
            if self._source is None:
                return Recovered()
            try:
                held = self._resume(self._source)
                digest = b"" if held else self._hash_target(self._source)
            except OSError as err:
                raise target_error(err, "cannot recover", path=self._shown) from err
            self._require_live()
            return Recovered(held, digest)

    def adopt(self) -> None:
        """The whole file that `recover` gave the digest of is what is being sent: `finish` only sets mode and time.

        A partial file beside it is removed.

        Raises:
            StorageError: the file was changed or replaced since.
            ClosedError: the sink was aborted.
        """
        with _Turn(self):
            self._require_live()
            self._check_target()
            try:
                if self._part is None:
                    self._claim(create=False)
                if self._part is not None:
                    self._part.remove()
                else:
                    remove_orphan(self._leaf, dir_fd=self._parent_fd)
            except OSError as err:
                raise target_error(err, "cannot adopt", path=self._shown) from err
            with self._lock:
                self._require_live()
                self._state = _State.ADOPTED

    # ---- bytes ----------------------------------------------------------------------------

    def write(self, offset: int, view: memoryview, crc: int | None = None) -> None:
        """Put ``view`` at ``offset``; ``crc`` is its CRC-32C, if it is known.

        Raises:
            RefusedError: no permission, a symbolic link on the way, a directory under the file's name.
            StorageError: the disk is full, the name too long, the directory vanished.
            ProtocolError: the bytes pass the announced size.
            ClosedError: the sink was finished or aborted, or another session continues the file.
        """
        done, size = 0, view.nbytes
        if offset < 0 or (self._size is not None and offset + size > self._size):
            raise ProtocolError(f"bytes {offset}+{size} of {self._shown} pass its announced size {self._size}")
        part = self._opened()
        with part.descriptor as fd:
            try:
                while done < size:
                    done += os.pwrite(fd, view[done:], offset + done)
                if part.journal is not None:
                    part.journal.append(offset, view, data_fd=fd, crc=crc)
            except OSError as err:
                raise target_error(err, "cannot write", path=self._shown) from err

    # ---- the end --------------------------------------------------------------------------

    def finish(self, entry: Entry) -> None:
        """Give the file its exact size, mode and modification time, then its final name. Idempotent.

        Whatever file or symbolic link had that name is replaced, never written through. ``entry.size`` is the
        total; of ``entry.mode`` the permissions count. When it fails (other than with BusyError) nothing is left. A
        process killed meanwhile leaves the whole file under its name, or what can be continued. With `Fsync.END` or
        ALWAYS the file is on the disk when this returns.

        Raises:
            RefusedError, StorageError: as `write`.
            ProtocolError: the total is not the announced size.
            BusyError: a write is still in progress.
            ClosedError: the sink was aborted, or another session continues the file.
        """
        if self._size is not None and entry.size != self._size:
            raise ProtocolError(f"{self._shown} was announced with {self._size} bytes and ended with {entry.size}")
        with _Turn(self):
            if self._state is _State.FINISHED:
                return
            self._require_live()
            part = None if self._state is _State.ADOPTED else self._ensure_part()
            with self._lock:
                self._require_live()
                fd = -1 if part is None else part.descriptor.take()
                self._state = _State.FINISHING
            try:
                if part is None:
                    self._finish_target(entry)
                else:
                    self._finish_part(part, fd, entry)
            except BaseException as err:
                with self._lock:
                    self._state = _State.ABORTED
                if isinstance(err, OSError):
                    raise target_error(err, "cannot finish", path=self._shown) from err
                raise
            with self._lock:
                self._state = _State.FINISHED

    def abort(self, *, keep: bool = False) -> None:
        """Give the file up; the target stays as it was. Idempotent, nothing after `finish`. Does not wait.

        With ``keep`` a later try can continue from what is there, if it has a journal with something in it; all else
        is removed.
        """
        with self._lock:
            if self._state in _LIVE:
                self._end_locked(_State.ABORTED, keep=keep)

    def give_way(self) -> bool:
        """Another sink wants this one's file: True once it can have it.

        An idle sink, or one that ended, takes no more bytes, and what it has is kept; writes in progress are waited
        for, up to `GIVE_WAY_S`.
        """
        idle = self._is_idle is not None and self._is_idle()
        with self._lock:
            if self._state in _LIVE:
                if not idle:
                    return False
                self._end_locked(_State.SUPERSEDED, keep=True)
            elif self._state is _State.FINISHING:
                return False
            released = self._released = self._released or threading.Event()
        if self._has_released:  # looked at after the event is there for `_on_part_closed` to see
            return True
        return released.wait(GIVE_WAY_S)

    # ---- states ---------------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._turn.acquire()
        with self._lock:
            self._busy = True

    def _end_turn(self) -> None:
        """Let go of everything if the sink ended meanwhile, or has nothing to hold."""
        with self._lock:
            self._busy = False
            if self._state not in _LIVE or (self._part is None and self._target is None):
                self._let_go_locked()
        self._turn.release()

    def _require_live(self) -> None:
        if self._state is _State.SUPERSEDED:
            raise ClosedError(f"another session continues this file: {self._shown}", path=self._shown)
        if self._state not in _LIVE:
            raise ClosedError(f"{self._shown} was finished or given up already", path=self._shown)

    def _end_locked(self, state: _State, *, keep: bool) -> None:
        self._state, self._keep = state, keep
        if not self._busy:
            self._let_go_locked()

    def _let_go_locked(self) -> None:
        part, self._part, self._ready = self._part, None, None
        if part is not None:
            if self._state is not _State.FINISHED and not (self._keep and part.resumable):
                part.remove()
            part.descriptor.close()  # the lock goes when the last write has returned
        if self._target is not None:
            os.close(self._target)
            self._target = None
        if self._parent_fd >= 0:
            os.close(self._parent_fd)
            self._parent_fd = -1

    def _on_part_closed(self) -> None:
        if self._place is not None:
            self._partials.release(self._place, self)
        self._has_released = True
        if self._released is not None:
            self._released.set()

    # ---- making ---------------------------------------------------------------------------

    def _opened(self) -> Part:
        part = self._ready
        if part is not None:
            return part
        with _Turn(self):
            self._require_live()
            if self._state is _State.ADOPTED:
                raise ClosedError(f"{self._shown} is there already and takes no bytes", path=self._shown)
            return self._ensure_part()

    def _ensure_part(self) -> Part:
        """The part, made if it must be; for who has the turn."""
        if self._part is None:
            try:
                self._make()
            except OSError as err:
                if self._part is not None:
                    self._disclaim(remove=True)
                raise target_error(err, "cannot create", path=self._shown) from err
        part = self._part
        assert part is not None, "who ends the sink leaves the part to who has the turn"
        with self._lock:
            if self._state is _State.OPEN:
                self._ready = part
        return part

    def _parent(self) -> tuple[int, bytes]:
        if self._parent_fd < 0:
            self._parent_fd, self._leaf = self._open_parent()
            status = os.fstat(self._parent_fd)
            self._directory = status.st_dev, status.st_ino
        return self._parent_fd, self._leaf

    def _make(self) -> None:
        """Have a part to write to, empty: the one of this file's name, or one that nobody else can mean."""
        parent_fd, leaf = self._parent()
        found = look(leaf, dir_fd=parent_fd)
        if found is not None and stat.S_ISDIR(found.st_mode):
            # The rename would refuse a directory too, but only after all the bytes have come.
            raise IsADirectoryError(errno.EISDIR, "a directory has that name")
        mark = self._source if self._size is not None and self._size > JOURNAL_FROM else None
        fresh = self._claim(create=True)
        if self._part is not None and not self._part.restart(mark, fsync=self._fsync, fresh=fresh):
            self._disclaim(remove=fresh)
        if self._part is None:
            name = temporary_name()
            self._install(os.open(name, _CREATE, 0o600, dir_fd=parent_fd), name, None)
        self._partials.sweep(parent_fd, self._directory)

    def _claim(self, *, create: bool) -> bool:
        """Take the part of this file's name, if it can be had; whether it was made just now."""
        parent_fd, leaf = self._parent()
        place = *self._directory, leaf
        holder = self._partials.holder(place)
        if holder is not None and not holder.give_way():
            return False
        name, journal_name = partial_names(leaf)
        claimed = claim(name, dir_fd=parent_fd, create=create)
        if claimed is None:
            return False
        self._place = place
        self._partials.hold(place, self)
        self._install(claimed[0], name, journal_name)
        return claimed[1]

    def _install(self, fd: int, name: bytes, journal_name: bytes | None) -> None:
        part = Part(
            fd,
            parent_fd=self._parent_fd,
            name=name,
            journal_name=journal_name,
            shown=self._shown,
            on_closed=self._on_part_closed,
        )
        with self._lock:
            self._part = part
            if self._state is _State.NEW:
                self._state = _State.OPEN

    def _disclaim(self, *, remove: bool) -> None:
        """Let go of a part that cannot be used after all."""
        with self._lock:
            part, self._part = self._part, None
        assert part is not None, "there is one to let go of"
        if remove:
            part.remove()
        part.descriptor.close()

    # ---- recovering -----------------------------------------------------------------------

    def _resume(self, source: SourceMark) -> tuple[tuple[int, int], ...]:
        """Take up what an earlier try left, if there is something; its spans that are good."""
        if source.size <= JOURNAL_FROM:
            return ()
        self._claim(create=False)
        part = self._part
        if part is None:
            return ()
        held = IntervalSet()
        separate = 0
        buffer = bytearray(PIECE)

        def is_good(record: Record) -> bool:
            nonlocal separate
            self._require_live()
            start, end = record.offset, record.offset + record.length
            if held.covers(start, end) or self._crc(fd, start, end, buffer) != record.crc:
                return False
            separate += 1 - held.covers(start - 1, start) - held.covers(end, end + 1)
            if separate > MAX_HELD:
                return False
            held.add(start, end)
            return True

        with part.descriptor as fd:
            try:
                if part.resume(source, keep=is_good, fsync=self._fsync):
                    return held.spans()
            except OSError:
                pass  # a journal that cannot be read or cut is as good as none
        usable = False
        try:
            usable = part.restart(source, fsync=self._fsync, fresh=False)
        finally:
            if not usable:
                self._disclaim(remove=False)
        return ()

    def _crc(self, fd: int, start: int, end: int, buffer: bytearray) -> int | None:
        """The CRC-32C of a span; None when it cannot be read."""
        crc = 0
        try:
            for piece in pieces(fd, start, end, buffer=buffer):
                crc = crc32c(piece, crc)
                start += len(piece)
        except OSError:
            return None
        return crc if start == end else None

    def _hash_target(self, source: SourceMark) -> bytes:
        """The digest of a whole file of that size and time under the final name, which stays open; else empty.

        One that is not ours alone is replaced as always: setting its mode would fail, or change another name's file.
        """
        parent_fd, leaf = self._parent()
        status = look(leaf, dir_fd=parent_fd)
        if status is None or not _is_candidate(status, source):
            return b""
        try:
            fd = os.open(leaf, _READ, dir_fd=parent_fd)
        except OSError:
            return b""  # unreadable, or swapped since: it gets replaced
        digest: bytes | None = None
        try:
            status = os.fstat(fd)
            if _is_candidate(status, source):
                digest = sha256_of(fd, size=source.size, cancelled=lambda: self._state not in _LIVE)
            if digest is not None and _is_unchanged(os.fstat(fd), status):
                self._target, self._target_status = fd, status
                return digest
            return b""
        except OSError:
            return b""
        finally:
            if self._target is None:
                os.close(fd)

    def _check_target(self) -> int:
        """The descriptor of the target, if that is still what was hashed, and still has the name."""
        assert self._target is not None and self._target_status is not None, "recover() found a target"
        named = look(self._leaf, dir_fd=self._parent_fd)
        for status in (named, os.fstat(self._target)):
            if status is None or not _is_unchanged(status, self._target_status):
                raise StorageError(f"{self._shown} was changed while it was compared; copy it again", path=self._shown)
        return self._target

    # ---- finishing ------------------------------------------------------------------------

    def _finish_part(self, part: Part, fd: int, entry: Entry) -> None:
        mode = entry.mode & 0o777
        early = (mode & ~_PART_MAY_NOT) | _PART_MUST
        try:
            os.ftruncate(fd, entry.size)
            os.fchmod(fd, early)
            set_times(fd, mtime_ns=entry.mtime_ns)
            if self._fsync is not Fsync.NEVER:
                os.fsync(fd)
            os.close(os.dup(fd))  # some file systems report a failed write only here; the lock must stay, though
            part.rename(self._leaf)
            if mode != early:
                # Only now, because a partial file that others may write to is not continued. If the process dies
                # before it, the same command finds the file whole and sets this.
                os.fchmod(fd, mode)
            if self._fsync is not Fsync.NEVER:
                os.fsync(fd)
                sync_directory(self._parent_fd)
        finally:
            part.remove()  # the journal, or everything if it has not come to the rename
            os.close(fd)
            part.close_journal()

    def _finish_target(self, entry: Entry) -> None:
        fd = self._check_target()
        status = os.fstat(fd)
        if stat.S_IMODE(status.st_mode) != entry.mode & 0o777:
            os.fchmod(fd, entry.mode & 0o777)
        if status.st_mtime_ns != entry.mtime_ns:
            set_times(fd, mtime_ns=entry.mtime_ns)
        if self._fsync is not Fsync.NEVER:
            os.fsync(fd)
            sync_directory(self._parent_fd)


class _Turn:
    """Doing what may take long, one thread at a time. (A generator would cost more than the rest for a small file.)"""

    __slots__ = ("_sink",)

    def __init__(self, sink: FileSink) -> None:
        self._sink = sink

    def __enter__(self) -> None:
        self._sink._begin_turn()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink._end_turn()


def _is_candidate(status: os.stat_result, source: SourceMark) -> bool:
    """Whether a file found under the final name may be the source already, and is ours alone to keep."""
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == os.geteuid()
        and status.st_nlink == 1
        and (status.st_size, status.st_mtime_ns) == (source.size, source.mtime_ns)
    )


def _is_unchanged(now: os.stat_result, then: os.stat_result) -> bool:
    return os.path.samestat(now, then) and (
        (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (then.st_size, then.st_mtime_ns, then.st_ctime_ns)
    )
