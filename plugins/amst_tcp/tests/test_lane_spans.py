"""What a TCP lane promises of payloads that lie in files: the system sends them, and frames stay whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import amst_tcp.lane
from amst_core.errors import BrokenError, BusyError, ClosedError
from amst_core.interfaces import HEADER_SIZE, FileSpan, LaneTimeouts
from amst_tcp.lane import TcpLane

LanePairs = Callable[..., tuple[TcpLane, TcpLane]]
Spawn = Callable[[Callable[[], Any]], Any]
WaitUntil = Callable[[Callable[[], bool], str], None]
Files = Callable[[bytes], int]

EMPTY = memoryview(b"")
SIZE = 300_000
MORE_THAN_BUFFERS = 256 << 20


def header(number: int) -> bytes:
    return number.to_bytes(4, "big") * (HEADER_SIZE // 4)


@pytest.fixture
def files() -> Iterator[Files]:
    """Makes open files in memory; closed after the test."""
    made: list[int] = []

    def make(content: bytes) -> int:
        fd = os.memfd_create("span")
        made.append(fd)
        os.write(fd, content)
        return fd

    yield make
    for fd in made:
        os.close(fd)


class Reads:
    """A span's ``read`` as promised; notes what was asked for."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.asked: list[tuple[int, int]] = []

    def __call__(self, at: int, view: memoryview) -> None:
        self.asked.append((at, view.nbytes))
        got = os.preadv(self._fd, [view], at)
        view[got:] = bytes(view.nbytes - got)


def span(fd: int, *, offset: int = 0, nbytes: int = SIZE) -> FileSpan:
    return FileSpan(fd, offset, nbytes, Reads(fd))


def carry(near: TcpLane, far: TcpLane, spawn: Spawn, what: FileSpan) -> bytes:
    """Send a span and an empty frame after it; the span's bytes as they arrive."""
    sending = spawn(lambda: [near.send_span(header(1), what), near.send_frame(header(2), EMPTY)])
    buffer = bytearray(what.nbytes)
    assert far.recv_frame(lambda _header: memoryview(buffer)) == header(1)
    assert far.recv_frame(lambda _header: EMPTY) == header(2)
    sending.outcome()
    return bytes(buffer)


def asked(what: FileSpan) -> list[tuple[int, int]]:
    assert isinstance(what.read, Reads)
    return what.read.asked


def test_the_system_sends_it_and_nothing_is_read(lane_pairs: LanePairs, spawn: Spawn, files: Files) -> None:
    content = os.urandom(SIZE + 100)
    what = span(files(content), offset=77)
    assert carry(*lane_pairs(), spawn, what) == content[77 : 77 + SIZE]
    assert asked(what) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("begun", [0, 100_001], ids=["at once", "in the middle"])
def test_where_the_system_will_not_it_is_read(
    lane_pairs: LanePairs, spawn: Spawn, files: Files, monkeypatch: pytest.MonkeyPatch, code: int, begun: int
) -> None:
    sendfile = os.sendfile

    def refusing(out: int, fd: int, offset: int, size: int) -> int:
        if offset >= begun:
            raise OSError(code, os.strerror(code))
        return sendfile(out, fd, offset, min(size, begun - offset))

    monkeypatch.setattr(os, "sendfile", refusing)
    content = os.urandom(SIZE)
    what = span(files(content))
    assert carry(*lane_pairs(), spawn, what) == content
    assert asked(what)[0][0] == begun
    assert sum(size for _, size in asked(what)) == SIZE - begun


@pytest.mark.parametrize("there", [0, 1, 65536, 100_000])
def test_what_the_file_does_not_have_comes_from_read(
    lane_pairs: LanePairs, spawn: Spawn, files: Files, there: int
) -> None:
    content = os.urandom(there)
    what = span(files(content))
    assert carry(*lane_pairs(), spawn, what) == content.ljust(SIZE, b"\0")
    assert asked(what)[0][0] == there


