"""BBR, version 1: congestion control by a model of the path instead of by its losses.

Linux net/ipv4/tcp_bbr.c (compared with torvalds/linux 02dc96ef6c25, of Linux 5.x) in bytes and seconds; Cardwell et
al., "BBR: Congestion-Based Congestion Control", ACM Queue 14(5), 2016; draft-cardwell-iccrg-bbr-congestion-control-00.
Where this differs from the kernel, the README says so.
"""

from __future__ import annotations

import enum
import math
import random
from collections.abc import Mapping
from typing import ClassVar, Final

from amst_core.congestion import FlowAccount, WindowedMax
from amst_core.errors import UsageError
from amst_core.interfaces import AckSample, CongestionController

from .aggregation import AckAggregation
from .options import BbrOptions
from .policer import LongTermBandwidth

HIGH_GAIN: Final = 2 / math.log(2)
"""Smallest pacing gain that doubles the rate delivered with each round trip."""
DRAIN_GAIN: Final = 1 / HIGH_GAIN
CWND_GAIN: Final = 2.0
PACING_GAINS: Final = (1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""One cycle of ProbeBW: probe, drain what probing has queued, cruise."""

_CYCLE_RANDOM: Final = 7  # any phase may be the first but the one that drains
_BANDWIDTH_ROUNDS: Final = len(PACING_GAINS) + 2
_MIN_RTT_WINDOW_S: Final = 10.0
_PROBE_RTT_S: Final = 0.2
_PACING_MARGIN: Final = 0.01
_NOMINAL_RTT_S: Final = 0.001
_FULL_GROWTH: Final = 1.25
_FULL_ROUNDS: Final = 3
_MIN_SEGMENTS: Final = 4
_START_SEGMENTS: Final = 10
_LOW_RATE: Final = 1_200_000 / 8
_QUANTUM_S: Final = 1 / 1024
_MAX_QUANTUM: Final = 64 << 10
_MAX_AGGREGATION_S: Final = 0.1


class _Mode(enum.Enum):
    STARTUP = "startup"
    DRAIN = "drain"
    PROBE_BW = "probe_bw"
    PROBE_RTT = "probe_rtt"


class _Recovery(enum.Enum):
    """TCP_CA_Open, TCP_CA_Recovery, TCP_CA_Loss."""

    OPEN = "open"
    RECOVERY = "recovery"
    TIMEOUT = "timeout"


class BbrController(CongestionController):
    """Keeps a path's bandwidth-delay product in flight, sent at the rate at which it is delivered.

    The bandwidth is the largest delivery rate of 10 round trips, the delay the shortest round trip of 10 s. An isolated
    loss changes neither; see `on_loss` for what it does change.
    """

    name: ClassVar[str] = "bbr"
    kernel_name: ClassVar[str | None] = "bbr"

    def __init__(self, options: Mapping[str, object], *, mss: int) -> None:
        """Begin a flow whose segments carry ``mss`` bytes; ``options`` are the settings under ``plugins.bbr``.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of bounds (`BbrOptions`).
            UsageError: ``mss`` is not positive.
        """
        checked = BbrOptions.checked(options)
        if mss < 1:
            raise UsageError(f"a segment carries at least one byte, not mss = {mss}")
        self._mss = mss
        self._random = random.Random(checked.seed)
        self._account = FlowAccount()
        self._mode = _Mode.STARTUP
        self._pacing_gain = self._cwnd_gain = HIGH_GAIN
        self._cwnd = checked.initial_window * mss
        self._prior_cwnd = 0
        self._ssthresh: int | None = None
        self._pacing_rate = self._paced(self._cwnd / _NOMINAL_RTT_S, HIGH_GAIN)
        self._has_seen_rtt = False

        self._max_bandwidth = WindowedMax(_BANDWIDTH_ROUNDS)
        self._rounds = 0
        self._round_start = False
        self._round_ends_at = 0
        self._delivered = 0
        self._low_rate_from = self._low_rate_until = -1

        self._min_rtt: float | None = None
        self._min_rtt_at: float | None = None
        self._probe_rtt_until: float | None = None
        self._probe_rtt_round_done = False

        self._full_bandwidth = 0.0
        self._full_rounds = 0
        self._full_reached = False

        self._cycle = 0
        self._cycle_at = 0.0

        self._recovery = self._prior_recovery = _Recovery.OPEN
        self._reacted_at = -math.inf
        self._conserving = False
        self._to_resend = 0
        self._timeout_over_at = 0

        self._ran_out = False
        self._idle_restart = False

        self._long_term = LongTermBandwidth(enabled=checked.long_term_bandwidth)
        self._aggregation = AckAggregation(mss)

    @property
    def window(self) -> int:
        return self._cwnd

    @property
    def pacing_rate(self) -> float | None:
        """Bytes/s: gain × bandwidth, less 1 %; before a round trip was measured, as if it took 1 ms."""
        return self._pacing_rate

    @property
    def send_quantum(self) -> int:
        """Bytes that may leave at once: what pacing lets through in 1/1024 s, at least two segments (one below
        1.2 Mbit/s) and at most 64 KiB.

        The kernel cuts its TSO bursts to this size. A sender in user space wakes up about as often, and what is
        acknowledged comes from as large bursts, so the window allows for three of them as the kernel's does.
        """
        least = 1 if self._pacing_rate < _LOW_RATE else 2
        return max(int(min(self._pacing_rate * _QUANTUM_S, _MAX_QUANTUM)) // self._mss, least) * self._mss

    # ---- what happens ---------------------------------------------------------------------

    def on_sent(self, *, now: float, size: int, in_flight: int, app_limited: bool) -> None:
        """``size`` bytes left; after a pause for lack of data they leave at the bandwidth, without gain."""
        self._account.on_sent(size, in_flight)
        self._to_resend = max(self._to_resend - size, 0)
        self._begin(now)
        ran_out, self._ran_out = self._ran_out, app_limited
        if in_flight > size or not (app_limited or ran_out):
            return
        self._idle_restart = True
        self._aggregation.restart(now)
        if self._mode is _Mode.PROBE_BW:
            self._pace(self._bandwidth(), 1.0)
        elif self._mode is _Mode.PROBE_RTT:
            self._check_probe_rtt_done(now)

    def on_ack(self, sample: AckSample) -> None:
        self._account.on_ack(sample)
        self._begin(sample.now)
        self._delivered = sample.delivered
        if self._recovery is not _Recovery.OPEN and self._is_recovered(sample):
            self._recovery = _Recovery.OPEN
        self._update_model(sample)
        if not self._has_seen_rtt and sample.rtt is not None:
            self._has_seen_rtt = True
            self._pacing_rate = self._paced(self._cwnd / max(sample.rtt, 1e-6), HIGH_GAIN)
        self._pace(self._bandwidth(), self._pacing_gain)
        self._set_cwnd(sample)

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        """A loss changes neither the model nor the pacing rate, and the window for a while only.

        The first loss of what was sent after the last recovery had begun begins another. With the next acknowledgement
        the window shrinks to what is in flight and what was acknowledged; for a round trip as much may be sent as
        arrives (packet conservation). After that the window grows by what is acknowledged, less what is lost, up to
        its target. When something arrives that was sent after the recovery's last loss, the window of before is back.

        So a path that loses in every round trip conserves packets in the first of them only: Linux leaves a recovery
        when all that was lost has been sent again and acknowledged, and finds itself in the next at once.

        ``persistent`` sets the window to one segment more than is in flight, and has Startup look anew for growth. The
        window of before is back when as much was delivered as had been under way or waited to be sent again (Linux
        tcp_process_loss: all up to high_seq); losses until then come off the window, and begin no recovery.
        """
        self._account.on_loss(lost, in_flight)
        self._to_resend += lost
        self._begin(now)
        if persistent:
            self._save_cwnd()
            self._recovery = self._prior_recovery = _Recovery.TIMEOUT
            self._timeout_over_at = self._delivered + in_flight + self._to_resend
            self._reacted_at = now
            self._full_bandwidth = 0.0
            self._round_start = True
            self._sample_long_term(now, lost=lost, app_limited=False)
            self._cwnd = in_flight + self._mss
        elif self._recovery is _Recovery.RECOVERY:
            self._reacted_at = now
        elif self._recovery is _Recovery.OPEN and sent_at >= self._reacted_at:
            self._save_cwnd()
            self._recovery = _Recovery.RECOVERY
            self._reacted_at = now

    def on_spurious_loss(self, *, now: float) -> None:
        """The recovery is over: the window of before is back, and growth and policers are looked for anew."""
        self._full_bandwidth = 0.0
        self._full_rounds = 0
        self._long_term.reset(now, self._delivered, self._account.lost)
        if self._recovery is not _Recovery.OPEN or self._prior_recovery is not _Recovery.OPEN:
            self._recovery = self._prior_recovery = _Recovery.OPEN
            self._conserving = False
            self._cwnd = max(self._cwnd, self._prior_cwnd)
            self._cap_in_probe_rtt()

    def state(self) -> Mapping[str, float | str]:
        """As `CongestionController.state`; the README lists what BBR adds. ``min_rtt`` is the shortest of 10 s."""
        state = self._account.state(self.name, window=self._cwnd, pacing_rate=self._pacing_rate)
        state |= {
            "mode": self._mode.value,
            "pacing_gain": self._pacing_gain,
            "cwnd_gain": self._cwnd_gain,
            "round_count": self._rounds,
            "cycle_index": self._cycle,
            "full_bw": self._full_bandwidth,
            "full_bw_count": self._full_rounds,
            "full_bw_reached": int(self._full_reached),
            "recovery": self._recovery.value,
            "packet_conservation": int(self._conserving),
            "prior_cwnd": self._prior_cwnd,
            "idle_restart": int(self._idle_restart),
            "extra_acked": self._aggregation.extra,
            "lt_use_bw": int(self._long_term.in_use),
            "send_quantum": self.send_quantum,
        }
        perhaps = {
            "btl_bw": self._max_bandwidth.value,
            "min_rtt": self._min_rtt,
            "ssthresh": self._ssthresh,
            "lt_bw": self._long_term.bandwidth,
        }
        return state | {name: value for name, value in perhaps.items() if value is not None}

    # ---- the model ------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        """The first time anything is heard: what the kernel does when a connection is made."""
        if self._min_rtt_at is None:
            self._min_rtt_at = now
            self._aggregation.restart(now)
            self._long_term.reset(now, 0, 0)

    def _update_model(self, sample: AckSample) -> None:
        self._round_start = False
        rate = sample.delivery_rate
        if rate is not None and rate > 0 and sample.acked > 0:
            self._update_bandwidth(sample, rate)
            self._aggregation.update(
                sample.now,
                acked=sample.acked,
                bandwidth=self._bandwidth(),
                window=self._cwnd,
                round_start=self._round_start,
            )
        if self._mode is _Mode.PROBE_BW and self._phase_is_over(sample):
            self._next_phase(sample.now)
        self._check_full(sample)
        self._check_drain(sample)
        self._update_min_rtt(sample)
        self._update_gains()

    def _update_bandwidth(self, sample: AckSample, rate: float) -> None:
        if sample.prior_delivered >= self._round_ends_at:
            self._round_ends_at = sample.delivered
            self._rounds += 1
            self._round_start = True
            self._conserving = False
        app_limited = self._app_limited(sample)
        self._sample_long_term(sample.now, lost=sample.lost, app_limited=app_limited)
        if not app_limited or rate >= self._max_bw():
            self._max_bandwidth.update(rate, self._rounds)

    def _sample_long_term(self, now: float, *, lost: int, app_limited: bool) -> None:
        if self._long_term.in_use:
            if self._long_term.expired(round_start=self._round_start, probing=self._mode is _Mode.PROBE_BW):
                self._long_term.reset(now, self._delivered, self._account.lost)
                self._enter_probe_bw(now)
            return
        if self._long_term.sample(
            now,
            delivered=self._delivered,
            all_lost=self._account.lost,
            lost=lost,
            app_limited=app_limited,
            round_start=self._round_start,
        ):
            self._pacing_gain = 1.0

    def _app_limited(self, sample: AckSample) -> bool:
        """Also what left in ProbeRTT, when the window and not the path held it back."""
        return sample.app_limited or self._low_rate_from <= sample.prior_delivered <= self._low_rate_until

    def _max_bw(self) -> float:
        return self._max_bandwidth.value or 0.0

    def _bandwidth(self) -> float:
        """The estimate in force."""
        if self._long_term.in_use and self._long_term.bandwidth is not None:
            return self._long_term.bandwidth
        return self._max_bw()

    def _check_full(self, sample: AckSample) -> None:
        """The pipe is full when three rounds, none of them limited by the application, brought less than 25 % more."""
        if self._full_reached or not self._round_start or self._app_limited(sample):
            return
        if self._max_bw() >= self._full_bandwidth * _FULL_GROWTH:
            self._full_bandwidth = self._max_bw()
            self._full_rounds = 0
            return
        self._full_rounds += 1
        self._full_reached = self._full_rounds >= _FULL_ROUNDS

    def _check_drain(self, sample: AckSample) -> None:
        if self._mode is _Mode.STARTUP and self._full_reached:
            self._mode = _Mode.DRAIN
            self._ssthresh = self._inflight(self._max_bw(), 1.0)
        if self._mode is _Mode.DRAIN and sample.in_flight <= self._inflight(self._max_bw(), 1.0):
            self._enter_probe_bw(sample.now)

    def _enter_probe_bw(self, now: float) -> None:
        self._mode = _Mode.PROBE_BW
        self._cycle = len(PACING_GAINS) - 1 - self._random.randrange(_CYCLE_RANDOM)
        self._next_phase(now)

    def _next_phase(self, now: float) -> None:
        self._cycle = (self._cycle + 1) % len(PACING_GAINS)
        self._cycle_at = now

    def _phase_is_over(self, sample: AckSample) -> bool:
        """A phase takes a round trip; probing until it has filled the pipe or lost, draining no longer than it must."""
        gain = self._pacing_gain
        full_length = self._min_rtt is not None and sample.now - self._cycle_at > self._min_rtt
        if gain == 1:
            return full_length
        in_flight = sample.prior_in_flight
        if gain > 1:
            # What is about to leave counts, too.
            reached = in_flight + self.send_quantum >= self._inflight(self._max_bw(), gain)
            return full_length and (sample.lost > 0 or reached)
        return full_length or in_flight <= self._inflight(self._max_bw(), 1.0)

    def _update_min_rtt(self, sample: AckSample) -> None:
        now, rtt = sample.now, sample.rtt
        expired = self._min_rtt_at is not None and now > self._min_rtt_at + _MIN_RTT_WINDOW_S
        if rtt is not None and (self._min_rtt is None or rtt <= self._min_rtt or expired):
            self._min_rtt = rtt
            self._min_rtt_at = now
        if expired and not self._idle_restart and self._mode is not _Mode.PROBE_RTT:
            self._mode = _Mode.PROBE_RTT
            self._save_cwnd()
            self._probe_rtt_until = None
            self._low_rate_from = sample.delivered
        if self._mode is _Mode.PROBE_RTT:
            self._low_rate_until = sample.delivered + sample.in_flight
            if self._probe_rtt_until is None:
                if sample.in_flight <= _MIN_SEGMENTS * self._mss:
                    self._probe_rtt_until = now + _PROBE_RTT_S
                    self._probe_rtt_round_done = False
                    self._round_ends_at = sample.delivered
            else:
                self._probe_rtt_round_done |= self._round_start
                if self._probe_rtt_round_done:
                    self._check_probe_rtt_done(now)
        if sample.acked > 0:
            self._idle_restart = False

    def _check_probe_rtt_done(self, now: float) -> None:
        if self._probe_rtt_until is None or now <= self._probe_rtt_until:
            return
        self._min_rtt_at = now
        self._cwnd = max(self._cwnd, self._prior_cwnd)
        if self._full_reached:
            self._enter_probe_bw(now)
        else:
            self._mode = _Mode.STARTUP

    def _update_gains(self) -> None:
        if self._mode is _Mode.STARTUP:
            self._pacing_gain = self._cwnd_gain = HIGH_GAIN
        elif self._mode is _Mode.DRAIN:
            self._pacing_gain, self._cwnd_gain = DRAIN_GAIN, HIGH_GAIN
        elif self._mode is _Mode.PROBE_BW:
            self._pacing_gain = 1.0 if self._long_term.in_use else PACING_GAINS[self._cycle]
            self._cwnd_gain = CWND_GAIN
        else:
            self._pacing_gain = self._cwnd_gain = 1.0

    # ---- what follows from it -------------------------------------------------------------

    @staticmethod
    def _paced(bandwidth: float, gain: float) -> float:
        return bandwidth * gain * (1 - _PACING_MARGIN)

    def _pace(self, bandwidth: float, gain: float) -> None:
        rate = self._paced(bandwidth, gain)
        if self._full_reached or rate > self._pacing_rate:
            self._pacing_rate = rate

    def _bdp(self, bandwidth: float, gain: float) -> int:
        if self._min_rtt is None:
            return _START_SEGMENTS * self._mss
        return math.ceil(bandwidth * self._min_rtt * gain)

    def _quantized(self, size: int) -> int:
        """With room for three bursts (one leaving, one under way, one being acknowledged), in pairs of segments."""
        pair = 2 * self._mss
        size = -(-(size + 3 * self.send_quantum) // pair) * pair
        if self._mode is _Mode.PROBE_BW and self._cycle == 0:
            size += pair  # probing must get above even the smallest BDP
        return size

    def _inflight(self, bandwidth: float, gain: float) -> int:
        return self._quantized(self._bdp(bandwidth, gain))

    def _aggregated(self) -> int:
        if not self._full_reached:
            return 0
        return min(self._aggregation.extra, int(self._bandwidth() * _MAX_AGGREGATION_S))

    def _is_recovered(self, sample: AckSample) -> bool:
        if self._recovery is _Recovery.TIMEOUT:
            return sample.delivered >= self._timeout_over_at
        return sample.acked > 0 and sample.sent_at >= self._reacted_at

    def _save_cwnd(self) -> None:
        if self._prior_recovery is _Recovery.OPEN and self._mode is not _Mode.PROBE_RTT:
            self._prior_cwnd = self._cwnd
        else:  # it has been cut for a while
            self._prior_cwnd = max(self._prior_cwnd, self._cwnd)

    def _set_cwnd(self, sample: AckSample) -> None:
        if sample.acked > 0 and not self._recover_or_restore(sample):
            target = self._quantized(self._bdp(self._bandwidth(), self._cwnd_gain) + self._aggregated())
            if self._full_reached:  # only then is the target known well enough to cut the window to it
                self._cwnd = min(self._cwnd + sample.acked, target)
            elif self._cwnd < target or sample.delivered < _START_SEGMENTS * self._mss:
                self._cwnd += sample.acked
            self._cwnd = max(self._cwnd, _MIN_SEGMENTS * self._mss)
        self._cap_in_probe_rtt()

    def _recover_or_restore(self, sample: AckSample) -> bool:
        """Take losses from the window, and what a recovery begins or ends with; whether packets are conserved."""
        if sample.lost > 0:
            self._cwnd = max(self._cwnd - sample.lost, self._mss)
        before, self._prior_recovery = self._prior_recovery, self._recovery
        conserved = max(sample.in_flight + sample.acked, self._mss)
        if self._recovery is _Recovery.RECOVERY and before is not _Recovery.RECOVERY:
            self._conserving = True
            self._round_ends_at = sample.delivered
            self._cwnd = conserved
        elif self._recovery is _Recovery.OPEN and before is not _Recovery.OPEN:
            self._conserving = False
            self._cwnd = max(self._cwnd, self._prior_cwnd)
        if self._conserving:
            self._cwnd = max(self._cwnd, conserved)
        return self._conserving

    def _cap_in_probe_rtt(self) -> None:
        if self._mode is _Mode.PROBE_RTT:
            self._cwnd = min(self._cwnd, _MIN_SEGMENTS * self._mss)
