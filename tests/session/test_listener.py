"""Strangers at the port: they cost descriptors, never threads, a session of somebody else's, or the log."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import amst_core
from amst_core.control.listener import Listener, Newcomer
from amst_core.interfaces import PREAMBLE, PREAMBLE_MAGIC, Endpoint

pytestmark = pytest.mark.needs_transport

DEADLINE_S = 20.0
FAR_S = 300.0
"""A timeout that no test waits for."""

LANE = PREAMBLE.pack(PREAMBLE_MAGIC, 1)


def client_hello() -> bytes:
    """The first words of a client of ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["amst/1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def is_closed(sock: socket.socket) -> bool:
    """The other side has hung up by now."""
    while select.select([sock], [], [], 0)[0]:
        try:
            if not sock.recv(65536):
                return True
        except OSError:
            return True
    return False


@pytest.fixture
def dial() -> Iterator[Callable[..., socket.socket]]:
    """Connects to ``HOST:PORT`` and says the given bytes; closed after the test."""
    with contextlib.ExitStack() as stack:

        def connect(address: str, first: bytes = b"") -> socket.socket:
            host, _, port = address.rpartition(":")
            sock = stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(first)
            return sock

        yield connect


@pytest.fixture
def listener() -> Iterator[Callable[..., Listener]]:
    """A bare listener; what it hands out is refused unless the test takes it."""
    with contextlib.ExitStack() as stack:

        def refuse(newcomer: Newcomer, tag: int = 0) -> None:
            raise OSError("refused")

        def start(**how: Any) -> Listener:
            made = Listener(
                Endpoint("amst", "127.0.0.1", 0),
                **{
                    "on_control": refuse,
                    "on_lane": refuse,
                    "handshake_timeout_s": FAR_S,
                    "unauthenticated": 8,
                    **how,
                },
            )
            stack.callback(made.close)
            return made

        yield start


def works(net: Any, server: Any) -> None:
    """An honest client that comes now gets its session."""
    session = net.connect(server, streams=2)
    session.send(b"honest").wait(DEADLINE_S)
    session.close()


# ---- too many ------------------------------------------------------------------------------------

DAWDLERS = {
    "idle": b"",
    "half a ClientHello": client_hello()[:100],
    "a byte of TLS": b"\x16",
    "half a preamble": LANE[:4],
    "a lane that is not admitted": LANE,
}


@pytest.mark.parametrize("first", DAWDLERS.values(), ids=DAWDLERS.keys())
def test_an_honest_client_gets_its_session_and_the_oldest_stranger_makes_room(
    net: Any, dial: Any, first: bytes
) -> None:
    server = net.server(limits__unauthenticated=8, limits__handshake_timeout="5min")
    strangers = []
    for number in range(1, 9):
        strangers.append(dial(server.address, first))
        net.wait_until(lambda number=number: server._listener.unauthenticated == number, f"{number} strangers")
    works(net, server)
    net.wait_until(lambda: is_closed(strangers[0]), "the oldest to be cut")
    closed = [is_closed(sock) for sock in strangers]
    assert closed == sorted(closed, reverse=True), "the oldest go first"
    assert not closed[-1]


def test_strangers_never_cut_a_session(net: Any, dial: Any) -> None:
    pair = net.pair(streams=3, server={"limits__unauthenticated": 8, "limits__handshake_timeout": "5min"})
    for i in range(60):
        dial(pair.server.address, list(DAWDLERS.values())[i % len(DAWDLERS)])
    net.wait_until(lambda: pair.server._listener.unauthenticated == 8, "the limit to be reached")
    pair.near.send(b"x").wait(DEADLINE_S)
    assert pair.far.recv(timeout=DEADLINE_S) == b"x"
    for end in pair.ends:
        assert end.error is None and len(end.core.lanes) == 3 and end.metrics().lane_failures == 0


def test_what_has_proven_itself_is_not_cut_though_its_callback_goes_on(net: Any, listener: Any, dial: Any) -> None:
    go_on, inside = threading.Event(), threading.Event()

    def lane(newcomer: Newcomer, tag: int) -> None:
        newcomer.proven()
        inside.set()
        assert go_on.wait(DEADLINE_S)
        newcomer.sock.sendall(b"still here")
        newcomer.sock.close()

    made = listener(on_lane=lane)
    try:
        friend = dial(made.address, LANE)
        assert inside.wait(DEADLINE_S)
        strangers = [dial(made.address) for _ in range(20)]
        net.wait_until(lambda: sum(map(is_closed, strangers)) == 12, "all but 8 of the others to be cut")
        assert made.unauthenticated == 8
    finally:
        go_on.set()
    assert friend.recv(100) == b"still here"


def test_more_streams_than_strangers_are_allowed_come_up_without_a_failure(net: Any) -> None:
    """A client opens its streams a few at a time: it does not cut its own."""
    server = net.server(limits__unauthenticated=64, transport__amst__max_streams=200)
    session = net.connect(server, streams=200, transport__amst__max_streams=200)
    assert session.metrics().total_streams == 200
    session.close()


# ---- too slow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", DAWDLERS.values(), ids=DAWDLERS.keys())
def test_who_stops_is_cut_when_the_time_is_up(net: Any, dial: Any, first: bytes) -> None:
    server = net.server(limits__handshake_timeout="1s")
    stranger = dial(server.address, first)
    net.wait_until(lambda: is_closed(stranger), "the stranger to be cut")
    net.wait_until(lambda: server._listener.unauthenticated == 0, "nothing to be left of it")
    works(net, server)


@pytest.mark.parametrize("words", [client_hello(), LANE + bytes(400)], ids=["ClientHello", "lane"])
def test_who_says_a_byte_at_a_time_is_cut_when_the_time_is_up(net: Any, dial: Any, words: bytes) -> None:
    server = net.server(limits__handshake_timeout="1s")
    stranger = dial(server.address)
    said = 0
    with contextlib.suppress(OSError):
        while not is_closed(stranger):
            assert said < len(words), "all of it was listened to"
            stranger.sendall(words[said : said + 1])
            said += 1
            time.sleep(0.03)
    net.wait_until(lambda: is_closed(stranger), "the stranger to be cut")
    net.wait_until(lambda: server._listener.unauthenticated == 0, "nothing to be left of it")


def test_a_callback_that_ignores_its_deadline_is_cut_a_little_later(net: Any, listener: Any, dial: Any) -> None:
    def lane(newcomer: Newcomer, tag: int) -> None:
        with newcomer.sock:
            while newcomer.sock.recv(100):  # for as long as it takes
                pass

    made = listener(on_lane=lane, handshake_timeout_s=0.2)
    stranger = dial(made.address, LANE)
    net.wait_until(lambda: is_closed(stranger), "the stranger to be cut")


# ---- garbage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"G", b"\0", b"\x16\x04", b"AMSTX", b"AMSTL\x02", b"\x17\x03\x03"], ids=repr)
def test_what_can_be_neither_is_closed_at_once(net: Any, dial: Any, first: bytes) -> None:
    server = net.server(limits__handshake_timeout="5min")
    stranger = dial(server.address, first)
    net.wait_until(lambda: is_closed(stranger), "it to be closed")


def test_who_leaves_before_the_first_words_are_whole_is_forgotten(net: Any, dial: Any) -> None:
    server = net.server(limits__handshake_timeout="5min")
    for first in (b"", b"A", LANE[:7], b"\x16\x03\x01"):
        stranger = dial(server.address, first)
        stranger.shutdown(socket.SHUT_WR)
        net.wait_until(lambda sock=stranger: is_closed(sock), "it to be closed")
    net.wait_until(lambda: server._listener.unauthenticated == 0, "nothing to be left of them")


def test_strangers_do_not_fill_the_log(net: Any, dial: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = net.server(limits__unauthenticated=8)
    with caplog.at_level(logging.INFO, "amst"):
        strangers = [dial(server.address, b"GET / HTTP/1.1" if i % 3 else b"") for i in range(100)]
        net.wait_until(lambda: sum(map(is_closed, strangers)) >= 92, "all to be cut that go beyond the limit")
        works(net, server)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "limits.unauthenticated" in warnings[0]


# ---- what they cost --------------------------------------------------------------------------------


def test_idle_connections_cost_no_thread(net: Any, dial: Any) -> None:
    server = net.server(limits__handshake_timeout="5min")
    works(net, server)
    net.wait_until(lambda: not server.sessions, "the session to be gone")
    before = threading.active_count()
    for i in range(200):
        dial(server.address, (b"", b"\x16\x03", LANE[:6])[i % 3])
    net.wait_until(lambda: server._listener.unauthenticated == 200, "all of them")
    assert threading.active_count() <= before


def test_handshakes_cost_no_more_threads_than_strangers_are_allowed(net: Any, dial: Any) -> None:
    server = net.server(limits__unauthenticated=16, limits__handshake_timeout="5min")

    def greeting() -> int:
        return sum(thread.name.startswith("amst-greet") for thread in threading.enumerate())

    most = 0
    strangers = []
    for i in range(200):
        strangers.append(dial(server.address, LANE if i % 2 else client_hello()[:50]))
        most = max(most, greeting())
    net.wait_until(lambda: sum(map(is_closed, strangers)) == 184, "all but 16 to be cut")
    net.wait_until(lambda: greeting() == 16, "the others to have their threads")
    assert most <= 16
    works(net, server)


def test_a_thread_that_cannot_be_had_costs_the_connection_only(
    net: Any, listener: Any, dial: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = threading.Event()
    made = listener(on_lane=lambda newcomer, tag: (newcomer.sock.close(), served.set()))
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("amst-greet"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        for _ in range(3):
            stranger = dial(made.address, LANE)
            net.wait_until(lambda sock=stranger: is_closed(sock), "it to be closed")
    dial(made.address, LANE)
    assert served.wait(DEADLINE_S)
    assert made.unauthenticated == 0
    assert sum("cannot serve" in record.getMessage() for record in caplog.records) == 1


def test_a_bug_does_not_end_the_accepting(
    net: Any, listener: Any, dial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = threading.Event()
    made = listener(on_lane=lambda newcomer, tag: (newcomer.sock.close(), served.set()))
    failed = threading.Event()

    def broken() -> None:
        failed.set()
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(made, "_accept", broken)
        patch.setattr("amst_core.control.listener._log", logging.getLogger("elsewhere"))
        dial(made.address, LANE)
        assert failed.wait(DEADLINE_S)
    assert served.wait(DEADLINE_S)


# ---- no descriptors ------------------------------------------------------------------------------

SERVER = """
import logging, os, resource, sys
import amst_core
from amst_core.settings.load import load_settings

logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(message)s")
settings = load_settings(environ={}, overrides={"limits.handshake_timeout": "5min"})
server = amst_core.listen("127.0.0.1:0", settings=settings, state_dir=sys.argv[1], on_session=lambda session: None)
used = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, used + 24))
print(server.address, flush=True)
held = []
for line in sys.stdin:
    if line == "fill\\n":
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            pass
    elif line == "free\\n":
        for descriptor in held:
            os.close(descriptor)
        held.clear()
    print("done", flush=True)
server.close(5)
"""


class Poor:
    """A server in a process that may have few descriptors."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(state_dir)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.warnings: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.address = self._line()

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        assert self._line() == "done"

    def serves(self, net: Any) -> None:
        session = amst_core.connect(
            self.address,
            settings=net.settings({}),
            token=bytes.fromhex((self._state_dir / "token").read_text().strip()),
            streams=2,
        )
        with session:
            session.health_check(DEADLINE_S)
            assert session.error is None

    def end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(DEADLINE_S) == 0, self.warnings
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, self.warnings
        return line

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr:
            for line in self._process.stderr:
                self.warnings.append(line)


@pytest.fixture
def poor(tmp_path: Path) -> Iterator[Poor]:
    server = Poor(tmp_path / "poor")
    yield server
    server.end()


def test_strangers_that_take_every_descriptor_are_cut_and_an_honest_client_is_served(
    net: Any, dial: Any, poor: Poor
) -> None:
    strangers = [dial(poor.address, b"" if i % 2 else b"\x16\x03") for i in range(80)]
    net.wait_until(lambda: sum(map(is_closed, strangers)) >= 50, "the oldest to be cut")
    for _ in range(3):
        poor.serves(net)
    closed = [is_closed(sock) for sock in strangers]
    assert closed == sorted(closed, reverse=True), "the oldest go first"
    assert sum("few are left" in line for line in poor.warnings) == 1, poor.warnings
    assert not any("cannot accept" in line for line in poor.warnings), "the last ones are not for strangers"


def test_without_strangers_to_cut_it_waits_for_descriptors(net: Any, dial: Any, poor: Poor) -> None:
    poor.tell("fill")
    waiting = dial(poor.address, LANE)
    net.wait_until(lambda: poor.warnings, "the want of descriptors to be noticed")
    assert not is_closed(waiting)
    poor.tell("free")
    net.wait_until(lambda: select.select([waiting], [], [], 0)[0], "the connection to be served")
    assert not is_closed(waiting), "it is challenged, as a lane is"
    poor.serves(net)
    assert len(poor.warnings) == 1, poor.warnings


# ---- the end ---------------------------------------------------------------------------------------


def test_closing_cuts_all_who_have_not_proven_themselves(net: Any, dial: Any) -> None:
    server = net.server(limits__handshake_timeout="5min")
    strangers = [dial(server.address, first) for first in DAWDLERS.values()]
    net.wait_until(lambda: server._listener.unauthenticated == len(strangers), "all of them")
    server.close(5)
    net.wait_until(lambda: all(map(is_closed, strangers)), "all to be cut")
    server._listener.close()  # again: nothing
    with pytest.raises(OSError, match="refused"):
        dial(server.address)


def test_the_descriptors_of_a_closed_listener_are_not_written_to(listener: Any, dial: Any) -> None:
    """A callback that outlives the listener ends without touching what may be somebody else's by now."""
    go_on, inside = threading.Event(), threading.Event()

    def lane(newcomer: Newcomer, tag: int) -> None:
        inside.set()
        assert go_on.wait(DEADLINE_S)
        newcomer.sock.close()

    made = listener(on_lane=lane)
    dial(made.address, LANE)
    assert inside.wait(DEADLINE_S)
    made.close()
    reused = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        go_on.set()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(reused)
    finally:
        os.close(reused)
