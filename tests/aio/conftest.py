"""Servers and sessions on an event loop, over real sockets on loopback; no test leaves a thread or a descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from leftovers import no_error_logged, no_leftovers
from waiting import DEADLINE_S

from amst_core import aio
from amst_core.settings.load import load_settings
from amst_core.settings.values import Settings


def loop_factory(kind: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if kind == "asyncio":
        return asyncio.new_event_loop
    return pytest.importorskip("uvloop", reason="uvloop is not installed").new_event_loop  # type: ignore[no-any-return]


@pytest.fixture(scope="session", autouse=True)
def uvloop_has_run() -> None:
    """The first loop that libuv makes opens descriptors that stay with the process."""
    with contextlib.suppress(ImportError):
        with asyncio.Runner(loop_factory=import_module("uvloop").new_event_loop) as runner:
            runner.run(asyncio.sleep(0))


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine to its end on either loop, with a deadline; debug mode finds calls from wrong threads."""
    factory = loop_factory(request.param)

    def run(main: Coroutine[Any, Any, Any], deadline_s: float = 3 * DEADLINE_S) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(deadline_s):
                return await main

        with asyncio.Runner(debug=True, loop_factory=factory) as runner:
            return runner.run(limited())

    return run


@dataclass
class Pair:
    """Two ends of one session, in one loop."""

    server: aio.Server
    near: aio.Session
    far: aio.Session


class Net:
    """Where servers keep their state, and how everything is set up quickly."""

    def __init__(self, tmp_path: Path) -> None:
        self.state_dir = tmp_path / "state"
        self.root = tmp_path / "root"
        self.root.mkdir()
        self.local = tmp_path / "local"
        self.local.mkdir()

    @staticmethod
    def settings(**overrides: object) -> Settings:
        quick: dict[str, object] = {
            "limits.handshake_timeout": "5s",
            "limits.session_timeout": "4s",
            "transport.modes.auto_mode": False,
        }
        return load_settings(
            environ={}, overrides={**quick, **{key.replace("__", "."): value for key, value in overrides.items()}}
        )

    def listen(self, on_session: Any = None, **overrides: object) -> Any:
        return aio.listen(
            "127.0.0.1:0",
            root=self.root,
            state_dir=self.state_dir,
            settings=self.settings(**overrides),
            on_session=on_session,
        )

    def connect(self, server: aio.Server, *, streams: int = 2, **overrides: object) -> Any:
        return aio.connect(
            server.address, token=server.token, streams=streams, settings=self.settings(**overrides)
        )

    @contextlib.asynccontextmanager
    async def pair(self, *, streams: int = 2, **overrides: object) -> AsyncIterator[Pair]:
        async with self.listen(**overrides) as server:
            async with self.connect(server, streams=streams, **overrides) as near:
                far = await server.accept(DEADLINE_S)
                await until(lambda: len(near.streams()) == len(far.streams()) == streams, f"{streams} streams")
                yield Pair(server, near, far)


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return Net(tmp_path)


async def until(condition: Callable[[], object], what: str) -> None:
    """Look until ``condition`` holds."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited {DEADLINE_S:g} s for {what}") from None


@pytest.fixture(name="until")
def until_fixture() -> Any:
    return until


async def steps(count: int) -> None:
    """Let the event loop turn so many times."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture(name="steps")
def steps_fixture() -> Any:
    return steps


@pytest.fixture
def own_threads() -> Callable[[], list[str]]:
    """The names of the threads that run on behalf of coroutines."""
    return lambda: sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("amst-aio"))


@pytest.fixture(autouse=True)
def nothing_unexpected() -> Iterator[None]:
    with no_error_logged("unexpected"):
        yield


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Set up first, so checked last."""
    with no_leftovers():
        yield
