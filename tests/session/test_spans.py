"""Files that nobody verifies are sent by the system itself; that one changes or fails is noticed all the same."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amst_core.errors import ClosedError, StorageError
from amst_core.files.sink import FileSink
from amst_core.files.source import FileSource
from amst_core.session.copying import CopyResult, download, upload
from amst_core.session.lanes import SPAN_FROM

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
SIZE = 8 * MIB + 123456


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom(SIZE))
    return path


class Sendfile:
    """Stands for `os.sendfile`: counts, and has ``before(number, socket)`` do what a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.before: Callable[[int, int], object] = lambda number, sock: None
        self._numbers = itertools.count()
        self._sendfile = os.sendfile
        monkeypatch.setattr(os, "sendfile", self._send)

    def _send(self, sock: int, fd: int, offset: int, size: int) -> int:
        self.calls += 1
        self.before(next(self._numbers), sock)
        return self._sendfile(sock, fd, offset, min(size, 300_000))


@pytest.fixture
def sendfile(monkeypatch: pytest.MonkeyPatch) -> Sendfile:
    return Sendfile(monkeypatch)


def only_failure(result: CopyResult) -> tuple[str, str]:
    (failure,) = result.failed
    return failure.kind, os.path.basename(failure.path)


def still_well(pair: Any, root: Path) -> None:
    """No lane was lost, nothing is left of the file, and the session goes on."""
    assert [end.metrics().lane_failures for end in pair.ends] == [0, 0]
    pair.near.send(b"alive").wait(20)
    assert pair.far.recv(timeout=20) == b"alive"
    assert not (root / "there").exists()


@pytest.mark.parametrize("how", ["encrypted", "verified", "unverified"])
@pytest.mark.parametrize("way", ["up", "down"])
def test_only_what_nobody_verifies_is_sent_from_the_file(
    net: Any, root: Path, source: Path, sendfile: Sendfile, tmp_path: Path, way: str, how: str
) -> None:
    small = tmp_path / "small"
    small.write_bytes(os.urandom(SPAN_FROM - 1))
    pair = net.pair(streams=3, plaintext=how != "encrypted", verify=how != "unverified", root=root)
    upload(pair.near, [(source, b"there"), (small, b"small")])
    if way == "down":
        sendfile.calls = 0
        download(pair.near, [(b"there", tmp_path / "back"), (b"small", tmp_path / "small back")])
    copies = (root / "there", root / "small") if way == "up" else (tmp_path / "back", tmp_path / "small back")
    assert [copy.read_bytes() for copy in copies] == [source.read_bytes(), small.read_bytes()]
    assert bool(sendfile.calls) == (how == "unverified")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("after", [0, 1])
def test_what_the_system_will_not_send_is_read_and_sent(
    net: Any, root: Path, source: Path, sendfile: Sendfile, code: int, after: int
) -> None:
    def refuse(number: int, _sock: int) -> None:
        if number >= after:
            raise OSError(code, os.strerror(code))

    sendfile.before = refuse
    pair = net.pair(plaintext=True, verify=False, root=root)
    assert upload(pair.near, [(source, b"there")]).failed == ()
    assert (root / "there").read_bytes() == source.read_bytes()
    assert sendfile.calls > after
    assert [end.metrics().lane_failures for end in pair.ends] == [0, 0]


@pytest.mark.parametrize("length", [0, 100_000, MIB + 1])
def test_a_file_that_is_cut_off_while_it_is_sent_fails_alone(
    net: Any, root: Path, source: Path, sendfile: Sendfile, length: int
) -> None:
    sendfile.before = lambda number, _sock: os.truncate(source, length) if number == 2 else None
    pair = net.pair(plaintext=True, verify=False, root=root)
    assert only_failure(upload(pair.near, [(source, b"there")])) == ("source_changed", "source")
    still_well(pair, root)


def test_a_file_that_cannot_be_read_fails_alone(
    net: Any, root: Path, source: Path, sendfile: Sendfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: FileSource, offset: int, view: memoryview) -> None:
        raise StorageError(f"cannot read {self.name}: bad sector")

    def refuse(number: int, _sock: int) -> None:
        if number > 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileSource, "read_into", unreadable)
    sendfile.before = refuse
    pair = net.pair(plaintext=True, verify=False, root=root)
    assert only_failure(upload(pair.near, [(source, b"there")])) == ("storage", "source")
    still_well(pair, root)


class HeldWrite:
    """The receiver's write of the last chunk waits for ``go_on``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        write = FileSink.write

        def held(sink: FileSink, offset: int, view: memoryview, crc: int | None = None) -> None:
            if offset + len(view) == SIZE:
                self.reached.set()
                assert self.go_on.wait(60)
            write(sink, offset, view, crc)

        monkeypatch.setattr(FileSink, "write", held)


def test_a_change_before_the_last_byte_has_arrived_is_noticed(
    net: Any, spawn: Any, root: Path, source: Path, sendfile: Sendfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system sends what the file has when it gets round to it, which may be after the lanes are done with it."""
    held = HeldWrite(monkeypatch)
    pair = net.pair(streams=3, plaintext=True, verify=False, root=root)
    copying = spawn(upload, pair.near, [(source, b"there")])
    assert held.reached.wait(20)
    (out,) = pair.near.core.engine._outgoing.values()
    net.wait_until(lambda: out.cursor == out.size and not out.reading, "all of it to be handed to lanes")
    net.stays(lambda: not out.ended, "the source counts as read while some of it is on its way")
    with source.open("r+b") as file:
        file.write(b"changed")
    held.go_on.set()
    assert only_failure(copying.outcome()) == ("source_changed", "source")
    still_well(pair, root)


def test_a_lane_that_dies_in_the_middle_is_made_up_for(
    net: Any, root: Path, source: Path, sendfile: Sendfile
) -> None:
    def kill(number: int, sock: int) -> None:
        if number == 3:
            (lane,) = [worker for worker in pair.near.core.lanes.values() if worker.lane._sock.fileno() == sock]
            pair.far.core.lanes[lane.id].lane.abort()

    pair = net.pair(streams=3, plaintext=True, verify=False, root=root)
    sendfile.before = kill
    assert upload(pair.near, [(source, b"there")]).failed == ()
    assert (root / "there").read_bytes() == source.read_bytes()
    net.wait_until(lambda: [end.metrics().lane_failures for end in pair.ends] == [1, 1], "both ends to have noticed")


def test_a_session_that_ends_in_the_middle_leaves_what_the_next_one_goes_on_from(
    net: Any, spawn: Any, root: Path, source: Path, sendfile: Sendfile
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold(number: int, _sock: int) -> None:
        if number >= 12:
            reached.set()
            assert go_on.wait(60)

    sendfile.before = hold
    pair = net.pair(plaintext=True, verify=False, root=root)
    copying = spawn(upload, pair.near, [(source, b"there")])
    assert reached.wait(20)
    net.wait_until(lambda: pair.far.core.engine.bytes_verified, "something to have arrived")
    pair.near.abort()
    go_on.set()
    assert isinstance(copying.error(), ClosedError)
    assert pair.near.wait_closed(10) and pair.far.wait_closed(10)
    again = net.connect(pair.server, plaintext=True, verify=False)
    result = upload(again, [(source, b"there")])
    assert (root / "there").read_bytes() == source.read_bytes()
    assert result.resumed_bytes > 0
