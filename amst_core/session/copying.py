"""Copying files, links and directories over a session, up and down, with an account of what failed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from ..errors import AmstError, NotFoundError, RefusedError
from ..files.entries import Entry, EntryType, display_path, from_attributes, join_path
from ..files.root import Root
from ..wire import requests as ops
from ..wire.messages import Open
from .endpoints import Sink, TreeEntrySink
from .service import TreeSender, measure

if TYPE_CHECKING:
    from .session import Session

LocalPath: TypeAlias = str | bytes | os.PathLike[str]

_log = logging.getLogger("amst.session")

_REPORT_EVERY_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """How far a copy is. Totals are None until they are known."""

    bytes_done: int
    bytes_total: int | None
    files_done: int
    files_total: int | None


@dataclass(frozen=True, slots=True)
class CopyFailure:
    """One entry that did not arrive, and why; ``kind`` is that of the error."""

    path: str
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What a copy did. ``seconds``: first payload byte offered to last byte acknowledged as verified."""

    bytes: int
    files: int
    seconds: float
    failed: tuple[CopyFailure, ...]


ProgressCallback: TypeAlias = Callable[[CopyProgress], None]


class _Account:
    """Counts what a copy does, from several threads, and reports it a few times a second."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._lock = threading.Lock()
        self._progress = progress
        self._reported_at = 0.0
        self._bytes = 0
        self._files = 0
        self._file_bytes = 0
        self._totals: tuple[int, int] | None = None
        self._failed: list[CopyFailure] = []
        self._started: float | None = None
        self._ended = 0.0

    @property
    def wants_totals(self) -> bool:
        return self._progress is not None

    def begin(self) -> None:
        with self._lock:
            if self._started is None:
                self._started = time.monotonic()

    def expect(self, size: int, files: int) -> None:
        """The totals are known."""
        with self._lock:
            self._totals = (size, files)

    def moved(self, size: int) -> None:
        """``size`` more bytes are held by the receiver."""
        with self._lock:
            self._bytes += size
            self._ended = time.monotonic()
        self._report()

    def done(self, entry: Entry) -> None:
        """An entry has arrived."""
        if entry.type is not EntryType.DIRECTORY:
            with self._lock:
                self._files += 1
                self._file_bytes += entry.size
                self._ended = time.monotonic()
            self._report()

    def failed(self, path: bytes, error: AmstError) -> None:
        """An entry did not arrive."""
        with self._lock:
            self._failed.append(CopyFailure(display_path(path), error.kind, error.message))

    def result(self) -> CopyResult:
        self._report(last=True)
        with self._lock:
            seconds = max(0.0, self._ended - self._started) if self._started is not None else 0.0
            return CopyResult(self._file_bytes, self._files, seconds, tuple(self._failed))

    def _report(self, *, last: bool = False) -> None:
        if self._progress is None:
            return
        with self._lock:
            now = time.monotonic()
            if not last and now - self._reported_at < _REPORT_EVERY_S:
                return
            self._reported_at = now
            size, files = self._totals or (None, None)
            # a retransmitted or failed file may have been counted in part
            done = min(self._bytes, size) if size is not None else self._bytes
            state = CopyProgress(done, size, self._files, files)
        try:
            self._progress(state)
        except Exception:
            _log.exception("a progress callback of the application raised")


def upload(
    session: Session, items: Sequence[tuple[LocalPath, bytes]], *, progress: ProgressCallback | None = None
) -> CopyResult:
    """Copy each local source to its full remote name below the peer's root, directories with all in them.

    What cannot be read or written is in the result's ``failed``; the rest arrives.

    Raises:
        AmstError: the session ended; its ``partial`` attribute holds the `CopyResult` so far.
    """
    account = _Account(progress)
    opened: list[tuple[Root, bytes, bytes, LocalPath]] = []
    try:
        for local, remote in items:
            try:
                opened.append((*_open_local(local), remote, local))
            except AmstError as err:
                account.failed(os.fsencode(local), err)
        if account.wants_totals:
            threading.Thread(
                target=_measure_local, args=(account, [item[:2] for item in opened]), name="amst-measure", daemon=True
            ).start()
        for root, name, remote, local in opened:
            account.begin()
            sender = TreeSender(session.core, root, name)
            sender.on_progress = account.moved
            sender.on_done = lambda entry, error: account.done(entry) if error is None else None
            try:
                failures = sender.send(remote)
            except AmstError as err:
                if session.error is not None:
                    raise
                failures = [(b"", err)]
            for path, error in failures:
                account.failed(join_path(os.fsencode(local), path), error)
    except AmstError as err:
        raise _with_partial(err, account) from None
    finally:
        for root, *_ in opened:
            root.close()
    return account.result()


def download(
    session: Session, items: Sequence[tuple[bytes, LocalPath]], *, progress: ProgressCallback | None = None
) -> CopyResult:
    """Copy each remote source, a path below the peer's root, to its full local name; otherwise as `upload`."""
    account = _Account(progress)
    if account.wants_totals:
        threading.Thread(
            target=_measure_remote, args=(session, account, [r for r, _ in items]), name="amst-measure", daemon=True
        ).start()
    try:
        for remote, local in items:
            try:
                _download_one(session, remote, local, account)
            except AmstError as err:
                if session.error is not None:
                    raise
                account.failed(remote, err)
    except AmstError as err:
        raise _with_partial(err, account) from None
    return account.result()


