"""The other process dies or stops: this one notices, says so, and is left as it was."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import amst_core
from amst_core.errors import BrokenError, ClosedError, DeadlineError
from amst_core.session.copying import CopyResult, upload

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20

PRELUDE = """
import sys, time, threading
import amst_core
from amst_core.settings.load import load_settings
from amst_core.files.sink import FileSink
from amst_core.files.source import FileSource
settings = load_settings(environ={}, overrides={"limits.memory": "32MiB"})

def slowly(cls, name):  # so slow that whatever is to happen in between does
    real = getattr(cls, name)
    def slow(self, *args):
        time.sleep(0.02)
        return real(self, *args)
    setattr(cls, name, slow)
"""

SERVER = (
    PRELUDE
    + """
slowly(FileSink, "write")
server = amst_core.listen("127.0.0.1:0", root=sys.argv[1], settings=settings, state_dir=sys.argv[2])
print(server.address, server.token.hex(), flush=True)
for session in server:
    if len(sys.argv) > 3:
        threading.Thread(target=lambda: [session.recv() for _ in iter(int, 1)], daemon=True).start()
"""
)

CLIENT = (
    PRELUDE
    + """
slowly(FileSource, "read_into")
session = amst_core.connect(sys.argv[1], settings=settings, token=bytes.fromhex(sys.argv[2]), streams=2)
print("connected", flush=True)
act, source, target = sys.argv[3:6]
if act == "up":
    session.send_file(source, target)
else:
    session.recv_file(source, target)
