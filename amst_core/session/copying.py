"""Copying files, links and directories over a session, up and down, with an account of what failed."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

from ..errors import (
    AmstError,
    BrokenError,
    CancelledError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    error_from_kind,
)
from ..files.entries import Entry, EntryType, display_path, from_attributes, join_path
from ..files.root import Root
from ..files.sink import Recovered
from ..wire import requests as ops
from ..wire.fields import AttributeValue
from ..wire.messages import HOLD, HOLES, PACK, Open, holes_of
from .core import SessionCore
from .endpoints import Sink, TreeEntrySink
from .packs import PackRoom, PackSink
from .requests import PendingRequest
from .sending import TreeSender
from .service import is_present, measure

if TYPE_CHECKING:
    from .session import Session

LocalPath: TypeAlias = str | bytes | os.PathLike[str]

_log = logging.getLogger("amst.session")

_REPORT_EVERY_S: Final = 0.1
_LOOK_EVERY_S: Final = 0.2


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
    """What a copy did. ``seconds``: first payload byte offered to last byte acknowledged as verified.

    ``bytes`` are those of the files that arrived; of them and of what is still on its way, ``resumed_bytes`` were
    there from an earlier try and did not travel again.
    """

    bytes: int
    files: int
    seconds: float
    resumed_bytes: int
    failed: tuple[CopyFailure, ...]


ProgressCallback: TypeAlias = Callable[[CopyProgress], None]


class Account:
    """Counts what a copy does, from several threads, and reports it a few times a second."""

    def __init__(self, session: Session, progress: ProgressCallback | None) -> None:
        self._lock = threading.Lock()
        self._session = session
        self._resumed_before = session.report.resumed_bytes
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
            resumed = self._session.report.resumed_bytes - self._resumed_before
            return CopyResult(self._file_bytes, self._files, seconds, resumed, tuple(self._failed))

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


class Stop:
    """Asks copies to begin nothing new and to return when what is under way has ended (from any thread).

    `cancel` gives up what is under way as well: whoever receives it removes what there is of it.
    """

    def __init__(self) -> None:
        self.asked = False
        self.cancelled = False
        self._stops: list[Callable[[], None]] = []
        self._cancels: list[Callable[[], None]] = []

    def ask(self) -> None:
        self.asked = True
        for stop in list(self._stops):
            stop()

    def cancel(self) -> None:
        self.cancelled = True
        self.ask()
        for cancel in list(self._cancels):
            cancel()

    def watch(self, *, stop: Callable[[], None] | None = None, cancel: Callable[[], None]) -> None:
        """Have these called when it is asked for; each may be called twice, and at once."""
        if stop is not None:
            self._stops.append(stop)
            if self.asked:
                stop()
        self._cancels.append(cancel)
        if self.cancelled:
            cancel()


def upload(
    session: Session,
    items: Sequence[tuple[LocalPath, bytes]],
    *,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> CopyResult:
    """Copy each local source to its full remote name below the peer's root, directories with all in them.

    What cannot be read or written is in the result's ``failed``; the rest arrives. Where the target is there already,
    whole or begun, each file is compared first and only what is missing is sent.

    Raises:
        AmstError: the session ended; its ``partial`` attribute holds the `CopyResult` so far, in ``failed`` what was
            under way.
    """
    stop = stop or Stop()
    account = Account(session, progress)
    opened: list[tuple[Root, bytes, bytes, LocalPath]] = []
    try:
        for local, remote in items:
            try:
                opened.append((*open_local(local), remote, local))
            except AmstError as err:
                account.failed(os.fsencode(local), err)
        if account.wants_totals:
            threading.Thread(
                target=_measure_local,
                args=(account, [item[:2] for item in opened], stop),
                name="amst-measure",
                daemon=True,
            ).start()
        looks = [session.requests.ask(ops.LOOK, {ops.PATH: remote}) for _, _, remote, _ in opened]
        for look in looks:
            stop.watch(cancel=look.cancel)
        for (root, name, remote, local), look in zip(opened, looks, strict=True):
            if stop.asked:
                break
            on_hold = _is_present(look)
            account.begin()
            sender = TreeSender(session.core, root, name, on_hold=on_hold)
            stop.watch(stop=sender.stop, cancel=sender.cancel)
            sender.on_progress = account.moved
            sender.on_done = lambda entry, error: account.done(entry) if error is None else None
            try:
                failures = sender.send(remote)
            except AmstError as err:
                if session.error is not None:
                    for entry, arrived in sender.unfinished():
                        how_far = f"{arrived} of {entry.size} bytes had arrived"
                        lost = error_from_kind(err.kind, f"not finished, {how_far}")
                        account.failed(join_path(os.fsencode(local), entry.path), lost)
                    raise
                failures = [(b"", err)]
            for path, error in failures:
                account.failed(join_path(os.fsencode(local), path), error)
    except AmstError as err:
        raise with_partial(err, account) from None
    finally:
        for root, *_ in opened:
            root.close()
    return account.result()


def download(
    session: Session,
    items: Sequence[tuple[bytes, LocalPath]],
    *,
    progress: ProgressCallback | None = None,
    stop: Stop | None = None,
) -> CopyResult:
    """Copy each remote source, a path below the peer's root, to its full local name; otherwise as `upload`."""
    stop = stop or Stop()
    account = Account(session, progress)
    if account.wants_totals:
        threading.Thread(
            target=_measure_remote,
            args=(session, account, [r for r, _ in items], stop),
            name="amst-measure",
            daemon=True,
        ).start()
    try:
        for remote, local in items:
            if stop.asked:
                break
            try:
                _download_one(session, remote, local, account, stop)
            except AmstError as err:
                if session.error is not None:
                    raise
                account.failed(remote, err)
    except AmstError as err:
        raise with_partial(err, account) from None
    return account.result()


