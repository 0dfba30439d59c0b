"""What a side that has a root does for its peer: take files, tell about them, send them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Final

from ..errors import AmstError, BusyError, NotFoundError, ProtocolError, RefusedError, StorageError
from ..files.entries import Entry, EntryType, WalkError, from_attributes, join_path, to_attributes
from ..files.root import Root
from ..wire import requests as ops
from ..wire.fields import AttributeValue
from ..wire.messages import FILE, Open, Reply, Request
from .core import SessionCore
from .endpoints import FileContent, MemorySource, Sink, Source, TreeEntrySink
from .tickets import Ticket

_NOTHING: Final = memoryview(b"")

MAX_LONG_RUNNING: Final = 32
"""Walks through a tree (downloads, measurements) that one session may have under way at once."""


class FileService:
    """Serves one session below ``root``; None refuses everything."""

    def __init__(self, core: SessionCore, root: Root | None) -> None:
        self._core = core
        self._root = root
        core.accept_kind(FILE, self._accept)

    def handle(self, request: Request) -> None:
        """Answer a request of the peer; returns at once."""
        match request.operation:
            case ops.STAT:
                self._core.later(lambda: self._answer(request, self._stat))
            case ops.FETCH:
                self._in_thread(request, self._fetch)
            case ops.MEASURE:
                self._in_thread(request, self._measure)
            case other:
                self._reply(request, ProtocolError(f"operation {other!r} is unknown here"))

    def _accept(self, opened: Open) -> Sink:
        entry = from_attributes(opened.attributes, size=opened.size)
        return TreeEntrySink(self._required_root(), entry.path, entry)

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

    def _in_thread(self, request: Request, act: Callable[[Request], dict[str, AttributeValue]]) -> None:
        core = self._core
        with core.lock:
            refusal = (
                "this side is stopping and takes nothing new" if core.draining
                else f"more than {MAX_LONG_RUNNING} tree operations in one session" if core.serving >= MAX_LONG_RUNNING
                else None
            )  # fmt: skip
            core.serving += refusal is None
        if refusal is not None:
            self._reply(request, BusyError(refusal))
            return

        def run() -> None:
            try:
                self._answer(request, act)
            finally:
                with core.lock:
                    core.serving -= 1
                    core.room.notify_all()

        threading.Thread(target=run, name=f"amst-{request.operation}", daemon=True).start()

    def _fetch(self, request: Request) -> dict[str, AttributeValue]:
        root = self._required_root()
        path = _path(request)
        # what fails on the way the peer learns entry by entry
        TreeSender(self._core, root, path, request=request.request).send(b"")
        return {}

    def _measure(self, request: Request) -> dict[str, AttributeValue]:
        total, files = measure(self._required_root(), _path(request))
        return {ops.TOTAL_BYTES: total, ops.TOTAL_FILES: files}

    def _answer(self, request: Request, act: Callable[[Request], dict[str, AttributeValue]]) -> None:
        try:
            attributes = act(request)
        except AmstError as err:
            self._reply(request, err)
        else:
            self._core.tell(Reply(request.request, "", "", attributes))

    def _reply(self, request: Request, err: AmstError) -> None:
        self._core.tell(Reply(request.request, err.kind, err.message, {}))


def _path(request: Request) -> bytes:
    path = request.attributes.get(ops.PATH)
    if not isinstance(path, bytes):
        raise ProtocolError(f"{request.operation} without a path")
    return path


class TreeSender:
    """Sends what lies at ``path`` below ``root``: a file, a link, or a directory with all that is in it.

    Files travel many at once; directories follow when everything below them has arrived, so that their
    modes and times stay what they are told to be.
    """

    def __init__(self, core: SessionCore, root: Root, path: bytes, *, request: int = 0) -> None:
        self._core = core
        self._root = root
        self._path = path
        self._request = request
        self._completed: queue.SimpleQueue[tuple[Entry, Ticket]] = queue.SimpleQueue()
        self._open_count = 0
        self.on_progress: Callable[[int], None] | None = None  # more bytes acknowledged
        self.on_done: Callable[[Entry, AmstError | None], None] | None = None

    def send(self, target: bytes) -> list[tuple[bytes, AmstError]]:
        """Send everything, naming the peer ``target`` + what is below; return what failed, path by path.

        Raises:
            NotFoundError, RefusedError, StorageError: nothing can be read at ``path``.
            AmstError: the session ended.
        """
        failures: list[tuple[bytes, AmstError]] = []
        directories: list[Entry] = []
        for found in self._root.walk(self._path):
            try:
                if isinstance(found, WalkError):
                    raise found.error
                if found.type is EntryType.DIRECTORY:
                    directories.append(found)
                else:
                    self._open(found, target)
            except (NotFoundError, RefusedError, StorageError) as err:
                failures.append((found.path, err))
                if self._request:
                    self._report(found.path, err, target)
            self._reap(failures, wait=False)
        self._reap(failures, wait=True)
        for directory in directories:
            self._open(directory, target)
            self._reap(failures, wait=False)
        self._reap(failures, wait=True)
        return failures

    def _open(self, entry: Entry, target: bytes) -> None:
        here = join_path(self._path, entry.path)
        source: Source
        if entry.type is EntryType.FILE:
            file = self._root.open_source(here)
            # what counts is the open file, not the name that was listed a moment ago
            entry = replace(entry, size=file.size, mtime_ns=file.mtime_ns, mode=file.mode & 0o7777)
            source = FileContent(file)
        else:
            source = MemorySource(_NOTHING)
        self._track(
            entry,
            self._core.open(
                FILE,
                source,
                size=entry.size,
                flow=("files", self._request),
                request=self._request,
                attributes=to_attributes(replace(entry, path=join_path(target, entry.path))),
                on_progress=self._counter() if self.on_progress is not None else None,
            ),
        )

    def _track(self, entry: Entry, ticket: Ticket) -> None:
        self._open_count += 1
        ticket.add_done_callback(lambda done: self._completed.put((entry, done)))

    def _counter(self) -> Callable[[int, int], None]:
        seen = 0

        def progressed(acknowledged: int, size: int) -> None:
            nonlocal seen
            more, seen = acknowledged - seen, max(seen, acknowledged)
            if more > 0 and self.on_progress is not None:
                self.on_progress(more)

        return progressed

    def _report(self, path: bytes, error: AmstError, target: bytes) -> None:
        """Have the peer know of an entry that it asked for and cannot get."""
        self._core.open(
            FILE,
            _Unreadable(error),
            size=0,
            flow=("files", self._request),
            request=self._request,
            attributes=to_attributes(Entry(join_path(target, path), EntryType.FILE, 0, 0)),
        )

    def _reap(self, failures: list[tuple[bytes, AmstError]], *, wait: bool) -> None:
        """Account for completed transfers; with ``wait`` for all that are open."""
        while self._open_count and (wait or not self._completed.empty()):
            entry, ticket = self._completed.get()
            self._open_count -= 1
            if ticket.error is not None:
                if self._core.error is not None:
                    raise copy(self._core.error)
                failures.append((entry.path, ticket.error))
            if self.on_done is not None:
                self.on_done(entry, ticket.error)


class _Unreadable(Source):
    """Stands for an entry that could not be read: it is opened, and given up with the reason."""

    def __init__(self, error: AmstError) -> None:
        self._error = error

    def view(self, offset: int, length: int) -> None:
        return None

    def verify(self) -> None:
        raise self._error


def measure(root: Root, path: bytes) -> tuple[int, int]:
    """Bytes and number of the files and links at and below ``path``; what cannot be read does not count.

    Raises:
        NotFoundError, RefusedError, StorageError: nothing can be read at ``path``.
    """
    total = files = 0
    for found in root.walk(path):
        if not isinstance(found, WalkError) and found.type is not EntryType.DIRECTORY:
            total += found.size
            files += 1
    return total, files
