"""Who gets a session and who does not, within limits and time limits, and how a server stops."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import amst_core
from amst_core.control.channel import ControlChannel
from amst_core.errors import (
    AmstError,
    AuthError,
    BrokenError,
    BusyError,
    ClosedError,
    ConnectError,
    DeadlineError,
    ProtocolError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from amst_core.interfaces import HEADER_SIZE, PREAMBLE, PREAMBLE_MAGIC
from amst_core.security import keys
from amst_core.security.identity import ServerIdentity
from amst_core.security.seal import Protection
from amst_core.security.tls import TlsStream, client_context, server_context
from amst_core.testing import FaultyLane, Flip
from amst_core.wire.frames import FrameHeader, FrameKind
from amst_core.wire.messages import PROTOCOL_VERSION, Close, Hello, LaneGrant, Message, Open, Proof

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
TOKEN = b"t" * 32


def connect(address: str, net: Any, *, token: bytes = TOKEN, **overrides: object) -> Any:
    return amst_core.connect(
        address,
        settings=net.settings({"transport.amst.connect_timeout": "2s", **overrides}),
        token=token,
        streams=2,
    )


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Starts something that is not an AMST server: ``serve(handler)``, called with each connection."""
    with contextlib.ExitStack() as stack:

        def start(handle: Callable[[socket.socket], None]) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def run() -> None:
                while True:
                    try:
                        sock, _ = listener.accept()
                    except OSError:
                        return
                    with sock, contextlib.suppress(OSError, AmstError):
                        handle(sock)

            thread = threading.Thread(target=run)
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start


def alive(pair: Any) -> None:
    """The session still carries messages."""
    pair.near.send(b"alive").wait(20)
    assert pair.far.recv(timeout=20) == b"alive"


# ---- what a client meets ---------------------------------------------------------------------------


def test_a_wrong_token_is_refused_with_advice_and_others_go_on(net: Any) -> None:
    pair = net.pair()
    with pytest.raises(AuthError, match="token") as caught:
        net.connect(pair.server, token=b"w" * 32)
    assert "--token-file" in str(caught.value)
    assert not caught.value.retryable
    assert len(pair.server.sessions) == 1
    alive(pair)


def test_no_token_at_all_is_an_error_before_anything_is_sent(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = net.server()
    monkeypatch.delenv("AMST_TOKEN", raising=False)
    monkeypatch.setenv("AMST_STATE_DIR", "/nonexistent/amst")
    with pytest.raises(AmstError, match="token"):
        amst_core.connect(server.address, settings=net.settings({}))


def test_nobody_listens(net: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectError, match="refused") as caught:
        connect(f"127.0.0.1:{port}", net)
    assert caught.value.retryable


def test_a_name_that_does_not_resolve(net: Any) -> None:
    with pytest.raises(ConnectError, match=r"nothing\.invalid"):
        connect("nothing.invalid:9", net)


def _greeting(sock: socket.socket) -> None:
    sock.recv(1)
    sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
    sock.recv(65536)


def _http(sock: socket.socket) -> None:
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def _hang_up(sock: socket.socket) -> None:
    sock.recv(1)


def _reset(sock: socket.socket) -> None:
    import struct

    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))


@pytest.mark.parametrize("handler", [_greeting, _http, _hang_up, _reset])
def test_something_else_listens(net: Any, serve: Any, handler: Any) -> None:
    started = time.monotonic()
    with pytest.raises(AmstError) as caught:
        connect(serve(handler), net)
    assert time.monotonic() - started < 5
    assert isinstance(caught.value, ConnectError), repr(caught.value)
    assert str(caught.value)


def test_a_server_that_says_nothing_is_given_up_in_time(net: Any, serve: Any) -> None:
    done = threading.Event()
    address = serve(lambda sock: done.wait(20))
    started = time.monotonic()
    try:
        with pytest.raises((DeadlineError, ConnectError)):
            connect(address, net)
        assert 1.5 < time.monotonic() - started < 4
    finally:
        done.set()


@pytest.fixture
def tls(tmp_path: Path) -> ssl.SSLContext:
    identity = ServerIdentity.load_or_create(tmp_path / "other")
    return server_context(identity.certificate_path, identity.key_path)


