"""The rules of `Lane`, each tried on connected lanes that the caller makes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from contextlib import suppress
from itertools import pairwise
from typing import Final

from ..errors import AmstError, BrokenError, ClosedError, UnavailableError
from ..interfaces import HEADER_SIZE, FlowSample, Lane, LaneTimeouts, StreamLane
from .conformance import PATIENCE_S, SETTLE_S, Call, Conformance, Counted, NotApplicable, Rule, chosen
from .lane_trial import STEPS, LaneTrial, MakePair, Pace, first_difference, header, pattern

MORE_THAN_HOLDS: Final = 64 << 20
"""Bytes that no path holds while nobody reads: a socket's buffers grow to some MiB."""

_LIMIT_S: Final = 0.25
"""The timeout of lanes that run into it, or keep just within it."""

_SIZES: Final = (1, 31, 32, 33, 4096, (64 << 10) + 1)
_LARGE: Final = (8 << 20) + 1
_COUNTERS: Final = ("bytes_acknowledged", "bytes_received", "segments_sent", "segments_retransmitted",
                    "bytes_retransmitted")  # fmt: skip
_NEVER_ZERO: Final = ("rtt_s", "min_rtt_s", "cwnd", "pacing_rate", "delivery_rate", "mss")
_MANY: Final = 16
_NO_CONGESTION: Final = "no-such-control"
_TOTALS: Final = ("delivered", "sent", "lost")
_SIZES_OF_FLOWS: Final = (*_TOTALS, "in_flight", "window", "unsent", "mss")
_RATES: Final = (1.0, 1500.5, 1 << 20, 2e10, None)
"""Bytes/s that any lane takes that can be paced; the largest does not fit into 32 bits."""

_FIRST_PACE: Final = 8 << 20
_SECOND_PACE: Final = 2 << 20
_AHEAD: Final = 512 << 10
"""Bytes that a lane may be ahead of its pace, some full segments of a loopback interface (64 KiB each)."""

_PIECE: Final = 16 << 10
_SLOW_PACE: Final = 256 << 10


def check_lane_pair(
    make_pair: MakePair,
    *,
    patience_s: float = PATIENCE_S,
    more_than_holds: int = MORE_THAN_HOLDS,
    only: Collection[str] | None = None,
) -> Conformance:
    """Try every rule of `Lane`, each on fresh lanes; takes a few seconds when all of them hold.

    ``make_pair`` is called with the timeouts that the lanes must have. ``more_than_holds`` is a number of bytes that
    the path cannot hold while nobody reads. ``only`` names the rules to try. Rules that need a frame to stop half
    way are tried on a `StreamLane` and skipped on others.

    Raises:
        ConformanceError: a rule is broken; no further one is tried.
    """
    held: list[str] = []
    skipped: dict[str, str] = {}
    for rule in chosen(LANE_RULES, only):
        with LaneTrial(rule.name, patience_s, make_pair, more_than_holds) as trial:
            try:
                rule.attempt(trial)
                held.append(rule.name)
            except NotApplicable as reason:
                skipped[rule.name] = str(reason)
    return Conformance(tuple(held), skipped)


# ---- frames ---------------------------------------------------------------------------------------


def _whole(t: LaneTrial) -> None:
    near, far = t.pair()
    frames = [(header(n), pattern(size, n)) for n, size in enumerate(_SIZES)]
    for (_, sent), (_, got) in zip(frames, t.carry(near, far, *frames), strict=True):
        wrong = first_difference(sent, got)
        t.check(wrong is None, f"a payload of {len(sent)} bytes as it was sent", f"byte {wrong} is another one")


def _in_order(t: LaneTrial) -> None:
    near, far = t.pair()
    frames = [(header(100 + n), pattern(16, n)) for n in range(64)]
    got = t.carry(near, far, *frames)
    wrong = next((n for n in range(64) if got[n] != frames[n]), None)
    t.check(wrong is None, "64 frames in the order in which they were sent", f"another one in place {wrong}")


def _empty(t: LaneTrial) -> None:
    near, far = t.pair()
    frames = [(header(200), b""), (header(201), b"x"), (header(202), b"")]
    got = t.carry(near, far, *frames)
    t.check(got == frames, "frames without a payload to arrive as others do", got)


def _large(t: LaneTrial) -> None:
    near, far = t.pair()
    payload = pattern(_LARGE)
    ((_, got),) = t.carry(near, far, (header(300), payload))
    wrong = first_difference(payload, got)
    t.check(wrong is None, f"a payload of {_LARGE} bytes as it was sent", f"byte {wrong} is another one")


