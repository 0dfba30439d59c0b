"""A crowd that hangs on a server's port: ``python strangers.py HOST:PORT --crowd 300 --rate 50``; until stdin ends.

Of the crowd a quarter each says nothing, trickles a TLS ClientHello, has done TLS and says nothing, and has announced
a lane and says nothing. ``--rate`` bounds new connections per second, once all were there: those that replace the ones
that the server has cut, else connections that bring garbage. Prints ``ready`` when all were there once, and in the end
how many connections there were.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import ssl
import sys
from contextlib import suppress

PREAMBLE = b"AMSTL\x01\x00\x01"


class Crowd:
    def __init__(self, host: str, port: int, rate: float) -> None:
        self._address = (host, port)
        self._rate = rate
        self._turns: asyncio.Queue[None] = asyncio.Queue()
        self._there = 0
        self.total = 0

    async def run(self, size: int) -> None:
        kinds = itertools.cycle((self._silent, self._trickling, self._tls, self._lane))
        members = [asyncio.create_task(self._member(kind)) for kind, _ in zip(kinds, range(size), strict=False)]
        while self._there < size:
            await asyncio.sleep(0.01)
        print("ready", flush=True)
        end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        while not end.done():
            if self._turns.empty() and not self._waiting():
                members.append(asyncio.create_task(self._garbage()))
            else:
                self._turns.put_nowait(None)
            await asyncio.sleep(1 / self._rate)
        for member in members:
            member.cancel()
        await asyncio.gather(*members, return_exceptions=True)
        print(self.total, flush=True)

    def _waiting(self) -> bool:
        return bool(self._turns._getters)  # type: ignore[attr-defined]

    async def _member(self, kind: object) -> None:
        first = True
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                await kind(first)  # type: ignore[operator]
            first = False
            await self._turns.get()

    async def _open(self, first: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.total += 1
        try:
            return await asyncio.open_connection(*self._address)
        finally:
            self._there += first

    async def _hang(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        """Until the server closes it."""
        reader, writer = streams
        try:
            while await reader.read(4096):
                pass
        finally:
            writer.close()

    async def _silent(self, first: bool) -> None:
        await self._hang(await self._open(first))

    async def _lane(self, first: bool) -> None:
        streams = await self._open(first)
        streams[1].write(PREAMBLE)
        await self._hang(streams)

    async def _trickling(self, first: bool) -> None:
        reader, writer = await self._open(first)
        hello = _client_hello()
        hanging = asyncio.create_task(self._hang((reader, writer)))
        try:
            for at in itertools.count():
                if hanging.done():
                    return
                writer.write(hello[at : at + 1])
                await asyncio.sleep(0.3)
        finally:
            hanging.cancel()

    async def _tls(self, first: bool) -> None:
        reader, writer = await self._open(first)
        try:
            await writer.start_tls(_context())
            await self._hang((reader, writer))
        finally:
            writer.close()

    async def _garbage(self) -> None:
        with suppress(OSError):
            _, writer = streams = await self._open(False)
            writer.write(os.urandom(1000))
            await self._hang(streams)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["amst/1"])
    return context


def _client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        _context().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--crowd", type=int, default=300)
    parser.add_argument("--rate", type=float, default=50.0)
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    asyncio.run(Crowd(host, int(port), options.rate).run(options.crowd))


if __name__ == "__main__":
    main()
