"""What `amst bench` moves: messages over a session, sent by either side. Uses the public API only.

The client asks on one channel, as JSON: ``{"send": false}``, then sends messages on the others until an empty one on
each; or ``{"send": true, "size": BYTES | null, "seconds": S | null, "message": BYTES, "window": N}``, then receives
them. The server answers ``{"ready": true}`` before, and after having sent ``{"bytes": B, "seconds": S}``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..errors import AmstError, BrokenError, ClosedError, ConnectError, DeadlineError, ProtocolError

if TYPE_CHECKING:
    from .. import Session, Ticket

DATA: Final = ("amst.bench", *(f"amst.bench.{number}" for number in range(2, 9)))
"""Several channels for a long path: what waits for a lost segment then holds up, and holds in memory, only what is
behind it in its channel; and one channel may have half of a session's memory for messages only."""

CONTROL: Final = "amst.bench.control"

MAX_MESSAGE: Final = 64 << 20
MAX_WINDOW: Final = 1024
_MAX_CONTROL: Final = 4096
_MAX_SECONDS: Final = 86400.0
_ANSWER_TIMEOUT_S: Final = 20.0

_NEAR_S: Final = 0.005
_NEAR_AT_ONCE: Final = 4
_BEGIN_AHEAD: Final = 32 << 20
_ROUNDS: Final = 4  # a window that doubles in the next round trip holds twice that before its first half has arrived
_LEAST_MESSAGE: Final = 256 << 10
_MOST_AT_ONCE: Final = 128  # many short ones: the peer has memory for whole ones, until their last chunk is there
_LOOK_S: Final = 0.02

_log = logging.getLogger("amst.bench")


@dataclass(frozen=True, slots=True)
class Load:
    """How much to send: ``size`` bytes or for ``seconds``, in messages of ``message`` bytes, ``window`` at once."""

    size: int | None
    seconds: float | None
    message: int
    window: int


@dataclass(slots=True)
class Tally:
    """What has arrived so far; kept by one thread, read by others. ``seconds`` is set at the end."""

    bytes: int = 0
    seconds: float = 0.0


# ---- the client's side --------------------------------------------------------------------


def send(session: Session, load: Load, tally: Tally, *, progress: Callable[[], None]) -> None:
    """Have the server take what ``load`` says; ``tally`` counts what it acknowledged.

    Raises:
        ConnectError: the other side runs no bench service.
        AmstError: the session ended.
    """
    _tell(session, {"send": False})
    _answer(session)
    push(session, load, tally, progress=progress)


def receive(session: Session, load: Load, tally: Tally, *, progress: Callable[[], None]) -> None:
    """Have the server send what ``load`` says; ``tally`` counts what came, its time is the server's.

    Raises:
        ConnectError: the other side runs no bench service.
        ProtocolError: what it says that it sent is not what came.
        AmstError: the session ended.
    """
    _tell(
        session,
        {"send": True, "size": load.size, "seconds": load.seconds, "message": load.message, "window": load.window},
    )
    _answer(session)
    drain(session, tally, progress=progress)
    sent = _answer(session)
    seconds = sent.get("seconds")
    if sent.get("bytes") != tally.bytes:
        raise ProtocolError(f"the server says that it sent {sent.get('bytes')!r} bytes, but {tally.bytes} arrived")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= _MAX_SECONDS:
        raise ProtocolError("the server does not say in how many seconds it sent them")
    tally.seconds = float(seconds)


def _tell(session: Session, value: Mapping[str, object]) -> None:
    session.send(json.dumps(value).encode(), channel=CONTROL)


def _answer(session: Session) -> Mapping[str, Any]:
    try:
        answer = _parse(session.recv(CONTROL, timeout=_ANSWER_TIMEOUT_S))
    except DeadlineError as err:
        raise ConnectError(
            f"{session.peer} does not answer on the channel {CONTROL}: run `amst serve` there", retryable=False
        ) from err
    if "error" in answer:
        raise ProtocolError(f"{session.peer} refuses to measure: {answer['error']}")
    return answer


# ---- the server's side --------------------------------------------------------------------


def offer(session: Session) -> None:
    """Do what the peer of ``session`` asks for on `CONTROL`, on a thread of its own, until the session ends."""
    threading.Thread(target=_serve, args=(session,), name=f"amst-bench-{session.id}", daemon=True).start()


def _serve(session: Session) -> None:
    try:
        while True:
            try:
                request = _parse(session.recv(CONTROL))
                load = _parse_load(request) if request.get("send") is True else None
            except ProtocolError as err:
                _tell(session, {"error": str(err)})
                continue
            _tell(session, {"ready": True})
            tally = Tally()
            if load is None:
                drain(session, tally)
            else:
                push(session, load, tally)
                _tell(session, {"bytes": tally.bytes, "seconds": tally.seconds})
    except (ClosedError, BrokenError):
        return
    except AmstError as err:
        _log.info("the bench service for %s ended: %s", session.peer, err)


def _parse(message: memoryview) -> Mapping[str, Any]:
    if len(message) > _MAX_CONTROL:
        raise ProtocolError(f"a bench message of {len(message)} bytes; {_MAX_CONTROL} are allowed")
    try:
        value = json.loads(bytes(message))
    except (ValueError, RecursionError) as err:
        raise ProtocolError("a bench message that is no JSON") from err
    if not isinstance(value, dict):
        raise ProtocolError("a bench message that is no JSON object")
    return value


