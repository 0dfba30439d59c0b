"""The transport object: options, probing, connecting with the preamble, adopting."""

from __future__ import annotations

import gc
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import amst_tcp.sysctl
import amst_tcp.transport
from amst_core.errors import BrokenError, ConfigError, ConnectError
from amst_core.interfaces import (
    API_VERSION,
    HEADER_SIZE,
    PREAMBLE,
    PREAMBLE_MAGIC,
    Advertisement,
    Capability,
    Endpoint,
    LaneRequest,
    LaneTimeouts,
)
from amst_tcp.lane import SocketOptions, TcpLane
from amst_tcp.transport import TcpTransport

Listen = Callable[..., socket.socket]
SocketPairs = Callable[..., tuple[socket.socket, socket.socket]]
EMPTY = memoryview(b"")


def request(listener: socket.socket, *, timeout_s: float = 5.0) -> LaneRequest:
    host, port = listener.getsockname()[:2]
    return LaneRequest(Advertisement("tcp", 7), host, port, PREAMBLE.pack(PREAMBLE_MAGIC, 7), timeout_s)


def test_connect_and_adopt_make_two_ends_of_one_lane(listen: Listen, family: socket.AddressFamily) -> None:
    transport, listener = TcpTransport({}), listen(family)
    wanted = request(listener)
    with transport.connect(wanted, LaneTimeouts()) as near:
        accepted = listener.accept()[0]
        assert accepted.recv(PREAMBLE.size, socket.MSG_WAITALL) == wanted.preamble
        with transport.adopt(accepted, LaneTimeouts()) as far:
            for sender, receiver in ((near, far), (far, near)):
                sender.send_frame(bytes(HEADER_SIZE), memoryview(b"hello"))
                buffer = bytearray(5)
                assert receiver.recv_frame(lambda _header, buffer=buffer: memoryview(buffer)) == bytes(HEADER_SIZE)
                assert buffer == b"hello"


def test_adopt_takes_a_socket_with_a_python_timeout(socket_pairs: SocketPairs) -> None:
    near, _far = socket_pairs()
    near.settimeout(0.01)
    with TcpTransport({}).adopt(near, LaneTimeouts(read_s=5)):
        assert near.gettimeout() is None


def test_a_dead_connection_is_not_adopted_and_closed(socket_pairs: SocketPairs) -> None:
    near, far = socket_pairs()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    far.close()
    with pytest.raises(BrokenError, match="gone"):
        TcpTransport({}).adopt(near, LaneTimeouts())
    assert near.fileno() == -1


def test_a_refused_connection_is_a_connect_error(listen: Listen) -> None:
    listener = listen()
    wanted = request(listener)
    listener.close()
    with pytest.raises(ConnectError, match="Connection refused"):
        TcpTransport({}).connect(wanted, LaneTimeouts())


def test_a_connection_that_dies_at_once_is_a_connect_error_and_leaks_nothing(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled: list[socket.socket] = []

    def dial_and_lose(*args: object, **kwargs: object) -> socket.socket:
        sock = socket.create_connection(listener.getsockname())
        accepted = listener.accept()[0]
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        accepted.close()
        dialled.append(sock)
        return sock

    listener = listen()
    monkeypatch.setattr(amst_tcp.transport, "dial", dial_and_lose)
    with pytest.raises(ConnectError, match="dropped it at once"):
        TcpTransport({}).connect(request(listener), LaneTimeouts())
    assert dialled[0].fileno() == -1


def test_it_describes_itself() -> None:
    transport = TcpTransport({})
    assert transport.name == "tcp"
    assert transport.api_version == API_VERSION
    assert transport.capabilities == Capability.FILE_SPAN
    assert transport.advertise(3, lambda _lane: None) == Advertisement("tcp", 3, "")
    transport.close()
    transport.close()


def test_lanes_outlive_their_transport(listen: Listen) -> None:
    transport, listener = TcpTransport({}), listen()
    with transport.connect(request(listener), LaneTimeouts()) as lane:
        transport.close()
        del transport
        gc.collect()
        lane.send_frame(bytes(HEADER_SIZE), EMPTY)
        with listener.accept()[0] as accepted:
            assert len(accepted.recv(8 + HEADER_SIZE, socket.MSG_WAITALL)) == 8 + HEADER_SIZE


@pytest.mark.parametrize("peer", [None, Endpoint("amst", "192.0.2.1", 9000)])
def test_probe_tells_the_kernels_algorithms(peer: Endpoint | None) -> None:
    candidate = TcpTransport({}).probe(peer)
    assert candidate.usable
    assert candidate.transport == "tcp"
    assert candidate.score == 1.0
    assert candidate.reason == "kernel TCP"
    with socket.socket() as sock:
        default = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).partition(b"\0")[0].decode()
    assert candidate.facts["default_congestion"] == default
    available = candidate.facts["available_congestion"]
    assert isinstance(available, tuple)
    assert default in available