@pytest.fixture(params=["reset", "shutdown"])
def way_of_abort(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "shutdown":
        monkeypatch.setattr(amst_tcp.lane, "_reset", lambda _sock: False)
    way: str = request.param
    return way


@pytest.fixture
def blocked(
    lane_pairs: LanePairs, spawn: Spawn, files: Files, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> Callable[..., tuple[TcpLane, TcpLane, Any]]:
    """A lane whose sender is inside sendfile, because nobody reads."""
    sendfile, calls = os.sendfile, []

    def counting(*arguments: int) -> int:
        calls.append(arguments)
        return sendfile(*arguments)

    monkeypatch.setattr(os, "sendfile", counting)

    def make() -> tuple[TcpLane, TcpLane, Any]:
        near, far = lane_pairs()
        fd = files(b"")
        os.ftruncate(fd, MORE_THAN_BUFFERS)
        sending = spawn(lambda: near.send_span(header(1), span(fd, nbytes=MORE_THAN_BUFFERS)))
        wait_until(lambda: bool(calls), "the sender to be in sendfile")
        return near, far, sending

    return make


def test_abort_wakes_who_is_in_sendfile_and_frees_the_descriptor(
    blocked: Callable[..., tuple[TcpLane, TcpLane, Any]], way_of_abort: str
) -> None:
    near, far, sending = blocked()
    near.abort()
    with pytest.raises(ClosedError):
        sending.outcome()
    assert near._sock.fileno() == -1
    with pytest.raises(BrokenError):
        far.recv_frame(lambda _header: memoryview(bytearray(MORE_THAN_BUFFERS)))


def test_a_peer_that_goes_is_broken_to_who_is_in_sendfile(
    blocked: Callable[..., tuple[TcpLane, TcpLane, Any]],
) -> None:
    near, far, sending = blocked()
    with pytest.raises(BusyError, match="sends"):
        near.send_frame(header(2), EMPTY)
    far.abort()
    with pytest.raises(BrokenError, match=r"reset|Broken pipe"):
        sending.outcome()


def test_a_peer_that_reads_nothing_is_broken(lane_pairs: LanePairs, files: Files) -> None:
    near, _far = lane_pairs(timeouts=LaneTimeouts(write_s=0.2))
    fd = files(b"")
    os.ftruncate(fd, MORE_THAN_BUFFERS)
    with pytest.raises(BrokenError, match=r"could send nothing for 0\.2 s"):
        near.send_span(header(1), span(fd, nbytes=MORE_THAN_BUFFERS))


GONE = """
import os, signal, socket
from amst_core.errors import BrokenError
from amst_core.interfaces import FileSpan, LaneTimeouts
from amst_tcp.lane import SocketOptions, TcpLane

signal.signal(signal.SIGPIPE, signal.SIG_DFL)
with socket.create_server(("127.0.0.1", 0)) as listener:
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
lane = TcpLane(near, LaneTimeouts(), SocketOptions())
near.shutdown(socket.SHUT_WR)
lane._write_more = lambda view: None  # so that it is sendfile that meets the closed pipe
file = os.memfd_create("x")
os.write(file, bytes(100))
try:
    lane.send_span(bytes(32), FileSpan(file, 0, 100, lambda at, view: None))
except BrokenError as error:
    print("broken", signal.sigpending(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_a_program_that_dies_of_sigpipe_does_not_die_of_a_lane() -> None:
    done = subprocess.run([sys.executable, "-c", GONE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "broken set() set()\n"), done.stderr


def test_a_signal_mask_is_left_as_it_was(lane_pairs: LanePairs, spawn: Spawn, files: Files) -> None:
    blocked_before = {signal.SIGPIPE, signal.SIGUSR1}

    def send(near: TcpLane, what: FileSpan) -> set[signal.Signals]:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        near.send_span(header(1), what)
        return signal.pthread_sigmask(signal.SIG_BLOCK, [])

    near, _far = lane_pairs()
    sending = spawn(lambda: send(near, span(files(bytes(1000)), nbytes=1000)))
    assert sending.outcome() == blocked_before