"""
)

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run() -> Iterator[Run]:
    """Runs a script in a process of its own, killed after the test."""
    with contextlib.ExitStack() as stack:

        def start(script: str, *args: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(64 * MIB))
    return path


def serve(run: Run, root: Path, state: Path, *more: str) -> tuple[subprocess.Popen[str], str, bytes]:
    process = run(SERVER, root, state, *more)
    assert process.stdout is not None
    address, token = process.stdout.readline().split()
    return process, address, bytes.fromhex(token)


@pytest.fixture
def connect(net: Any) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        def open_(address: str, token: bytes, **overrides: object) -> Any:
            session = amst_core.connect(address, settings=net.settings(overrides), token=token, streams=4)
            stack.callback(session.abort)
            return session

        yield open_


def test_a_server_killed_in_the_middle_is_noticed_at_once(
    net: Any, run: Run, spawn: Any, connect: Any, root: Path, big: Path, tmp_path: Path
) -> None:
    process, address, token = serve(run, root, tmp_path / "state")
    session = connect(address, token, **{"limits.session_timeout": "60s"})
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(b"a")
    os.link(big, tmp_path / "tree" / "big")
    copying = spawn(upload, session, [(tmp_path / "tree", b"tree")])
    receiving = spawn(session.recv)
    net.wait_until(lambda: session.core.engine.bytes_acknowledged > 4 * MIB, "some to arrive")
    process.kill()
    error = copying.error()
    assert isinstance(error, BrokenError) and not isinstance(error, DeadlineError)
    assert "nobody listens" in str(error), "it waits for the session's timeout only if a server may still be there"
    assert error.retryable
    assert isinstance(error.partial, CopyResult) and error.partial.files == 1
    assert isinstance(receiving.error(), BrokenError)
    with pytest.raises(BrokenError):
        session.send(b"late")
    # nothing partial under a final name
    assert sorted(name for name in os.listdir(root / "tree") if not name.startswith(".amst-")) == ["a"]
    # a server that starts again in the same place works, and shows nothing of it
    process, address, token = serve(run, root, tmp_path / "state")
    again = connect(address, token)
    assert again.stat("tree/big") is None
    again.recv_file("tree", tmp_path / "back")
    assert os.listdir(tmp_path / "back") == ["a"]


def test_a_download_goes_on_where_a_killed_server_left_it(
    net: Any, run: Run, spawn: Any, connect: Any, root: Path, big: Path, tmp_path: Path
) -> None:
    script = SERVER.replace('slowly(FileSink, "write")', 'slowly(FileSource, "read_into")')
    process = run(script, tmp_path, tmp_path / "state")
    assert process.stdout is not None
    address, token = process.stdout.readline().split()
    session = connect(address, bytes.fromhex(token))
    copying = spawn(session.recv_file, "big", root / "copy")
    net.wait_until(lambda: session.core.engine.bytes_verified > 4 * MIB, "some to arrive")
    process.kill()
    assert isinstance(copying.error(), BrokenError)
    assert session.wait_closed(10)
    assert all(name.startswith(".amst-") for name in os.listdir(root)), "partial under a final name"
    _, address, token = serve(run, tmp_path, tmp_path / "state")
    again = connect(address, token)
    again.recv_file("big", root / "copy")
    assert (root / "copy").read_bytes() == big.read_bytes()
    assert again.report.resumed_bytes > 4 * MIB
    assert os.listdir(root) == ["copy"]


@pytest.mark.parametrize("act", ["up", "down"])
def test_a_client_killed_in_the_middle_is_waited_for_and_then_forgotten(
    net: Any, run: Run, root: Path, big: Path, tmp_path: Path, act: str
) -> None:
    server = net.server(root=root if act == "up" else tmp_path)
    source, target = (big, "copy") if act == "up" else ("big", root / "copy")
    process = run(CLIENT, server.address, server.token.hex(), act, source, target)
    far = server.accept(20)
    engine = far.core.engine
    net.wait_until(lambda: engine.bytes_verified + engine.bytes_acknowledged > 4 * MIB, "some to arrive")
    process.kill()
    net.wait_until(lambda: not far.core.control_up and not far.core.lanes, "the server to notice")
    assert far.error is None, "it may come back"
    assert far.wait_closed(20)
    assert isinstance(far.error, BrokenError)
    net.wait_until(lambda: not server.sessions, "the server to forget it")
    if act == "up":
        assert all(name.startswith(".amst-") for name in os.listdir(root)), "partial under a final name"


def test_a_peer_that_stops_for_a_moment_loses_nothing(
    net: Any, run: Run, spawn: Any, connect: Any, root: Path, big: Path, tmp_path: Path
) -> None:
    process, address, token = serve(run, root, tmp_path / "state")
    session = connect(address, token)
    copying = spawn(session.send_file, big, "copy")
    for _ in range(3):
        moved = session.core.engine.bytes_acknowledged
        net.wait_until(lambda moved=moved: session.core.engine.bytes_acknowledged > moved, "some to arrive")
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.15)
        process.send_signal(signal.SIGCONT)
    copying.outcome(30)
    assert (root / "copy").read_bytes() == big.read_bytes()
    assert session.metrics().lane_failures == 0


def test_a_peer_that_has_stopped_hangs_nobody(
    net: Any, run: Run, spawn: Any, connect: Any, root: Path, tmp_path: Path
) -> None:
    process, address, token = serve(run, root, tmp_path / "state", "receive")
    session = connect(address, token)
    session.send(b"there").wait(20)
    net.wait_until(lambda: session.metrics().active_streams == 4, "every stream to be there")
    process.send_signal(signal.SIGSTOP)
    tickets = [session.send(bytes(32 * MIB)) for _ in range(3)]
    with pytest.raises(DeadlineError, match="not delivered"):
        tickets[0].wait(0.1)
    with pytest.raises(DeadlineError):
        session.flush(0.1)
    with pytest.raises(DeadlineError):
        session.stat("x", timeout=0.1)
    report = session.health_check(0.2)
    assert not report.healthy and set(report.round_trips_s.values()) == {None}
    assert session.metrics().active_streams == 4
    started = time.monotonic()
    with pytest.raises(DeadlineError, match="3 transfers"):
        session.close(0.2)
    assert time.monotonic() - started < 8
    for ticket in tickets:
        with pytest.raises(ClosedError):
            ticket.wait(5)


def test_abort_never_blocks(net: Any, run: Run, spawn: Any, connect: Any, root: Path, tmp_path: Path) -> None:
    process, address, token = serve(run, root, tmp_path / "state", "receive")
    session = connect(address, token)
    session.send(b"there").wait(20)
    process.send_signal(signal.SIGSTOP)
    ticket = session.send(bytes(32 * MIB))
    started = time.monotonic()
    session.abort()
    assert time.monotonic() - started < 1
    with pytest.raises(ClosedError):
        ticket.wait(5)
    assert session.wait_closed(5)
    session.abort()  # again: nothing


def test_a_quiet_session_is_asked_for_a_sign_of_life_and_lives(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import amst_core.session.control_loop as module

    monkeypatch.setattr(module, "PING_AFTER_S", 0.2)
    monkeypatch.setattr(module, "LOST_AFTER_S", 0.6)
    pair = net.pair()
    net.wait_until(lambda: pair.near._loop.round_trip_s is not None, "it to be asked and to answer")
    net.stays(lambda: pair.near.core.control_up and pair.far.core.control_up, "a quiet session is alive", for_s=1.5)
    assert pair.far.epoch == 0
