"""One broken lane for each rule of lanes: the lane in memory, with one fault that some author might leave in."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from amst_core.errors import BrokenError, ClosedError
from amst_core.interfaces import FileSpan, FlowSample, LaneTimeouts, PathStats, Placer
from amst_core.testing.memory import CAPACITY, ByteQueue, MemoryLane

HANG_S = 4.0
"""How long a lane that hangs does so: longer than the mutants' patience, and not for ever."""

MUTANTS: dict[str, type[MemoryLane]] = {}


def breaks(rule: str) -> Any:
    def add(lane: type[MemoryLane]) -> type[MemoryLane]:
        assert rule not in MUTANTS
        MUTANTS[rule] = lane
        return lane

    return add


def make_pair(lane: type[MemoryLane], timeouts: LaneTimeouts) -> tuple[MemoryLane, MemoryLane]:
    there, back = ByteQueue(CAPACITY), ByteQueue(CAPACITY)
    return lane(there, back, timeouts, "near"), lane(back, there, timeouts, "far")


class BusyLane(MemoryLane):
    """Knows what its threads are doing."""

    is_sending = False
    in_place = False
    frames = 0

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self.is_sending = True
        try:
            super().send_frame(header, payload)
        finally:
            self.is_sending = False
        self.frames += 1

    def recv_frame(self, place: Placer) -> bytes | None:
        def placing(head: memoryview) -> memoryview:
            self.in_place = True
            try:
                return place(head)
            finally:
                self.in_place = False

        return super().recv_frame(placing)

    def wait_for_both(self) -> None:
        until = time.monotonic() + HANG_S
        while self.is_sending and self.in_place and time.monotonic() < until:
            time.sleep(0.01)


# ---- frames ---------------------------------------------------------------------------------------


def damaged(payload: memoryview) -> memoryview:
    copy = bytearray(payload)
    copy[-1] ^= 1
    return memoryview(copy)