def _header_exact(t: LaneTrial) -> None:
    near, far = t.pair()
    sent = [bytes(range(at, at + HEADER_SIZE)) for at in range(0, 256, HEADER_SIZE)]
    seen: list[bytes] = []

    def place(head: memoryview) -> memoryview:
        seen.append(bytes(head))
        return memoryview(bytearray(3))

    sending = t.sending(near, *((head, b"abc") for head in sent))
    got = t.call("recv_frame", lambda: [far.recv_frame(place) for _ in sent])
    t.returns(sending)
    t.check(seen == sent, "place to see each header as it was sent", seen)
    t.check(all(type(head) is bytes for head in got), "recv_frame to return bytes", got)
    t.check(got == sent, "recv_frame to return each header as it was sent, for keeps", got)


def _one_place(t: LaneTrial) -> None:
    near, far = t.pair()
    asked: list[int] = []
    for number, size in enumerate((0, 5, 100_000)):

        def place(_head: memoryview, number: int = number, size: int = size) -> memoryview:
            asked.append(number)
            return memoryview(bytearray(size))

        sending = t.sending(near, (header(400 + number), pattern(size)))
        t.call("recv_frame", far.recv_frame, place)
        t.returns(sending)
    t.check(asked == [0, 1, 2], "place to be asked once for each of three frames", f"it was asked for {asked}")


def _in_place(t: LaneTrial) -> None:
    near, far = t.pair()
    payload = pattern(100_000)
    memory = bytearray(b"\xee" * (len(payload) + 200))
    sending = t.sending(near, (header(500), payload))
    t.call("recv_frame", far.recv_frame, lambda _head: memoryview(memory)[100:-100])
    t.check(memory[100:-100] == payload, "the payload in the view that place gave", "other bytes in it")
    around = memory[:100] + memory[-100:]
    t.check(around == b"\xee" * 200, "nothing to be written outside the view that place gave", "changed bytes there")
    t.returns(sending)


def _place_raises(t: LaneTrial) -> None:
    near, far = t.pair()
    fault = LookupError("the placer's own")

    def place(_head: memoryview) -> memoryview:
        raise fault

    sending = t.sending(near, (header(600), b"payload"))
    error = t.raises(t.begin("recv_frame", far.recv_frame, place), LookupError)
    t.check(error is fault, "the very exception that place raised", repr(error))
    t.returns(sending)


def _duplex(t: LaneTrial) -> None:
    near, far = t.pair()
    frame = (header(700), bytes(t.more_than_holds))
    sending = [t.sending(lane, frame) for lane in (near, far)]
    t.settle()  # neither has anybody to read yet
    receiving = [t.receiving(lane, t.more_than_holds) for lane in (near, far)]
    for call in (*receiving, *sending):
        t.returns(call)


def _payload_free(t: LaneTrial) -> None:
    near, far = t.pair()
    buffer = bytearray(pattern(512))

    def send_and_use_again() -> None:
        near.send_frame(header(800), memoryview(buffer))
        buffer[:] = bytes(512)

    sending = t.begin("send_frame", send_and_use_again)
    t.settle()
    got = t.receive(far, 512)
    t.returns(sending)
    t.check(got[1] == pattern(512), "the bytes that the buffer held during send_frame", "what was put there afterwards")


def _payload_kept(t: LaneTrial) -> None:
    near, far = t.pair()
    buffer = bytearray(pattern(70_000))
    sending = t.begin("send_frame", near.send_frame, header(900), memoryview(buffer))
    t.receive(far, len(buffer))
    t.returns(sending)
    t.check(buffer == pattern(70_000), "send_frame to leave the payload as it was", "changed bytes in the buffer")


# ---- a full path and its limits -------------------------------------------------------------------


