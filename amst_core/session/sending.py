"""Sending what lies at a path, a tree with all that is in it: the same for an upload and in answer to a FETCH."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import accumulate
from types import TracebackType
from typing import Final

from ..errors import (
    AmstError,
    CancelledError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    StorageError,
    UnavailableError,
)
from ..files.entries import Entry, EntryType, WalkError, join_path, to_attributes
from ..files.root import Parents, Root
from ..wire import requests as ops
from ..wire.messages import FILE, PACK
from .core import SessionCore
from .endpoints import FileContent, MemorySource, Source
from .packs import PACK_BYTES, PACKED_UP_TO, PACKS_AT_ONCE, Pack
from .tickets import Ticket

_NOTHING: Final = memoryview(b"")

_ENTRY_ERRORS: Final = (NotFoundError, RefusedError, StorageError, SourceChangedError, CancelledError)
"""What concerns one entry of a tree; the others go on."""

_SPARE_BLOCKS: Final = 2
"""Blocks of a pack's size that are kept for the next one."""


class TreeSender:
    """Sends what lies at ``path`` below ``root``: a file, a link, or a directory with all that is in it.

    Files travel many at once, small ones in packs; directories follow when everything below them has arrived, so that
    their modes and times stay what they are told to be. With ``on_hold`` the peer is asked, file by file, what it has,
    and nothing is packed; with ``sparse`` the holes of files are left out.
    """

    def __init__(
        self,
        core: SessionCore,
        root: Root,
        path: bytes,
        *,
        request: int = 0,
        on_hold: bool = False,
        sparse: bool = True,
    ) -> None:
        self._on_hold = on_hold
        self._sparse = sparse
        self._stopping = False
        self._given_up = False
        self._core = core
        self._root = root
        self._path = path
        self._request = request
        self._completed: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self._under_way: dict[Ticket, Sequence[Entry]] = {}
        self._may_pack = not on_hold
        self._most_packs = PACKS_AT_ONCE
        self._pack: Pack | None = None
        self._blocks = _Blocks(core)
        self._packs_under_way = 0
        self._target = b""
        self._failures: list[tuple[bytes, AmstError]] = []
        self.on_progress: Callable[[int], None] | None = None  # more bytes acknowledged
        self.on_done: Callable[[Entry, AmstError | None], None] | None = None

    def send(self, target: bytes) -> list[tuple[bytes, AmstError]]:
        """Send everything, naming the peer ``target`` + what is below; return what failed, path by path.

        Raises:
            NotFoundError, RefusedError, StorageError: nothing can be read at ``path``.
            AmstError: the session ended.
        """
        self._target = target
        with self._blocks:
            try:
                return self._send_all()
            finally:
                if self._pack is not None:
                    self._blocks.give_back(self._pack.memory)

    def _send_all(self) -> list[tuple[bytes, AmstError]]:
        directories: list[Entry] = []
        with Parents(self._root) as parents:
            for found in self._root.walk(self._path):
                if self._stopping:
                    break
                if isinstance(found, WalkError):
                    self._failed(found.path, found.error)
                elif found.type is EntryType.DIRECTORY:
                    directories.append(found)
                else:
                    self._send(found, parents)
                self._reap(wait=False)
            self._flush()
            self._reap(wait=True)
            self._most_packs = 1  # each before the one above it, also if it must go again
            for directory in directories if not self._stopping else ():
                self._send(directory, parents)
                self._reap(wait=False)
            self._flush()
            self._reap(wait=True)
        return self._failures

    def stop(self) -> None:
        """Begin nothing new; `send` returns when what is under way has ended (any thread)."""
        self._stopping = True

    def cancel(self) -> None:
        """Give up what is under way, too: the peer removes what it has of it (any thread)."""
        self._stopping = self._given_up = True
        with self._core.lock:
            self._core.room.notify_all()  # it may wait to open the next one
        for ticket in list(self._under_way):
            ticket.cancel()

    def unfinished(self) -> list[tuple[Entry, int]]:
        """What was under way when the session ended, and how many bytes of it had arrived."""
        return [
            (entry, min(max(0, ticket.acknowledged - start), entry.size))
            for ticket, entries in self._under_way.items()
            if ticket.error is not None
            for entry, start in zip(entries, accumulate((entry.size for entry in entries), initial=0), strict=False)
        ]

    def _send(self, entry: Entry, parents: Parents) -> None:
        """Have ``entry`` sent, in a pack if it is small."""
        try:
            while self._may_pack and entry.size <= PACKED_UP_TO and (pack := self._begun(parents)) is not None:
                added = pack.add(entry)
                if added:
                    return
                if added is None:
                    break  # it grew, or has holes, or chunks are shorter than it
                self._flush()
            self._flush()  # in the order of the tree: what is small does not wait for what is large
            self._open(entry)
        except _ENTRY_ERRORS as err:
            self._failed(entry.path, err)

    def _failed(self, path: bytes, error: AmstError) -> None:
        self._failures.append((path, error))
        if self._request:
            self._report(path, error)

    def _begun(self, parents: Parents) -> Pack | None:
        """The pack that is being filled; it fits a chunk. None when there is no memory for one, nor will be soon."""
        while self._pack is None:
            block = self._blocks.take()
            if block is not None:
                memory = block[: self._core.engine.chunk_size]
                self._pack = Pack(self._root, self._path, self._target, memory=memory, parents=parents)
            elif not self._packs_under_way:
                return None
            else:
                self._reap(wait=False, packs=self._packs_under_way - 1)
        return self._pack

    def _flush(self) -> None:
        """Send the pack that was being filled."""
        if self._pack is None:
            return
        self._reap(wait=False, packs=self._most_packs - 1)
        pack, self._pack = self._pack, None
        if not pack.entries or self._stopping:
            self._blocks.give_back(pack.memory)
            return
        if len(pack.entries) == 1:
            self._blocks.give_back(pack.memory)
            self._send_each(pack.entries)
            return
        try:
            ticket = self._core.open(
                PACK,
                pack.source(partial(self._blocks.give_back, pack.memory)),
                size=pack.size,
                flow=("files", self._request),
                request=self._request,
                attributes={ops.ENTRIES: pack.table},
                on_progress=self._counter() if self.on_progress is not None else None,
                given_up=lambda: self._given_up,
            )
        except CancelledError as err:
            for entry in pack.entries:
                self._failed(entry.path, err)
            return
        self._track(pack.entries, ticket)

    def _send_each(self, entries: Sequence[Entry], refused: Ticket | None = None) -> None:
        """The peer could not keep them as a pack (``refused``): have each arrive, or tell why not."""
        for at, entry in enumerate(entries):
            try:
                self._open(entry)
            except _ENTRY_ERRORS as err:
                self._failed(entry.path, err)
            except AmstError:
                if refused is not None:
                    self._under_way[refused] = entries[at:]  # the session has ended: they are `unfinished`
                raise

    def _open(self, entry: Entry) -> None:
        here = join_path(self._path, entry.path)
        source: Source
        if entry.type is EntryType.FILE:
            file = self._root.open_source(here)
            # what counts is the open file, not the name that was listed a moment ago
            entry = replace(
                entry, size=file.size, mtime_ns=file.mtime_ns, mode=file.mode & 0o7777, identity=file.identity
            )
            try:
                source = FileContent(file, sparse=self._sparse)
            except BaseException:
                file.close()
                raise
        else:
            source = MemorySource(_NOTHING)
        self._track(
            (entry,),
            self._core.open(
                FILE,
                source,
                size=entry.size,
                flow=("files", self._request),
                request=self._request,
                attributes=to_attributes(replace(entry, path=join_path(self._target, entry.path))),
                on_progress=self._counter() if self.on_progress is not None else None,
                on_hold=self._on_hold and entry.type is EntryType.FILE,
                given_up=lambda: self._given_up,
            ),
        )

    def _track(self, entries: Sequence[Entry], ticket: Ticket) -> None:
        self._under_way[ticket] = entries
        self._packs_under_way += len(entries) > 1
        ticket.add_done_callback(self._completed.put)
        if self._given_up:
            ticket.cancel()  # `cancel` may have come before it was among those under way

    def _counter(self) -> Callable[[int, int], None]:
        seen = 0

        def progressed(acknowledged: int, size: int) -> None:
            nonlocal seen
            more, seen = acknowledged - seen, max(seen, acknowledged)
            if more > 0 and self.on_progress is not None:
                self.on_progress(more)

        return progressed

    def _report(self, path: bytes, error: AmstError) -> None:
        """Have the peer know of an entry that it asked for and cannot get."""
        self._core.open(
            FILE,
            _Unreadable(error),
            size=0,
            flow=("files", self._request),
            request=self._request,
            attributes=to_attributes(Entry(join_path(self._target, path), EntryType.FILE, 0, 0)),
        )

    def _reap(self, *, wait: bool, packs: int = PACKS_AT_ONCE) -> None:
        """Account for what has completed; wait until all has, or until no more than ``packs`` are under way."""
        while self._under_way and (wait or self._packs_under_way > packs or not self._completed.empty()):
            ticket = self._completed.get()
            if ticket.error is not None and self._core.error is not None:
                raise copy(self._core.error)
            entries = self._under_way.pop(ticket)
            self._packs_under_way -= len(entries) > 1
            if ticket.error is not None and len(entries) > 1 and not self._stopping:
                if isinstance(ticket.error, UnavailableError):
                    self._may_pack = False
                self._send_each(entries, ticket)
                continue
            for entry in entries:
                if ticket.error is not None:
                    self._failures.append((entry.path, ticket.error))
                if self.on_done is not None:
                    self.on_done(entry, ticket.error)