def test_a_tls_server_that_speaks_something_else(net: Any, serve: Any, tls: ssl.SSLContext) -> None:
    def https(sock: socket.socket) -> None:
        with tls.wrap_socket(sock, server_side=True) as secure:
            secure.recv(65536)
            secure.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            secure.recv(65536)

    with pytest.raises(ConnectError):
        connect(serve(https), net)


def test_a_tls_server_that_says_nothing(net: Any, serve: Any, tls: ssl.SSLContext) -> None:
    done = threading.Event()

    def silent(sock: socket.socket) -> None:
        with tls.wrap_socket(sock, server_side=True) as secure:
            secure.recv(65536)
            done.wait(20)

    started = time.monotonic()
    try:
        with pytest.raises((DeadlineError, ConnectError)):
            connect(serve(silent), net)
        assert time.monotonic() - started < 4
    finally:
        done.set()


def test_a_server_that_does_not_know_the_token_is_found_out(
    net: Any, tmp_path: Path, serve: Any, tls: ssl.SSLContext
) -> None:
    """It accepts any proof and makes one up."""

    def impostor(sock: socket.socket) -> None:
        channel = ControlChannel(sock, TlsStream(tls, server_side=True, peer="client"), peer="client")
        deadline = time.monotonic() + 5
        channel.establish(deadline)
        channel.wait_message(deadline)
        channel.send(Hello((PROTOCOL_VERSION,), secrets.token_bytes(32), {}))
        channel.wait_message(deadline)
        channel.send(Proof(secrets.token_bytes(32)))
        channel.flush_all(deadline)
        channel.wait_message(deadline)

    with pytest.raises(AuthError, match="in between"):
        connect(serve(impostor), net)


def test_a_client_of_another_version_is_told_why(net: Any) -> None:
    pair = net.pair()
    host, _, port = pair.server.address.rpartition(":")
    deadline = time.monotonic() + 5
    channel = ControlChannel(
        socket.create_connection((host, int(port)), 5),
        TlsStream(client_context(), server_side=False, peer="server"),
        peer="server",
    )
    channel.establish(deadline)
    channel.send(Hello((PROTOCOL_VERSION + 1,), secrets.token_bytes(32), {}))
    answer = channel.wait_message(deadline)
    assert isinstance(answer, Close) and answer.kind == "version" and str(PROTOCOL_VERSION) in answer.message
    channel.close()
    alive(pair)


@pytest.mark.parametrize(
    "answer",
    [Close("version", "this server speaks version 2"), Hello((PROTOCOL_VERSION + 1,), bytes(32), {})],
    ids=["refused", "chosen"],
)
def test_a_server_of_another_version(net: Any, serve: Any, tls: ssl.SSLContext, answer: Message) -> None:
    def newer(sock: socket.socket) -> None:
        channel = ControlChannel(sock, TlsStream(tls, server_side=True, peer="client"), peer="client")
        deadline = time.monotonic() + 5
        channel.establish(deadline)
        channel.wait_message(deadline)
        channel.send(answer)
        channel.flush_all(deadline)
        channel.wait_message(deadline)

    with pytest.raises(ConnectError, match="version") as caught:
        connect(serve(newer), net)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("address", "error"),
    [("http://host:1", UsageError), ("host:99999", UsageError), ("", UsageError), ("amst://::1:5", UsageError)],
)
def test_an_address_that_makes_no_sense(net: Any, address: str, error: type[AmstError]) -> None:
    with pytest.raises(error):
        amst_core.connect(address, settings=net.settings({}), token=TOKEN)


def test_transports_that_are_not_there(net: Any) -> None:
    server = net.server()
    with pytest.raises(UnavailableError, match="carrier-pigeon"):
        amst_core.connect(server.address, settings=net.settings({}), token=server.token, require="carrier-pigeon")
    with pytest.raises(UsageError, match="carrier-pigeon"):
        amst_core.connect(server.address, settings=net.settings({}), token=server.token, transport="carrier-pigeon")
    with amst_core.connect(server.address, settings=net.settings({}), token=server.token, require="tcp") as session:
        assert session.report.transport == "tcp"


