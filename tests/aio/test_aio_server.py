"""A server on an event loop: a task for each session, faults of one are nobody else's, a stop in good order."""

from __future__ import annotations

import asyncio
import contextvars
import os
from typing import Any

import pytest

from amst_core import aio
from amst_core.errors import AmstError, ClosedError, ConnectError, DeadlineError

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


def test_each_session_has_a_task_and_a_fault_in_one_ends_that_session_only(
    run: Any, net: Any, until: Any, caplog: Any
) -> None:
    async def main() -> None:
        asked = contextvars.ContextVar("asked", default="")
        asked.set("by the one who listens")
        seen = set()

        async def serve(session: aio.Session) -> None:
            seen.add((asyncio.current_task(), asked.get()))
            asked.set("by another session")
            async for message in session.messages():
                if message == b"fault":
                    raise ValueError("a fault of the application")
                await session.send(bytes(message))

        async with net.listen(serve) as server, net.connect(server) as good, net.connect(server) as bad:
            await bad.send(b"fault")
            with pytest.raises(ClosedError):
                await bad.recv()
            await good.send(b"x")
            assert await good.recv() == b"x"
            await until(lambda: [session.id for session in server.sessions] == [good.id], "the other one to be gone")
        assert len(seen) == 2 and {told for _, told in seen} == {"by the one who listens"}
        assert "on_session raised; the session is ended" in caplog.text and "a fault of the application" in caplog.text

    run(main())


def test_a_session_goes_on_when_its_handler_returns(run: Any, net: Any) -> None:
    async def main() -> None:
        returned = asyncio.Event()

        async def serve(session: aio.Session) -> None:
            returned.set()

        (net.local / "file").write_bytes(b"content")
        async with net.listen(serve) as server, net.connect(server) as near:
            await returned.wait()
            await near.send_file(net.local / "file", "file")
            assert (net.root / "file").read_bytes() == b"content"

    run(main())


def test_sessions_are_accepted_in_turn_and_a_cancelled_accept_loses_none(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.listen() as server:
            with pytest.raises(DeadlineError, match="no session"):
                await server.accept(0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await server.accept()
            accepted = []

            async def collect() -> None:
                async for session in server:
                    accepted.append(session.id)

            collecting = asyncio.create_task(collect())
            async with net.connect(server) as one, net.connect(server) as two:
                pass
            await server.close()
            await collecting
            assert accepted == [one.id, two.id]
            with pytest.raises(ClosedError):
                await server.accept()

    run(main())


def test_a_stop_lets_what_is_under_way_finish_and_takes_nothing_new(run: Any, net: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(os.urandom(2 * MIB))
        ended = asyncio.Event()

        async def serve(session: aio.Session) -> None:
            async for _ in session.messages():
                pass
            await asyncio.sleep(0.05)  # tidies up
            ended.set()

        server = await net.listen(serve)
        near = await net.connect(server)
        near.limit_rate(64 << 10)
        copying = asyncio.create_task(near.send_file(net.local / "file", "file"))
        while not server.inner.sessions[0].core.engine.receiving:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(server.close())
        while not server.inner._closed:
            await asyncio.sleep(0)
        with pytest.raises(ConnectError, match="the server is stopping"):
            await net.connect(server)
        near.limit_rate(None)
        await copying
        assert (net.root / "file").read_bytes() == (net.local / "file").read_bytes()
        await closing
        assert ended.is_set()
        assert isinstance(near.error, ClosedError) or await near.wait_closed()

    run(main())


def test_a_stop_that_runs_out_of_time_says_what_was_not_finished_and_cancels_the_handlers(run: Any, net: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(os.urandom(2 * MIB))
        cancelled = asyncio.Event()

        async def serve(session: aio.Session) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        server = await net.listen(serve)
        near = await net.connect(server)
        near.limit_rate(16 << 10)
        copying = asyncio.create_task(near.send_file(net.local / "file", "file"))
        while not server.inner.sessions[0].core.engine.receiving:
            await asyncio.sleep(0.001)
        with pytest.raises(DeadlineError, match=r"file \("):
            await server.close(0.1)
        assert cancelled.is_set()
        with pytest.raises(AmstError):
            await copying
        await near.wait_closed()

    run(main())


def test_a_cancelled_stop_ends_everything_at_once(run: Any, net: Any) -> None:
    async def main() -> None:
        server = await net.listen()
        near = await net.connect(server)
        near.limit_rate(16 << 10)
        await near.send(bytes(MIB))
        (far,) = server.inner.sessions
        while not far.core.engine.receiving:
            await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await server.close()
        assert far.error is not None
        await near.wait_closed()
        assert near.error is not None

    run(main())


def test_a_handler_may_close_its_server(run: Any, net: Any) -> None:
    async def main() -> None:
        closed = asyncio.Event()

        async def serve(session: aio.Session) -> None:
            async for _ in session.messages():
                await server.close()
                closed.set()

        server = await net.listen(serve)
        async with net.connect(server) as near:
            await (await near.send(b"stop"))
            await closed.wait()

    run(main())


def test_a_cancelled_listen_leaves_nothing(run: Any, net: Any, steps: Any) -> None:
    async def main() -> None:
        for turns in (0, 1, 2, 5, 20, 100, 500):
            listening = asyncio.ensure_future(net.listen())
            await steps(turns)
            listening.cancel()
            try:
                server = await listening
            except asyncio.CancelledError:
                continue
            await server.close()

    run(main())
