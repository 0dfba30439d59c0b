"""One real server per module with an honest session in mid-transfer, and what every case leaves behind: nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hostile_peer import RawClient, RawServer, settings_with
from leftovers import no_error_logged, no_leftovers
from waiting import DEADLINE_S, Task, wait_until

import amst_core
from amst_core import Server, Session
from amst_core.interfaces import Lane, LaneRequest, LaneTimeouts

HIDDEN = ".amst-"
_DATA = 1


class _Gate:
    """Lets so many DATA frames through and holds back the others until it is opened; but a few.

    A lane must send now and then: one that holds back the answer to a PING for long is given up.
    """

    _PATIENCE_S = 4.0

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: int | None = None
        self.held = 0

    def hold_after(self, frames: int) -> None:
        with self._changed:
            self._left = frames

    def open(self) -> None:
        with self._changed:
            self._left = None
            self._changed.notify_all()

    def passed(self) -> None:
        with self._changed:
            self.held += 1
            if self._left == 0:
                self._changed.wait_for(lambda: self._left is None, self._PATIENCE_S)
            elif self._left is not None:
                self._left -= 1
            self.held -= 1


class _GatedLane(Lane):
    def __init__(self, inner: Lane, gate: _Gate) -> None:
        self._inner = inner
        self._gate = gate

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        if header[1] == _DATA:
            self._gate.passed()
        self._inner.send_frame(header, payload)

    def recv_frame(self, place: Any) -> bytes | None:
        return self._inner.recv_frame(place)

    def close(self) -> None:
        self._inner.close()

    def abort(self) -> None:
        self._inner.abort()

    def path_stats(self) -> Any:
        return self._inner.path_stats()

    @property
    def description(self) -> str:
        return self._inner.description


class Bystander:
    """An honest session on the attacked server. Each `begin` starts to send a file, half of which is held back."""

    CHUNK = 16 << 10

    def __init__(self, server: Server, folder: Path, root: Path) -> None:
        from amst_tcp.transport import TcpTransport

        self._gate = _Gate()
        self._root = root
        self._content = os.urandom(40 * self.CHUNK + 1)
        self._source = folder / "honest"
        self._source.write_bytes(self._content)
        self._count = 0
        connect = TcpTransport.connect

        def gated(transport: TcpTransport, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
            return _GatedLane(connect(transport, request, timeouts), self._gate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TcpTransport, "connect", gated)
            self.session = amst_core.connect(
                server.address,
                settings=settings_with({"transport.amst.chunk_size_kb": self.CHUNK >> 10}),
                token=server.token,
                streams=2,
            )
            wait_until(lambda: len(self.session.core.lanes) == 2, "the honest session's streams")
        self.id = self.session.id
        for end in (self.session, *server.sessions):
            end.core.background.later(lambda: None)  # the worker is started when it is needed first: now
        self.begin()
        self.complete()

    def begin(self) -> None:
        self._count += 1
        self._gate.hold_after(5)
        self._copy = Task(self.session.send_file, self._source, f"honest-{self._count}")
        wait_until(lambda: self._gate.held == 2 or not self._copy.is_alive(), "the honest transfer to be under way")
        assert self._copy.is_alive()

    def complete(self) -> None:
        """What was begun arrives whole, nothing was lost on the way."""
        self._gate.open()
        self._copy.outcome()
        target = self._root / f"honest-{self._count}"
        assert target.read_bytes() == self._content
        target.unlink()
        assert self.session.error is None
        assert self.session.metrics().lane_failures == 0

    def close(self) -> None:
        self._gate.open()
        self.session.abort()
        assert self.session.wait_closed(DEADLINE_S)


class Ground:
    """What a case meets: a server, its files, and ways to come to it."""

    def __init__(self, folder: Path, overrides: dict[str, object]) -> None:
        self.root = folder / "root"
        self.outside = folder / "outside"
        self._state_dir = folder / "state"
        self._folder = folder
        self._case = ExitStack()
        for directory in (self.root, self.outside, self.root / "directory"):
            directory.mkdir()
        (self.root / "victim").write_bytes(b"victim")
        (self.root / "directory" / "file").write_bytes(b"file")
        (self.root / "link").symlink_to(self.outside)
        (self.outside / "secret").write_bytes(b"secret")
        self.settings = settings_with(overrides)
        self.server = amst_core.listen(
            "127.0.0.1:0",
            root=self.root,
            settings=self.settings,
            state_dir=self._state_dir,
            on_session=lambda session: None,
        )
        self.token = self.server.token
        self.bystander = Bystander(self.server, folder, self.root)

    # ---- for the cases -------------------------------------------------------------------------

    def stranger(self) -> RawClient:
        """A client that has not said a word yet."""
        client = RawClient(self.server.address, self.token)
        self._case.callback(client.close)
        return client

    def client(self, **how: Any) -> RawClient:
        """A client that agreed on a session like an honest one."""
        client = RawClient.agreed(self.server.address, self.token, **how)
        self._case.callback(client.close)
        return client

    def keep(self, thing: Any) -> Any:
        """Have ``thing`` closed after the case."""
        self._case.callback(thing.close)
        return thing

    def far(self, client: RawClient) -> Session:
        """The server's end of a client's session."""
        wanted = client.limits.attributes["session"].hex()
        wait_until(lambda: any(s.id == wanted for s in self.server.sessions), "the session at the server")
        return next(s for s in self.server.sessions if s.id == wanted)

    def honest_works(self) -> None:
        """A client that comes now is served."""
        with amst_core.connect(
            self.server.address, settings=settings_with({}), token=self.token, streams=1
        ) as session:
            session.send(b"honest").wait(DEADLINE_S)

    # ---- around the cases ------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """Everything below root and outside but hidden temporary files, with what is in it."""
        found = {}
        for top in (self.root, self.outside):
            for path in top.rglob("*"):
                if not path.name.startswith(HIDDEN):
                    shown = str(path.relative_to(self._folder))
                    found[shown] = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        return found

    def end_case(self) -> None:
        """Close what the case opened, and wait until the server has forgotten it."""
        self._case.close()
        for session in self.server.sessions:
            if session.id != self.bystander.id:
                session.abort()  # one whose connections are cut waits for them to come back
        wait_until(
            lambda: {session.id for session in self.server.sessions} == {self.bystander.id},
            "the server to have only its honest session",
        )

    def tidy(self) -> None:
        """Remove what is kept of files that did not come whole, so that no case finds another's."""
        for path in self.root.rglob(f"{HIDDEN}*"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self.bystander.close()
        self.server.close(5.0)


@pytest.fixture(scope="module")
def _ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    ground = Ground(tmp_path_factory.mktemp("ground"), getattr(request.module, "SETTINGS", {}))
    yield ground
    ground.close()


@pytest.fixture
def ground(_ground: Ground, nothing_left: None) -> Iterator[Ground]:
    """The module's server; after the case its honest session and its files are as they should be."""
    before = _ground.files()
    _ground.bystander.begin()
    try:
        yield _ground
    finally:
        _ground.end_case()
        _ground.bystander.complete()
        _ground.tidy()
    assert _ground.files() == before


@pytest.fixture
def raw_server(tmp_path: Path, nothing_left: None) -> Iterator[RawServer]:
    """A server that does only what the test says."""
    server = RawServer(tmp_path / "hostile state")
    yield server
    server.close()


@pytest.fixture
def spawn() -> Callable[..., Task]:
    """Starts a function in a thread; ``outcome()`` waits for it with a deadline."""
    return Task


@pytest.fixture(autouse=True)
def nothing_unexpected() -> Iterator[None]:
    with no_error_logged():
        yield


@pytest.fixture
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    if "ground" in request.fixturenames:
        request.getfixturevalue("_ground")  # what the module shares is there before the count
    with no_leftovers():
        yield
