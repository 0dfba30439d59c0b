"""A transport inside one process: lanes are pairs of bounded byte queues. No socket, no device, nothing to install.

Where addresses live: in a `MemoryNetwork`, which whoever makes both sides passes to both, as one lays a cable. So
nothing is global: two networks in one process never meet, and when the last reference goes, so does every address.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Final

from ..errors import AmstError, BrokenError, ClosedError, ConfigError, ConnectError, UsageError
from ..hookspecs import hookimpl
from ..interfaces import (
    Advertisement,
    Candidate,
    Endpoint,
    FlowSample,
    Lane,
    LaneRequest,
    LaneTimeouts,
    PathStats,
    StreamLane,
    Transport,
)

_log = logging.getLogger("amst.testing")

CAPACITY: Final = 256 << 10
"""Bytes that lie on the way in each direction of a lane before its sender blocks."""

_FOREVER: Final = threading.TIMEOUT_MAX

_SEGMENT: Final = 1448
"""What counts as a segment in memory, in bytes: as on most networks."""

_PACE_S: Final = 0.005
"""A paced lane sends so much time's worth of bytes at once, and catches up so much after a pause."""

_FIRST_RTT_S: Final = 1e-5
"""The round trip until one was measured: handing over to another thread takes no less."""

_RTT_GAIN: Final = 1 / 8  # RFC 6298's