class _Blocks:
    """Memory for the packs of one `TreeSender`. It counts as that of pipes does: nobody waits for it. Any thread."""

    def __init__(self, core: SessionCore) -> None:
        self._core = core
        self._spare: list[memoryview] = []
        self._count = 0
        self._lock = threading.Lock()
        self._ended = False

    def take(self) -> memoryview | None:
        """One that was used before, and is warm, or a fresh one if it may be had now."""
        with self._lock:
            if self._spare:
                return self._spare.pop()
            if not self._core.memory.reserve_pipe(PACK_BYTES, own=self._count * PACK_BYTES):
                return None
            self._count += 1
        return memoryview(bytearray(PACK_BYTES))

    def give_back(self, part: memoryview) -> None:
        """The block whose beginning ``part`` is may be used again."""
        with self._lock:
            if not self._ended and len(self._spare) < _SPARE_BLOCKS:
                self._spare.append(memoryview(part.obj))
                return
        self._release(1)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            spare, self._spare = self._spare, []
        self._release(len(spare))

    def _release(self, count: int) -> None:
        with self._lock:
            self._count -= count
        for _ in range(count):
            self._core.memory.release_pipe(PACK_BYTES)
        with self._core.lock:
            self._core.room.notify_all()


class _Unreadable(Source):
    """Stands for an entry that could not be read: it is opened, and given up with the reason."""

    def __init__(self, error: AmstError) -> None:
        self._error = error

    def view(self, offset: int, length: int) -> None:
        return None

    def verify(self) -> None:
        raise self._error
