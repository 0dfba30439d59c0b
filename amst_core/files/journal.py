"""The journal of a partial file: which of its spans were written, and the CRC-32C of their bytes.

Layout, integers big-endian. A header of 96 bytes names the source that the bytes come from; records of 32 bytes
follow, appended as spans are written. Both divide a page, so that a write cut short by kill -9, which happens between
pages, leaves whole records. Nothing is ever trusted because it stands here: a span counts only after its
bytes have been read again and have the recorded CRC. So a record may be ahead of its bytes (power cut), or stand
for bytes that were overwritten since; it is then found out, and the span is sent again.
"""

from __future__ import annotations

import enum
import logging
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from crc32c import crc32c

from .entries import MAX_IDENTITY

MAX_SPAN: Final = 16 << 20
"""Bytes one record stands for at most: what a flipped bit in the partial file costs."""

_MAGIC: Final = b"AMSTJRNL"
_VERSION: Final = 1
_HEADER: Final = struct.Struct(f"!8sBB2x{MAX_IDENTITY}sQq")
_RECORD: Final = struct.Struct("!QII12x")
_CHECK: Final = struct.Struct("!I")

HEADER_SIZE: Final = _HEADER.size + _CHECK.size
RECORD_SIZE: Final = _RECORD.size + _CHECK.size

_BATCH: Final = 2048
"""Records in memory at once while a journal is read."""

_log = logging.getLogger("amst.files")


class Fsync(enum.StrEnum):
    """When bytes of received files are forced to the disk; the value is the word in the settings."""

    NEVER = "never"
    """When the system does it: a power cut may lose files that were reported as copied."""
    END = "end"
    """Each file before it gets its name, and its directory after that."""
    ALWAYS = "always"
    """As END, and each span before its record in the journal: a power cut loses nothing that was recorded."""


@dataclass(frozen=True, slots=True)
class SourceMark:
    """What a file is copied from. Equal marks mean the same bytes.

    ``identity`` is 1 to 64 bytes that only the source's side understands, ``size`` in bytes.
    """

    identity: bytes
    size: int
    mtime_ns: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.identity) <= MAX_IDENTITY:
            raise ValueError(f"an identity has 1 to {MAX_IDENTITY} bytes, not {len(self.identity)}")


@dataclass(frozen=True, slots=True)
class Record:
    """``length`` bytes at ``offset`` were written and have the CRC-32C ``crc``."""

    offset: int
    length: int
    crc: int


# ---- codec --------------------------------------------------------------------------------


def encode_header(mark: SourceMark) -> bytes:
    """The first `HEADER_SIZE` bytes of a journal for ``mark``."""
    header = _HEADER.pack(_MAGIC, _VERSION, len(mark.identity), mark.identity, mark.size, mark.mtime_ns)
    return header + _CHECK.pack(crc32c(header))


def decode_header(raw: bytes) -> SourceMark | None:
    """The source that a journal's first `HEADER_SIZE` bytes name; None when they are not a whole, good header."""
    if len(raw) != HEADER_SIZE or _CHECK.unpack(raw[_HEADER.size :])[0] != crc32c(raw[: _HEADER.size]):
        return None
    magic, version, length, identity, size, mtime_ns = _HEADER.unpack(raw[: _HEADER.size])
    if magic != _MAGIC or version != _VERSION or not 1 <= length <= MAX_IDENTITY:
        return None
    return SourceMark(identity[:length], size, mtime_ns)


def encode_record(record: Record) -> bytes:
    """A record as `RECORD_SIZE` bytes."""
    body = _RECORD.pack(record.offset, record.length, record.crc)
    return body + _CHECK.pack(crc32c(body))


def decode_record(raw: bytes, *, size: int) -> Record | None:
    """The record in ``raw``; None when it is torn, damaged or passes the ``size`` bytes of its file."""
    if len(raw) != RECORD_SIZE or _CHECK.unpack(raw[_RECORD.size :])[0] != crc32c(raw[: _RECORD.size]):
        return None
    record = Record(*_RECORD.unpack(raw[: _RECORD.size]))
    return record if 1 <= record.length <= MAX_SPAN and record.offset + record.length <= size else None


# ---- reading ------------------------------------------------------------------------------


