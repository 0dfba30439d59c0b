"""Where the bytes of a transfer come from and go to: sources and sinks over memory and files.

Lanes call these from many threads at once; the engine guarantees that no two of them touch the same span.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from ..errors import AmstError
from ..files.entries import Entry, EntryType
from ..files.root import Root
from ..files.source import FileSource


class Source(ABC):
    """The bytes of an outgoing transfer."""

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

    def close(self) -> None:
        """No lane reads it any more. Idempotent."""


class MemorySource(Source):
    """A message's bytes; the caller does not change them until the ticket completes."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def view(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]


class FileContent(Source):
    """An open file's content."""

    def __init__(self, file: FileSource) -> None:
        self._file = file

    def view(self, offset: int, length: int) -> None:
        return None

    def read_into(self, offset: int, view: memoryview) -> None:
        self._file.read_into(offset, view)

    def verify(self) -> None:
        self._file.verify()

    def close(self) -> None:
        self._file.close()


class Sink(ABC):
    """Where an incoming transfer goes."""

    def prepare_locked(self) -> None:
        """A span is about to be placed (the session's lock held; quick)."""

    @abstractmethod
    def place(self, start: int, end: int) -> memoryview | None:
        """The memory for a span, None when it must be given to `store` once verified."""

    def store(self, start: int, view: memoryview) -> None:
        """Keep verified bytes that `place` had no memory for.

        Raises:
            AmstError: they cannot be kept; the transfer fails, the lane goes on.
        """
        raise AssertionError(f"{type(self).__name__} has its bytes in memory")

    @abstractmethod
    def finish(self, total: int) -> None:
        """Every byte is stored: make the whole available. Raises `AmstError` when that fails."""

    @abstractmethod
    def abort(self, reason: AmstError) -> None:
        """Drop what was stored; the transfer failed for ``reason``. Nothing writes to it any more."""


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

    def abort(self, reason: AmstError) -> None:
        self._memory = None
        self._deliver(None)


class TreeEntrySink(Sink):
    """A file, directory or link that appears under its final name, whole, when everything has arrived."""

    def __init__(self, root: Root, path: bytes, entry: Entry) -> None:
        self._root = root
        self._path = path
        self.entry = entry
        self._file = root.open_sink(path, size=entry.size) if entry.type is EntryType.FILE else None

    def place(self, start: int, end: int) -> None:
        return None

    def store(self, start: int, view: memoryview) -> None:
        assert self._file is not None, "only files have bytes"
        self._file.write(start, view)

    def finish(self, total: int) -> None:
        if self._file is not None:
            self._file.finish(self.entry)
        elif self.entry.type is EntryType.DIRECTORY:
            self._root.put_directory(self._path, self.entry)
        else:
            self._root.put_symlink(self._path, self.entry)

    def abort(self, reason: AmstError) -> None:
        if self._file is not None:
            self._file.abort()
