"""One flow: a sender as a modern TCP's, driven by a congestion controller, and its receiver."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ...congestion import DeliveryRateSampler, SentPacket
from ...errors import UsageError
from ...interfaces import CongestionController
from .link import Link
from .trace import TraceRecord

if TYPE_CHECKING:
    from .simulation import Simulation

__all__ = ["Flow"]

_DUPLICATE_THRESHOLD: Final = 3
"""Packets that must have been acknowledged after one for it to be lost (RFC 6675's DupThresh)."""

_INITIAL_RTO: Final = 1.0
_MIN_RTO: Final = 0.2
_MAX_RTO: Final = 120.0
"""RFC 6298, with Linux's bounds (TCP_RTO_MIN, TCP_RTO_MAX)."""


class _Packet(SentPacket):
    """A transmission. ``departs``: when it is on the wire; ``ack_at``: when the sender hears of it.

    ``gone``: it never arrives. ``given_up``: a timeout took it for lost while it was under way.
    """

    __slots__ = ("ack_at", "departs", "given_up", "gone", "number", "sequence")

    departs: float
    ack_at: float
    gone: bool
    given_up: bool
    number: int
    sequence: int


class Flow:
    """Data on its way from one sender to one receiver; `Simulation.add_flow` makes it.

    The sender keeps to the controller's window and pacing rate (None: no pacing), and tells it of everything as
    `CongestionController` says: what one acknowledgement tells is first ``on_loss``, then ``on_ack``.

    - A packet is lost when three that left after it have been acknowledged, or one, and it should have arrived a
      quarter of the shortest round trip ago (RFC 6675's threshold, RFC 8985's timer). Retransmissions are no different,
      and go before new data.
    - When nothing is heard for a retransmission timeout (RFC 6298; at least 200 ms above the smoothed round trip,
      doubled each time), everything under way is taken for lost, ``persistent``. What arrives nevertheless is told by
      ``on_spurious_loss``, once for each timeout.

    Attributes:
        sent: bytes that left, retransmissions included; always ``delivered + duplicate + lost + in_flight``.
        delivered: bytes that arrived and were acknowledged, each counted once; ``duplicate``: those that came again.
        lost: bytes taken for lost and not heard of since.
        retransmitted: bytes of ``sent`` that were sent before.
        dropped: bytes that the queue had no room for; ``corrupted``: bytes lost on the wire.
        timeouts: how many retransmission timeouts there were; ``spurious``: how many were in vain.
        in_flight: bytes under way, as the sender sees it.
        rtt, srtt: the last round trip, and the smoothed one; None before the first.
        finished_at: when all of ``size`` was acknowledged, None until then.
        trace: what it was like at each interval since its start.
    """

    def __init__(
        self,
        simulation: Simulation,
        controller: CongestionController,
        *,
        index: int,
        mss: int,
        start: float,
        size: int | None,
        app_rate: float | None,
        extra_delay: float,
    ) -> None:
        if mss < 1:
            raise UsageError(f"flow: mss is {mss!r}; it is bytes, 1 or more")
        if size is not None and size < 1:
            raise UsageError(f"flow: size is {size!r}; it is bytes, 1 or more, or None for no end")
        if app_rate is not None and not app_rate > 0:
            raise UsageError(f"flow: app_rate is {app_rate!r}; it is bytes/s, above 0, or None for no limit")
        if not extra_delay >= 0:
            raise UsageError(f"flow: extra_delay is {extra_delay!r}; it is seconds, 0 or more")
        self.controller = controller
        self.mss = mss
        self.size = size
        self.app_rate = app_rate
        self.start = start
        self.extra_delay = extra_delay
        self.sent = 0
        self.delivered = 0
        self.duplicate = 0
        self.lost = 0
        self.retransmitted = 0
        self.dropped = 0
        self.corrupted = 0
        self.timeouts = 0
        self.spurious = 0
        self.in_flight = 0
        self.rtt: float | None = None
        self.srtt: float | None = None
        self.finished_at: float | None = None
        self.trace: list[TraceRecord] = []
        self._simulation = simulation
        self._link: Link = simulation.link
        self._index = index
        self._sampler = DeliveryRateSampler()
        self._pipe: deque[_Packet] = deque()
        """What the receiver may still get, in order; what is gone stays only until it comes to the front."""
        self._missing: deque[_Packet] = deque()
        """What is gone, and not yet known to be lost."""
        self._again: deque[tuple[int, int]] = deque()
        """(sequence, size) of what is lost and waits to be sent again."""
        self._arrived_late: set[int] = set()
        """Sequences that a given-up packet brought after all; further copies of them are duplicates."""
        self._next_sequence = 0
        self._next_number = 0
        self._acked_number = -1
        self._pace_at = 0.0
        self._rto_from = 0.0
        self._rttvar = 0.0
        self._backoff = 1
        self._undone = True
        self._patience = 0.0
        self._last_ack_at = 0.0
        self._ack_armed: float | None = None
        self._send_armed: float | None = None
        self._sending_on_time = False
        self._timer_armed: float | None = None
        self._reorder_armed: float | None = None
        self._stopped = False
        self._loss_changes = 0
        self._survive = 0
        self._gaps: Iterator[int] = iter(())
        self.restart_losses()
        simulation.schedule(start, self._begin)

    # ---- what users ask ---------------------------------------------------------------------------------------

    def goodput(self, start: float, end: float) -> float:
        """Bytes/s delivered between two times, exact where both are times of the trace, else interpolated.

        Raises:
            UsageError: the times are not in order, or the simulation has not come to ``end``.
        """
        return (self._delivered_at(end) - self._delivered_at(start)) / self._span(start, end)

    def mean_window(self, start: float, end: float) -> float:
        """The controller's window on the average of the trace between two times, in bytes.

        Raises:
            UsageError: the times are not in order, or nothing was traced between them.
        """
        self._span(start, end)
        windows = [record.cwnd for record in self.trace if start <= record.time <= end]
        if not windows:
            raise UsageError(f"flow: nothing was traced from {start:g} to {end:g} s")
        return sum(windows) / len(windows)

    def stop(self) -> None:
        """Send nothing new from now on; what is under way, and what of it is lost, still arrives."""
        self._stopped = True

    def _span(self, start: float, end: float) -> float:
        if not start < end:
            raise UsageError(f"flow: from {start:g} to {end:g} s is no span of time")
        if end > self._simulation.now:
            raise UsageError(f"flow: it is only {self._simulation.now:g} s, not {end:g} s")
        return end - start

    def _delivered_at(self, time: float) -> float:
        trace = self.trace
        if not trace or time <= trace[0].time:
            return 0.0
        low, high = 0, len(trace)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if trace[middle].time <= time else (low, middle)
        before = trace[low]
        end, delivered = self._simulation.now, self.delivered
        if high < len(trace):
            end, delivered = trace[high].time, trace[high].delivered
        if end <= before.time:
            return before.delivered
        return before.delivered + (delivered - before.delivered) * (time - before.time) / (end - before.time)

    # ---- sending ----------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        self._pace_at = now
        self._send(now)
        self._record(now)
        self._simulation.schedule(now + self._simulation.trace_interval, self._record)

    def _record(self, now: float) -> float:
        controller = self.controller
        record = TraceRecord(
            now, controller.window, self.in_flight, controller.pacing_rate, self.rtt, self.sent, self.delivered,
            self.lost, self._link.queue(now), dict(controller.state()),
        )  # fmt: skip
        self.trace.append(record)
        return self.start + len(self.trace) * self._simulation.trace_interval

    def _available(self, now: float) -> int:
        """Bytes of the next new packet, 0: the application has none."""
        size = self.mss
        if self.size is not None and self._next_sequence + size > self.size:
            size = self.size - self._next_sequence
        if self._stopped or not size:
            return 0
        if self.app_rate is not None:
            ready_at = self.start + (self._next_sequence + size) / self.app_rate
            if ready_at > now:
                self._wake(ready_at)
                return 0
        return size

    def _wake(self, time: float) -> None:
        """Try to send at ``time``, unless that is going to happen before."""
        if self._send_armed is None or self._send_armed > time:
            self._send_armed = time
            if not self._sending_on_time:
                self._simulation.schedule(time, self._on_time_to_send)

    def _on_time_to_send(self, now: float) -> float | None:
        if self._send_armed != now:
            return None
        self._send_armed = None
        self._sending_on_time = True
        self._send(now)
        self._sending_on_time = False
        return self._send_armed

    def _send(self, now: float) -> None:
        """Send what window, pacing and the application allow."""
        controller, sampler, link, again = self.controller, self._sampler, self._link, self._again
        limited = self.size is not None or self.app_rate is not None or self._stopped
        while True:
            if again:
                sequence, size = again[0]
            elif limited:
                sequence, size = self._next_sequence, self._available(now)
                if not size:
                    if self.in_flight < controller.window:
                        sampler.on_app_limited(self.in_flight)
                    return
            else:
                sequence, size = self._next_sequence, self.mss
            in_flight = self.in_flight
            if in_flight + size > controller.window:
                return
            rate = controller.pacing_rate
            if rate is not None:
                if self._pace_at > now:
                    self._wake(self._pace_at)
                    return
                self._pace_at = now + size / rate
            packet = _Packet.__new__(_Packet)
            packet.size = size
            packet.sequence = sequence
            packet.given_up = False
            packet.number = self._next_number
            self._next_number += 1
            if again:
                again.popleft()
                packet.retransmission = True
                self.retransmitted += size
            else:
                packet.retransmission = False
                self._next_sequence += size
            sampler.on_sent(packet, now=now, prior_in_flight=in_flight)
            if not in_flight:
                self._rto_from = now
            self.sent += size
            self.in_flight = in_flight = in_flight + size
            # Onto the link. Nothing that comes later changes when this leaves, but for `Link.set`.
            idle_at = link.idle_at
            if idle_at > now:
                waiting = (idle_at - now) * link.rate
                if waiting + size > link.room:
                    packet.gone = True
                    packet.departs = packet.ack_at = now
                    self.dropped += size
                else:
                    packet.gone = False
                    if waiting + size > link.max_queue:
                        link.max_queue = waiting + size
            else:
                packet.gone = False
                idle_at = now
                if size > link.max_queue:
                    link.max_queue = size
            pipe = self._pipe
            if not packet.gone:
                link.idle_at = packet.departs = departs = idle_at + size / link.rate
                ack_at = departs + link.delay + link.back + self.extra_delay
                if ack_at < self._last_ack_at:
                    ack_at = self._last_ack_at
                packet.ack_at = ack_at
                if self._survive:
                    self._survive -= 1
                    self._last_ack_at = ack_at
                else:
                    packet.gone = True
                    self.corrupted += size
                    self._next_loss()
            pipe.append(packet)
            if self._ack_armed is None:
                self._arm_ack()
            if self._timer_armed is None:
                self._arm_timer(self._rto_from + self._rto())
            controller.on_sent(
                now=now, size=size, in_flight=in_flight,
                app_limited=limited and not again and not self._available(now),
            )  # fmt: skip

    def _next_loss(self) -> None:
        self._survive = next(self._gaps, -1)

    def restart_losses(self) -> None:
        """Losses on the wire follow the link's present model, from its beginning."""
        loss = self._link.loss
        random = self._simulation.random(f"loss/{self._index}/{self._loss_changes}")
        self._loss_changes += 1
        self._gaps = iter(()) if loss is None else iter(loss.gaps(random))
        self._next_loss()

    # ---- acknowledgements -------------------------------------------------------------------------------------

    def _arm_ack(self) -> None:
        """Put aside what is gone at the front, and have the first acknowledgement after it heard of."""
        pipe = self._pipe
        while pipe:
            packet = pipe[0]
            if not packet.gone:
                self._ack_armed = packet.ack_at
                self._simulation.schedule(packet.ack_at, self._on_ack)
                return
            pipe.popleft()
            if not packet.given_up:
                self._missing.append(packet)
        self._ack_armed = None

    def _on_ack(self, now: float) -> float | None:
        if now != self._ack_armed:
            return None  # the link changed meanwhile
        pipe, sampler = self._pipe, self._sampler
        packet = pipe.popleft()
        size = packet.size
        prior = in_flight = self.in_flight
        acked = self._acked_number = packet.number
        new = True
        if packet.given_up:
            new = self._arrives_late(packet, now)
        else:
            in_flight -= size
            if self._arrived_late and packet.sequence in self._arrived_late:
                self.duplicate += size
                new = False
        self._rto_from = now
        # The round-trip estimate (RFC 6298; a retransmission tells none).
        if not packet.retransmission:
            rtt = self.rtt = now - packet.sent_at
            srtt = self.srtt
            if srtt is None:
                self.srtt = rtt
                self._rttvar = rtt / 2
                self._arm_timer(now + self._rto())
            else:
                error = rtt - srtt
                self.srtt = srtt + error / 8
                self._rttvar += ((error if error > 0 else -error) - self._rttvar) / 4
            if self._backoff > 1:
                self._backoff = 1
                self._arm_timer(now + self._rto())
        self.in_flight = in_flight
        lost = 0
        missing = self._missing
        if missing and missing[0].number < acked:
            rtt = now - packet.sent_at
            self._patience = rtt + (sampler.min_rtt or rtt) / 4
            lost = self._detect(now)
            in_flight = self.in_flight
        if new:
            self.delivered += size
            sampler.on_delivered(packet, now=now)
            self.controller.on_ack(sampler.sample(now=now, lost=lost, in_flight=in_flight, prior_in_flight=prior))
            if self.delivered == self.size:
                self.finished_at = now
        self._send(now)
        # As _arm_ack, which would schedule it.
        while pipe:
            packet = pipe[0]
            if not packet.gone:
                self._ack_armed = ack_at = packet.ack_at
                return ack_at
            pipe.popleft()
            if not packet.given_up:
                missing.append(packet)
        self._ack_armed = None
        return None

    def _detect(self, now: float) -> int:
        """Take for lost what must be, as of the newest acknowledgement; how many bytes that is."""
        missing, acked, patience = self._missing, self._acked_number, self._patience
        lost = 0
        sent_at = 0.0
        while missing:
            packet = missing[0]
            if packet.number > acked - _DUPLICATE_THRESHOLD and (
                packet.number > acked or packet.sent_at + patience > now
            ):
                break
            missing.popleft()
            lost += packet.size
            sent_at = packet.sent_at
            self._send_again(packet)
        if lost:
            self._lose(now, lost, sent_at, persistent=False)
        if missing and missing[0].number < acked:
            self._arm_reorder(missing[0].sent_at + patience)
        return lost

    def _lose(self, now: float, lost: int, sent_at: float, *, persistent: bool) -> None:
        self.lost += lost
        self.in_flight -= lost
        self.controller.on_loss(now=now, sent_at=sent_at, lost=lost, in_flight=self.in_flight, persistent=persistent)

    def _arrives_late(self, packet: _Packet, now: float) -> bool:
        """What a timeout had given up is acknowledged; whether for the first time."""
        size = packet.size
        self.lost -= size
        if not self._undone:
            self._undone = True
            self.spurious += 1
            self.controller.on_spurious_loss(now=now)
        if packet.sequence in self._arrived_late:
            self.duplicate += size
            return False
        self._arrived_late.add(packet.sequence)
        if (packet.sequence, size) in self._again:
            self._again.remove((packet.sequence, size))
        return True

    def _send_again(self, packet: _Packet) -> None:
        if packet.sequence not in self._arrived_late:
            self._again.append((packet.sequence, packet.size))

    # ---- timers -----------------------------------------------------------------------------------------------

    def _arm_reorder(self, time: float) -> None:
        if self._reorder_armed is None:
            self._reorder_armed = time
            self._simulation.schedule(time, self._on_reorder)

    def _on_reorder(self, now: float) -> None:
        self._reorder_armed = None
        if self._missing and self._missing[0].number < self._acked_number:
            self._detect(now)
            self._send(now)

    def _rto(self) -> float:
        if self.srtt is None:
            return min(_INITIAL_RTO * self._backoff, _MAX_RTO)
        return min((self.srtt + max(_MIN_RTO, 4 * self._rttvar)) * self._backoff, _MAX_RTO)

    def _arm_timer(self, time: float) -> None:
        self._timer_armed = time
        self._simulation.schedule(time, self._on_timer)

    def _on_timer(self, now: float) -> float | None:
        if now != self._timer_armed:
            return None
        if not self.in_flight:
            self._timer_armed = None
            return None
        due = self._rto_from + self._rto()
        if due > now:
            self._timer_armed = due
            return due
        self.timeouts += 1
        self._backoff *= 2
        self._undone = False
        self._rto_from = now
        newest = self._missing[-1].sent_at if self._missing else 0.0
        for packet in self._missing:
            self._send_again(packet)
        self._missing.clear()
        for packet in self._pipe:
            if not packet.given_up:
                packet.given_up = True
                newest = packet.sent_at
                self._send_again(packet)
        self._lose(now, self.in_flight, newest, persistent=True)
        self._send(now)
        if self.in_flight:
            self._timer_armed = due = now + self._rto()
            return due
        self._timer_armed = None
        return None

    # ---- when the link changes --------------------------------------------------------------------------------

    def queued(self, now: float) -> list[_Packet]:
        """What has not left the queue at ``now``."""
        self._last_ack_at = max(
            (packet.ack_at for packet in self._pipe if packet.departs <= now and not packet.gone), default=now
        )
        return [packet for packets in (self._missing, self._pipe) for packet in packets if packet.departs > now]

    def retime(self, packet: _Packet, departs: float) -> None:
        """``packet`` leaves the queue at another time."""
        link = self._link
        packet.departs = departs
        packet.ack_at = max(self._last_ack_at, departs + link.delay + link.back + self.extra_delay)
        if not packet.gone:
            self._last_ack_at = packet.ack_at

    def rearm(self) -> None:
        """Times of acknowledgements have changed."""
        self._ack_armed = None
        self._arm_ack()
