"""What a side that has a root does for its peer: take files, tell about them, send them."""

from __future__ import annotations

import contextlib
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
    BusyError,
    CancelledError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    SourceChangedError,
    StorageError,
    UnavailableError,
)
from ..files.entries import MAX_PATH, Entry, EntryType, WalkError, from_attributes, join_path, split_path, to_attributes
from ..files.listing import Listing
from ..files.root import Parents, Root
from ..wire import requests as ops
from ..wire.fields import AttributeValue
from ..wire.messages import FILE, HOLD, HOLES, PACK, SIZE_UNKNOWN, Open, Reply, Request
from .core import MIN_RATE, SessionCore
from .endpoints import FileContent, MemorySource, Sink, Source, TreeEntrySink
from .listing import describe
from .packs import PACK_BYTES, PACKED_UP_TO, PACKS_AT_ONCE, Pack, PackRoom, PackSink
from .tickets import Ticket

_NOTHING: Final = memoryview(b"")

_ENTRY_ERRORS: Final = (NotFoundError, RefusedError, StorageError, SourceChangedError, CancelledError)
"""What concerns one entry of a tree; the others go on."""

_SPARE_BLOCKS: Final = 2
"""Blocks of a pack's size that are kept for the next one."""

MAX_OPERATION: Final = 32
"""Of the name of an operation, so much is looked at."""

MAX_QUEUED: Final = 1024
"""Questions of one peer that may wait for the disk at once."""

_KNOWN: Final = (ops.PATH, ops.RATE, HOLD, HOLES, ops.AFTER, ops.RECURSIVE)

MAX_LONG_RUNNING: Final = 32
"""Walks through a tree (downloads, measurements, pages of lists) that one session may have under way at once."""

MAX_LISTS: Final = 4
"""Of those, pages of lists: each is an answer of some length that a peer may leave unread."""