def sift(fd: int, *, mark: SourceMark, keep: Callable[[Record], bool]) -> int | None:
    """Ask ``keep`` about each record of the journal ``fd``, and leave only those it wants; how many that are.

    Reading stops at the first record that is not good, and the journal is cut there. Its memory is bounded, however
    long it is. A process killed meanwhile, or ``keep`` raising, leaves a journal that has every wanted record
    still: they only move towards the beginning, over those that have moved or are not wanted.

    Returns None, with nothing changed, when it is not a journal of ``mark``.

    Raises:
        OSError: it cannot be read or written.
    """
    if decode_header(os.pread(fd, HEADER_SIZE, 0)) != mark:
        return None
    source = target = HEADER_SIZE
    good = True
    while good:
        raw = os.pread(fd, _BATCH * RECORD_SIZE, source)
        wanted = bytearray()
        for at in range(0, len(raw), RECORD_SIZE):
            piece = raw[at : at + RECORD_SIZE]
            record = decode_record(piece, size=mark.size)
            if record is None:
                good = False
                break
            if keep(record):
                wanted += piece
        if target != source or wanted != raw[: len(wanted)]:
            _write_whole(fd, wanted, target)
        target += len(wanted)
        source += len(raw)
        good = good and bool(raw)
    os.ftruncate(fd, target)
    return (target - HEADER_SIZE) // RECORD_SIZE


def _write_whole(fd: int, data: bytearray, offset: int) -> None:
    done, view = 0, memoryview(data)
    while done < len(data):
        done += os.pwrite(fd, view[done:], offset + done)


# ---- appending ----------------------------------------------------------------------------


class _Commit:
    """Records that become durable together, and what came of it."""

    def __init__(self) -> None:
        self.records = bytearray()
        self.done = False
        self.error: OSError | None = None


class Journal:
    """A journal being appended to, by any number of threads. It owns ``fd`` and writes from the end of the file on.

    When the journal itself cannot be written (disk full), that is logged once and it takes no more records: what it
    has stays true, and a later try begins from there. ``count`` is the number of records it holds, ``shown`` the
    name of the file in messages.
    """

    def __init__(self, fd: int, *, shown: str, fsync: Fsync = Fsync.NEVER, count: int = 0) -> None:
        self.count = count
        self._fd = fd
        self._shown = shown
        self._fsync = fsync
        self._given_up = False
        self._changed = threading.Condition()
        self._next = _Commit()
        self._committing = False
        os.lseek(fd, 0, os.SEEK_END)

    def append(self, offset: int, view: memoryview, *, data_fd: int, crc: int | None = None) -> None:
        """Record that ``view`` has been written at ``offset`` of the partial file, which ``data_fd`` is open on.

        ``crc`` is the CRC-32C of ``view``; without it, it is computed.
        Returns when the record is written; with `Fsync.ALWAYS` when bytes and record are on the disk, where threads
        that come at the same time share their syncs.

        Raises:
            OSError: the bytes could not be forced to the disk.
        """
        if self._given_up:
            return
        if crc is not None and len(view) <= MAX_SPAN:
            records = encode_record(Record(offset, len(view), crc))
        else:
            records = b"".join(
                encode_record(Record(offset + at, len(piece), crc32c(piece)))
                for at in range(0, len(view), MAX_SPAN)
                for piece in (view[at : at + MAX_SPAN],)
            )
        if self._fsync is Fsync.ALWAYS:
            self._commit(records, data_fd)
        else:
            with self._changed:
                self._write(records)

    def is_at(self, status: os.stat_result) -> bool:
        """Whether ``status`` is that of this journal's file."""
        return os.path.samestat(os.fstat(self._fd), status)

    def close(self) -> None:
        """Close the file; nobody appends any more."""
        os.close(self._fd)

    def _commit(self, records: bytes, data_fd: int) -> None:
        with self._changed:
            commit = self._next
            commit.records += records
            while self._committing and not commit.done:
                self._changed.wait()
            if not commit.done:  # this thread does it for all that joined so far; later ones make up the next
                self._committing = True
                self._next = _Commit()
        if not commit.done:
            try:
                os.fdatasync(data_fd)  # every thread that joined had written its bytes before
                self._write(commit.records)
                self._sync()
            except OSError as err:
                commit.error = err
            finally:
                with self._changed:
                    commit.done = True
                    self._committing = False
                    self._changed.notify_all()
        if commit.error is not None:
            raise OSError(commit.error.errno, os.strerror(commit.error.errno or 0)) from commit.error

    def _write(self, records: bytes | bytearray) -> None:
        """One write() for all of ``records``: a process killed right after it has lost none."""
        if self._given_up:
            return  # behind a torn record nothing is found
        try:
            written = os.write(self._fd, records)
        except OSError as err:
            self._give_up(err)
            return
        self.count += written // RECORD_SIZE
        if written != len(records):
            self._give_up(None)

    def _sync(self) -> None:
        if not self._given_up:
            try:
                os.fdatasync(self._fd)
            except OSError as err:
                self._give_up(err)

    def _give_up(self, error: OSError | None) -> None:
        self._given_up = True
        warn_given_up(self._shown, error)


def warn_given_up(shown: str, error: OSError | None) -> None:
    """Log that ``shown`` is received without a journal from now on; without ``error``, half a record was written."""
    _log.warning(
        "cannot write the journal of %s: %s; if the copy is cut short, what comes from now on is sent again",
        shown,
        "the disk is full" if error is None else error.strerror,
    )
