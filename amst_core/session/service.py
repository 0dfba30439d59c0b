"""What a side that has a root does for its peer: take files, tell about them, send them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ..errors import (
    AmstError,
    BusyError,
    CancelledError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    StorageError,
)
from ..files.entries import MAX_PATH, EntryType, WalkError, from_attributes, split_path, to_attributes
from ..files.listing import Listing
from ..files.root import Root
from ..units import MIN_RATE
from ..wire import requests as ops
from ..wire.fields import AttributeValue
from ..wire.messages import FILE, HOLD, HOLES, PACK, SIZE_UNKNOWN, Open, Reply, Request
from .core import SessionCore
from .endpoints import Sink, TreeEntrySink
from .listing import describe
from .packs import PackRoom, PackSink
from .sending import TreeSender

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
