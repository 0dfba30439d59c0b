"""Small entries by the packful: one transfer for hundreds of them, because what costs is the transfer, not the bytes.

The OPEN of a pack names its entries (`encode_row`), its bytes are those of the files among them, one after the other.
The sender has read and verified every file before it opens the pack, so that nothing can go wrong with it later. The
receiver writes a file as soon as a chunk has all of it: a pack is made to fit one chunk, but need not come as one.

A pack is kept or refused as a whole. One that was refused is sent again entry by entry, and each tells its own reason.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from stat import S_IMODE
from typing import Final

from ..errors import AmstError, BusyError, ProtocolError, UnavailableError
from ..files.entries import MAX_ROWS, Entry, EntryType, decode_table, encode_row, join_path
from ..files.journal import Fsync
from ..files.root import Parents, Root
from ..wire import requests as ops
from ..wire.messages import Open
from .endpoints import MemorySource, PartialKeeper, Sink, TreeEntrySink

PACK_BYTES: Final = 1 << 20
"""Bytes in a pack at most; fewer where chunks are shorter."""

PACKED_UP_TO: Final = 256 << 10
"""Bytes of the largest file that goes into a pack."""

MAX_TABLE: Final = 64 << 10
"""Bytes in which a pack names its entries: whoever receives it keeps them."""

PACKS_AT_ONCE: Final = 16
"""Packs that a sender has under way at once at most."""

MAX_PACKS: Final = 32
"""Packs that one session may have under way: more are refused, and so come as single entries."""

MAX_PARTS: Final = 256
"""Files of them that came in part, and are open: a pack that would have more is refused."""

_EMPTY: Final = memoryview(b"")


# ---- sending ------------------------------------------------------------------------------


class Pack:
    """A pack that is being filled, in ``memory``. One thread."""

    def __init__(self, root: Root, base: bytes, target: bytes, *, memory: memoryview, parents: Parents) -> None:
        self._root = root
        self._base = base
        self._target = target
        self._parents = parents
        self.memory = memory
        self._table: list[bytes] = []
        self._table_bytes = 0
        self.size = 0
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> bool | None:
        """Put ``entry`` in, a file with its bytes; False when there is no room, None when it is for no pack at all.

        Raises:
            NotFoundError, RefusedError, StorageError: it cannot be read.
            SourceChangedError: it was written to meanwhile.
        """
        if entry.type is EntryType.FILE:
            room = self.memory[self.size : self.size + PACKED_UP_TO]
            if entry.size > room.nbytes:
                return False if self.entries else None
            read = self._root.read_file(join_path(self._base, entry.path), room, parents=self._parents)
            if read is None:
                return None
            if (read.st_mtime_ns, read.st_size, S_IMODE(read.st_mode)) != (entry.mtime_ns, entry.size, entry.mode):
                entry = Entry(entry.path, entry.type, S_IMODE(read.st_mode), read.st_mtime_ns, read.st_size)
        named = encode_row(entry, join_path(self._target, entry.path))
        if self._table_bytes + len(named) > MAX_TABLE or len(self.entries) >= MAX_ROWS:
            return False
        self._table.append(named)
        self._table_bytes += len(named)
        self.size += entry.size
        self.entries.append(entry)
        return True

    @property
    def table(self) -> bytes:
        """The entries, as the OPEN tells them."""
        return b"".join(self._table)

    def source(self, on_close: Callable[[], None]) -> PackSource:
        """Its bytes, to be sent; ``on_close`` is called when nobody reads the memory any more."""
        return PackSource(self.memory[: self.size], len(self.entries), on_close)


class PackSource(MemorySource):
    """The bytes of a pack."""

    def __init__(self, data: memoryview, count: int, on_close: Callable[[], None]) -> None:
        super().__init__(data)
        self.name = _shown(count)
        self._on_close = on_close

    def close(self) -> None:
        on_close, self._on_close = self._on_close, lambda: None
        on_close()


# ---- receiving ----------------------------------------------------------------------------


class PackRoom:
    """How much one session may have under way of packs that it receives. Any thread.

    Raises:
        BusyError: (`begin`, `begin_part`) it would be too much.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packs = 0
        self._parts = 0

    def begin(self) -> None:
        """One pack more."""
        with self._lock:
            if self._packs >= MAX_PACKS:
                raise BusyError(f"more than {MAX_PACKS} packs of one session at once")
            self._packs += 1

    def begin_part(self) -> None:
        """One file more that came in part."""
        with self._lock:
            if self._parts >= MAX_PARTS:
                raise BusyError(f"more than {MAX_PARTS} files in packs of one session that came in part")
            self._parts += 1

    def end(self, parts: int) -> None:
        """A pack less, of which so many files had come in part."""
        with self._lock:
            self._packs -= 1
            self._parts -= parts


