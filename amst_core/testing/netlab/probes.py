"""Small measurements of a lab from inside it, to compare what it does with what it was asked for.

Both ends are sockets of this process on two hosts. Arrivals are timed by the kernel when the packet leaves the
device (SO_TIMESTAMPNS), so that they do not depend on when Python looks.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import select
import socket
import statistics
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...errors import UsageError
from .lab import Host

_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_SO_SNDBUFFORCE: Final = 32
_UDP_SEGMENT: Final = 103
_ROOM: Final = 256 << 20
_STAMP: Final = struct.Struct("=qq")
_PATIENCE_S: Final = 5.0
_HEADERS: Final = {4: 28, 6: 48}
_LARGEST_SUPER: Final = 60_000
_MOST_SEGMENTS: Final = 64


@dataclass(frozen=True, slots=True)
class Arrival:
    """A probe: its number, and when it was sent and arrived, in seconds of one clock."""

    number: int
    sent: float
    arrived: float

    @property
    def delay(self) -> float:
        """Seconds that it took."""
        return self.arrived - self.sent


@dataclass(frozen=True, slots=True)
class Probes:
    """What became of ``sent`` UDP packets of ``size`` bytes of IP each."""

    sent: int
    size: int
    arrivals: tuple[Arrival, ...]

    @property
    def rate(self) -> float:
        """Bytes/s of IP at which they arrived while the next one was waiting already; 0 when none ever was.

        So a sender that is slow for a moment, and leaves the link idle, does not count as a slow link.
        """
        least = min(self.delays, default=0.0)
        busy = [
            after.arrived - before.arrived
            for before, after in itertools.pairwise(self.arrivals)
            if after.sent + least <= before.arrived
        ]
        return len(busy) * self.size / sum(busy) if sum(busy) else 0.0

    @property
    def loss(self) -> float:
        """The part that did not arrive."""
        return 1 - len(self.arrivals) / self.sent

    @property
    def lost(self) -> list[int]:
        """The numbers of those that did not arrive."""
        arrived = {arrival.number for arrival in self.arrivals}
        return [number for number in range(self.sent) if number not in arrived]

    @property
    def burst(self) -> float:
        """Mean number of packets lost in a row."""
        lost = self.lost
        rows = 1 + sum(after != before + 1 for before, after in itertools.pairwise(lost))
        return len(lost) / rows if lost else 0.0

    @property
    def delays(self) -> list[float]:
        """Seconds that each took, in the order of arrival."""
        return [arrival.delay for arrival in self.arrivals]

    @property
    def in_order(self) -> bool:
        """Whether none has overtaken another."""
        return all(before.number < after.number for before, after in itertools.pairwise(self.arrivals))


def send(
    sender: Host,
    receiver: Host,
    address: str,
    count: int,
    *,
    size: int = 1500,
    interval: float = 0.0,
    together: int = 1,
) -> Probes:
    """Send ``count`` UDP packets of ``size`` bytes of IP to ``address`` of the receiver, and wait for them.

    ``interval`` seconds pass between two of them, none by default: what a buffer then cannot hold is dropped.
    ``together`` that many are handed to the kernel at once, as one super-packet (UDP_SEGMENT, Linux 4.18).

    Raises:
        UsageError: more than fits into a super-packet.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    payload = size - _HEADERS[ipaddress.ip_address(address).version]
    if payload < _STAMP.size or (together > 1 and (together > _MOST_SEGMENTS or together * payload > _LARGEST_SUPER)):
        raise UsageError(f"{together} probes of {size} bytes cannot be sent at once")
    with _socket(receiver, family) as incoming, _socket(sender, family) as outgoing:
        incoming.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        incoming.bind((address, 0))
        outgoing.connect((address, incoming.getsockname()[1]))
        if together > 1:
            outgoing.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, payload)
        filling = bytes(payload - _STAMP.size)
        arrivals: list[Arrival] = []
        began = time.monotonic()
        for first in range(0, count, together):
            numbers = range(first, min(first + together, count))
            if interval:
                _take(incoming, arrivals, until=began + first * interval)
            now = time.clock_gettime_ns(time.CLOCK_REALTIME)
            outgoing.send(b"".join(_STAMP.pack(number, now) + filling for number in numbers))
            if first % (together << 8) == 0:
                _take(incoming, arrivals, until=0)
        last = time.monotonic()
        while len(arrivals) < count and time.monotonic() - last < _quiet(arrivals):
            if _take(incoming, arrivals, until=time.monotonic() + 0.01):
                last = time.monotonic()
    return Probes(count, size, tuple(arrivals))


def ping(sender: Host, address: str, count: int, *, interval: float = 0.0) -> list[float]:
    """Seconds that ``count`` ICMP echoes to ``address`` took there and back, one after the other; its kernel answers.

    Raises:
        TimeoutError: one got no answer.
    """
    six = ":" in address
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    request, answer, skip = (128, 129, 0) if six else (8, 0, 20)
    times = []
    with sender.enter():
        echo = socket.socket(family, socket.SOCK_RAW, protocol)
    with echo:
        for number in range(count):
            body = struct.pack("!HH", 1, number)
            # The kernel fills in the checksum of ICMPv6.
            check = 0 if six else ~_folded(request << 8, *struct.unpack("!HH", body)) & 0xFFFF
            before = time.monotonic_ns()
            echo.sendto(struct.pack("!BBH", request, 0, check) + body, (address, 0))
            echo.settimeout(_PATIENCE_S)
            while True:
                packet = echo.recv(4096)[skip:]
                if packet[0] == answer and packet[4:8] == body:
                    break
            times.append((time.monotonic_ns() - before) / 1e9)
            time.sleep(interval)
    return times


def spread(values: Sequence[float]) -> float:
    """The width of an even distribution that has the standard deviation of these values."""
    return float(statistics.pstdev(values) * 12**0.5)


@contextlib.contextmanager
def _socket(host: Host, family: int) -> Iterator[socket.socket]:
    with host.enter():
        made = socket.socket(family, socket.SOCK_DGRAM)
    with made:
        for option in (_SO_RCVBUFFORCE, _SO_SNDBUFFORCE):
            made.setsockopt(socket.SOL_SOCKET, option, _ROOM)
        made.setblocking(False)
        yield made


def _quiet(arrivals: list[Arrival]) -> float:
    """For how long nothing must come until nothing more is expected: well above the delays that were seen."""
    return _PATIENCE_S if not arrivals else 0.25 + 2 * arrivals[-1].delay


def _take(incoming: socket.socket, arrivals: list[Arrival], *, until: float) -> bool:
    """Take what is there, and what comes until then."""
    before = len(arrivals)
    while True:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, extra, _, _ = incoming.recvmsg(2048, 64)
                seconds, nanoseconds = struct.unpack_from("=qq", extra[0][2])
                number, sent = _STAMP.unpack_from(data)
                arrivals.append(Arrival(number, sent / 1e9, seconds + nanoseconds / 1e9))
        left = until - time.monotonic()
        if left <= 0:
            return len(arrivals) > before
        select.select([incoming], [], [], left)


def _folded(*words: int) -> int:
    total = sum(words)
    return (total & 0xFFFF) + (total >> 16)