def test_a_number_of_streams_out_of_bounds(net: Any) -> None:
    server = net.server()
    for streams in (0, 257):
        with pytest.raises(UsageError, match="streams"):
            net.connect(server, streams=streams)


def test_ipv6_and_names(net: Any) -> None:
    try:
        server = net.server(address="[::1]:0")
    except AmstError:
        pytest.skip("no IPv6 on loopback here")
    assert server.address.startswith("[::1]:")
    with amst_core.connect(
        f"amst://{server.address}", settings=net.settings({}), token=server.token, streams=3
    ) as session:
        far = server.accept(20)
        session.send(b"six").wait(20)
        assert far.recv(timeout=20) == b"six"


def test_a_dual_stack_server_takes_both(net: Any) -> None:
    server = net.server(address="[::]:0")
    port = server.address.rpartition(":")[2]
    with amst_core.connect(f"localhost:{port}", settings=net.settings({}), token=server.token, streams=2) as session:
        session.send(b"x").wait(20)


# ---- limits ----------------------------------------------------------------------------------------


def test_the_limit_of_sessions(net: Any) -> None:
    server = net.server(limits__sessions=2)
    first, second = net.connect(server), net.connect(server)
    with pytest.raises(ConnectError, match=r"limits\.sessions") as caught:
        net.connect(server)
    assert caught.value.retryable
    second.send(b"x").wait(20)
    first.close()
    net.wait_until(lambda: len(server.sessions) == 1, "the first to be gone")
    net.connect(server).send(b"x").wait(20)


def test_the_limit_of_lanes(net: Any) -> None:
    server = net.server(limits__lanes=3)
    near = net.connect(server, streams=8, wait=False)
    far = server.accept(20)
    net.wait_until(lambda: len(near.core.lanes) == 3, "three streams")
    started = time.monotonic()
    assert near.adjust_streams(8) == 3
    assert far.adjust_streams(5) == 3
    with pytest.raises(ConnectError, match="no streams"):
        net.connect(server)
    assert time.monotonic() - started < 5, "what will not come is not waited for"
    assert near.adjust_streams(1) == 1
    net.wait_until(lambda: len(far.core.lanes) == 1, "room")
    assert net.connect(server, streams=2).metrics().active_streams == 2
    near.send(b"x").wait(20)


def test_a_servers_own_limit_of_streams(net: Any) -> None:
    server = net.server(transport__amst__max_streams=4)
    near = net.connect(server, streams=8, wait=False)
    net.wait_until(lambda: len(near.core.lanes) == 4, "four streams")
    assert near.adjust_streams(6) == 4
    net.stays(lambda: len(near.core.lanes) == 4, "more than the server allows")


def test_a_server_cannot_have_the_client_open_more_than_it_allows(net: Any) -> None:
    pair = net.pair(client={"transport__amst__max_streams": 4})
    assert pair.far.adjust_streams(4) == 4
    net.wait_until(lambda: len(pair.near.core.lanes) == 4, "the client to have them too")
    pair.far.core.tell(amst_core.session.session.LaneRequest(60000, "tcp"))
    net.stays(lambda: len(pair.near.core.lanes) == 4, "more than the client allows")
    pair.far.core.tell(LaneGrant(1, 60000, "tcp"))
    assert pair.near.wait_closed(10)
    assert isinstance(pair.near.error, ProtocolError)