def _blocks(t: LaneTrial) -> None:
    near, far = t.pair()
    payload = bytes(t.more_than_holds // 64)
    sent = 0

    def send() -> None:
        nonlocal sent
        for number in range(64):
            near.send_frame(header(1000 + number), memoryview(payload))
            sent += 1

    sending = t.begin("send_frame", send)
    last = -1
    while not sending.ended(4 * SETTLE_S) and sent != last:
        last = sent
    t.check(sent < 64, "send_frame to block while nobody reads", f"{t.more_than_holds} bytes were taken")
    for number in range(64):
        head, _ = t.receive(far, len(payload))
        t.check(head == header(1000 + number), f"frame {number} once there was room again", "another frame")
    t.returns(sending)


def _write_timeout(t: LaneTrial) -> None:
    near, _far = t.pair(LaneTimeouts(write_s=_LIMIT_S / 2))
    t.raises(t.sending(near, (header(1100), bytes(t.more_than_holds))), BrokenError)


def _slow_send(t: LaneTrial) -> None:
    def attempt(pace: Pace) -> Call:
        near, far = t.pair(LaneTimeouts(write_s=_LIMIT_S, read_s=_LIMIT_S))
        stream, size = t.stream(far), HEADER_SIZE + t.more_than_holds
        sending = t.sending(near, (header(1200), bytes(t.more_than_holds)))
        buffer = memoryview(bytearray(-(-size // STEPS)))

        def take() -> None:
            left = size
            for _ in pace.steps():
                wanted = min(left, buffer.nbytes)
                while wanted and (got := stream.read_into(buffer[:wanted], idle=False)):
                    wanted, left = wanted - got, left - got

        t.begin("read_into", take).ended(t.patience_s)  # what it raises, the sender explains
        return sending

    t.at_pace(_LIMIT_S, attempt)


def _read_timeout(t: LaneTrial) -> None:
    for sent in (10, HEADER_SIZE, HEADER_SIZE + 20):
        near, far = t.pair(LaneTimeouts(read_s=_LIMIT_S / 4))
        t.write_raw(far, (header(1300) + bytes(100))[:sent])
        t.raises(t.receiving(near, 100), BrokenError)


def _slow_receive(t: LaneTrial) -> None:
    def attempt(pace: Pace) -> Call:
        near, far = t.pair(LaneTimeouts(read_s=_LIMIT_S))
        t.stream(far)
        receiving = t.receiving(near, 4 * STEPS)
        t.write_raw(far, header(1400))
        for number in pace.steps():
            with suppress(AmstError):  # the receiver tells
                t.stream(far).write([memoryview(bytes([number] * 4))])
        return receiving

    t.at_pace(_LIMIT_S, attempt)


def _idle(t: LaneTrial) -> None:
    near, far = t.pair(LaneTimeouts(read_s=_LIMIT_S / 10, write_s=_LIMIT_S / 10))
    receiving = t.receiving(near, 3)
    t.check(not receiving.ended(_LIMIT_S), "an idle lane to outlive its timeouts", f"{receiving.error!r}")
    t.returns(t.sending(far, (header(1500), b"abc")))
    t.check(t.returns(receiving) == (header(1500), b"abc"), "the frame that ends the pause", receiving.result)


# ---- the end of a lane ----------------------------------------------------------------------------


def _abort_sender(t: LaneTrial) -> None:
    near, far = t.pair()
    frame = t.within(near, far)
    t.call("abort", near.abort)
    t.raises(frame.sending, ClosedError)


def _abort_receiver(t: LaneTrial) -> None:
    near, far = t.pair()
    receiving = t.receiving(near, 0)
    t.settle()
    t.call("abort", near.abort)
    t.raises(receiving, ClosedError)
    near, far = t.pair()
    frame = t.within(far, near)
    t.call("abort", near.abort)
    frame.go_on()
    t.raises(frame.receiving, ClosedError)
    near, far = t.pair()
    if isinstance(far, StreamLane):
        t.write_raw(far, header(1600) + bytes(10))
        receiving = t.receiving(near, 100)
        t.settle()
        t.call("abort", near.abort)
        t.raises(receiving, ClosedError)


def _abort_returns(t: LaneTrial) -> None:
    near, far = t.pair()
    t.within(far, near)
    t.sending(near, (header(1600), bytes(t.more_than_holds)))
    t.settle()
    t.call("abort, while a thread sends and another one is inside place,", near.abort)


def _abort_again(t: LaneTrial) -> None:
    near, far = t.pair()
    for _ in range(3):
        t.call("abort, called again,", near.abort)
    t.call("close", far.close)
    for call in [t.begin("abort after close, by two threads at once,", far.abort) for _ in range(2)]:
        t.returns(call)


def _abort_is_no_end(t: LaneTrial) -> None:
    near, far = t.pair()
    t.carry(near, far, (header(1700), b"abc"))
    receiving = t.receiving(far, 0)
    t.settle()
    t.call("abort", near.abort)
    t.raises(receiving, BrokenError)


def _cut_inside(t: LaneTrial) -> None:
    near, far = t.pair()
    frame = t.within(near, far)
    t.call("abort", near.abort)
    frame.go_on()
    t.raises(frame.receiving, BrokenError)


def _end_inside(t: LaneTrial) -> None:
    for sent in (1, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 10):
        near, far = t.pair()
        t.write_raw(near, (header(1800) + bytes(100))[:sent])
        t.call("close", near.close)
        t.raises(t.receiving(far, 100), BrokenError)


def _gone_peer(t: LaneTrial) -> None:
    near, far = t.pair()
    frame = t.within(near, far)
    t.call("abort", far.abort)
    t.raises(frame.sending, BrokenError)


_LAST_WORDS: Final = [(header(1900 + number), pattern(8192, number)) for number in range(8)]


def _send_and_close(t: LaneTrial, near: Lane, far: Lane) -> None:
    def send_and_close() -> None:
        for head, payload in _LAST_WORDS:
            near.send_frame(head, memoryview(payload))
        near.close()

    closing = t.begin("close", send_and_close)
    closing.ended(SETTLE_S)  # mostly before anything was read
    for number, frame in enumerate(_LAST_WORDS):
        what = f"frame {number} of {len(_LAST_WORDS)} that were sent before close"
        receiving = t.receiving(far, len(frame[1]))
        t.check(receiving.ended(t.patience_s) and receiving.error is None, what, repr(receiving.error or "nothing"))
        t.check(receiving.result == frame, what, "the end" if receiving.result is None else "another frame")
    t.returns(closing)


def _close_flushes(t: LaneTrial) -> None:
    near, far = t.pair()
    _send_and_close(t, near, far)


def _close_over_unread(t: LaneTrial) -> None:
    near, far = t.pair()
    t.returns(t.sending(far, (header(2000), bytes(1000))))

    def arrived() -> bool:
        count = t.stats(near).bytes_received
        return count is None or count >= HEADER_SIZE + 1000

    t.wait(arrived, "bytes_received to count what was sent", lambda: near.path_stats().bytes_received)
    _send_and_close(t, near, far)


def _close_again(t: LaneTrial) -> None:
    near, far = t.pair()
    for _ in range(3):
        t.call("close, called again,", near.close)
    t.call("abort", far.abort)
    t.call("close after abort", far.close)


def _close_returns(t: LaneTrial) -> None:
    near, far = t.pair()
    t.within(far, near)
    t.sending(near, (header(2100), bytes(t.more_than_holds)))
    t.settle()
    t.call("close, while a thread sends and another one is inside place,", near.close)


def _close_receiver(t: LaneTrial) -> None:
    near, _far = t.pair()
    receiving = t.receiving(near, 0)
    t.settle()
    t.call("close", near.close)
    t.raises(receiving, ClosedError)


def _clean_end(t: LaneTrial) -> None:
    near, far = t.pair()
    t.carry(near, far, (header(2200), b"abc"))
    receiving = t.receiving(far, 0)
    t.settle()
    t.call("close", near.close)
    t.check(t.returns(receiving) is None, "None at a clean end", receiving.result)


def _closed(t: LaneTrial) -> None:
    for end in ("close", "abort"):
        near, _far = t.pair()
        t.call(end, getattr(near, end))
        t.raises(t.sending(near, (header(2300), b"abc")), ClosedError)
        t.raises(t.receiving(near, 0), ClosedError)


def _with(t: LaneTrial) -> None:
    near, far = t.pair()

    def send_and_leave() -> None:
        with near:
            near.send_frame(header(2350), memoryview(b"abc"))

    t.call("leaving a with block", send_and_leave)
    got = t.receive(far, 3)
    t.check(got == (header(2350), b"abc"), "a with block that ends well to close the lane, which flushes", got)
    other, far = t.pair()

    def leave() -> None:
        with suppress(LookupError), other:
            raise LookupError

    receiving = t.receiving(far, 0)
    t.settle()
    t.call("leaving a with block by an exception", leave)
    t.raises(receiving, BrokenError)


def _nothing_left(t: LaneTrial) -> None:
    count = Counted(t)
    pairs = [t.pair() for _ in range(_MANY)]
    receiving = [t.receiving(far, 0) for _, far in pairs]
    t.settle()
    for number, (near, far) in enumerate(pairs):
        ends = (near.close, far.close) if number % 2 else (far.abort, near.abort)
        t.call("the end", ends[0])
        receiving[number].ended(t.patience_s)
        t.call("the end", ends[1])

    count.nothing_of(_MANY, f"{_MANY} lanes whose both ends are closed or aborted")


# ---- spans of files --------------------------------------------------------------------------------


def _span_whole(t: LaneTrial) -> None:
    content = pattern((1 << 20) + 5000)
    near, far = t.pair()
    for number, (offset, size) in enumerate(((0, 1), (4097, 100), (33, 4096), (4096, 1 << 20))):
        sending = t.sending_span(near, header(3000 + number), t.span(content, offset=offset, nbytes=size))
        head, got = t.receive(far, size)
        t.returns(sending)
        t.check(head == header(3000 + number), "the header as it was sent", head)
        wrong = first_difference(content[offset : offset + size], got)
        t.check(wrong is None, f"{size} bytes of the file from its byte {offset} on", f"byte {wrong} is another one")


def _span_short(t: LaneTrial) -> None:
    content, size = pattern(30_000), 50_000
    near, far = t.pair()
    for offset in (0, size):
        sending = t.sending_span(near, header(3100), t.span(content, offset=offset, nbytes=size))
        sending.ended(SETTLE_S)
        after = t.sending(near, (header(3101), b"the next"))
        got = [t.receive(far, size), t.receive(far, 8)]
        for call in (sending, after):
            t.returns(call)
        expected = content[offset:].ljust(size, b"\0")
        t.check(got[0] == (header(3100), expected), "a frame that ends in what span.read gives", "other bytes")
        t.check(got[1] == (header(3101), b"the next"), "the next frame after one whose file was too short", got[1])


def _span_file(t: LaneTrial) -> None:
    content = pattern(100_000)
    span = t.span(content, offset=1000, nbytes=90_000)
    os.lseek(span.fd, 7, os.SEEK_SET)
    near, far = t.pair()
    sending = t.sending_span(near, header(3200), span)
    t.receive(far, span.nbytes)
    t.returns(sending)
    at = os.lseek(span.fd, 0, os.SEEK_CUR)
    t.check(at == 7, "the file to stay open, and at the position that it had", f"position {at}")
    t.check(os.pread(span.fd, len(content) + 1, 0) == content, "the file as it was", "other bytes in it")


def _span_abort(t: LaneTrial) -> None:
    span = t.span(b"", nbytes=t.more_than_holds, file_size=t.more_than_holds)
    near, _far = t.pair()
    sending = t.sending_span(near, header(3300), span)
    t.settle()
    t.call("abort", near.abort)
    t.raises(sending, ClosedError)


def _span_timeout(t: LaneTrial) -> None:
    span = t.span(b"", nbytes=t.more_than_holds, file_size=t.more_than_holds)
    near, _far = t.pair(LaneTimeouts(write_s=_LIMIT_S / 2))
    t.raises(t.sending_span(near, header(3400), span), BrokenError)


# ---- statistics -----------------------------------------------------------------------------------


def _stats_raise(t: LaneTrial) -> None:
    for end in ("close", "abort"):
        near, far = t.pair()
        t.stats(near)
        t.carry(near, far, (header(2400), b"abc"))
        t.stats(near)
        t.call(end, getattr(near, end))
        t.stats(near)
        t.stats(far)


def _stats_any_thread(t: LaneTrial) -> None:
    near, far = t.pair()
    t.within(near, far)
    for _ in range(10):
        t.call("path_stats, while a thread sends,", near.path_stats)
        t.call("path_stats, while a thread receives,", far.path_stats)


def _stats_totals(t: LaneTrial) -> None:
    near, far = t.pair()
    taken = [(t.stats(near), t.stats(far))]
    for number in range(3):
        t.carry(near, far, (header(2500 + number), bytes(10_000)))
        taken.append((t.stats(near), t.stats(far)))
        t.check(
            (got := taken[-1][1].bytes_received) is None or got >= (number + 1) * (HEADER_SIZE + 10_000),
            "bytes_received to count every byte received since the lane opened, or to be None", got,
        )  # fmt: skip
    for earlier, later in pairwise(taken):
        for one, two in zip(earlier, later, strict=True):
            for name in _COUNTERS:
                was, now = getattr(one, name), getattr(two, name)
                t.check(
                    was is None or (now is not None and now >= was),
                    f"{name} to be a total that never falls", f"{now} after {was}",
                )  # fmt: skip


def _stats_inside(t: LaneTrial) -> None:
    near, far = t.pair()
    t.within(near, far)

    def counted(lane: Lane, name: str) -> bool:
        value = getattr(t.stats(lane), name)
        return value is None or value > HEADER_SIZE

    for lane, name in ((near, "bytes_acknowledged"), (far, "bytes_received")):
        t.wait(
            lambda lane=lane, name=name: counted(lane, name),  # type: ignore[misc]
            f"{name} to count what has moved of a frame, or to be None",
            lambda lane=lane, name=name: getattr(lane.path_stats(), name),  # type: ignore[misc]
        )


def _stats_unknown(t: LaneTrial) -> None:
    near, far = t.pair()
    for round_ in range(2):
        for lane in (near, far):
            stats = t.stats(lane)
            for name in _NEVER_ZERO:
                value = getattr(stats, name)
                t.check(
                    value is None or (value > 0 and math.isfinite(value)),
                    f"{name} to be None while it is unknown", repr(value),
                )  # fmt: skip
        if not round_:
            t.carry(near, far, (header(2600), bytes(10_000)))


def _stats_busy(t: LaneTrial) -> None:
    near, far = t.pair()
    t.within(near, far)
    t.wait(
        lambda: not t.stats(near).bytes_waiting,
        "bytes_waiting to leave out what a peer that does not read has no room for, or to be None",
        lambda: near.path_stats().bytes_waiting,
    )


def _set_congestion(lane: Lane, algorithm: str) -> str | None:
    """What is in force then; None where the lane refuses."""
    try:
        return lane.set_congestion(algorithm)
    except UnavailableError:
        return None


def _congestion(t: LaneTrial) -> None:
    for lane in t.pair():
        own = t.stats(lane).congestion
        if own is not None:
            again = t.call("set_congestion", _set_congestion, lane, own)
            t.check(again == own, f"{own!r}, which is in force, to be taken and read back", repr(again))
        taken = t.call("set_congestion", _set_congestion, lane, _NO_CONGESTION)
        t.check(taken is None, "UnavailableError for a congestion control that no system has", repr(taken))
        now = t.stats(lane).congestion
        t.check(now == own, f"{own!r} to stay in force after another was refused", repr(now))


# ---- pacing ---------------------------------------------------------------------------------------


def _pace_taken(t: LaneTrial) -> None:
    near, far = t.pair()
    taken = {rate: t.takes_pace(near, rate) for rate in _RATES}
    t.check(len(set(taken.values())) == 1, "one answer to every rate: it is taken, or UnavailableError", taken)
    got = t.carry(near, far, (header(2700), b"abc"))
    t.check(got == [(header(2700), b"abc")], "frames to pass as before", got)


def _pace_holds(t: LaneTrial) -> None:
    near, far = t.pair()
    t.pace(near, None)
    pieces = [(header(2800 + number), bytes(_PIECE)) for number in range(_AHEAD // _PIECE)]
    t.carry(near, far, *pieces, *pieces)  # what a new connection may send at once has gone
    t.pace(near, _FIRST_PACE)
    began = time.monotonic()
    sending = t.sending(near, *pieces, *pieces, *pieces)
    for _ in pieces:
        t.receive(far, _PIECE)
    t.pace(near, _SECOND_PACE)
    changed = time.monotonic()
    for _ in range(2 * len(pieces)):
        t.receive(far, _PIECE)
    ended = time.monotonic()
    t.returns(sending)
    most = _AHEAD + _FIRST_PACE * (changed - began) + _SECOND_PACE * (ended - changed)
    t.check(
        3 * _AHEAD <= most,
        f"at most {_FIRST_PACE} bytes/s for {changed - began:.3f} s, then {_SECOND_PACE} for {ended - changed:.3f} s,"
        f" and {_AHEAD} bytes ahead of that",
        f"{3 * _AHEAD} bytes",
    )


def _pace_lifted(t: LaneTrial) -> None:
    near, far = t.pair()
    t.pace(near, _SLOW_PACE)
    sending = t.sending(near, (header(2900), bytes(_LARGE)))
    receiving = t.receiving(far, _LARGE)
    sending.ended(SETTLE_S)
    t.pace(near, None)
    t.returns(receiving)
    t.returns(sending)


def _pacing_blocks(t: LaneTrial) -> None:
    near, far = t.pair()
    t.within(near, far)
    for number in range(10):
        t.takes_pace(near, None if number % 2 else 1e9)
        t.call("limit_unsent, while a thread sends,", near.limit_unsent, 64 << 10)
        t.flow(near)


def _pace_closed(t: LaneTrial) -> None:
    for end in ("close", "abort"):
        near, _far = t.pair()
        t.pace(near, None)
        t.call(end, getattr(near, end))
        for rate in (1e6, None):
            t.raises(t.begin("set_pacing", near.set_pacing, rate), ClosedError)


def _unsent(t: LaneTrial) -> None:
    for end in ("close", "abort"):
        near, far = t.pair()
        for nbytes in (1 << 40, 64 << 10, 1):
            t.call("limit_unsent", near.limit_unsent, nbytes)
            got = t.carry(near, far, (header(3500), pattern(100_000)))
            t.check(got == [(header(3500), pattern(100_000))], "frames to pass as before", "others")
        t.call(end, getattr(near, end))
        for lane in (near, far):
            t.call(f"limit_unsent after {end}", lane.limit_unsent, 64 << 10)


# ---- how the sending half stands --------------------------------------------------------------------


def _flow_raises(t: LaneTrial) -> None:
    for end in ("close", "abort"):
        near, far = t.pair()
        t.flow(near)
        t.carry(near, far, (header(3600), b"abc"))
        t.flow(near)
        t.call(end, getattr(near, end))
        t.flow(near)
        t.flow(far)


def _flow_totals(t: LaneTrial) -> None:
    near, far = t.pair()
    taken = [t.known_flow(near)]
    for number in range(1, 4):
        t.carry(near, far, (header(3700 + number), bytes(10_000)))
        least = number * (HEADER_SIZE + 10_000)
        t.wait(
            lambda least=least: t.known_flow(near).delivered >= least,  # type: ignore[misc]
            f"delivered to reach the {least} bytes that the peer has received", lambda: near.flow_sample(),
        )  # fmt: skip
        taken.append(t.known_flow(near))
    for earlier, later in pairwise(taken):
        for name in _TOTALS:
            was, now = getattr(earlier, name), getattr(later, name)
            # what is counted in segments may become less with them
            holds = now >= was or later.mss < earlier.mss
            t.check(holds, f"{name} to be a total that never falls", f"{now} after {was}")
    for sample in taken:
        most = sample.sent + 2 * sample.mss  # opening and closing a connection are acknowledged as well
        t.check(sample.delivered <= most, "no more to be delivered than was sent, but for two segments", sample)


def _flow_settles(t: LaneTrial) -> None:
    near, far = t.pair()
    t.known_flow(near)
    frame = t.within(near, far)

    def under_way() -> int:
        sample = t.known_flow(near)
        return sample.in_flight + sample.unsent

    t.wait(under_way, "in_flight or unsent to tell of a frame that is being sent", lambda: near.flow_sample())
    frame.go_on()
    t.returns(frame.receiving)
    t.returns(frame.sending)
    t.wait(
        lambda: not under_way(), "in_flight and unsent to be 0 once all has arrived", lambda: near.flow_sample()
    )


def _flow_plausible(t: LaneTrial) -> None:
    began = time.monotonic()
    near, far = t.pair()
    samples: list[FlowSample] = []

    def look() -> None:
        sample = t.known_flow(near)
        samples.append(sample)
        for name in _SIZES_OF_FLOWS:
            value = getattr(sample, name)
            least = name in ("window", "mss")
            t.check(isinstance(value, int) and value >= least, f"{name} to be whole bytes, {least:d} at least", sample)
        t.check(0 < sample.min_rtt_s <= sample.rtt_s, "a shortest round trip above 0, and none below it", sample)
        lives_s = time.monotonic() - began
        t.check(sample.rtt_s <= lives_s, f"no round trip longer than the {lives_s:.6f} s that the lane lives", sample)

    look()
    for number in range(3):
        t.carry(near, far, (header(3800 + number), bytes(100_000)))
        look()


def _described(lane: Lane) -> object:
    return lane.description


def _description(t: LaneTrial) -> None:
    for end in ("close", "abort"):
        lanes = t.pair()
        for finish in (getattr(lanes[0], end), lambda: None):
            for lane in lanes:
                said = t.call("description", _described, lane)
                t.check(isinstance(said, str) and said.strip(), "description to name the two ends", repr(said))
            t.call(end, finish)


LANE_RULES: Final[tuple[Rule[LaneTrial], ...]] = (
    Rule("frames-stay-whole", "a payload of any size arrives with every byte it was sent with", _whole),
    Rule("frames-stay-in-order", "frames arrive in the order in which they were sent", _in_order),
    Rule("empty-payload", "a frame without a payload arrives as others do, and the next one too", _empty),
    Rule("large-payload", "a payload larger than any buffer on the way arrives whole", _large),
    Rule("header-is-exact", "place sees and recv_frame returns the header as it was sent, whatever is in it",
         _header_exact),
    Rule("one-place-per-frame", "place is asked once for each frame, also for an empty one", _one_place),
    Rule("payload-lands-in-place", "the payload fills the view that place gave; nothing else is written", _in_place),
    Rule("place-exception-passes-through", "what place raises leaves recv_frame unchanged", _place_raises),
    Rule("full-duplex", "both directions move at once, also when both senders are ahead of their readers", _duplex),
    Rule("payload-is-free-after-send", "the sender's buffer may be used again once send_frame has returned",
         _payload_free),
    Rule("payload-is-only-read", "send_frame leaves the sender's buffer as it was", _payload_kept),
    Rule("send-blocks-when-full", "while nobody reads, send_frame blocks; nothing is lost when it goes on", _blocks),
    Rule("write-timeout", "a send that makes no progress for write_s raises BrokenError", _write_timeout),
    Rule("slow-send-is-no-timeout", "a frame may take longer than write_s as long as it moves", _slow_send),
    Rule("read-timeout-inside-a-frame", "a pause of read_s inside a frame raises BrokenError", _read_timeout),
    Rule("slow-receive-is-no-timeout", "a frame may take longer than read_s as long as it moves", _slow_receive),
    Rule("idle-is-not-an-error", "between frames a lane may be silent for ever", _idle),
    Rule("abort-wakes-sender", "a thread blocked in send_frame gets ClosedError when this side aborts", _abort_sender),
    Rule("abort-wakes-receiver", "a thread in recv_frame gets ClosedError when this side aborts", _abort_receiver),
    Rule("abort-never-blocks", "abort returns while other threads are inside the lane", _abort_returns),
    Rule("abort-idempotent", "abort may be called again, after close, and by several threads at once", _abort_again),
    Rule("abort-is-no-clean-end", "the peer of an abort gets BrokenError, never None", _abort_is_no_end),
    Rule("cut-inside-a-frame-is-broken", "a lane that is cut inside a frame raises BrokenError at the receiver",
         _cut_inside),
    Rule("end-inside-a-frame-is-broken", "a peer that closes inside a frame is broken, not finished", _end_inside),
    Rule("gone-peer-is-broken", "a thread blocked in send_frame gets BrokenError when the peer aborts", _gone_peer),
    Rule("close-flushes", "what was sent before close reaches the peer", _close_flushes),
    Rule("close-flushes-over-unread", "so it does when frames of the peer lie there unread", _close_over_unread),
    Rule("close-idempotent", "close may be called again, and after abort", _close_again),
    Rule("close-never-blocks", "close returns while other threads are inside the lane", _close_returns),
    Rule("close-wakes-receiver", "a thread blocked in recv_frame gets ClosedError when this side closes",
         _close_receiver),
    Rule("clean-end-is-none", "when the peer has closed between frames, recv_frame returns None", _clean_end),
    Rule("closed-after-own-end", "after close or abort, send_frame and recv_frame raise ClosedError", _closed),
    Rule("with-closes-or-aborts", "a with block closes the lane, or aborts it when it ends by an exception", _with),
    Rule("nothing-outlives-a-lane", "no thread and no descriptor of a lane is left after both ends", _nothing_left),
    Rule("span-stays-whole", "a span of a file arrives as the bytes that the file has there", _span_whole),
    Rule("short-file-keeps-the-frame", "a file too short for its span is made up from span.read; frames stay whole",
         _span_short),
    Rule("file-is-only-read", "send_span leaves a file's bytes and position as they were", _span_file),
    Rule("abort-wakes-span-sender", "a thread blocked in send_span gets ClosedError when this side aborts",
         _span_abort),
    Rule("span-write-timeout", "a span that makes no progress for write_s raises BrokenError", _span_timeout),
    Rule("stats-never-raise", "path_stats returns PathStats at any time, also after the end", _stats_raise),
    Rule("stats-from-any-thread", "path_stats returns while other threads are inside the lane", _stats_any_thread),
    Rule("stats-are-totals", "counters count since the lane opened and never fall", _stats_totals),
    Rule("stats-count-inside-a-frame", "byte counters tell progress inside a frame", _stats_inside),
    Rule("stats-unknown-is-none", "what is not known is None and not zero", _stats_unknown),
    Rule("stats-busy-is-not-dead", "bytes_waiting leaves out what the peer has no room for", _stats_busy),
    Rule("congestion-reads-back", "set_congestion tells what is in force; what is refused leaves that alone",
         _congestion),
    Rule("pace-is-taken-or-refused", "set_pacing takes any rate, or refuses each by UnavailableError", _pace_taken),
    Rule("pace-holds", "no more is sent than the pace allows, also when it changes meanwhile", _pace_holds),
    Rule("no-pace-is-no-limit", "set_pacing(None) lifts the pace at once, also of a frame that is being sent",
         _pace_lifted),
    Rule("pacing-never-blocks", "set_pacing, limit_unsent and flow_sample return while other threads are inside"
         " the lane", _pacing_blocks),
    Rule("closed-is-not-paced", "after close or abort, set_pacing raises ClosedError", _pace_closed),
    Rule("unsent-is-a-wish", "limit_unsent never raises, and frames pass whatever it asks for", _unsent),
    Rule("flow-never-raises", "flow_sample returns FlowSample or None at any time, also after the end", _flow_raises),
    Rule("flow-counts-totals", "delivered, sent and lost are totals in bytes, and what is delivered was sent",
         _flow_totals),
    Rule("flow-settles", "what is being sent is in flight or unsent, and neither once all has arrived",
         _flow_settles),
    Rule("flow-is-plausible", "sizes are whole bytes, and no round trip is longer than the lane lives",
         _flow_plausible),
    Rule("description-is-there", "description is text, also after the end", _description),
)  # fmt: skip
"""In the order in which they are tried: what others rest on comes first."""
