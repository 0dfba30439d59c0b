"""What the rules of lanes do again and again: make a pair, move frames over it, stop in the middle of one."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeAlias

from ..errors import UnavailableError
from ..interfaces import HEADER_SIZE, FileSpan, FlowSample, Lane, LaneTimeouts, PathStats, StreamLane
from .conformance import SETTLE_S, Call, NotApplicable, Trial

Frame: TypeAlias = tuple[bytes, bytes]
"""A header and a payload."""

STEPS: Final = 16
_TRIES: Final = 8


class MakePair(Protocol):
    """Makes two connected lanes. The timeouts must hold for the first one at least."""

    def __call__(self, timeouts: LaneTimeouts, /) -> tuple[Lane, Lane]: ...


def header(number: int) -> bytes:
    """A header of its own for each ``number``; to a lane it is opaque."""
    return number.to_bytes(8, "big") + bytes(range(HEADER_SIZE - 8))


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes in which a missing, doubled or moved piece shows."""
    return (bytes((seed + i * 7) % 251 for i in range(1009)) * (size // 1009 + 1))[:size]


def first_difference(expected: bytes, got: bytes) -> int | None:
    """Where two payloads of one length differ first."""
    if expected == got:
        return None
    return next(i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b)


class LaneTrial(Trial):
    """One rule of lanes tried once; every lane it made is aborted afterwards."""

    def __init__(self, rule: str, patience_s: float, make_pair: MakePair, more_than_holds: int) -> None:
        super().__init__(rule, patience_s)
        self._make_pair = make_pair
        self.more_than_holds = more_than_holds

    def pair(self, timeouts: LaneTimeouts | None = None) -> tuple[Lane, Lane]:
        """Two fresh lanes."""
        near, far = self.call("make_pair", self._make_pair, timeouts if timeouts is not None else LaneTimeouts())
        for lane in (near, far):
            self.afterwards(lane.abort)
        return near, far

    # ---- whole frames ------------------------------------------------------------------------

    def sending(self, lane: Lane, *frames: Frame) -> Call:
        """Begin to send ``frames``, one after the other."""

        def send() -> None:
            for head, payload in frames:
                lane.send_frame(head, memoryview(payload))

        return self.begin("send_frame", send)

    def receiving(self, lane: Lane, size: int) -> Call:
        """Begin to receive a frame with ``size`` bytes of payload: the result is a `Frame`, None at the end."""

        def receive() -> Frame | None:
            payload = bytearray(size)
            head = lane.recv_frame(lambda _head: memoryview(payload))
            return None if head is None else (head, bytes(payload))

        return self.begin("recv_frame", receive)

    def receive(self, lane: Lane, size: int) -> Frame:
        """The next frame; that the lane ends instead breaks the rule."""
        frame: Frame | None = self.returns(self.receiving(lane, size))
        if frame is None:
            self.fail("a frame", "the end of the lane")
        return frame

    def carry(self, sender: Lane, receiver: Lane, *frames: Frame) -> list[Frame]:
        """Send ``frames`` and receive as many."""
        sending = self.sending(sender, *frames)
        got = [self.receive(receiver, len(payload)) for _, payload in frames]
        self.returns(sending)
        return got

    # ---- spans of files ----------------------------------------------------------------------

    def span(self, content: bytes, *, offset: int = 0, nbytes: int, file_size: int = 0) -> FileSpan:
        """A span of a new file: ``content``, then zeros up to ``file_size``. It may end beyond that."""
        file = tempfile.TemporaryFile(buffering=0)
        self.afterwards(file.close)
        file.write(content)
        if file_size:
            file.truncate(file_size)

        def read(at: int, view: memoryview) -> None:
            got = os.preadv(file.fileno(), [view], at)
            view[got:] = bytes(view.nbytes - got)

        return FileSpan(file.fileno(), offset, nbytes, read)

    def sending_span(self, lane: Lane, head: bytes, span: FileSpan) -> Call:
        """Begin to send one."""
        return self.begin("send_span", lane.send_span, head, span)

    def settle(self) -> None:
        """Give threads the time to run into what should block them."""
        time.sleep(SETTLE_S)

    def stats(self, lane: Lane) -> PathStats:
        """What the lane knows about its path."""
        stats = self.call("path_stats", lane.path_stats)
        if not isinstance(stats, PathStats):
            self.fail("path_stats to return PathStats", repr(stats))
        return stats

    def flow(self, lane: Lane) -> FlowSample | None:
        """How the lane's sending half stands, as far as it tells."""
        sample = self.call("flow_sample", lane.flow_sample)
        if not (sample is None or isinstance(sample, FlowSample)):
            self.fail("flow_sample to return FlowSample or None", repr(sample))
        return sample

    def known_flow(self, lane: Lane) -> FlowSample:
        """The same of a lane that must tell, as all of its kind do."""
        sample = self.flow(lane)
        if sample is None:
            raise NotApplicable("this kind of lane does not tell how its sending half stands")
        return sample

    def takes_pace(self, lane: Lane, rate: float | None) -> bool:
        """Set a pace; False where the lane says that its kind cannot be paced."""

        def set_pacing() -> bool:
            try:
                lane.set_pacing(rate)
            except UnavailableError:
                return False
            return True

        taken: bool = self.call("set_pacing", set_pacing)
        return taken

    def pace(self, lane: Lane, rate: float | None) -> None:
        """Set a pace, as a rule needs that is about lanes that can be paced."""
        if not self.takes_pace(lane, rate):
            raise NotApplicable("this kind of lane cannot be paced")

    # ---- parts of frames ---------------------------------------------------------------------

    def within(self, sender: Lane, receiver: Lane) -> Within:
        """Stop in the middle of a frame that is larger than what the path holds."""
        return Within(self, sender, receiver)

    def write_raw(self, lane: Lane, data: bytes) -> None:
        """Put ``data`` on the path as it is."""
        stream = self.stream(lane)
        view = memoryview(data)
        while view.nbytes:
            view = view[self.call("write", stream.write, [view]) :]

    def stream(self, lane: Lane) -> StreamLane:
        """The lane, if part of a frame can be put on it or taken off it."""
        if not isinstance(lane, StreamLane):
            raise NotApplicable("only a StreamLane can be made to stop in the middle of a frame")
        return lane

    def at_pace(self, limit_s: float, attempt: Callable[[Pace], Call]) -> None:
        """Have ``attempt`` take longer than ``limit_s`` step by step; the call it returns must return.

        Where this machine was too busy to keep the pace, a failure proves nothing, and it is tried again.
        """
        for _ in range(_TRIES):
            pace = Pace(limit_s)
            call = attempt(pace)
            if pace.kept or (call.ended(self.patience_s) and call.error is None):
                self.returns(call)
                return
        raise NotApplicable("this machine is too busy just now to keep a pace")


class Pace:
    """Steps that take one and a half times a limit together, none of them as long as half of it."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.kept = True

    def steps(self) -> Iterator[int]:
        """The numbers below `STEPS`, one after each pause."""
        for number in range(STEPS):
            last = time.monotonic()
            time.sleep(1.5 * self._limit_s / STEPS)
            yield number
            self.kept = self.kept and time.monotonic() - last < self._limit_s / 2


class Within:
    """A frame whose header the receiver has, and whose payload is larger than what the path holds.

    The receiver's thread waits inside ``place`` until `go_on`; the sender's is blocked.
    """

    def __init__(self, trial: LaneTrial, sender: Lane, receiver: Lane) -> None:
        size = trial.more_than_holds
        self._go_on = threading.Event()
        trial.afterwards(self._go_on.set)
        inside = threading.Event()

        def place(_head: memoryview) -> memoryview:
            inside.set()
            self._go_on.wait()
            return memoryview(bytearray(size))

        self.sending = trial.begin("send_frame", sender.send_frame, header(size), memoryview(bytes(size)))
        self.receiving = trial.begin("recv_frame", receiver.recv_frame, place)
        trial.wait(inside.is_set, "recv_frame to ask for a place once the header is there", lambda: "it did not")
        trial.settle()

    def go_on(self) -> None:
        """Let the receiver have its place."""
        self._go_on.set()