def _parse_load(request: Mapping[str, Any]) -> Load:
    size, seconds = request.get("size"), request.get("seconds")
    message, window = request.get("message"), request.get("window")
    if (
        (size is None) == (seconds is None)
        or not (size is None or (type(size) is int and 0 < size < 1 << 63))
        or not (seconds is None or (type(seconds) in (int, float) and 0 < seconds <= _MAX_SECONDS))
        or not (type(message) is int and 0 < message <= MAX_MESSAGE)
        or not (type(window) is int and 0 < window <= MAX_WINDOW)
    ):
        raise ProtocolError("a bench request with values out of bounds")
    return Load(size, seconds, message, window)


# ---- both ---------------------------------------------------------------------------------


def push(session: Session, load: Load, tally: Tally, *, progress: Callable[[], None] | None = None) -> None:
    """Send what ``load`` says and wait until all of it is acknowledged; then an empty message on each channel.

    When the time is up, what has been offered and not begun is taken back.
    """
    payload = memoryview(os.urandom(load.message))
    ahead = _Ahead(load, session)
    channels = itertools.cycle(ahead.channels)
    waiting: deque[Ticket] = deque()
    offered = 0
    sent_before = session.metrics().bytes_sent
    began = time.monotonic()

    def settle() -> None:
        ticket = waiting.popleft()
        ticket.wait()
        tally.bytes += ticket.size
        if progress is not None:
            progress()

    while load.size is None or offered < load.size:
        now = time.monotonic()
        if load.seconds is not None and now - began >= load.seconds:
            tally.bytes += _take_back(session, waiting, offered, sent_before)
            break
        length = ahead.message if load.size is None else min(ahead.message, load.size - offered)
        waiting.append(session.send(payload[:length], channel=next(channels), borrow=True))
        offered += length
        # what is missing of the oldest may hang on one slow stream, and the others are not to wait for that
        while offered - (arrived := tally.bytes + sum(ticket.acknowledged for ticket in waiting)) >= ahead.size:
            if load.seconds is not None and time.monotonic() - began >= load.seconds:
                break
            if waiting[0].done or offered - tally.bytes >= ahead.most:
                settle()
            else:
                with contextlib.suppress(DeadlineError):
                    waiting[0].wait(_LOOK_S)
                ahead.look(arrived, starved=session.starved)
        while waiting and waiting[0].done:
            settle()
    while waiting:
        settle()
    tally.seconds = time.monotonic() - began
    for ended in [session.send(b"", channel=channel) for channel in DATA]:
        ended.wait()


def _take_back(session: Session, waiting: deque[Ticket], offered: int, sent_before: int) -> int:
    """Cancel those of ``waiting``, the newest, that no stream is near; bytes of what arrived all the same."""
    metrics = session.metrics()
    begun = metrics.bytes_sent - sent_before + 2 * sum(stream.chunk_size for stream in metrics.streams)
    cancelled: list[Ticket] = []
    while waiting and offered - waiting[-1].size >= begun:
        ticket = waiting.pop()
        ticket.cancel()
        offered -= ticket.size
        cancelled.append(ticket)
    return sum(ticket.size for ticket in cancelled if ticket.done and ticket.error is None)


class _Ahead:
    """How much is offered before it has arrived: what keeps the streams busy, and little more.

    It grows with what arrives in a round trip, for the next one may carry twice as much, and when the streams have
    nothing left. On a short path it is all that ``load`` allows.
    """

    def __init__(self, load: Load, session: Session) -> None:
        rtt_s = session.metrics().average_latency_s or 0.0
        near = rtt_s < _NEAR_S
        self.most = load.message * load.window
        self.channels = DATA[:1] if near else DATA
        self.size = self.most if near else min(self.most, _BEGIN_AHEAD)
        self._largest = load.message
        self._message = self.most // min(_NEAR_AT_ONCE, load.window) if near else _LEAST_MESSAGE
        self._round_s = max(rtt_s, _LOOK_S)
        self._round_began = time.monotonic()
        self._arrived = 0

    @property
    def message(self) -> int:
        """Bytes of the next message."""
        return min(self._largest, max(1, self._message, self.size // _MOST_AT_ONCE))

    def look(self, arrived: int, *, starved: bool) -> None:
        """As much as `size` is ahead of the bytes that have ``arrived``; ``starved``: the streams could take more."""
        now = time.monotonic()
        if now - self._round_began < self._round_s:
            return
        in_round = arrived - self._arrived
        self._round_began, self._arrived = now, arrived
        self.size = min(self.most, max(self.size, _ROUNDS * in_round, 2 * self.size if starved else 0))


def drain(session: Session, tally: Tally, *, progress: Callable[[], None] | None = None) -> None:
    """Receive and drop messages until an empty one on each channel."""
    lock = threading.Lock()
    failed: list[AmstError] = []

    def take(channel: str) -> None:
        while length := len(session.recv(channel)):
            with lock:
                tally.bytes += length
                if progress is not None:
                    progress()

    def take_beside(channel: str) -> None:
        try:
            take(channel)
        except AmstError as err:
            failed.append(err)

    # daemons: what interrupts this thread ends the session, and them with it
    others = [threading.Thread(target=take_beside, args=(channel,), daemon=True) for channel in DATA[1:]]
    for other in others:
        other.start()
    take(DATA[0])
    for other in others:
        other.join()
    if failed:
        raise failed[0]
