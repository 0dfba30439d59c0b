"""AMST for asyncio: the API of `amst_core`, awaited instead of waited for.

>>> async with aio.connect("amst://peer:9000") as session:          # doctest: +SKIP
...     await (await session.send(b"hello"))

A session belongs to the event loop that it was opened in. Its threads do the I/O and wake the loop, which never blocks;
no thread waits on behalf of a coroutine. Cancelling a coroutine undoes what it waited for: a transfer is
given up and the peer drops what it has of it, a `Session.recv` loses no message, an attempt to connect leaves nothing.
"""

from .client import connect
from .pipes import PipeReader, PipeWriter
from .server import Server, listen
from .session import Session
from .tickets import Ticket

__all__ = ["PipeReader", "PipeWriter", "Server", "Session", "Ticket", "connect", "listen"]