class FileService:
    """Serves one session below ``root``; None refuses everything."""

    def __init__(self, core: SessionCore, root: Root | None) -> None:
        self._core = core
        self._root = root
        self._listing = Listing(root) if root is not None else None
        self._lists = 0
        self._queued = 0  # counted up by the control loop and down by the worker: a bound, not to the last one
        self._packs = PackRoom()
        core.accept_kind(FILE, self._accept)
        core.accept_kind(PACK, self._accept_pack)

    def handle(self, request: Request) -> None:
        """Answer a request of the peer; returns at once."""
        # what waits for its turn keeps the little that it needs of a message that may be long
        request = replace(
            request,
            operation=request.operation[:MAX_OPERATION],
            attributes={key: request.attributes[key] for key in _KNOWN if key in request.attributes},
        )
        for key in (ops.PATH, ops.AFTER):
            path = request.attributes.get(key)
            if isinstance(path, bytes) and len(path) > MAX_PATH:
                self._reply(request, StorageError(f"a path of {len(path)} bytes; {MAX_PATH} are allowed"))
                return
        match request.operation:
            case ops.STAT:
                self._queue(request, self._stat)
            case ops.LOOK:
                self._queue(request, self._look)
            case ops.LIST:
                self._in_thread(request, self._list, is_list=True)
            case ops.FETCH:
                self._in_thread(request, self._fetch)
            case ops.MEASURE:
                self._in_thread(request, self._measure)
            case ops.PACE:
                self._answer(request, self._pace)
            case other:
                self._reply(request, ProtocolError(f"operation {other!r} is unknown here"))

    def _accept(self, opened: Open) -> Sink:
        open_ended = opened.size == SIZE_UNKNOWN
        entry = from_attributes(opened.attributes, size=0 if open_ended else opened.size)
        if open_ended and entry.type is not EntryType.FILE:
            raise ProtocolError(f"entry of type {entry.type.value} cannot have a size that is not known")
        return TreeEntrySink(self._core, self._required_root(), entry.path, entry, open_ended=open_ended)

    def _accept_pack(self, opened: Open) -> Sink:
        return PackSink(self._core, self._required_root(), opened, room=self._packs)

    def _required_root(self) -> Root:
        if self._root is None:
            raise RefusedError("this side serves no files (it was started without a root)")
        return self._root

    def _stat(self, request: Request) -> dict[str, AttributeValue]:
        path = _path(request)
        entry = self._required_root().stat(path)
        if entry is None:
            raise NotFoundError("there is nothing of that name")
        return {**to_attributes(entry), ops.SIZE: entry.size}

    def _pace(self, request: Request) -> dict[str, AttributeValue]:
        rate = request.attributes.get(ops.RATE)
        if type(rate) is not int or rate < 0:
            raise ProtocolError(f"{request.operation} with a rate that is no number of bytes")
        self._core.limit_rate_for_peer(max(rate, MIN_RATE) if rate else None)
        return {}

    def _look(self, request: Request) -> dict[str, AttributeValue]:
        return {ops.PRESENT: is_present(self._required_root(), _path(request))}

    def _list(self, request: Request) -> dict[str, AttributeValue]:
        self._required_root()
        assert self._listing is not None, "there is a root"
        after, recursive = request.attributes.get(ops.AFTER, b""), request.attributes.get(ops.RECURSIVE, False)
        if not isinstance(after, bytes) or type(recursive) is not bool:
            raise ProtocolError(f"{request.operation} with {ops.AFTER!r} or {ops.RECURSIVE!r} of another type")
        if len(split_path(after)) > 1 and not recursive:
            raise ProtocolError(f"{request.operation} of one directory, after a path below it")
        page = bytearray()
        entries = self._listing.entries(_path(request), after=after, recursive=recursive)
        with contextlib.closing(entries):
            for found in entries:
                page += ops.encode_entry(describe(found))
                if len(page) >= ops.PAGE_BYTES or self._core.error is not None:
                    return {ops.ENTRIES: bytes(page), ops.MORE: True}
        return {ops.ENTRIES: bytes(page), ops.MORE: False}

    def _queue(self, request: Request, act: Callable[[Request], dict[str, AttributeValue]]) -> None:
        if self._queued >= MAX_QUEUED:
            self._reply(request, BusyError(f"more than {MAX_QUEUED} questions of one session at once"))
            return
        self._queued += 1

        def run() -> None:
            self._queued -= 1
            self._answer(request, act)

        self._core.background.later(run)

    def _in_thread(
        self, request: Request, act: Callable[[Request], dict[str, AttributeValue]], *, is_list: bool = False
    ) -> None:
        core = self._core
        with core.lock:
            refusal = (
                "this side is stopping and takes nothing new" if core.draining
                else f"more than {MAX_LONG_RUNNING} tree operations in one session" if core.serving >= MAX_LONG_RUNNING
                else f"more than {MAX_LISTS} lists in one session" if is_list and self._lists >= MAX_LISTS
                else None
            )  # fmt: skip
            core.serving += refusal is None
            self._lists += is_list and refusal is None
        if refusal is not None:
            self._reply(request, BusyError(refusal))
            return

        def run() -> None:
            reply = None
            try:
                reply = self._outcome(request, act)
            finally:
                with core.lock:
                    core.serving -= 1
                    self._lists -= is_list
                    if reply is not None:
                        core.tell_locked(reply)  # not before: who is answered may ask again at once
                    core.room.notify_all()

        threading.Thread(target=run, name=f"amst-{request.operation}", daemon=True).start()

    def _fetch(self, request: Request) -> dict[str, AttributeValue]:
        root = self._required_root()
        path = _path(request)
        on_hold, sparse = request.attributes.get(HOLD, False), request.attributes.get(HOLES, False)
        if type(on_hold) is not bool or type(sparse) is not bool:
            raise ProtocolError(f"{request.operation} with {HOLD!r} or {HOLES!r} that is neither true nor false")
        # what fails on the way the peer learns entry by entry
        TreeSender(self._core, root, path, request=request.request, on_hold=on_hold, sparse=sparse).send(b"")
        return {}

    def _measure(self, request: Request) -> dict[str, AttributeValue]:
        total, files = measure(self._required_root(), _path(request))
        return {ops.TOTAL_BYTES: total, ops.TOTAL_FILES: files}

    def _answer(self, request: Request, act: Callable[[Request], dict[str, AttributeValue]]) -> None:
        self._core.tell(self._outcome(request, act))

    def _outcome(self, request: Request, act: Callable[[Request], dict[str, AttributeValue]]) -> Reply:
        try:
            return Reply(request.request, "", "", act(request))
        except AmstError as err:
            return _refusal(request, err)

    def _reply(self, request: Request, err: AmstError) -> None:
        self._core.tell(_refusal(request, err))


def _refusal(request: Request, err: AmstError) -> Reply:
    return Reply(request.request, err.kind, err.message, {})


def _path(request: Request) -> bytes:
    path = request.attributes.get(ops.PATH)
    if not isinstance(path, bytes):
        raise ProtocolError(f"{request.operation} without a path")
    return path


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
            added: bool | None = None
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


def measure(root: Root, path: bytes, *, given_up: Callable[[], bool] = lambda: False) -> tuple[int, int]:
    """Bytes and number of the files and links at and below ``path``; what cannot be read does not count.

    Raises:
        NotFoundError, RefusedError, StorageError: nothing can be read at ``path``.
        CancelledError: ``given_up()`` became true.
    """
    total = files = 0
    for found in root.walk(path):
        if given_up():
            raise CancelledError("nobody waits for the sizes any more")
        if not isinstance(found, WalkError) and found.type is not EntryType.DIRECTORY:
            total += found.size
            files += 1
    return total, files


def is_present(root: Root, path: bytes) -> bool:
    """Whether something lies at ``path``, whole or begun, that a copy to it might go on from."""
    if root.stat(path) is not None:
        return True
    try:
        return root.has_partial(path)
    except NotFoundError:
        return False