def raise_first(result: CopyResult) -> None:
    """Raise the first failure of a copy, if there is one."""
    for failure in result.failed:
        raise error_from_kind(failure.kind, failure.message, path=failure.path)


def _is_present(look: PendingRequest) -> bool:
    try:
        return look.wait().get(ops.PRESENT) is True
    except BrokenError:
        raise
    except AmstError:
        return False  # the copy itself tells what is wrong


def _download_one(session: Session, remote: bytes, local: LocalPath, account: Account, stop: Stop) -> None:
    path = os.fsencode(local)
    directory, name = os.path.split(path.rstrip(b"/"))
    if name in (b"", b".", b".."):
        raise RefusedError(f"{display_path(path)} is not a name for a copy; write where it shall go in full")
    try:
        root = Root(directory or b".", partials=session.partials)
    except NotFoundError as err:
        raise RefusedError(f"the target directory {display_path(directory)} does not exist; make it first") from err
    with root:
        receiver = _Receiver(session.core, root, name, remote, account, stop)
        wish: dict[str, AttributeValue] = {ops.PATH: remote, HOLD: is_present(root, name), HOLES: True}
        try:
            asked = session.requests.ask(ops.FETCH, wish, acceptor=receiver.accept)
            stop.watch(cancel=receiver.cancel)
            stop.watch(cancel=asked.cancel)  # the peer goes on to offer, and is refused
            while not asked.answered_within(_LOOK_EVERY_S):
                if stop.asked and receiver.is_idle:
                    return  # the peer goes on to offer, and is refused, until the session ends
            asked.wait()
        except AmstError:
            receiver.wait()
            raise
        receiver.wait()
        if not receiver.answered:
            raise ProtocolError(f"{session.peer} says that it sent {display_path(remote)}, and sent nothing")