def test_probe_does_without_a_proc_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(amst_tcp.sysctl, "_NET", tmp_path)
    candidate = TcpTransport({"send_buffer": 1 << 30}).probe(None)
    assert candidate.usable
    assert candidate.facts == {}


def test_probe_says_when_the_kernel_will_cut_a_buffer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core/wmem_max").write_text("212992\n")
    (tmp_path / "core/rmem_max").write_text("4194304\n")
    monkeypatch.setattr(amst_tcp.sysctl, "_NET", tmp_path)
    candidate = TcpTransport({"send_buffer": 1 << 20, "receive_buffer": 1 << 20}).probe(None)
    assert candidate.reason == "send_buffer 1048576 is cut to net.core.wmem_max = 212992"


def test_options_reach_the_sockets_of_both_sides(listen: Listen) -> None:
    transport, listener = (
        TcpTransport({"notsent_lowat": 98304, "send_buffer": 65536, "receive_buffer": 32768}),
        listen(),
    )
    with (
        transport.connect(request(listener), LaneTimeouts()) as near,
        transport.adopt(listener.accept()[0], LaneTimeouts()) as far,
    ):
        for lane in (near, far):
            assert isinstance(lane, TcpLane)
            sock = lane._sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 98304
            # The kernel doubles what is asked for, to account for its own overhead (socket(7)).
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 65536
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 32768


def test_buffers_are_set_before_the_handshake(monkeypatch: pytest.MonkeyPatch, listen: Listen) -> None:
    buffers: list[int] = []
    connect_ex = socket.socket.connect_ex

    class Watched(socket.socket):
        def connect_ex(self, address: object) -> int:
            buffers.append(self.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
            return connect_ex(self, address)  # type: ignore[arg-type]

    listener = listen()
    monkeypatch.setattr(socket, "socket", Watched)
    TcpTransport({"receive_buffer": 32768}).connect(request(listener), LaneTimeouts()).abort()
    assert buffers == [2 * 32768]


def test_the_default_options_are_those_documented() -> None:
    assert SocketOptions() == SocketOptions(notsent_lowat=262144, send_buffer=0, receive_buffer=0)


@pytest.mark.parametrize("value", ["big", 1.5, True, None, -1, 1 << 31], ids=repr)
@pytest.mark.parametrize("key", ["notsent_lowat", "send_buffer", "receive_buffer"])
def test_a_bad_value_is_refused_by_key_with_what_is_allowed(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TcpTransport({key: value})
    assert f"plugins.tcp.{key} = {value!r} must be a whole number of bytes" in str(caught.value)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TcpTransport({"nodelay": 1, "send_buffer": "x", "receive_buffer": -5})
    message = str(caught.value)
    assert "plugins.tcp.nodelay is unknown; known are notsent_lowat, send_buffer, receive_buffer" in message
    assert "plugins.tcp.send_buffer" in message
    assert "plugins.tcp.receive_buffer" in message
