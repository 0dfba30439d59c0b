"""Servers and sessions over real sockets on loopback, and a check that each test leaves no thread and no descriptor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_error_logged, no_leftovers
from waiting import DEADLINE_S, Task, wait_until

import amst_core
from amst_core import Server, Session
from amst_core.interfaces import Lane, LaneRequest, LaneTimeouts
from amst_core.plugins import Plugins
from amst_core.settings.load import load_settings
from amst_core.settings.values import Settings
from amst_core.testing import FaultyLane


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
        # what a loaded machine makes of the loopback's round trip is no matter of most tests
        quick = {
            "limits.handshake_timeout": "5s",
            "limits.session_timeout": "4s",
            "transport.modes.auto_mode": False,
        }
        return load_settings(environ={}, overrides={**quick, **overrides})

    def server(
        self,
        *,
        root: Path | None = None,
        address: str = "127.0.0.1:0",
        on_session: Callable[[Session], None] | None = None,
        plugins: Plugins | None = None,
        mode: str | None = None,
        **overrides: object,
    ) -> Server:
        """A server in its own state directory; settings are written ``limits__memory="32MiB"``."""
        server = amst_core.listen(
            address,
            root=root,
            settings=self.settings(_dotted(overrides)),
            state_dir=self.state_dir,
            on_session=on_session,
            plugins=plugins,
            mode=mode,
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
        verify: bool = True,
        root: Path | None = None,
        wait: bool = True,
        plugins: Plugins | None = None,
        transport: str | None = None,
        congestion: str | None = None,
        max_streams: int | None = None,
        polite: bool = False,
        mode: str | None = None,
        **overrides: object,
    ) -> Session:
        """A session with ``server``, once all its streams are up."""
        session = amst_core.connect(
            server.address,
            settings=self.settings(_dotted(overrides)),
            token=server.token if token is None else token,
            streams=streams,
            plaintext=plaintext,
            verify=verify,
            root=root,
            plugins=plugins,
            transport=transport,
            congestion=congestion,
            max_streams=max_streams,
            polite=polite,
            mode=mode,
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
        verify: bool = True,
        root: Path | None = None,
        client_root: Path | None = None,
        server: dict[str, Any] | None = None,
        client: dict[str, Any] | None = None,
    ) -> Pair:
        """A server and one session with it, all streams up on both sides."""
        listening = self.server(root=root, **(server or {}))
        near = self.connect(
            listening, streams=streams, plaintext=plaintext, verify=verify, root=client_root, **(client or {})
        )
        far = listening.accept(DEADLINE_S)
        self.wait_until(lambda: len(far.core.lanes) == streams, f"{streams} streams at the server")
        return Pair(listening, near, far)

    wait_until = staticmethod(wait_until)

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


@pytest.fixture
def wrapped_lane() -> type[FaultyLane]:
    """A lane that passes everything on: a test overrides what it wants to spoil."""
    return FaultyLane


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


@pytest.fixture(autouse=True)
def nothing_unexpected() -> Iterator[None]:
    with no_error_logged("unexpected"):
        yield


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Set up first, so checked last."""
    with no_leftovers():
        yield
