"""Opening and closing: cancelled at any moment nothing is left, and loops, ends and deaths of peers are survived."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from leftovers import Snapshot

import amst_core
from amst_core import aio
from amst_core.api.attempt import Attempt
from amst_core.errors import (
    AuthError,
    BrokenError,
    CancelledError,
    ClosedError,
    ConnectError,
    DeadlineError,
    UsageError,
)

pytestmark = pytest.mark.needs_transport


@contextlib.asynccontextmanager
async def leaving_nothing() -> AsyncIterator[None]:
    """No thread and no descriptor outlives the block by more than moments."""
    before = Snapshot()
    yield
    try:
        async with asyncio.timeout(10):
            while any(before.left()):
                await asyncio.sleep(0.005)
    except TimeoutError:
        assert before.left() == ([], [])


@pytest.fixture
def silent() -> Iterator[str]:
    """An address where somebody accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def deaf() -> Iterator[str]:
    """An address where connections are not even accepted: the backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_connect_and_listen_are_awaited_or_entered(run: Any, net: Any) -> None:
    async def main() -> None:
        server = await net.listen()
        near = await net.connect(server)
        async with await net.connect(server) as other, net.connect(server) as third:
            assert len({near.id, other.id, third.id}) == 3
            assert near.report.encrypted and near.peer == server.address
            accepted = [await server.accept() for _ in range(3)]
            assert {session.id for session in accepted} == {near.id, other.id, third.id}
        assert isinstance(other.error, ClosedError) and isinstance(third.error, ClosedError)
        assert near.error is None
        await near.close()
        await server.close()
        await server.close()

    run(main())


def test_what_is_wrong_is_raised(run: Any, net: Any, tmp_path: Any) -> None:
    async def main() -> None:
        async with net.listen() as server:
            with pytest.raises(AuthError):
                await aio.connect(server.address, token=bytes(32), settings=net.settings())
            with pytest.raises(UsageError):
                await aio.connect("nonsense://x", token=bytes(32))
            with pytest.raises(UsageError):
                await aio.listen("nonsense://x", state_dir=tmp_path / "other")
            with pytest.raises(ConnectError):
                await aio.listen(server.address, state_dir=tmp_path / "other", settings=net.settings())
        with pytest.raises(ConnectError):
            await aio.connect(server.address, token=server.token, settings=net.settings())
        with pytest.raises(ConnectError, match="cannot find"):
            await aio.connect("no-such-host.invalid", token=bytes(32), settings=net.settings())

    run(main())


def test_connect_cancelled_at_any_moment_leaves_nothing(run: Any, net: Any, steps: Any) -> None:
    async def main() -> None:
        settings = net.settings()
        async with net.listen() as server:
            cancelled, turns = 0, 0
            while True:
                async with leaving_nothing():
                    opening = asyncio.ensure_future(
                        aio.connect(server.address, token=server.token, streams=2, settings=settings)
                    )
                    await steps(turns)
                    opening.cancel()
                    try:
                        session = await opening
                    except asyncio.CancelledError:
                        cancelled += 1
                    else:
                        await session.close()
                        break
                turns = turns * 3 // 2 + 1
            assert cancelled > 5
            async with net.connect(server) as session:
                assert (await session.health_check()).healthy

    run(main())


@pytest.mark.parametrize("where", ["silent", "deaf"])
def test_connect_to_whom_does_not_answer_is_cancelled_at_once(
    run: Any, net: Any, until: Any, own_threads: Any, request: Any, where: str
) -> None:
    address = request.getfixturevalue(where)

    async def main() -> None:
        async with leaving_nothing():
            opening = asyncio.ensure_future(aio.connect(address, token=bytes(32), settings=net.settings()))
            await asyncio.sleep(0.2)
            assert not opening.done()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await aio.connect(address, token=bytes(32), settings=net.settings())
            await until(lambda: not own_threads(), "the thread to end, long before its time is up (30 s)")

    run(main(), deadline_s=20)


@pytest.mark.parametrize("where", ["silent", "deaf"])
def test_the_synchronous_connect_can_be_given_up_by_another_thread(net: Any, request: Any, where: str) -> None:
    attempt = Attempt()
    giving_up = threading.Timer(0.2, attempt.give_up)
    giving_up.start()
    with pytest.raises(CancelledError, match="given up"):
        amst_core.connect(request.getfixturevalue(where), token=bytes(32), settings=net.settings(), attempt=attempt)
    giving_up.join()


def test_an_attempt_given_up_before_or_after_connect(net: Any) -> None:
    with amst_core.listen("127.0.0.1:0", state_dir=net.state_dir, settings=net.settings()) as server:
        early, late = Attempt(), Attempt()
        early.give_up()
        with pytest.raises(CancelledError):
            amst_core.connect(server.address, token=server.token, settings=net.settings(), attempt=early)
        with amst_core.connect(server.address, token=server.token, settings=net.settings(), attempt=late) as session:
            late.give_up()
            assert session.health_check().healthy


def test_a_cancelled_close_aborts(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            pair.near.limit_rate(16 << 10)
            ticket = await pair.near.send(bytes(1 << 20))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await pair.near.close()
            assert await pair.near.wait_closed(5) and ticket.error is not None
            assert await pair.far.wait_closed(5)

    run(main())


def test_close_delivers_what_is_under_way_or_says_what_was_not(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.listen() as server:
            async with net.connect(server) as near:
                far = await server.accept()
                for n in range(50):
                    await near.send(b"%d" % n)
            assert [bytes(message) async for message in far.messages()] == [b"%d" % n for n in range(50)]

            near = await net.connect(server)
            near.limit_rate(16 << 10)
            await near.send(bytes(1 << 20))
            closing = [asyncio.create_task(near.close(0.1)), asyncio.create_task(near.close(0.1))]
            with pytest.raises(DeadlineError, match="1 transfers"):
                await closing[0]
            await closing[1]

    run(main())


def test_a_block_that_raises_aborts_its_session(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.listen() as server:
            with pytest.raises(ZeroDivisionError):
                async with net.connect(server) as near:
                    near.limit_rate(16 << 10)
                    await near.send(bytes(1 << 20))
                    raise ZeroDivisionError
            assert near.error is not None and "aborted" in str(near.error)

    run(main())


def test_streams_health_and_limits(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            near = pair.near
            assert await near.adjust_streams(4) == 4
            reports = await asyncio.gather(*(near.health_check() for _ in range(20)), near.adjust_streams(3))
            assert all(report.healthy for report in reports[:-1]) and reports[-1] == 3
            with pytest.raises(UsageError):
                await near.adjust_streams(0)
            with pytest.raises(UsageError):
                near.limit_rate(1)
            with pytest.raises(UsageError):
                await near.limit_peer_rate(1)
            await near.limit_peer_rate(1e6)
            assert pair.far._inner.core._rates[1] == 1e6
            assert near.metrics().active_streams == 3 == len([s for s in near.streams() if s.healthy])
            adjusting = asyncio.create_task(near.adjust_streams(5))
            await asyncio.sleep(0)
            adjusting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adjusting
            assert await near.adjust_streams(2) == 2

    run(main())


def test_two_loops_in_two_threads_and_several_sessions_in_each(run: Any, net: Any) -> None:
    async def client(address: str, token: bytes) -> None:
        async with contextlib.AsyncExitStack() as stack:
            sessions = [
                await stack.enter_async_context(
                    aio.connect(address, token=token, streams=1, settings=net.settings())
                )
                for _ in range(3)
            ]
            for n in range(30):
                for session in sessions:
                    await session.send(b"%d" % n)
                assert [bytes(await session.recv()) for session in sessions] == [b"%d" % n] * 3

    async def main() -> None:
        async def echo(session: aio.Session) -> None:
            async for message in session.messages():
                await session.send(bytes(message))

        async with net.listen(echo) as server:
            outcomes: list[BaseException | None] = []

            def elsewhere() -> None:
                try:
                    asyncio.run(client(server.address, server.token))
                except BaseException as err:
                    outcomes.append(err)
                else:
                    outcomes.append(None)

            threads = [threading.Thread(target=elsewhere) for _ in range(2)]
            for thread in threads:
                thread.start()
            await client(server.address, server.token)
            while any(thread.is_alive() for thread in threads):
                await asyncio.sleep(0.01)
            assert outcomes == [None, None]

    run(main())


def test_a_loop_that_is_closed_over_open_sessions_is_only_silence(net: Any, caplog: Any) -> None:
    """The application forgot to close: what threads have to tell nobody hears, and nobody falls over."""
    kept: list[aio.Session] = []
    with amst_core.listen("127.0.0.1:0", state_dir=net.state_dir, settings=net.settings()) as server:

        async def main() -> None:
            near = await aio.connect(server.address, token=server.token, settings=net.settings())
            kept.append(near)
            asyncio.create_task(near.recv()).add_done_callback(lambda task: task.cancelled())
            await asyncio.sleep(0)
            ticket = await near.send(b"x")
            asyncio.create_task(ticket.wait()).add_done_callback(lambda task: task.cancelled())

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        far = server.accept(10)
        pending = asyncio.all_tasks(loop)
        loop.call_soon(loop.stop)
        loop.run_forever()
        loop.close()
        with caplog.at_level(logging.WARNING):
            assert far.recv(timeout=10) == b"x"
            far.send(b"to nobody").wait(10)
            far.close()
            assert kept[0]._inner.wait_closed(10)
        assert [record for record in caplog.records if record.name.startswith("amst")] == []
        for task in pending:
            task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_an_interpreter_that_ends_with_a_session_open_ends(net: Any) -> None:
    code = """
