"""Pairs of real lanes over loopback, and threads whose outcome a test can wait for."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from amst_core.interfaces import LaneTimeouts
from amst_tcp.lane import SocketOptions, TcpLane

DEADLINE_S = 20.0
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


class Task(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as err:
            self._error = err

    def outcome(self) -> Any:
        self.join(DEADLINE_S)
        assert not self.is_alive(), "the thread is still blocked"
        if self._error is not None:
            raise self._error
        return self._result


@pytest.fixture
def spawn() -> Callable[[Callable[[], Any]], Task]:
    """Starts a function in a thread; the task's ``outcome()`` waits for it with a deadline."""
    return Task


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool], str], None]:
    """Waits for a condition, with a deadline and a name for what did not come."""
    return _wait_until


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.002)


def _listener(family: socket.AddressFamily) -> socket.socket:
    """A listening socket on loopback; skips the test where the machine lacks the family."""
    try:
        return socket.create_server((LOOPBACK[family], 0), family=family, backlog=512)
    except OSError as err:
        if err.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            pytest.skip(f"no {family.name} on loopback here: {err.strerror}")
        raise


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> socket.AddressFamily:
    found: socket.AddressFamily = request.param
    return found


@pytest.fixture
def listen() -> Iterator[Callable[..., socket.socket]]:
    """Makes listening sockets on loopback, closed after the test."""
    with ExitStack() as stack:

        def make(family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
            return stack.enter_context(_listener(family))

        yield make


SocketPairs = Callable[..., tuple[socket.socket, socket.socket]]


@pytest.fixture
def socket_pairs() -> Iterator[SocketPairs]:
    """Makes connected TCP sockets, closed after the test unless a lane took them."""
    with ExitStack() as stack:

        def make(family: socket.AddressFamily = socket.AF_INET) -> tuple[socket.socket, socket.socket]:
            with _listener(family) as listener:
                near = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
                far = stack.enter_context(listener.accept()[0])
            return near, far

        yield make


@pytest.fixture
def lane_pairs(socket_pairs: SocketPairs) -> Iterator[Callable[..., tuple[TcpLane, TcpLane]]]:
    """Makes two lanes joined by a connection; aborted after the test."""
    with ExitStack() as stack:

        def make(
            *,
            family: socket.AddressFamily = socket.AF_INET,
            timeouts: LaneTimeouts | None = None,
            options: SocketOptions | None = None,
        ) -> tuple[TcpLane, TcpLane]:
            lanes = [TcpLane(s, timeouts or LaneTimeouts(), options or SocketOptions()) for s in socket_pairs(family)]
            for lane in lanes:
                stack.callback(lane.abort)
            return lanes[0], lanes[1]

        yield make
