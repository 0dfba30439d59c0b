"""A service on asyncio: it takes any number of transfers at once and answers each with its SHA-256.

    python examples/asyncio_service.py serve 127.0.0.1:9000
    python examples/asyncio_service.py drive 127.0.0.1:9000

Both find the token in the same state directory (AMST_STATE_DIR); on another machine set AMST_TOKEN for `drive`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import signal
import time

from amst_core import aio

NUMBER = 8
"""Bytes in front of each message that say which transfer it is."""


async def answer(session: aio.Session) -> None:
    """Take messages and send their digests back, until the peer closes the session.

    The messages that wait for their digest count against limits.memory, which so bounds the tasks: when they are too
    many the peer gets no credit, and its `send` waits.
    """
    async with asyncio.TaskGroup() as tasks:
        async for message in session.messages("data"):
            tasks.create_task(digest(session, message))


async def digest(session: aio.Session, message: memoryview) -> None:
    found = await asyncio.to_thread(lambda: hashlib.sha256(message[NUMBER:]).digest())
    await session.send(bytes(message[:NUMBER]) + found, channel="digests")


async def serve(address: str) -> None:
    """Serve until SIGINT or SIGTERM, and let what is under way finish."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with aio.listen(address, on_session=answer) as server:
        print(f"listening on {server.address}", flush=True)
        await stop.wait()
    print("stopped")


async def drive(address: str, transfers: int, size: int) -> None:
    """Send so many messages at once, and compare what the service says of each with what was sent."""
    async with aio.connect(address) as session:
        answers: dict[int, asyncio.Future[bytes]] = {}

        async def collect() -> None:
            async for message in session.messages("digests"):
                answers[int.from_bytes(message[:NUMBER])].set_result(bytes(message[NUMBER:]))

        async def one(number: int) -> bool:
            answers[number] = asyncio.get_running_loop().create_future()
            data = number.to_bytes(NUMBER) + os.urandom(size)
            ticket = await session.send(data, channel="data")  # queued; waits while there is no room
            await ticket  # the service has it, verified
            return await answers[number] == hashlib.sha256(data[NUMBER:]).digest()

        collecting = asyncio.create_task(collect())
        started = time.monotonic()
        right = await asyncio.gather(*(one(number) for number in range(transfers)))
        seconds = time.monotonic() - started
        collecting.cancel()
        numbers = session.metrics()
        print(f"{sum(right)} of {transfers} digests are right: {transfers} messages of {size} bytes at once in "
              f"{seconds:.2f} s over {numbers.active_streams} {numbers.transport_type} streams")  # fmt: skip
        if not all(right):
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    serving = modes.add_parser("serve", help="run the service")
    driving = modes.add_parser("drive", help="send it messages, and check its answers")
    for mode in (serving, driving):
        mode.add_argument("address", metavar="HOST:PORT")
    driving.add_argument("--transfers", type=int, default=100, help="how many at once (default: 100)")
    driving.add_argument("--size", type=int, default=1 << 20, help="bytes of each (default: 1 MiB)")
    options = parser.parse_args()
    if options.mode == "serve":
        asyncio.run(serve(options.address))
    else:
        asyncio.run(drive(options.address, options.transfers, options.size))


if __name__ == "__main__":
    main()
