"""Faults on purpose: a lane that is cut, ends, stalls, is slow, damages or raises at a place that the test names.

Nothing is left to chance: a fault says after how many frames and bytes of a lane it strikes. It wraps the lanes of any
transport (`faulty`), or a single one (`FaultyLane`).
"""

from __future__ import annotations

import enum
import itertools
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from ..errors import BrokenError, ClosedError, UsageError
from ..interfaces import (
    HEADER_SIZE,
    Advertisement,
    Candidate,
    Endpoint,
    FlowSample,
    Lane,
    LaneRequest,
    LaneTimeouts,
    PathStats,
    Placer,
    StreamLane,
    Transport,
)

_LOOK_EVERY_S: Final = 0.01


class Direction(enum.Enum):
    """Which of a lane's two directions a fault is in."""

    SENDING = "sending"
    RECEIVING = "receiving"


def _any(_header: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fault:
    """Strikes once in the life of a lane: ``into`` bytes after ``after_frames`` frames of one ``direction``.

    ``into`` 0 is between two frames, just before the next one; more than a frame has reaches into later ones. Frames
    whose header does not fit ``matching`` pass and are not counted. ``struck`` is set when it strikes. One fault may
    be given to several lanes: it strikes once in each.
    """

    direction: Direction = Direction.SENDING
    after_frames: int = 0
    into: int = 0
    matching: Callable[[bytes], bool] = _any
    struck: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.after_frames < 0 or self.into < 0:
            raise UsageError(f"a fault strikes after 0 frames and bytes or more, not {self.after_frames}, {self.into}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut(Fault):
    """The connection is dropped: the lane is aborted, the peer and this side get `BrokenError`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class End(Fault):
    """The connection is closed too early; between frames the peer sees a clean end. This side gets `BrokenError`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stall(Fault):
    """Nothing moves until ``released``, or until this side ends the lane."""

    released: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delay(Fault):
    """Every frame from there on waits for ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flip(Fault):
    """One bit of the byte at ``into`` is another one: below `HEADER_SIZE` in the header, above in the payload."""

    bit: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fail(Fault):
    """``send_frame`` or ``recv_frame`` raises ``error``; the lane itself is left as it is."""

    error: BaseException


Plan: TypeAlias = Callable[[int], Iterable[Fault]]
"""The faults of a transport's lanes, numbered from 0 in the order in which it made them; may be asked by any thread."""


class _Armed:
    """One fault in one lane: how far it is from striking."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._frames = fault.after_frames
        self._bytes = fault.into
        self._over = False

    def counts(self, header: bytes) -> bool:
        """A frame begins: whether bytes of it count. Must be called once for each."""
        if self._over or not self.fault.matching(header):
            return False
        if self._frames:
            self._frames -= 1
            return False
        return True

    def strikes(self, size: int) -> int | None:
        """At which of the next ``size`` bytes that count it strikes, None when it does not."""
        if self._bytes >= size:
            self._bytes -= size
            return None
        self._over = not isinstance(self.fault, Delay)
        return self._bytes


class FaultyLane(Lane):
    """A lane with faults; without any it only passes everything on. Thread rules as for `Lane`.

    While frames are sent, a `Cut`, `End` or `Stall` in the middle of one takes a `StreamLane`. While they are
    received, every fault strikes when the header is there and the payload is not, wherever in the payload it is meant.
    """

    def __init__(self, inner: Lane, faults: Iterable[Fault] = ()) -> None:
        self.inner = inner
        self._ended = threading.Event()  # by this side
        self._dropped: Fault | None = None
        self._sending: list[_Armed] = []
        self._receiving: list[_Armed] = []
        for fault in faults:
            (self._sending if fault.direction is Direction.SENDING else self._receiving).append(_Armed(fault))

    # ---- frames ------------------------------------------------------------------------------

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        try:
            self._send(header, payload)
        except ClosedError:
            self._raise_if_dropped()
            raise

    def _send(self, header: bytes, payload: memoryview) -> None:
        sent, size = 0, HEADER_SIZE + payload.nbytes
        for armed in [armed for armed in self._sending if armed.counts(header)]:
            at = armed.strikes(size)
            if at is None:
                continue
            if isinstance(armed.fault, Flip):
                header, payload = _flipped(armed.fault, header, payload, at)
            elif isinstance(armed.fault, Cut | End | Stall):
                sent = self._write(header, payload, sent, at)
            self._strike(armed.fault)
        if sent:
            self._write(header, payload, sent, size)
        else:
            self.inner.send_frame(header, payload)

    def recv_frame(self, place: Placer) -> bytes | None:
        header = b""
        flips: list[tuple[Flip, int]] = []
        target = memoryview(b"")

        def placing(raw: memoryview) -> memoryview:
            nonlocal header, target
            header = bytes(raw)
            later = []
            for armed in [armed for armed in self._receiving if armed.counts(header)]:
                at = armed.strikes(HEADER_SIZE)
                if at is None:
                    later.append(armed)
                elif isinstance(armed.fault, Flip):
                    header, _ = _flipped(armed.fault, header, target, at)
                    self._strike(armed.fault)
                else:
                    self._strike(armed.fault, raises=False)
            target = place(memoryview(header))
            for armed in later:
                at = armed.strikes(target.nbytes)
                if at is None:
                    continue
                if isinstance(armed.fault, Flip):
                    flips.append((armed.fault, at))
                self._strike(armed.fault, raises=False)
            return target

        try:
            ended = self.inner.recv_frame(placing) is None
        except ClosedError:
            self._raise_if_dropped()
            raise
        self._raise_if_dropped()
        for flip, at in flips:
            target[at] ^= 1 << flip.bit
        return None if ended else header

    # ---- the end, and what is only passed on ---------------------------------------------------

    def close(self) -> None:
        self._ended.set()
        self.inner.close()

    def abort(self) -> None:
        self._ended.set()
        self.inner.abort()

    def path_stats(self) -> PathStats:
        return self.inner.path_stats()

    def set_congestion(self, algorithm: str) -> str:
        return self.inner.set_congestion(algorithm)

    def set_pacing(self, rate: float | None) -> None:
        self.inner.set_pacing(rate)

    def limit_unsent(self, nbytes: int) -> None:
        self.inner.limit_unsent(nbytes)

    def flow_sample(self) -> FlowSample | None:
        return self.inner.flow_sample()

    @property
    def description(self) -> str:
        return self.inner.description

    # ---- striking ------------------------------------------------------------------------------

    def _strike(self, fault: Fault, *, raises: bool = True) -> None:
        """Do what a fault does to the lane; ``raises`` whether this call then fails as well."""
        fault.struck.set()
        match fault:
            case Delay():
                self._ended.wait(fault.seconds)
            case Stall():
                while not (fault.released.is_set() or self._ended.is_set()):
                    fault.released.wait(_LOOK_EVERY_S)
            case Fail():
                raise fault.error
            case Cut() | End():
                self._dropped = fault
                (self.inner.abort if isinstance(fault, Cut) else self.inner.close)()
                if raises:
                    self._raise_if_dropped()

    def _raise_if_dropped(self) -> None:
        """What this side did not end is broken to it."""
        if self._dropped is not None and not self._ended.is_set():
            how = "cut" if isinstance(self._dropped, Cut) else "closed"
            raise BrokenError(f"{self.description}: {how} by a fault of the test") from None

    def _write(self, header: bytes, payload: memoryview, start: int, stop: int) -> int:
        """Put the bytes from ``start`` to ``stop`` of a frame on the path; returns how many of it are there."""
        if start < stop and not isinstance(self.inner, StreamLane):
            raise UsageError(f"{self.description} sends whole frames only: no fault is possible inside one")
        while start < stop:
            assert isinstance(self.inner, StreamLane)
            parts = [memoryview(header)[start:stop], payload[max(0, start - HEADER_SIZE) : max(0, stop - HEADER_SIZE)]]
            start += self.inner.write([part for part in parts if part.nbytes])
        return start


def _flipped(flip: Flip, header: bytes, payload: memoryview, at: int) -> tuple[bytes, memoryview]:
    """Copies with one bit of the frame changed."""
    frame = bytearray(header) + payload
    frame[at] ^= 1 << flip.bit
    return bytes(frame[:HEADER_SIZE]), memoryview(frame)[HEADER_SIZE:]


# ---- whole transports -------------------------------------------------------------------------------


def faulty(transport: Transport, plan: Plan) -> Transport:
    """``transport``, each of whose lanes has the faults that ``plan`` gives for its number.

    Lanes count from 0 as they come: those it connects, those it adopts and those its listener delivers.
    """

    class Named(FaultyTransport):
        name = transport.name
        api_version = transport.api_version
        capabilities = transport.capabilities

    return Named(transport, plan)


class FaultyTransport(Transport):
    """A transport whose lanes have faults. Made by `faulty`."""

    def __init__(self, inner: Transport, plan: Plan) -> None:
        self._inner = inner
        self._plan = plan
        self._numbers = itertools.count()  # next() of it is atomic

    def probe(self, peer: Endpoint | None) -> Candidate:
        return self._inner.probe(peer)

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        return self._inner.advertise(tag, lambda lane: deliver(self._wrapped(lane)))

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> Lane:
        return self._wrapped(self._inner.connect(request, timeouts))

    def adopt(self, sock: socket.socket, timeouts: LaneTimeouts) -> Lane:
        return self._wrapped(self._inner.adopt(sock, timeouts))

    def close(self) -> None:
        self._inner.close()

    def _wrapped(self, lane: Lane) -> FaultyLane:
        return FaultyLane(lane, self._plan(next(self._numbers)))