class _Receiver:
    """Takes what answers one FETCH: the entry itself, or everything below it, under ``name``."""

    def __init__(
        self, core: SessionCore, root: Root, name: bytes, remote: bytes, account: Account, stop: Stop
    ) -> None:
        self._core = core
        self._stop = stop
        self._root = root
        self._name = name
        self._remote = remote
        self._account = account
        self._open: set[int] = set()  # transfers under way
        self._packs = PackRoom()
        self.answered = False  # something was offered
        self._changed = threading.Condition()

    def accept(self, opened: Open) -> Sink:
        self.answered = True
        if opened.kind == PACK:
            return self._accept_pack(opened)
        try:
            entry = from_attributes(opened.attributes, size=opened.size)
        except ProtocolError:
            raise
        except AmstError as err:
            self._account.failed(self._remote, err)
            raise
        if self._stop.asked:
            raise _stopping()
        self._account.begin()
        try:
            ended = partial(self._ended, opened.transfer)
            sink = _Counted(self._core, self._root, join_path(self._name, entry.path), entry, ended)
        except AmstError as err:
            self._account.failed(join_path(self._remote, entry.path), err)
            raise
        with self._changed:
            self._open.add(opened.transfer)
        sink.on_stored = self._account.moved
        sink.leave_out(sum(end - start for start, end in holes_of(opened)))
        return sink

    def _accept_pack(self, opened: Open) -> Sink:
        """What goes wrong with a pack, the entries tell one by one, for then they come so."""
        if self._stop.asked:
            raise _stopping()
        self._account.begin()
        sink = PackSink(
            self._core,
            self._root,
            opened,
            room=self._packs,
            base=self._name,
            on_stored=self._account.moved,
            on_kept=self._kept,
            on_end=partial(self._let_go, opened.transfer),
        )
        with self._changed:
            self._open.add(opened.transfer)
        return sink

    def _kept(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._account.done(entry)

    @property
    def is_idle(self) -> bool:
        """Nothing is under way."""
        return not self._open

    def wait(self) -> None:
        """Until all that was accepted has ended: a peer's reply may overtake what became of a failed entry."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)

    def cancel(self) -> None:
        """Give up what is under way: what there is of it is removed (any thread)."""
        with self._core.lock, self._changed:  # behind an `accept` that has not seen it
            under_way = list(self._open)
        for transfer in under_way:
            self._core.drop(transfer, _stopping())

    def _ended(self, transfer: int, entry: Entry, error: AmstError | None) -> None:
        if error is None:
            self._account.done(entry)
        else:
            self._account.failed(join_path(self._remote, entry.path), error)
        self._let_go(transfer)

    def _let_go(self, transfer: int) -> None:
        with self._changed:
            self._open.discard(transfer)
            self._changed.notify_all()


class _Counted(TreeEntrySink):
    """A received entry that tells how it fares; ``on_end`` is called once."""

    def __init__(
        self,
        core: SessionCore,
        root: Root,
        path: bytes,
        entry: Entry,
        on_end: Callable[[Entry, AmstError | None], None],
    ) -> None:
        super().__init__(core, root, path, entry)
        self._on_end = on_end
        self.on_stored: Callable[[int], None] = lambda size: None
        self._left_out = 0

    def store(self, start: int, view: memoryview, crc: int | None = None) -> None:
        super().store(start, view, crc)
        self.on_stored(view.nbytes)

    def leave_out(self, size: int) -> None:
        """So many bytes are zeros, and will not be stored."""
        self._left_out = size
        self.on_stored(size)

    def recover(self) -> Recovered:
        found = super().recover()
        self.on_stored(sum(end - start for start, end in found.held))
        return found

    def adopt(self) -> None:
        super().adopt()
        self.on_stored(self.entry.size - self._left_out)

    def finish(self, total: int) -> None:
        super().finish(total)
        self._on_end(self.entry, None)

    def abort(self, reason: AmstError, *, keep: bool = False) -> None:
        super().abort(reason, keep=keep)
        self._on_end(self.entry, reason)


def _stopping() -> CancelledError:
    return CancelledError("this side is stopping and takes nothing new")


def open_local(local: LocalPath) -> tuple[Root, bytes]:
    """The directory that holds ``local``, resolved normally, and the name in it."""
    path = os.fsencode(local)
    if not os.path.lexists(path):
        raise NotFoundError(f"{display_path(path)} does not exist", path=display_path(path))
    directory, name = os.path.split(path.rstrip(b"/") or b"/")
    if name in (b"", b".", b".."):
        # a directory named by where one stands: there is no name to look up in its parent
        return Root(path), b""
    return Root(directory or b"."), name


def _measure_local(account: Account, sources: list[tuple[Root, bytes]], stop: Stop) -> None:
    try:
        sizes = [measure(root, name, given_up=lambda: stop.asked) for root, name in sources]
    except AmstError:
        return  # the copy itself tells what is wrong
    account.expect(sum(size for size, _ in sizes), sum(files for _, files in sizes))


def _measure_remote(session: Session, account: Account, paths: Sequence[bytes], stop: Stop) -> None:
    total = files = 0
    try:
        for path in paths:
            asked = session.requests.ask(ops.MEASURE, {ops.PATH: path})
            stop.watch(cancel=asked.cancel)
            reply = asked.wait()
            size, count = reply.get(ops.TOTAL_BYTES), reply.get(ops.TOTAL_FILES)
            if type(size) is not int or type(count) is not int:
                return
            total += size
            files += count
    except AmstError:
        return  # the copy itself tells what is wrong
    account.expect(total, files)


def with_partial(err: AmstError, account: Account) -> AmstError:
    """``err``, which ended the session, with what had been done."""
    err.partial = account.result()
    return err
