"""Pipes between coroutines: all bytes in order, back-pressure that is awaited, cancellations that lose nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
from typing import Any

import pytest

from amst_core import aio
from amst_core.errors import CancelledError, ClosedError, DeadlineError, UsageError

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20
SIZES = (1, 7, 4096, 65_535, 65_536, 70_000, MIB + 1, 2_500_000)


async def write_all(writer: aio.PipeWriter, seed: int, total: int) -> str:
    """Write random bytes, of every kind and in pieces of mixed sizes, close, and return the digest."""
    rng, digest = random.Random(seed), hashlib.sha256()
    async with writer:
        while total:
            piece = rng.randbytes(min(total, rng.choice(SIZES)))
            total -= len(piece)
            digest.update(piece)
            assert await writer.write(piece if total % 2 else bytearray(piece)) == len(piece)
    return digest.hexdigest()


async def read_all(session: aio.Session, channel: str = "") -> str:
    digest = hashlib.sha256()
    async with await session.accept_pipe(channel) as reader:
        async for piece in reader:
            digest.update(piece)
    return digest.hexdigest()


async def until_it_stands(value: Any) -> None:
    """Wait until a number that has begun to grow grows no more."""
    last = None
    while not last or value() != last:
        last = value()
        await asyncio.sleep(0.3)


def test_what_is_written_is_read_in_order_both_ways_at_once(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair(streams=4) as pair:
            for total in (0, 1, 12_000_000):
                digests = await asyncio.gather(
                    write_all(await pair.near.open_pipe(), 1, total),
                    read_all(pair.far),
                    write_all(await pair.far.open_pipe("c"), 2, total),
                    read_all(pair.near, "c"),
                )
                assert digests[0] == digests[1] and digests[2] == digests[3]
            for session in (pair.near, pair.far):
                assert not session._inner.core.memory.piped

    run(main())


def test_many_pipes_at_once_in_little_memory(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair(limits__memory="32MiB") as pair:
            before = threading.active_count()
            writers = [write_all(await pair.near.open_pipe(str(n)), n, 1_500_000) for n in range(12)]
            tasks = [asyncio.create_task(task) for task in (*writers, *(read_all(pair.far, str(n)) for n in range(12)))]
            await asyncio.sleep(0)
            assert threading.active_count() <= before
            digests = await asyncio.gather(*tasks)
            assert digests[:12] == digests[12:]

    run(main())


@pytest.mark.parametrize("steady", [True, False])
def test_a_stopped_reader_stops_the_writer_and_not_the_loop(run: Any, net: Any, steady: bool) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            writer = await pair.near.open_pipe("slow")
            reader = await pair.far.accept_pipe("slow")
            count, written = 200, 0

            async def write() -> None:
                nonlocal written
                async with writer:
                    for n in range(count):
                        piece = bytes([n]) * MIB
                        await writer.write(piece if steady else bytearray(piece))
                        written += 1

            writing = asyncio.create_task(write())
            await until_it_stands(lambda: written)
            assert not writing.done() and written < 150
            data = os.urandom(3 * MIB)
            ticket = await pair.near.send(data)
            assert await pair.far.recv() == data
            await ticket
            for n in range(count):
                part = bytearray()
                while len(part) < MIB:
                    part += await reader.read(MIB - len(part))
                assert part == bytes([n]) * MIB
            assert await reader.read(1) == b"" and await reader.read() == b""
            reader.close()
            await writing

    run(main())


def test_without_memory_it_goes_on_slowly(run: Any, net: Any, monkeypatch: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            memory = type(pair.near._inner.core.memory)
            monkeypatch.setattr(memory, "reserve_pipe", lambda self, size, own: False)
            digests = await asyncio.gather(write_all(await pair.near.open_pipe(), 3, 3_000_000), read_all(pair.far))
            assert digests[0] == digests[1]
            monkeypatch.undo()

    run(main())


def test_readers_that_are_cancelled_at_any_moment_lose_nothing(run: Any, net: Any, steps: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            data = os.urandom(2_000_000)
            writer = await pair.near.open_pipe()
            reader = await pair.far.accept_pipe()

            async def write() -> None:
                async with writer:
                    for at in range(0, len(data), 10_000):
                        await writer.write(data[at : at + 10_000])
                        await asyncio.sleep(0)

            writing = asyncio.create_task(write())
            got, rounds = bytearray(), 0
            while len(got) < len(data):
                reading = asyncio.create_task(reader.read(7_000))
                await steps(rounds % 11)
                reading.cancel()
                try:
                    got += await reading
                except asyncio.CancelledError:
                    rounds += 1
                    if rounds % 11 == 0:
                        got += await reader.read(7_000)
                else:
                    rounds += 1
            await writing
            assert got == data and await reader.read(1) == b"" and rounds > 20
            assert not reader._reader.changed._watchers
            reader.close()

    run(main())


def test_a_cancelled_write_has_written_nothing_or_gives_the_pipe_up(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            # nothing was taken: the pipe goes on
            writer = await pair.near.open_pipe("a")
            reader = await pair.far.accept_pipe("a")
            pair.near.limit_rate(64 << 10)
            full = bytes(MIB)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        await writer.write(full)
            size = writer._writer.ticket.size
            assert size and size % MIB == 0 and not writer.closed
            assert not pair.near._inner.core.room._watchers
            pair.near.limit_rate(None)
            closing = asyncio.create_task(writer.close())
            assert len(await reader.read()) == size
            await closing
            reader.close()

            # a part was taken: what comes behind it would be read as its rest
            writer = await pair.near.open_pipe("b")
            reader = await pair.far.accept_pipe("b")
            pair.near.limit_rate(64 << 10)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await writer.write(bytes(60 * MIB))
            assert writer.closed
            pair.near.limit_rate(None)
            with pytest.raises(CancelledError):
                await reader.read()
            with pytest.raises(ClosedError):
                await writer.write(b"x")
            reader.close()

    run(main())


def test_a_block_that_raises_and_a_close_that_is_cancelled_give_the_pipe_up(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            with pytest.raises(ZeroDivisionError):
                async with await pair.near.open_pipe() as writer:
                    await writer.write(b"begun")
                    writer.flush()
                    reader = await pair.far.accept_pipe()
                    assert await reader.read(100) == b"begun"
                    raise ZeroDivisionError
            with pytest.raises(CancelledError):
                await reader.read(1)

            writer = await pair.near.open_pipe()
            await writer.write(bytes(MIB))  # more than comes without a reader
            with pytest.raises(DeadlineError):
                await writer.close(0.1)
            assert not writer.closed
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await writer.close()
            assert writer.closed
            await writer.close()

    run(main())


def test_a_reader_that_closes_stops_the_writer(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            writer = await pair.near.open_pipe()
            reader = await pair.far.accept_pipe()

            async def write() -> None:
                while True:
                    await writer.write(bytearray(MIB))

            writing = asyncio.create_task(write())
            await reader.read(10)
            reader.close()
            with pytest.raises(ClosedError, match="the receiver closed it after"):
                await writing
            with pytest.raises(ClosedError):
                await writer.close()
            assert writer.closed
            with pytest.raises(ClosedError):
                await reader.read(1)

    run(main())


def test_pipes_are_accepted_in_order_and_a_cancelled_accept_loses_none(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            with pytest.raises(DeadlineError, match="no pipe on channel 'c'"):
                await pair.far.accept_pipe("c", timeout=0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pair.far.accept_pipe("c")
            assert not pair.far._inner.pipes.arrived._watchers
            with pytest.raises(UsageError):
                await pair.near.open_pipe("\ud800")
            for n in range(5):
                async with await pair.near.open_pipe("c") as writer:
                    await writer.write(b"%d" % n)
                    writer.flush()
                    async with await pair.far.accept_pipe("c") as reader:
                        assert await reader.read(10) == b"%d" % n
                        closing = asyncio.create_task(writer.close())
                        assert await reader.read() == b""
                        await closing

    run(main())


def test_waits_for_room_can_be_cancelled_and_the_end_ends_every_wait(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair(limits__open_transfers=8) as pair:
            writers = []
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    while True:
                        writers.append(await pair.near.open_pipe())
                        await writers[-1].write(bytes(100_000))
            assert 0 < len(writers) < 8 and not pair.near._inner.core.room._watchers
            reader = await pair.far.accept_pipe()
            waits = [
                asyncio.create_task(wait)
                for wait in (
                    pair.near.open_pipe(),
                    pair.near.accept_pipe(),
                    writers[-1].close(),
                    writers[0].write(bytes(200 * MIB)),
                    reader.read(),
                )
            ]
            await asyncio.sleep(0.05)
            assert not any(wait.done() for wait in waits)
            pair.near.abort()
            done = await asyncio.gather(*waits, return_exceptions=True)
            assert all(isinstance(outcome, ClosedError) for outcome in done), done

    run(main())