@pytest.mark.parametrize("allowed", [False, True])
def test_plaintext_from_another_machine(net: Any, monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    import amst_core.api.server as module

    monkeypatch.setattr(module, "LOOPBACK", ("192.0.2.",))
    server = net.server(security__allow_plaintext=allowed)
    if allowed:
        net.connect(server, plaintext=True).send(b"x").wait(20)
    else:
        with pytest.raises(AuthError, match="plaintext"):
            net.connect(server, plaintext=True)
    assert net.connect(server, plaintext=False).report.encrypted


def test_plaintext_from_loopback(net: Any) -> None:
    pair = net.pair(plaintext=True)
    assert not pair.near.report.encrypted
    alive(pair)


@pytest.mark.parametrize("verify", [True, False])
def test_both_sides_know_whether_plaintext_is_verified(net: Any, verify: bool) -> None:
    pair = net.pair(plaintext=True, verify=verify)
    assert [end.report.verified for end in pair.ends] == [verify] * 2
    alive(pair)
    expected = Protection.CRC if verify else Protection.NONE
    assert {worker.protection for end in pair.ends for worker in end.core.lanes.values()} == {expected}


def test_what_is_encrypted_cannot_go_unverified(net: Any) -> None:
    server = net.server()
    with pytest.raises(UsageError, match="always verified"):
        net.connect(server, verify=False)
    assert net.connect(server).report.verified


def test_what_nobody_verifies_arrives_as_the_network_leaves_it(net: Any, wrap_lanes: Any) -> None:
    flip = Flip(into=HEADER_SIZE + 5, matching=lambda header: header[1] == FrameKind.DATA)
    wrap_lanes(near=lambda lane: FaultyLane(lane, [flip]))
    pair = net.pair(streams=1, plaintext=True, verify=False)
    pair.near.send(bytes(1000)).wait(20)
    assert bytes(pair.far.recv(timeout=20)) == bytes(5) + b"\x01" + bytes(994)
    assert flip.struck.is_set() and len(pair.far.core.lanes) == 1


# ---- strangers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03",
        b"\x16\x03\x01\x00\x05hello" + bytes(100),
        b"\x16\x03\x03\xff\xff" + bytes(70_000),
        PREAMBLE.pack(PREAMBLE_MAGIC, 1),
        PREAMBLE.pack(PREAMBLE_MAGIC, 1) + bytes(64),
        PREAMBLE.pack(PREAMBLE_MAGIC, 999),
        PREAMBLE.pack(PREAMBLE_MAGIC, 1) + b"\xff" * 10_000,
    ],
    ids=lambda garbage: repr(garbage[:12]),
)
def test_garbage_on_the_port_harms_nobody(net: Any, garbage: bytes) -> None:
    pair = net.pair(server={"limits__handshake_timeout": "1s"})
    host, _, port = pair.server.address.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as stranger:
        with contextlib.suppress(OSError):
            stranger.sendall(garbage)
        alive(pair)
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while stranger.recv(65536):  # a challenge or an alert, then the end
                pass
    assert len(pair.server.sessions) == 1
    alive(pair)


def test_a_stranger_that_keeps_talking_is_cut_off_and_costs_no_memory(net: Any) -> None:
    """TLS records without end, faster than anybody reads: neither stored nor waited for."""
    import resource

    pair = net.pair(server={"limits__handshake_timeout": "1s"})
    host, _, port = pair.server.address.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_connection((host, int(port)), 5) as stranger, contextlib.suppress(OSError):
        with context.wrap_socket(stranger) as secure:
            started = time.monotonic()
            while time.monotonic() - started < 8:
                secure.sendall(bytes(1 << 20))
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    alive(pair)


class LaneStranger:
    """A connection that speaks the lane protocol by hand."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.sock = socket.create_connection((host, int(port)), 5)
        self.sock.sendall(PREAMBLE.pack(PREAMBLE_MAGIC, 1))
        header = FrameHeader.unpack(self._read(32))
        assert header.kind is FrameKind.CHALLENGE
        self.challenge = self._read(header.wire_length)

    def admit(self, incarnation: int, mac: bytes) -> None:
        self.sock.sendall(FrameHeader(FrameKind.ADMIT, transfer=incarnation, wire_length=len(mac)).pack() + mac)

    def refused(self) -> bool:
        """The server hangs up."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def _read(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            step = self.sock.recv(size - len(got))
            assert step, "the server hung up"
            got += step
        return got


