"""One direction of a link: buffer, rate, loss, delay. Pure: packets and times go in, packets and times come out.

The order is that of a bottleneck followed by a long way: a packet that finds no room in the buffer is dropped; one
that is sent occupies the link, whether it is lost afterwards or not; what is not lost arrives after the delay.
Times are nanoseconds of one clock.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .packets import HEADER, SuperPacket, parse, piece

QUANTUM_NS: Final = 200_000
"""Segments of one super-packet that are sent within this time arrive together, when the last of them is due.

On long ways within a hundredth of the delay, up to `LONGEST_QUANTUM_NS`: network cards do the like with interrupts, and
it halves what 100 Mbit/s cost at 100 ms.
"""

LONGEST_QUANTUM_NS: Final = 1_000_000


class Entry(NamedTuple):
    """A packet on its way: when it is due, when its last byte is (to be) sent, of how many segments and bytes it is.

    ``cut``: these segments of a super-packet only. The packet is made when it is due, so that one of many
    segments that comes in at once does not make others late.
    """

    due: int
    sent: int
    segments: int
    size: int
    raw: bytes
    cut: tuple[SuperPacket, int, int] | None

    def parts(self) -> tuple[bytes | memoryview, ...]:
        """The bytes to deliver, virtio_net_hdr first."""
        return (self.raw,) if self.cut is None else piece(*self.cut)


class Pipe:
    """One direction; `offer` puts a packet into ``queue``, in the order of ``due``, unless it is dropped or lost.

    ``values``: rate in bytes/s or None, delay and jitter in seconds, loss 0 to 1, burst in packets or None, buffer in
    bytes. The same seed and the same packets at the same times give the same fates.
    """

    def __init__(self, values: Mapping[str, Any], seed: str) -> None:
        self.queue: deque[Entry] = deque()
        self.packets = self.bytes = 0
        self.dropped_by_queue = self.dropped_by_loss = 0
        self.delivered_packets = self.delivered_bytes = 0
        self._random = random.Random(seed)
        self._free = 0.0  # when all that was let in will have been sent
        self._last = 0  # nothing overtakes
        self._ns_per_byte = 0.0
        self._delay = 0
        self._sweep = _Sweep(self._random)
        self._loss: tuple[float, float | None] = 0.0, None
        self._losses: Losses | None = None
        self.set(values, 0)

    def set(self, values: Mapping[str, Any], now: int) -> None:
        """Change to other values now; what waits in the buffer is sent at the new rate, what was sent travels on."""
        before, delay_before = self._ns_per_byte, self._delay
        self._ns_per_byte = 1e9 / values["rate"] if values["rate"] is not None else 0.0
        self._delay = round(values["delay"] * 1e9)
        self._quantum = min(max(QUANTUM_NS, self._delay // 100), LONGEST_QUANTUM_NS)
        self._buffer: float = values["buffer"]
        self._sweep.amplitude = values["jitter"] * 1e9
        loss = values["loss"], values["burst"]
        if loss != self._loss:
            self._loss = loss
            self._losses = Losses(*loss, self._random) if loss[0] else None
        if self._free > now and before:
            ratio = self._ns_per_byte / before
            kept = [entry for entry in self.queue if entry.sent <= now]
            self._last = kept[-1].due if kept else 0
            for entry in self.queue:
                if entry.sent > now:
                    sent = now + int((entry.sent - now) * ratio)
                    due = max(self._last, sent + self._delay + entry.due - entry.sent - delay_before)
                    self._last = due
                    kept.append(entry._replace(due=due, sent=sent))
            self.queue = deque(kept)
            self._free = now + (self._free - now) * ratio

    def offer(self, now: int, raw: bytes) -> None:
        """A packet arrives: a virtio_net_hdr, then IP."""
        if raw[1]:
            self._offer_super(now, raw)
            return
        size = len(raw) - HEADER.size
        self.packets += 1
        self.bytes += size
        sent = float(now)
        if self._ns_per_byte:
            start = self._free if self._free > now else now
            if (start - now) / self._ns_per_byte + size > self._buffer:
                self.dropped_by_queue += 1
                return
            sent = self._free = start + size * self._ns_per_byte
        if self._losses is not None and self._losses.lost():
            self.dropped_by_loss += 1
            return
        self._put(sent, 1, size, raw, None)

    def _offer_super(self, now: int, raw: bytes) -> None:
        whole = parse(raw)
        segment, count, per_byte = whole.segment, whole.count, self._ns_per_byte
        self.packets += count
        self.bytes += whole.total
        start = self._free if self._free > now and per_byte else float(now)
        together = count
        if per_byte:
            room = self._buffer - (start - now) / per_byte
            if whole.total > room:
                # A last segment that is shorter, and would fit, goes the way of those before it.
                count = max(0, min(count - 1, int(room // segment)))
                self.dropped_by_queue += whole.count - count
                if not count:
                    return
            self._free = start + (whole.total if count == whole.count else count * segment) * per_byte
            together = max(1, int(self._quantum / (segment * per_byte)))
        if self._losses is None:
            runs = [(0, count)]
        else:
            runs = self._losses.runs(count)
            self.dropped_by_loss += count - sum(end - first for first, end in runs)
        for run, stop in runs:
            for first in range(run, stop, together):
                end = min(first + together, stop)
                done = whole.total if end == whole.count else end * segment
                cut = None if end - first == whole.count else (whole, first, end)
                self._put(start + done * per_byte, end - first, done - first * segment, raw, cut)

    def _put(
        self, sent: float, segments: int, size: int, raw: bytes, cut: tuple[SuperPacket, int, int] | None
    ) -> None:
        due = int(sent) + self._delay
        if self._sweep.amplitude:
            due += self._sweep.at(sent)
        if due < self._last:
            due = self._last
        self._last = due
        self.queue.append(Entry(due, int(sent), segments, size, raw, cut))


class Losses:
    """Which packets are lost. Drawn as lengths of runs, so that a super-packet costs as little as a packet.

    Bernoulli without ``burst``. With it Gilbert-Elliott: bad states last ``burst`` packets in the mean and lose
    all, good ones lose none and last as long as makes the mean loss ``loss``; both lengths are geometric.
    """

    def __init__(self, loss: float, burst: float | None, random: random.Random) -> None:
        self._random = random.random
        self._pass = self._lose = 0
        self._ends = None if burst is None else 1 / burst
        self._begins = loss if burst is None else loss / (burst * (1 - loss)) if loss < 1 else 1.0
        self._all = loss >= 1

    def lost(self) -> bool:
        """Whether the next packet is."""
        while not self._pass:
            if self._lose:
                self._lose -= 1
                return True
            self._draw()
        self._pass -= 1
        return False

    def runs(self, count: int) -> list[tuple[int, int]]:
        """Which of the next ``count`` packets pass: (first, end) of each run of them."""
        passing = []
        at = 0
        while at < count:
            if self._pass:
                step = min(self._pass, count - at)
                self._pass -= step
                passing.append((at, at + step))
            elif self._lose:
                step = min(self._lose, count - at)
                self._lose -= step
            else:
                self._draw()
                continue
            at += step
        return passing

    def _draw(self) -> None:
        if self._all:
            self._lose = 1 << 60
        elif self._ends is None:
            self._pass, self._lose = self._geometric(self._begins), 1
        else:
            self._pass, self._lose = 1 + self._geometric(self._begins), 1 + self._geometric(self._ends)

    def _geometric(self, probability: float) -> int:
        """How often something of this probability fails to happen before it does."""
        return 0 if probability >= 1 else int(math.log(1 - self._random()) / math.log1p(-probability))


class _Sweep:
    """Jitter: grows evenly from 0 to ``amplitude`` and shrinks back, each taking 2 to 6 times the amplitude.

    It shrinks by half of the time that passes at most: two packets never change places.
    """

    def __init__(self, random: random.Random) -> None:
        self.amplitude = 0.0
        self._random = random.random
        self._start = self._end = 0.0
        self._rising = False

    def at(self, time: float) -> int:
        """The extra delay of what is sent at ``time``."""
        if not self._start <= time < self._end + 100 * self.amplitude:  # after a pause: anywhere in a sweep
            self._rising = self._random() < 0.5
            length = self._length()
            self._start = time - self._random() * length
            self._end = self._start + length
        while time >= self._end:
            self._rising = not self._rising
            self._start, self._end = self._end, self._end + self._length()
        part = (time - self._start) / (self._end - self._start)
        return int(self.amplitude * (part if self._rising else 1 - part))

    def _length(self) -> float:
        return self.amplitude * (2 + 4 * self._random())
