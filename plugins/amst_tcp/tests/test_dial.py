"""Connecting to names and addresses: order, fallback, the deadline, and errors that name every attempt."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from amst_core.errors import ConnectError
from amst_tcp.dial import STAGGER_S, address_text, dial

Listen = Callable[..., socket.socket]
Resolve = Callable[..., None]


def nothing(_sock: socket.socket) -> None:
    pass


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses: bound, so that nobody else gets it, and not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port whose queue of connections is full: the kernel drops further SYNs, as a firewall would."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port: int = listener.getsockname()[1]
        for _ in range(64):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(("127.0.0.1", port))
            except TimeoutError:
                break
        else:
            pytest.skip("the kernel goes on accepting connections beyond the backlog")
        yield port


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Makes every name resolve to the given IPv4 addresses."""

    def use(*addresses: tuple[str, int]) -> None:
        found: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)

    return use


def test_it_connects_to_an_address_of_either_family(listen: Listen, family: socket.AddressFamily) -> None:
    listener = listen(family)
    host, port = listener.getsockname()[:2]
    with dial(host, port, timeout_s=5, prepare=nothing) as sock, listener.accept()[0] as accepted:
        assert sock.getpeername() == listener.getsockname()
        assert accepted.getpeername() == sock.getsockname()
        assert sock.gettimeout() is None


def test_it_connects_to_a_name(listen: Listen) -> None:
    port = listen().getsockname()[1]
    with dial("localhost", port, timeout_s=5, prepare=nothing) as sock:  # also when ::1 comes first and refuses
        assert sock.getpeername() == ("127.0.0.1", port)


def test_it_goes_on_when_the_first_address_refuses(listen: Listen, resolve: Resolve, closed_port: int) -> None:
    target = listen().getsockname()
    resolve(("127.0.0.1", closed_port), target)
    with dial("two.example", 1, timeout_s=5, prepare=nothing) as sock:
        assert sock.getpeername() == target


def test_it_goes_on_when_the_first_address_keeps_silent(listen: Listen, resolve: Resolve, silent_port: int) -> None:
    target = listen().getsockname()
    resolve(("127.0.0.1", silent_port), target)
    began = time.monotonic()
    with dial("two.example", 1, timeout_s=60, prepare=nothing) as sock:
        assert sock.getpeername() == target
    assert STAGGER_S <= time.monotonic() - began < 30  # it neither skipped the first nor waited it out


def test_the_resolvers_order_is_kept(listen: Listen, resolve: Resolve) -> None:
    first, second = listen().getsockname(), listen().getsockname()
    resolve(first, second)
    with dial("two.example", 1, timeout_s=5, prepare=nothing) as sock:
        assert sock.getpeername() == first


def test_the_error_names_every_address_and_why(resolve: Resolve, closed_port: int, silent_port: int) -> None:
    resolve(("127.0.0.1", closed_port), ("127.0.0.1", silent_port))
    with pytest.raises(ConnectError) as caught:
        dial("two.example", 9000, timeout_s=0.3, prepare=nothing)
    message = str(caught.value)
    assert f"127.0.0.1:{closed_port}: Connection refused" in message
    assert f"127.0.0.1:{silent_port}: no answer within 0.3 s" in message
    assert "cannot connect to two.example:9000" in message
    assert caught.value.peer == "two.example:9000"
    assert caught.value.retryable


def test_addresses_that_the_deadline_left_untried_are_named(resolve: Resolve, silent_port: int) -> None:
    resolve(("127.0.0.1", silent_port), ("127.0.0.2", 7))
    with pytest.raises(ConnectError, match=r"127\.0\.0\.2:7: not tried"):
        dial("two.example", 9000, timeout_s=STAGGER_S / 5, prepare=nothing)


@pytest.mark.parametrize("host", ["a" * 70 + ".example", "no\0name", "nobody.invalid"])
def test_a_name_that_does_not_resolve_is_a_connect_error(host: str) -> None:
    with pytest.raises(ConnectError, match="cannot resolve"):
        dial(host, 9000, timeout_s=5, prepare=nothing)


def test_a_connection_to_itself_counts_as_refused(closed_port: int) -> None:
    def take_the_targets_port(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))

    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        with pytest.raises(ConnectError, match="Connection refused"):
            dial("127.0.0.1", port, timeout_s=5, prepare=take_the_targets_port)


def test_a_socket_that_cannot_be_prepared_fails_its_address_only_and_is_closed(listen: Listen) -> None:
    made: list[socket.socket] = []

    def refuse(sock: socket.socket) -> None:
        made.append(sock)
        raise PermissionError(1, "not here")

    port = listen().getsockname()[1]
    with pytest.raises(ConnectError, match=rf"127\.0\.0\.1:{port}: not here"):
        dial("127.0.0.1", port, timeout_s=5, prepare=refuse)
    assert [sock.fileno() for sock in made] == [-1]


def test_sockets_of_attempts_that_lost_are_closed(listen: Listen, resolve: Resolve, silent_port: int) -> None:
    made: list[socket.socket] = []
    resolve(("127.0.0.1", silent_port), listen().getsockname())
    with dial("two.example", 1, timeout_s=20, prepare=made.append) as sock:
        assert [s is sock for s in made] == [False, True]
        assert made[0].fileno() == -1


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert address_text("::1", 80) == "[::1]:80"
    assert address_text("127.0.0.1", 80) == "127.0.0.1:80"
