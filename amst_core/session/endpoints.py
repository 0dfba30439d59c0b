"""Where the bytes of a transfer come from and go to: sources and sinks over memory and files.

Lanes call these from many threads at once; the engine guarantees that no two of them touch the same span.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ..errors import AmstError
from ..files.entries import Entry, EntryType, display_path
from ..files.journal import Fsync, SourceMark
from ..files.root import Root
from ..files.sink import JOURNAL_FROM, FileSink, Recovered
from ..files.source import Descriptor, FileSource
from ..wire.fields import Span


class Source(ABC):
    """The bytes of an outgoing transfer; ``name`` is a file's, for people.

    ``steady``: they cannot change, and to close it takes no time. ``holes``: spans of zeros, which need not be sent.
    ``descriptor``: of the open file that has just these bytes, at the same offsets.
    """

    name: str = ""
    steady: bool = False
    holes: tuple[Span, ...] = ()
    descriptor: Descriptor | None = None

    @abstractmethod
    def view(self, offset: int, length: int) -> memoryview | None:
        """The span in memory, None when it must be `read_into` a buffer."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes at ``offset``.

        Raises:
            AmstError: they cannot be read, or the source has changed.
        """
        raise AssertionError(f"{type(self).__name__} has its bytes in memory")

    def verify(self) -> None:
        """Raise `SourceChangedError` when what was read so far may be a mix of two states."""

    def digest(self, cancelled: Callable[[], bool]) -> bytes:
        """The SHA-256 of all of it; may take long, and stops early once ``cancelled()``.

        Raises:
            AmstError: it cannot be read, or has changed.
        """
        raise AssertionError(f"{type(self).__name__} is never compared")

    def close(self) -> None:
        """No lane reads it any more. Idempotent."""


class MemorySource(Source):
    """A message's bytes; the caller does not change them until the ticket completes."""

    steady = True

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def view(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]


class FileContent(Source):
    """An open file's content; with ``sparse`` its holes are left out."""

    def __init__(self, file: FileSource, *, sparse: bool = False) -> None:
        self._file = file
        self.name = file.name
        self.holes = file.holes() if sparse else ()
        self.descriptor = file.descriptor

    def view(self, offset: int, length: int) -> None:
        return None

    def read_into(self, offset: int, view: memoryview) -> None:
        self._file.read_into(offset, view)

    def verify(self) -> None:
        self._file.verify()

    def digest(self, cancelled: Callable[[], bool]) -> bytes:
        return self._file.digest(cancelled)

    def close(self) -> None:
        self._file.close()


class Sink(ABC):
    """Where an incoming transfer goes; ``name`` is a file's, for people.

    ``sparse``: what is never stored reads as zeros. ``wants_crc``: `store` has use for the CRC-32C of the bytes.
    """

    name: str = ""
    sparse: bool = False
    wants_crc: bool = False

    def prepare_locked(self) -> None:
        """A span is about to be placed (the session's lock held; quick)."""

    @abstractmethod
    def place(self, start: int, end: int) -> memoryview | None:
        """The memory for a span, None when it must be given to `store` once verified."""

    def store(self, start: int, view: memoryview, crc: int | None = None) -> None:
        """Keep verified bytes that `place` had no memory for; ``crc`` is their CRC-32C, if it is known.

        Raises:
            AmstError: they cannot be kept; the transfer fails, the lane goes on.
        """
        raise AssertionError(f"{type(self).__name__} has its bytes in memory")

    def recover(self) -> Recovered:
        """What is there of it from an earlier try; before anything is placed, and may take long.

        Raises:
            AmstError: the target cannot be written.
        """
        return Recovered()

    def adopt(self) -> None:
        """The whole that `recover` found is what is being sent. Raises `AmstError` when it has changed since."""
        raise AssertionError(f"{type(self).__name__} found nothing to adopt")

    @abstractmethod
    def finish(self, total: int) -> None:
        """Every byte is stored: make the whole available. Raises `AmstError` when that fails."""

    @abstractmethod
    def abort(self, reason: AmstError, *, keep: bool = False) -> None:
        """The transfer failed for ``reason``: drop what was stored, or ``keep`` it for a later try.

        Nothing writes to it any more.
        """


class MessageSink(Sink):
    """A message in memory, taken when the first byte comes and not before: it is still warm then.

    ``deliver`` is called under the session's lock with the whole message, or None when it failed.
    """

    def __init__(self, lend: Callable[[], memoryview], deliver: Callable[[memoryview | None], None]) -> None:
        self._lend = lend
        self._deliver = deliver
        self._memory: memoryview | None = None

    def prepare_locked(self) -> None:
        if self._memory is None:
            self._memory = self._lend()

    def place(self, start: int, end: int) -> memoryview:
        assert self._memory is not None, "a span was placed before memory was taken, or after the end"
        return self._memory[start:end]

    def finish(self, total: int) -> None:
        memory, self._memory = self._memory, None
        self._deliver(memory if memory is not None else memoryview(b""))

    def abort(self, reason: AmstError, *, keep: bool = False) -> None:
        self._memory = None
        self._deliver(None)


class PartialKeeper(Protocol):
    """What a session knows that its files must: how to sync them, and whether its peer is gone."""

    fsync: Fsync

    @property
    def is_idle(self) -> bool: ...


class TreeEntrySink(Sink):
    """A file, directory or link that appears under its final name, whole, when everything has arrived.

    An ``open_ended`` file has as many bytes as come; nothing is kept of it for a later try.
    """

    def __init__(
        self, keeper: PartialKeeper, root: Root, path: bytes, entry: Entry, *, open_ended: bool = False
    ) -> None:
        self._root = root
        self._path = path
        self.entry = entry
        self.name = display_path(path)
        self.sparse = entry.type is EntryType.FILE and not open_ended
        self._file: FileSink | None = None
        if entry.type is EntryType.FILE:
            is_known = bool(entry.identity) and not open_ended
            self.wants_crc = is_known and entry.size > JOURNAL_FROM
            self._file = root.open_sink(
                path,
                size=None if open_ended else entry.size,
                source=SourceMark(entry.identity, entry.size, entry.mtime_ns) if is_known else None,
                fsync=keeper.fsync,
                is_idle=lambda: keeper.is_idle,
            )

    def place(self, start: int, end: int) -> None:
        return None

    def store(self, start: int, view: memoryview, crc: int | None = None) -> None:
        assert self._file is not None, "only files have bytes"
        self._file.write(start, view, crc)

    def finish(self, total: int) -> None:
        if self._file is not None:
            self._file.finish(replace(self.entry, size=total))
        elif self.entry.type is EntryType.DIRECTORY:
            self._root.put_directory(self._path, self.entry)
        else:
            self._root.put_symlink(self._path, self.entry)

    def recover(self) -> Recovered:
        return self._file.recover() if self._file is not None else Recovered()

    def adopt(self) -> None:
        assert self._file is not None, "only files are compared"
        self._file.adopt()

    def abort(self, reason: AmstError, *, keep: bool = False) -> None:
        if self._file is not None:
            self._file.abort(keep=keep)