def raise_first(result: CopyResult) -> None:
    """Raise the first failure of a copy, if there is one."""
    from ..errors import error_from_kind

    for failure in result.failed:
        raise error_from_kind(failure.kind, failure.message, path=failure.path)


def _download_one(session: Session, remote: bytes, local: LocalPath, account: _Account) -> None:
    path = os.fsencode(local)
    directory, name = os.path.split(path.rstrip(b"/"))
    if name in (b"", b".", b".."):
        raise RefusedError(f"{display_path(path)} is not a name for a copy; write where it shall go in full")
    try:
        root = Root(directory or b".")
    except NotFoundError as err:
        raise RefusedError(f"the target directory {display_path(directory)} does not exist; make it first") from err
    with root:
        receiver = _Receiver(root, name, remote, account)
        try:
            session.requests.ask(ops.FETCH, {ops.PATH: remote}, acceptor=receiver.accept).wait()
        except AmstError:
            receiver.wait()
            raise
        receiver.wait()


class _Receiver:
    """Takes what answers one FETCH: the entry itself, or everything below it, under ``name``."""

    def __init__(self, root: Root, name: bytes, remote: bytes, account: _Account) -> None:
        self._root = root
        self._name = name
        self._remote = remote
        self._account = account
        self._open = 0
        self._changed = threading.Condition()

    def accept(self, opened: Open) -> Sink:
        entry = from_attributes(opened.attributes, size=opened.size)
        self._account.begin()
        try:
            sink = _Counted(self._root, join_path(self._name, entry.path), entry, self._ended)
        except AmstError as err:
            self._account.failed(join_path(self._remote, entry.path), err)
            raise
        with self._changed:
            self._open += 1
        sink.on_stored = self._account.moved
        return sink

    def wait(self) -> None:
        """Until all that was accepted has ended: a peer's reply may overtake what became of a failed entry."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)

    def _ended(self, entry: Entry, error: AmstError | None) -> None:
        if error is None:
            self._account.done(entry)
        else:
            self._account.failed(join_path(self._remote, entry.path), error)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()


class _Counted(TreeEntrySink):
    """A received entry that tells how it fares; ``on_end`` is called once."""

    def __init__(
        self, root: Root, path: bytes, entry: Entry, on_end: Callable[[Entry, AmstError | None], None]
    ) -> None:
        super().__init__(root, path, entry)
        self._on_end = on_end
        self.on_stored: Callable[[int], None] = lambda size: None

    def store(self, start: int, view: memoryview) -> None:
        super().store(start, view)
        self.on_stored(view.nbytes)

    def finish(self, total: int) -> None:
        super().finish(total)
        self._on_end(self.entry, None)

    def abort(self, reason: AmstError) -> None:
        super().abort(reason)
        self._on_end(self.entry, reason)


def _open_local(local: LocalPath) -> tuple[Root, bytes]:
    """The directory that holds ``local``, resolved normally, and the name in it."""
    path = os.fsencode(local)
    if not os.path.lexists(path):
        raise NotFoundError(f"{display_path(path)} does not exist", path=display_path(path))
    directory, name = os.path.split(path.rstrip(b"/") or b"/")
    if name in (b"", b".", b".."):
        # a directory named by where one stands: there is no name to look up in its parent
        return Root(path), b""
    return Root(directory or b"."), name


def _measure_local(account: _Account, sources: list[tuple[Root, bytes]]) -> None:
    try:
        sizes = [measure(root, name) for root, name in sources]
    except AmstError:
        return  # the copy itself tells what is wrong
    account.expect(sum(size for size, _ in sizes), sum(files for _, files in sizes))


def _measure_remote(session: Session, account: _Account, paths: Sequence[bytes]) -> None:
    total = files = 0
    try:
        for path in paths:
            reply = session.requests.ask(ops.MEASURE, {ops.PATH: path}).wait()
            size, count = reply.get(ops.TOTAL_BYTES), reply.get(ops.TOTAL_FILES)
            if type(size) is not int or type(count) is not int:
                return
            total += size
            files += count
    except AmstError:
        return  # the copy itself tells what is wrong
    account.expect(total, files)


def _with_partial(err: AmstError, account: _Account) -> AmstError:
    err.partial = account.result()
    return err