def test_admissions_that_are_forged_repeated_or_stolen_are_refused(net: Any) -> None:
    pair = net.pair(streams=2)
    secret = pair.near.opener._secret
    live = next(iter(pair.near.core.lanes))
    other = net.connect(pair.server, streams=1)
    other_secret = other.opener._secret
    tell = pair.far.core.tell
    granted: list[LaneGrant] = []
    # hold back a grant, so that its incarnation is still open
    pair.far.core.tell = granted.append
    pair.near.opener.ask(1, "tcp")
    net.wait_until(lambda: granted, "a grant")
    pair.far.core.tell = tell
    open_one = granted[0].first

    def attempt(incarnation: int, mac: Callable[[bytes], bytes]) -> None:
        stranger = LaneStranger(pair.server.address)
        try:
            stranger.admit(incarnation, mac(stranger.challenge))
            assert stranger.refused()
        finally:
            stranger.sock.close()

    def proof(secret: bytes, incarnation: int) -> Callable[[bytes], bytes]:
        return lambda challenge: keys.admission_mac(secret, incarnation=incarnation, challenge=challenge)

    attempt(open_one, lambda challenge: secrets.token_bytes(32))  # forged
    attempt(open_one, proof(other_secret, open_one))  # another session's secret
    attempt(open_one, proof(secret, open_one + 1))  # of another incarnation
    attempt(open_one + 1000, proof(secret, open_one + 1000))  # never granted
    attempt(live, proof(secret, live))  # used already: it is that of a live lane
    old = LaneStranger(pair.server.address)
    replayed = keys.admission_mac(secret, incarnation=open_one, challenge=old.challenge)
    old.sock.close()
    attempt(open_one, lambda challenge: replayed)  # the answer to another challenge
    assert len(pair.far.core.lanes) == 2
    alive(pair)
    # and the proper one is still good, once
    tell(granted[0])
    net.wait_until(lambda: len(pair.far.core.lanes) == 3, "the lane")
    attempt(open_one, proof(secret, open_one))
    alive(pair)


def test_a_peer_that_breaks_the_rules_ends_its_own_session_only(net: Any) -> None:
    pair, other = net.pair(), None
    other = net.connect(pair.server)
    pair.near.core.tell(Open(99, 1, 5, 0, "", {}))
    assert pair.far.wait_closed(10) and pair.near.wait_closed(10)
    assert isinstance(pair.far.error, ProtocolError)
    assert isinstance(pair.near.error, ProtocolError), "the reason is told"
    other.send(b"x").wait(20)


def test_an_attribute_that_makes_no_sense_is_the_peers_fault(net: Any, tmp_path: Path) -> None:
    from amst_core.wire.messages import FILE

    pair = net.pair(root=tmp_path)
    pair.near.core.tell(Open(1, FILE, 5, 0, "", {"path": 7}))
    assert pair.far.wait_closed(10)
    assert isinstance(pair.far.error, ProtocolError)


# ---- on_session ------------------------------------------------------------------------------------


def test_on_session_runs_beside_the_server_and_may_take_its_time(net: Any) -> None:
    received: list[bytes] = []
    begun = threading.Event()

    def handle(session: Any) -> None:
        begun.set()
        while True:
            received.append(bytes(session.recv()))

    server = net.server(on_session=handle)
    near = net.connect(server)
    assert begun.wait(20)
    near.send(b"one").wait(20)
    net.wait_until(lambda: received == [b"one"], "the message")
    near.close()
    net.wait_until(lambda: not server.sessions, "the session to be gone")


def test_on_session_that_raises_ends_that_session_only(net: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Any] = []

    def handle(session: Any) -> None:
        calls.append(session)
        if len(calls) == 2:
            raise ValueError("a bug of the user's")

    server = net.server(on_session=handle)
    first = net.connect(server)
    net.wait_until(lambda: calls, "the first to be served")
    with contextlib.suppress(ClosedError):
        assert net.connect(server, wait=False).wait_closed(20)
    net.wait_until(lambda: len(server.sessions) == 1, "the second to be ended")
    first.send(b"x").wait(20)
    assert "on_session" in caplog.text


# ---- stopping --------------------------------------------------------------------------------------


