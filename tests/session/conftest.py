"""Servers and sessions over real sockets on loopback, and a check that each test leaves no thread and no descriptor."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import amst_core
from amst_core import Server, Session
from amst_core.interfaces import Lane, LaneRequest, LaneTimeouts
from amst_core.settings.load import load_settings
from amst_core.settings.values import Settings

DEADLINE_S = 20.0


class Task(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._call = (function, args, kwargs)
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, args, kwargs = self._call
        try:
            self._result = function(*args, **kwargs)
        except BaseException as err:
            self._error = err

    @property
    def running(self) -> bool:
        return self.is_alive()

    def outcome(self, timeout_s: float = DEADLINE_S) -> Any:
        """What the function returned; raises what it raised."""
        self.join(timeout_s)
        assert not self.is_alive(), "the thread is still blocked"
        if self._error is not None:
            raise self._error
        return self._result

    def error(self, timeout_s: float = DEADLINE_S) -> BaseException | None:
        """What the function raised, None when it returned."""
        self.join(timeout_s)
        assert not self.is_alive(), "the thread is still blocked"
        return self._error


@dataclass
class Pair:
    """Two ends of one session."""

    server: Server
    near: Session
    far: Session

    @property
    def ends(self) -> tuple[Session, Session]:
        return self.near, self.far


class Net:
    """Makes servers and sessions; everything is closed after the test."""

    def __init__(self, tmp_path: Path, stack: ExitStack) -> None:
        self._tmp_path = tmp_path
        self._stack = stack
        self.state_dir = tmp_path / "state"

    def settings(self, overrides: dict[str, object]) -> Settings:
        return load_settings(environ={}, overrides={"limits.handshake_timeout": "5s", **overrides})

    def server(
        self,
        *,
        root: Path | None = None,
        address: str = "127.0.0.1:0",
        on_session: Callable[[Session], None] | None = None,
        **overrides: object,
    ) -> Server:
        """A server in its own state directory; settings are written ``limits__memory="32MiB"``."""
        server = amst_core.listen(
            address,
            root=root,
            settings=self.settings(_dotted(overrides)),
            state_dir=self.state_dir,
            on_session=on_session,
        )
        self._stack.callback(_close_server, server)
        return server

    def connect(
        self,
        server: Server,
        *,
        streams: int | None = 2,
        token: bytes | None = None,
        plaintext: bool | None = None,
        root: Path | None = None,
        wait: bool = True,
        **overrides: object,
    ) -> Session:
        """A session with ``server``, once all its streams are up."""
        session = amst_core.connect(
            server.address,
            settings=self.settings(_dotted(overrides)),
            token=server.token if token is None else token,
            streams=streams,
            plaintext=plaintext,
            root=root,
        )
        self._stack.callback(session.abort)
        if wait and streams is not None:
            self.wait_until(lambda: len(session.core.lanes) == streams, f"{streams} streams")
        return session

    def pair(
        self,
        *,
        streams: int = 2,
        plaintext: bool | None = None,
        root: Path | None = None,
        client_root: Path | None = None,
        server: dict[str, Any] | None = None,
        client: dict[str, Any] | None = None,
    ) -> Pair:
        """A server and one session with it, all streams up on both sides."""
        listening = self.server(root=root, **(server or {}))
        near = self.connect(listening, streams=streams, plaintext=plaintext, root=client_root, **(client or {}))
        far = listening.accept(DEADLINE_S)
        self.wait_until(lambda: len(far.core.lanes) == streams, f"{streams} streams at the server")
        return Pair(listening, near, far)

    @staticmethod
    def wait_until(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            time.sleep(0.002)

    @staticmethod
    def stays(condition: Callable[[], object], what: str, for_s: float = 0.3) -> None:
        """``condition`` holds now and for a while; for what must *not* happen."""
        until = time.monotonic() + for_s
        while time.monotonic() < until:
            assert condition(), what
            time.sleep(0.005)


def _dotted(overrides: dict[str, object]) -> dict[str, object]:
    return {key.replace("__", "."): value for key, value in overrides.items()}


def _close_server(server: Server) -> None:
    for session in server.sessions:
        session.abort()
    server.close(5.0)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with ExitStack() as stack:
        yield Net(tmp_path, stack)


@pytest.fixture
def spawn() -> Callable[..., Task]:
    """Starts a function in a thread; ``outcome()`` waits for it with a deadline."""
    return Task


class WrappedLane(Lane):
    """A lane with its faults: a test overrides what it wants to spoil."""

    def __init__(self, inner: Lane) -> None:
        self.inner = inner

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self.inner.send_frame(header, payload)

    def recv_frame(self, place: Any) -> bytes | None:
        return self.inner.recv_frame(place)

    def close(self) -> None:
        self.inner.close()

    def abort(self) -> None:
        self.inner.abort()

    def path_stats(self) -> Any:
        return self.inner.path_stats()

    @property
    def description(self) -> str:
        return self.inner.description


@pytest.fixture
def wrapped_lane() -> type[WrappedLane]:
    return WrappedLane


@pytest.fixture
def wrap_lanes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every TCP lane made from now on wrapped: ``near`` those the client opens, ``far`` those the server adopts."""
    from amst_tcp.transport import TcpTransport

    def install(*, near: Callable[[Lane], Lane] | None = None, far: Callable[[Lane], Lane] | None = None) -> None:
        connect, adopt = TcpTransport.connect, TcpTransport.adopt
        if near is not None:

            def connecting(self: TcpTransport, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
                return near(connect(self, request, timeouts))

            monkeypatch.setattr(TcpTransport, "connect", connecting)
        if far is not None:

            def adopting(self: TcpTransport, sock: Any, timeouts: LaneTimeouts) -> Lane:
                return far(adopt(self, sock, timeouts))

            monkeypatch.setattr(TcpTransport, "adopt", adopting)

    return install


class _Unexpected(logging.Handler):
    """Collects what the session itself calls unexpected: a bug of ours that some caller might not notice."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "unexpected" in record.getMessage():
            self.found.append(self.format(record))


@pytest.fixture(autouse=True)
def nothing_unexpected() -> Iterator[None]:
    handler = _Unexpected()
    logger = logging.getLogger("amst")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.found == []


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No thread and no descriptor outlives a test (set up first, so checked last)."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    deadline = time.monotonic() + 10.0

    def left() -> tuple[list[str], list[str]]:
        return (
            sorted(thread.name for thread in threading.enumerate() if thread not in threads),
            sorted(set(_descriptors()) - set(descriptors)),
        )

    while any(left()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left() == ([], [])


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # the one of this listing
            continue
    return found