@breaks("frames-stay-whole")
class OneSizeDamaged(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        super().send_frame(header, damaged(payload) if payload.nbytes == 33 else payload)


@breaks("frames-stay-in-order")
class SmallOvertaken(MemoryLane):
    """Every tenth small frame waits for the next one, which goes first."""

    small = 0
    waiting: tuple[bytes, memoryview] | None = None

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self.small += payload.nbytes <= 16
        if self.small == 10 and self.waiting is None:
            self.waiting = header, memoryview(bytes(payload))
            return
        super().send_frame(header, payload)
        if self.waiting is not None:
            super().send_frame(*self.waiting)
            self.waiting, self.small = None, 0


@breaks("empty-payload")
class EmptyAfterOthersLost(MemoryLane):
    sent = 0

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        if payload.nbytes or not self.sent:
            super().send_frame(header, payload)
        self.sent += payload.nbytes


@breaks("large-payload")
class LargeDamaged(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        super().send_frame(header, damaged(payload) if payload.nbytes > 4 << 20 else payload)


@breaks("header-is-exact")
class SevenBitHeader(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        super().send_frame(bytes([header[0] & 0x7F]) + header[1:], payload)


@breaks("one-place-per-frame")
class AsksTwice(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        def twice(head: memoryview) -> memoryview:
            view = place(head)
            return place(head) if view.nbytes > 64 << 10 else view

        return super().recv_frame(twice)


@breaks("payload-lands-in-place")
class WritesBesideThePlace(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        def careless(head: memoryview) -> memoryview:
            view = place(head)
            around = memoryview(view.obj)  # type: ignore[arg-type]
            if around.nbytes > view.nbytes:
                around[0] = 0
            return view

        return super().recv_frame(careless)


@breaks("place-exception-passes-through")
class WrapsWhatPlaceRaises(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        try:
            return super().recv_frame(place)
        except LookupError as err:
            raise BrokenError("no place for it") from err


@breaks("full-duplex")
class OneDirectionAtATime(MemoryLane):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turn = threading.Lock()

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        with self.turn:
            super().send_frame(header, payload)

    def recv_frame(self, place: Placer) -> bytes | None:
        taken = False

        def placing(head: memoryview) -> memoryview:
            nonlocal taken
            view = place(head)
            taken = self.turn.acquire(timeout=HANG_S)
            return view

        try:
            return super().recv_frame(placing)
        finally:
            if taken:
                self.turn.release()


@breaks("payload-is-free-after-send")
class SendsLater(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        if payload.nbytes == 512:
            threading.Timer(0.02, super().send_frame, (header, payload)).start()
        else:
            super().send_frame(header, payload)


@breaks("payload-is-only-read")
class MasksThePayload(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        super().send_frame(header, payload)
        if not payload.readonly and payload.nbytes > 1024:
            payload[0] ^= 0xFF


# ---- a full path and its limits -------------------------------------------------------------------


@breaks("send-blocks-when-full")
class QueuesSmallFramesWithoutEnd(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self._outgoing.capacity = 1 << 30 if payload.nbytes <= 16 << 10 else CAPACITY
        super().send_frame(header, payload)


@breaks("write-timeout")
class SendsForEver(MemoryLane):
    is_patient = True

    def send_span(self, header: bytes, span: FileSpan) -> None:
        self.is_patient = False
        super().send_span(header, span)

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        if self.is_patient:
            self._timeouts = replace(self._timeouts, write_s=3600.0)
        super().send_frame(header, payload)


@breaks("slow-send-is-no-timeout")
class TimesTheWholeFrame(MemoryLane):
    began = 0.0

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self.began = time.monotonic()
        super().send_frame(header, payload)

    def write(self, parts: Sequence[memoryview]) -> int:
        done = super().write(parts)
        if self.began and time.monotonic() - self.began > self._timeouts.write_s:
            raise BrokenError("the frame took too long")
        return done


@breaks("read-timeout-inside-a-frame")
class WaitsForEver(MemoryLane):
    def __init__(self, out: ByteQueue, back: ByteQueue, timeouts: LaneTimeouts, name: str) -> None:
        super().__init__(out, back, replace(timeouts, read_s=3600.0), name)


@breaks("slow-receive-is-no-timeout")
class TimesTheWholePayload(MemoryLane):
    began = 0.0

    def recv_frame(self, place: Placer) -> bytes | None:
        def placing(head: memoryview) -> memoryview:
            self.began = time.monotonic()
            return place(head)

        return super().recv_frame(placing)

    def read_into(self, view: memoryview, *, idle: bool) -> int:
        got = super().read_into(view, idle=idle)
        if self.began and time.monotonic() - self.began > self._timeouts.read_s:
            raise BrokenError("the frame took too long")
        return got


@breaks("idle-is-not-an-error")
class TiresOfWaiting(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        until = time.monotonic() + self._timeouts.read_s
        while not (self._incoming.waiting or self._incoming.ended):
            if time.monotonic() > until:
                raise BrokenError("nothing arrived")
            time.sleep(0.001)
        return super().recv_frame(place)


# ---- the end of a lane ----------------------------------------------------------------------------


@breaks("abort-wakes-sender")
class SenderSleepsOn(MemoryLane):
    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            return super().write(parts)
        except ClosedError:
            time.sleep(HANG_S)
            raise


@breaks("abort-wakes-receiver")
class ReceiverSleepsOn(MemoryLane):
    def read_into(self, view: memoryview, *, idle: bool) -> int:
        was_open = not self._closed
        try:
            return super().read_into(view, idle=idle)
        except ClosedError:
            if was_open and not idle:
                time.sleep(HANG_S)
            raise


@breaks("abort-never-blocks")
class AbortWaits(BusyLane):
    def abort(self) -> None:
        self.wait_for_both()
        super().abort()


@breaks("abort-idempotent")
class AbortsOnce(MemoryLane):
    aborted = False

    def abort(self) -> None:
        if self.aborted:
            raise OSError("already aborted")
        self.aborted = True
        super().abort()


@breaks("abort-is-no-clean-end")
class AbortLooksLikeClose(BusyLane):
    def abort(self) -> None:
        if self.frames and not self.is_sending:
            super().close()
        else:
            super().abort()


@breaks("cut-inside-a-frame-is-broken")
class CutLooksLikeAnEnd(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        asked = []

        def placing(head: memoryview) -> memoryview:
            asked.append(1)
            return place(head)

        try:
            return super().recv_frame(placing)
        except BrokenError as err:
            if asked and "dropped" in str(err):
                return None
            raise


@breaks("end-inside-a-frame-is-broken")
class HalfAFrameLooksLikeAnEnd(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        try:
            return super().recv_frame(place)
        except BrokenError as err:
            if "inside a frame" in str(err) and "closed" in str(err):
                return None
            raise


@breaks("gone-peer-is-broken")
class BlamesItself(MemoryLane):
    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            return super().write(parts)
        except BrokenError as err:
            raise ClosedError(str(err)) if "gone" in str(err) else err from None


@breaks("close-flushes")
class CloseDrops(MemoryLane):
    def close(self) -> None:
        if self._outgoing.waiting > 1024 and not self._incoming.waiting:
            self._outgoing.cut()
        super().close()


@breaks("close-flushes-over-unread")
class CloseResetsOverUnread(MemoryLane):
    def close(self) -> None:
        if self._incoming.waiting:
            self._outgoing.cut()
        super().close()


@breaks("close-idempotent")
class ClosesOnce(MemoryLane):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise OSError("already closed")
        self.closed = True
        super().close()


@breaks("close-never-blocks")
class CloseWaits(BusyLane):
    def close(self) -> None:
        self.wait_for_both()
        super().close()


@breaks("close-wakes-receiver")
class CloseForgetsItsReceiver(MemoryLane):
    def close(self) -> None:
        self._closed = True
        self._outgoing.finish()


@breaks("clean-end-is-none")
class EndIsAnError(MemoryLane):
    def recv_frame(self, place: Placer) -> bytes | None:
        head = super().recv_frame(place)
        if head is None:
            raise BrokenError("the peer has gone")
        return head


@breaks("closed-after-own-end")
class BrokenAfterOwnEnd(MemoryLane):
    def send_frame(self, header: bytes, payload: memoryview) -> None:
        if self._closed:
            raise BrokenError("bad file descriptor")
        super().send_frame(header, payload)


@breaks("with-closes-or-aborts")
class AlwaysCloses(MemoryLane):
    def __exit__(self, *_: object) -> None:
        self.close()


@breaks("nothing-outlives-a-lane")
class KeepsADescriptor(MemoryLane):
    kept: list[int] = []  # noqa: RUF012  (the test closes them)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept.append(os.open("/dev/null", os.O_RDONLY))


# ---- spans of files --------------------------------------------------------------------------------


@breaks("span-stays-whole")
class BeginsAtABlock(MemoryLane):
    def send_span(self, header: bytes, span: FileSpan) -> None:
        super().send_span(header, replace(span, offset=span.offset & ~31))


@breaks("short-file-keeps-the-frame")
class StopsWhereTheFileDoes(MemoryLane):
    def send_span(self, header: bytes, span: FileSpan) -> None:
        there = max(0, os.fstat(span.fd).st_size - span.offset)
        super().send_span(header, replace(span, nbytes=min(there, span.nbytes)))


@breaks("file-is-only-read")
class MovesThePosition(MemoryLane):
    def send_span(self, header: bytes, span: FileSpan) -> None:
        super().send_span(header, span)
        os.lseek(span.fd, span.offset + span.nbytes, os.SEEK_SET)


@breaks("abort-wakes-span-sender")
class SpanSenderSleepsOn(MemoryLane):
    def send_span(self, header: bytes, span: FileSpan) -> None:
        try:
            super().send_span(header, span)
        except ClosedError:
            time.sleep(HANG_S)
            raise


@breaks("span-write-timeout")
class SendsSpansForEver(MemoryLane):
    def send_span(self, header: bytes, span: FileSpan) -> None:
        self._timeouts = replace(self._timeouts, write_s=3600.0)
        super().send_span(header, span)


# ---- statistics -----------------------------------------------------------------------------------


@breaks("stats-never-raise")
class StatsOfTheLivingOnly(MemoryLane):
    def path_stats(self) -> PathStats:
        if self._closed:
            raise OSError("bad file descriptor")
        return super().path_stats()


@breaks("stats-from-any-thread")
class StatsTakeTheSendersLock(BusyLane):
    asked = 0

    def path_stats(self) -> PathStats:
        self.asked += 1
        until = time.monotonic() + HANG_S
        while self.asked % 8 == 0 and self.is_sending and time.monotonic() < until:
            time.sleep(0.01)
        return super().path_stats()


@breaks("stats-are-totals")
class CountsSinceTheLastCall(MemoryLane):
    told = 0

    def path_stats(self) -> PathStats:
        stats = super().path_stats()
        assert stats.bytes_received is not None
        self.told, since = stats.bytes_received, stats.bytes_received - self.told
        return replace(stats, bytes_received=since)


@breaks("stats-count-inside-a-frame")
class CountsWholeFrames(MemoryLane):
    sent = 0

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        super().send_frame(header, payload)
        self.sent += len(header) + payload.nbytes

    def path_stats(self) -> PathStats:
        return replace(super().path_stats(), bytes_acknowledged=self.sent)


@breaks("stats-unknown-is-none")
class ZeroRoundTrip(MemoryLane):
    def path_stats(self) -> PathStats:
        return replace(super().path_stats(), rtt_s=0.0)


@breaks("stats-busy-is-not-dead")
class CountsWhatThePeerHasNotRead(MemoryLane):
    def path_stats(self) -> PathStats:
        return replace(super().path_stats(), bytes_waiting=self._outgoing.waiting)


@breaks("congestion-reads-back")
class TakesAnyCongestion(MemoryLane):
    def set_congestion(self, algorithm: str) -> str:
        return algorithm


# ---- pacing ---------------------------------------------------------------------------------------


@breaks("pace-is-taken-or-refused")
class PacesInThirtyTwoBits(MemoryLane):
    def set_pacing(self, rate: float | None) -> None:
        super().set_pacing(None if rate is None else struct.unpack("=I", struct.pack("=I", int(rate)))[0])


@breaks("pace-holds")
class TakesBitsForBytes(MemoryLane):
    def set_pacing(self, rate: float | None) -> None:
        super().set_pacing(None if rate is None else 8 * rate)


@breaks("no-pace-is-no-limit")
class NoneIsNoNews(MemoryLane):
    def set_pacing(self, rate: float | None) -> None:
        if rate is not None or self._closed:
            super().set_pacing(rate)


@breaks("pacing-never-blocks")
class PacingTakesTheSendersLock(BusyLane):
    asked = 0

    def set_pacing(self, rate: float | None) -> None:
        self.asked += 1
        until = time.monotonic() + HANG_S
        while self.asked % 8 == 0 and self.is_sending and time.monotonic() < until:
            time.sleep(0.01)
        super().set_pacing(rate)


@breaks("closed-is-not-paced")
class PacesTheClosed(MemoryLane):
    def set_pacing(self, rate: float | None) -> None:
        if not self._closed:
            super().set_pacing(rate)


@breaks("unsent-is-a-wish")
class LimitsTheLivingOnly(MemoryLane):
    def limit_unsent(self, nbytes: int) -> None:
        self._check_open()


# ---- how the sending half stands --------------------------------------------------------------------


@breaks("flow-never-raises")
class FlowOfTheLivingOnly(MemoryLane):
    def flow_sample(self) -> FlowSample | None:
        self._check_open()
        return super().flow_sample()


class OtherFlow(MemoryLane):
    """Tells something else than the truth."""

    def told(self, sample: FlowSample) -> FlowSample:
        raise NotImplementedError

    def flow_sample(self) -> FlowSample | None:
        sample = super().flow_sample()
        return None if sample is None else self.told(sample)


@breaks("flow-counts-totals")
class FlowSinceTheLastSample(OtherFlow):
    before = 0

    def told(self, sample: FlowSample) -> FlowSample:
        self.before, before = sample.delivered, self.before
        return replace(sample, delivered=sample.delivered - before)


@breaks("flow-settles")
class KeepsAHeaderInFlight(OtherFlow):
    def told(self, sample: FlowSample) -> FlowSample:
        return replace(sample, in_flight=sample.in_flight + 32 * (sample.sent > 0))


@breaks("flow-is-plausible")
class CountsMicroseconds(OtherFlow):
    def told(self, sample: FlowSample) -> FlowSample:
        return replace(sample, rtt_s=sample.rtt_s * 1e6, min_rtt_s=sample.min_rtt_s * 1e6)


@breaks("description-is-there")
class NobodyAfterTheEnd(MemoryLane):
    @property
    def description(self) -> str:
        return "" if self._closed else super().description