class Slow:
    """Makes each read of a file wait until `go_on`, after the first ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from amst_core.files.source import FileSource

        self.reached, self.go_on = threading.Event(), threading.Event()
        read_into = FileSource.read_into

        def slow(source: FileSource, offset: int, view: memoryview) -> None:
            if "slow" in source.name:
                self.reached.set()
                assert self.go_on.wait(20)
            read_into(source, offset, view)

        monkeypatch.setattr(FileSource, "read_into", slow)


@pytest.mark.parametrize("handled", [False, True], ids=["accept", "on_session"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_closing_lets_finish_what_is_under_way_and_takes_nothing_new(
    net: Any, spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str, handled: bool
) -> None:
    root, here = tmp_path / "root", tmp_path / "here"
    for path in (root, here):
        (path / "tree").mkdir(parents=True)
        for i in range(3):
            (path / "tree" / f"{i} slow").write_bytes(os.urandom(MIB))
        (path / "small").write_bytes(b"small")
    slow = Slow(monkeypatch)
    ended = threading.Event()

    def handle(session: Any) -> None:
        session.wait_closed()
        ended.set()

    server = net.server(root=root, on_session=handle if handled else None)
    near, other = net.connect(server), net.connect(server)
    if direction == "up":
        copying = spawn(near.send_file, here / "tree" / "0 slow", "copy")
    else:
        copying = spawn(near.recv_file, "tree", here / "copy")
    assert slow.reached.wait(20)
    net.wait_until(
        lambda: any(s.core.engine.receiving or s.core.serving for s in server.sessions), "the server to have begun"
    )
    closing = spawn(server.close, 20.0)
    net.wait_until(lambda: all(s.core.draining for s in server.sessions), "the server to be closing")
    assert copying.running and closing.running
    # nothing new, in either way
    with pytest.raises((BusyError, RefusedError, BrokenError, ClosedError)):
        near.send(b"late").wait(20)
    with pytest.raises((BusyError, RefusedError, BrokenError, ClosedError)):
        near.recv_file("small", here / "late")
    with pytest.raises(ConnectError):
        net.connect(server)
    slow.go_on.set()
    copying.outcome()
    closing.outcome()
    if direction == "up":
        assert (root / "copy").read_bytes() == (here / "tree" / "0 slow").read_bytes()
    else:
        for i in range(3):
            name = f"{i} slow"
            assert (here / "copy" / name).read_bytes() == (root / "tree" / name).read_bytes()
    for session in (near, other):
        assert session.wait_closed(10)
        assert isinstance(session.error, ClosedError)
    if handled:
        assert ended.wait(10)


def test_closing_gives_up_in_time_and_says_with_whom(
    net: Any, spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "slow").write_bytes(os.urandom(MIB))
    slow = Slow(monkeypatch)
    server = net.server(root=tmp_path / "root")
    near = net.connect(server)
    copying = spawn(near.send_file, tmp_path / "slow", "copy")
    assert slow.reached.wait(20)
    net.wait_until(lambda: server.sessions[0].core.engine.receiving, "the server to have begun")
    try:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match=r"not finished with .*: copy \(0 of 1048576 bytes received\)"):
            server.close(0.3)
        assert time.monotonic() - started < 8
    finally:
        slow.go_on.set()
    assert isinstance(copying.error(), AmstError)
    assert os.listdir(tmp_path / "root") == []
    server.close()  # again: nothing to do


def test_a_closed_server_accepts_no_more_and_tells_all_who_wait(net: Any, spawn: Any) -> None:
    server = net.server()
    waiting = [spawn(server.accept) for _ in range(3)]
    iterating = spawn(lambda: list(server))
    with pytest.raises(DeadlineError):
        net.server().accept(0.01)
    server.close()
    for task in waiting:
        assert isinstance(task.error(), ClosedError)
    assert iterating.outcome() == []


def test_a_server_as_a_context_ends_its_sessions(net: Any) -> None:
    with net.server() as server:
        near = net.connect(server)
        near.send(b"x").wait(20)
    assert near.wait_closed(10)
    with amst_core.listen(server.address, settings=net.settings({}), state_dir=net.state_dir) as again:
        assert again.address == server.address, "the address is free again at once"


def test_the_address_is_taken(net: Any) -> None:
    server = net.server()
    with pytest.raises(ConnectError, match="in use") as caught:
        net.server(address=server.address)
    assert not caught.value.retryable