class ByteQueue:
    """One direction of a lane: at most ``capacity`` bytes that were written and not read.

    Attributes:
        written, taken: bytes so far; ``unsent``: bytes that somebody is about to write.
        rtt_s: how long a byte lies here, smoothed; ``min_rtt_s``: the shortest.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._bytes = bytearray()
        self._changed = threading.Condition()  # re-entrant: a signal handler may abort what it interrupted
        self._finished = False  # by the writer: what lies here may be read, then it ends
        self._cut = False  # by either side: nothing moves any more
        self.written = self.taken = self.unsent = 0
        self.rtt_s = self.min_rtt_s = _FIRST_RTT_S
        self._timed: tuple[int, float] | None = None  # one byte at a time, by its number: when it was written
        self._rate: float | None = None
        self._next_at = 0.0

    @property
    def rate(self) -> float | None:
        """Bytes/s that are let in; None: no limit."""
        return self._rate

    def pace(self, rate: float | None) -> None:
        """Let at most ``rate`` bytes/s in, 1 at least; None: as many as there is room for."""
        with self._changed:
            self._rate = None if rate is None else max(1.0, rate)
            self._changed.notify_all()

    def write(self, parts: Sequence[memoryview], timeout_s: float) -> int:
        """Append what there is room for, at least a byte; 0 when there was no room for ``timeout_s``.

        A pace has it wait as long as it takes, and append less.

        Raises:
            BrokenPipeError: the queue was finished or cut.
        """
        with self._changed:
            self.unsent = sum(part.nbytes for part in parts)
            if self._changed.wait_for(
                lambda: self.ended or len(self._bytes) < self.capacity, min(timeout_s, _FOREVER)
            ):
                self._wait_for_pace()
            if self.ended:
                raise BrokenPipeError
            room = before = min(self.capacity - len(self._bytes), self._at_once())
            for part in parts:
                piece = part[:room]
                self._bytes += piece
                room -= piece.nbytes
                if not room:
                    break
            self._count_written(before - room)
            self._changed.notify_all()
            return before - room

    def _wait_for_pace(self) -> None:
        while self._rate is not None and not self.ended and (wait_s := self._next_at - time.monotonic()) > 0:
            self._changed.wait(wait_s)

    def _at_once(self) -> int:
        return self.capacity if self._rate is None else max(1, int(min(self.capacity, self._rate * _PACE_S)))

    def _count_written(self, nbytes: int) -> None:
        now = time.monotonic()
        self.written += nbytes
        self.unsent -= nbytes
        if self._timed is None and nbytes:
            self._timed = self.written, now
        if self._rate is not None:
            self._next_at = max(self._next_at, now - _PACE_S) + nbytes / self._rate

    def read_into(self, view: memoryview, timeout_s: float) -> int | None:
        """Move up to ``view.nbytes`` bytes; 0 at the end, None when nothing came for ``timeout_s``.

        Raises:
            BrokenPipeError: the queue was cut.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._bytes or self._cut or self._finished, min(timeout_s, _FOREVER))
            if self._cut:
                raise BrokenPipeError
            got = min(view.nbytes, len(self._bytes))
            if got:
                view[:got] = self._bytes[:got]
                del self._bytes[:got]
                self._count_taken(got)
                self._changed.notify_all()
                return got
            return 0 if self._finished else None

    def _count_taken(self, nbytes: int) -> None:
        self.taken += nbytes
        if self._timed is None or self.taken < self._timed[0]:
            return
        measured_s = max(_FIRST_RTT_S, time.monotonic() - self._timed[1])
        self._timed = None
        if self.rtt_s == _FIRST_RTT_S:
            self.rtt_s = self.min_rtt_s = measured_s
        else:
            self.rtt_s += _RTT_GAIN * (measured_s - self.rtt_s)
            self.min_rtt_s = min(self.min_rtt_s, measured_s)

    def still(self) -> AbstractContextManager[object]:
        """Nothing moves here in the block."""
        return self._changed

    @property
    def waiting(self) -> int:
        """Bytes that were written and not read."""
        return len(self._bytes)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._finished or self._cut

    def finish(self) -> None:
        """The writer has ended: what was written may still be read."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def cut(self) -> None:
        """Drop what was not read; nothing moves any more, and whoever waits here is woken."""
        with self._changed:
            self._cut = True
            self._bytes.clear()
            self._changed.notify_all()


class MemoryLane(StreamLane):
    """One end of a lane in memory; behaves as a connected socket does. Made by `memory_lane_pair`."""

    def __init__(self, outgoing: ByteQueue, incoming: ByteQueue, timeouts: LaneTimeouts, description: str) -> None:
        super().__init__()
        self._outgoing = outgoing
        self._incoming = incoming
        self._timeouts = timeouts
        self._description = description
        self._closed = False

    @property
    def description(self) -> str:
        return self._description

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self._check_open()
        super().send_frame(header, payload)

    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            done = self._outgoing.write(parts, self._timeouts.write_s)
        except BrokenPipeError:
            raise self._error("the peer is gone") from None
        if not done:
            raise self._error(f"could send nothing for {self._timeouts.write_s:g} s")
        return done

    def read_into(self, view: memoryview, *, idle: bool) -> int:
        self._check_open()
        try:
            got = self._incoming.read_into(view, _FOREVER if idle else self._timeouts.read_s)
        except BrokenPipeError:
            raise self._error("the peer dropped the lane") from None
        if got is None:
            raise self._error(f"nothing arrived for {self._timeouts.read_s:g} s inside a frame")
        if not got and (self._closed or not idle):
            raise self._error("the peer closed the lane inside a frame")
        return got

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.finish()
            self._incoming.cut()  # wakes who reads here, and whoever still sends to here learns of it

    def abort(self) -> None:
        self._closed = True
        self._outgoing.cut()
        self._incoming.cut()

    def set_pacing(self, rate: float | None) -> None:
        """As promised; what a pace holds back is no send that makes no progress."""
        self._check_open()
        self._outgoing.pace(rate)

    @property
    def pace(self) -> float | None:
        """Bytes/s that this end may send; None: as many as it can."""
        return self._outgoing.rate

    def flow_sample(self) -> FlowSample | None:
        """As if what lies in the queue were on its way, and reading it acknowledged it; nothing is ever lost."""
        queue = self._outgoing
        if self._closed:
            return None
        with queue.still():
            return FlowSample(
                delivered=queue.taken,
                sent=queue.written,
                lost=0,
                in_flight=queue.written - queue.taken,
                window=queue.capacity,
                unsent=queue.unsent,
                rtt_s=queue.rtt_s,
                min_rtt_s=queue.min_rtt_s,
                mss=_SEGMENT,
            )

    def path_stats(self) -> PathStats:
        """Counters only: what was written has arrived, and how far that was nobody can tell."""
        return PathStats(
            bytes_acknowledged=self._outgoing.written, bytes_received=self._incoming.written, bytes_waiting=0
        )

    def _check_open(self) -> None:
        if self._closed:
            raise self._error("closed")

    def _error(self, what: str) -> AmstError:
        if self._closed:
            return ClosedError(f"{self._description}: this side closed the lane")
        return BrokenError(f"{self._description}: {what}")


def memory_lane_pair(
    timeouts: LaneTimeouts | None = None, *, capacity: int = CAPACITY, name: str = "pair"
) -> tuple[MemoryLane, MemoryLane]:
    """Two ends of one lane; each direction holds ``capacity`` bytes before its sender blocks."""
    if capacity < 1:
        raise UsageError(f"a lane that holds {capacity} bytes moves nothing; it takes at least 1")
    timeouts = timeouts if timeouts is not None else LaneTimeouts()
    there, back = ByteQueue(capacity), ByteQueue(capacity)
    return (
        MemoryLane(there, back, timeouts, f"memory {name}, near end"),
        MemoryLane(back, there, timeouts, f"memory {name}, far end"),
    )


class MemoryNetwork:
    """Which address leads to which listener, and the plugin that makes transports on it. Thread-safe.

    Register it where a plugin is expected: ``plugins.register(network, "amst.transport", "memory")``.
    """

    def __init__(self, *, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._changed = threading.Condition()
        self._listeners: dict[str, Callable[[Lane], None] | None] = {}  # None: never answers
        self._numbers = itertools.count(1)

    @hookimpl
    def amst_make_transport(self, name: str, options: Mapping[str, object]) -> Transport | None:
        """Make the transport ``memory``; None for any other name."""
        if name != MemoryTransport.name:
            return None
        if options:
            raise ConfigError(f"plugins.memory.{next(iter(options))} is unknown; the transport has no options")
        return MemoryTransport(self)

    def listen(self, deliver: Callable[[Lane], None]) -> str:
        """Have the far end of each new lane handed to ``deliver``; returns the address."""
        return self._add(deliver)

    def silent_address(self) -> str:
        """An address where nobody ever answers: who connects there waits until the deadline."""
        return self._add(None)

    def leave(self, address: str) -> None:
        """Nobody listens at ``address`` any more."""
        with self._changed:
            self._listeners.pop(address, None)
            self._changed.notify_all()

    def listener(self, address: str, timeout_s: float) -> Callable[[Lane], None]:
        """Who listens at ``address``.

        Raises:
            ConnectError: nobody does, or nobody answers within ``timeout_s``.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._listeners.get(address, _nobody) is not None, min(timeout_s, _FOREVER))
            deliver = self._listeners.get(address, _nobody)
        if deliver is None:
            raise ConnectError(f"cannot connect to {address!r}: no answer within {timeout_s:g} s", peer=address)
        if deliver is _nobody:
            raise ConnectError(
                f"cannot connect to {address!r}: nobody listens there; check that the other side runs in this "
                "process, on the same MemoryNetwork",
                peer=address,
            )
        return deliver

    def _add(self, deliver: Callable[[Lane], None] | None) -> str:
        with self._changed:
            address = f"memory-{next(self._numbers)}"
            self._listeners[address] = deliver
            return address