import asyncio, sys
from amst_core import aio
async def main():
    server = await aio.listen("127.0.0.1:0", state_dir=sys.argv[1], root=sys.argv[2])
    near = await aio.connect(server.address, token=server.token)
    far = await server.accept()
    await near.send(b"x")
    assert await far.recv() == b"x"
    receiving = asyncio.create_task(near.recv())
    near.limit_rate(16 << 10)
    copying = asyncio.create_task(near.send_file(sys.executable, "x"))
    await asyncio.sleep(0.1)
    print("end", flush=True)
    return server, near, receiving, copying
kept = asyncio.run(main())
sys.exit(7)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(net.state_dir), str(net.root)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stdout == "end\n" and "Traceback" not in done.stderr, done.stderr


def test_a_peer_that_is_killed_ends_every_wait(run: Any, net: Any) -> None:
    code = """
import amst_core, sys
session = amst_core.connect(sys.argv[1], token=bytes.fromhex(sys.argv[2]), streams=2)
session.send(b"ready").wait()
sys.stdin.read()
"""

    async def main() -> None:
        async with net.listen() as server:
            process = subprocess.Popen(
                [sys.executable, "-c", code, server.address, server.token.hex()], stdin=subprocess.PIPE
            )
            try:
                far = await server.accept(30)
                assert await far.recv() == b"ready"
                waits = [asyncio.create_task(far.recv()), asyncio.create_task(far.wait_closed())]
                process.kill()
                with pytest.raises(BrokenError):
                    await waits[0]
                assert await waits[1]
            finally:
                process.kill()
                process.communicate()

    run(main())