class PackSink(Sink):
    """Writes what a pack has below ``root``, at ``base``.

    ``on_stored`` is told how many bytes are, ``on_kept`` the entries once they all are there; ``on_end`` is called
    once, when nothing more comes.

    Raises:
        ProtocolError: it has no table of entries, or one that is too long.
        BusyError: there is no ``room`` for it.
        UnavailableError: each file is to be synced, which is too slow for a lane that has more to do.
    """

    def __init__(
        self,
        keeper: PartialKeeper,
        root: Root,
        opened: Open,
        *,
        room: PackRoom,
        base: bytes = b"",
        on_stored: Callable[[int], None] = lambda size: None,
        on_kept: Callable[[list[Entry]], None] = lambda entries: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        table = opened.attributes.get(ops.ENTRIES)
        if not isinstance(table, bytes) or not 1 <= len(table) <= MAX_TABLE:
            raise ProtocolError(f"pack {opened.transfer} does not name its entries in 1 to {MAX_TABLE} bytes")
        if keeper.fsync is not Fsync.NEVER:
            raise UnavailableError("this side takes no packs, for it syncs each file (files.fsync)")
        room.begin()
        self.name = "small files"
        self._room = room
        self._parts = 0
        self._keeper = keeper
        self._root = root
        self._size = opened.size
        self._base = base
        self._table = table
        self._on_stored = on_stored
        self._on_kept = on_kept
        self._on_end: Callable[[], None] | None = on_end
        self._lock = threading.Lock()
        self._entries: list[Entry] | None = None
        self._starts: list[int] = []
        self._written: set[int] = set()
        self._in_parts: dict[int, TreeEntrySink] = {}  # files that came in more than one chunk

    def place(self, start: int, end: int) -> None:
        return None

    def store(self, start: int, view: memoryview, crc: int | None = None) -> None:
        entries, end = self._decoded(), start + view.nbytes
        with Parents(self._root, create=True) as parents:
            for index in range(bisect_right(self._starts, start) - 1, len(entries)):
                first = self._starts[index]
                if first >= end:
                    break
                entry, last = entries[index], first + entries[index].size
                piece = view[max(first, start) - start : min(last, end) - start]
                if not piece.nbytes:
                    continue
                if piece.nbytes == entry.size:
                    self._put(index, entry, piece, parents)
                else:
                    self._part(index, entry).store(max(first, start) - first, piece)
        self._on_stored(view.nbytes)

    def finish(self, total: int) -> None:
        entries = self._decoded()
        with Parents(self._root, create=True) as parents:
            for index, entry in enumerate(entries):
                part = self._in_parts.pop(index, None)
                if part is not None:
                    part.finish(entry.size)
                elif index not in self._written:
                    assert not entry.size, "every byte of the pack was stored"
                    self._put(index, entry, _EMPTY, parents)
        self._on_kept(entries)
        self._ended()

    def abort(self, reason: AmstError, *, keep: bool = False) -> None:
        while self._in_parts:
            self._in_parts.popitem()[1].abort(reason)
        self._ended()

    def _put(self, index: int, entry: Entry, content: memoryview, parents: Parents) -> None:
        path = join_path(self._base, entry.path)
        match entry.type:
            case EntryType.FILE:
                self._root.put_file(path, entry, content, parents=parents)
                self._written.add(index)
            case EntryType.DIRECTORY:
                self._root.put_directory(path, entry)
            case EntryType.SYMLINK:
                self._root.put_symlink(path, entry)

    def _part(self, index: int, entry: Entry) -> TreeEntrySink:
        with self._lock:
            part = self._in_parts.get(index)
            if part is None:
                self._room.begin_part()
                self._parts += 1
                path = join_path(self._base, entry.path)
                part = self._in_parts[index] = TreeEntrySink(self._keeper, self._root, path, entry)
            return part

    def _decoded(self) -> list[Entry]:
        """The entries. Not decoded before they are needed, for it takes a while and the session's lock is held then."""
        with self._lock:
            if self._entries is None:
                entries = decode_table(self._table)
                starts = list(accumulate((entry.size for entry in entries), initial=0))
                if starts.pop() != self._size:
                    raise ProtocolError(f"a pack of {self._size} bytes, whose files do not have as many")
                self._entries, self._starts, self._table = entries, starts, b""
            return self._entries

    def _ended(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            self._room.end(self._parts)
            on_end()


def _shown(count: int) -> str:
    return f"{count} small files"