def _nobody(_lane: Lane) -> None:
    """Stands for the listener of an address that has none."""


class MemoryTransport(Transport):
    """Lanes inside this process, over one `MemoryNetwork`, with a listener of its own. Safe from any thread."""

    name: ClassVar[str] = "memory"
    api_version: ClassVar[int] = 1

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._lock = threading.Lock()
        self._addresses: list[str] = []
        self._numbers = itertools.count(1)

    def probe(self, peer: Endpoint | None) -> Candidate:
        return Candidate(self.name, True, "lanes in the memory of this process")

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        address = self._network.listen(deliver)
        with self._lock:
            self._addresses.append(address)
        return Advertisement(self.name, tag, address)

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        """Open one lane; ``timeouts`` hold for both of its ends."""
        address = request.advertisement.address
        deliver = self._network.listener(address, request.timeout_s)
        near, far = memory_lane_pair(
            timeouts, capacity=self._network.capacity, name=f"{address} lane {next(self._numbers)}"
        )
        # deliver proves the lane's other side, which takes as long as that side likes
        threading.Thread(target=_hand_over, args=(deliver, far), name=f"amst-{address}", daemon=True).start()
        return near

    def close(self) -> None:
        with self._lock:
            addresses, self._addresses = self._addresses, []
        for address in addresses:
            self._network.leave(address)


def _hand_over(deliver: Callable[[Lane], None], lane: Lane) -> None:
    try:
        deliver(lane)
    except Exception as err:
        lane.abort()
        _log.info("%s was not taken: %s", lane.description, err)
