"""CUBIC as RFC 9438 has it, in bytes, with fractions kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Final, NamedTuple

from amst_core.congestion import FlowAccount
from amst_core.errors import ConfigError, UsageError
from amst_core.interfaces import AckSample, CongestionController

from .hystart import CSS_GROWTH_DIVISOR, L_UNPACED, HyStart

BETA: Final = 0.7
"""What a congestion event leaves of the window (RFC 9438 4.6)."""

C: Final = 0.4
"""How steep the cubic function is, in segments/s³ (RFC 9438 5.1)."""

ALPHA: Final = 3 * (1 - BETA) / (1 + BETA)
"""Segments per round trip by which Reno's average is met in spite of `BETA` (RFC 9438 4.3)."""

_MAX_INITIAL_WINDOW: Final = 1000
_SLOW_START_PACING: Final = 2.0
_AVOIDANCE_PACING: Final = 1.2


@dataclass(frozen=True, slots=True)
class CubicOptions:
    """The settings under ``plugins.cubic``.

    Attributes:
        fast_convergence: give up room to a newcomer when the window fell short of the last (RFC 9438 4.7, which wants
            it off where a flow is known to be alone).
        reno_friendly: never slower than Reno would be (4.3).
        hystart: leave the first slow start by HyStart++ (RFC 9406), otherwise by its first loss only.
        pacing: give a pacing rate. Without, what is acknowledged at once opens slow start by 8 segments at most.
        initial_window: segments to begin with (RFC 6928).
    """

    fast_convergence: bool = True
    reno_friendly: bool = True
    hystart: bool = True
    pacing: bool = True
    initial_window: int = 10


class _Undo(NamedTuple):
    """What a congestion event changed, as it was before (RFC 9438 4.9.2)."""

    cwnd: float
    cwnd_prior: float | None
    ssthresh: float
    w_max: float | None
    k: float
    t_epoch: float | None
    w_est: float
    reacted_at: float


class CubicController(CongestionController):
    """CUBIC (RFC 9438), with slow start by HyStart++ (RFC 9406).

    - Growth is counted per segment acknowledged, so that one acknowledgement of many grows the window as they would
      have one by one.
    - Time is the sender's own: it stands still while the application or an idle path left the window unused (4.2, 5.8).
    - ``flight_size`` (4.6) is the most that was in flight in this round trip and the last one. What is in flight when a
      loss is noticed depends on how acknowledgements happen to be gathered; the most in flight is what the path was
      asked to carry (the idea of RFC 7661). A window that was used within one segment counts as used.
    - No window is lost to idleness alone: a sender that resumes is paced.
    """

    name: ClassVar[str] = "cubic"
    api_version: ClassVar[int] = 1
    kernel_name: ClassVar[str | None] = "cubic"

    def __init__(self, options: Mapping[str, object], *, mss: int) -> None:
        """Check ``options``, the settings under ``plugins.cubic`` (see `CubicOptions`); ``mss`` is in bytes.

        Raises:
            ConfigError: an unknown option or an impossible value; names every fault.
            UsageError: ``mss`` is not positive.
        """
        if mss < 1:
            raise UsageError(f"mss = {mss!r} must be a positive number of bytes: the payload of the path's segments")
        self._options = _checked(options)
        self._mss = mss
        self._account = FlowAccount()
        self._hystart = HyStart() if self._options.hystart else None
        self._srtt: float | None = None

        self._cwnd = float(self._options.initial_window * mss)
        self._cwnd_prior: float | None = None
        self._ssthresh = math.inf
        self._w_max: float | None = None
        self._k = 0.0
        self._w_est = 0.0
        self._t_epoch: float | None = None

        self._active = 0.0  # the time that counts for t, in seconds; ``_seen`` is when it was last brought up to date
        self._seen: float | None = None
        self._peak = 0  # the most in flight in this round trip, and in the last one
        self._last_peak = 0

        self._reacted_at = -math.inf
        self._recovering = False
        self._timed_out = False
        self._undo: _Undo | None = None

    @property
    def window(self) -> int:
        return round(self._cwnd)

    @property
    def pacing_rate(self) -> float | None:
        """As Linux has it (``tcp_update_pacing_rate``): 2 × cwnd/srtt in slow start, 1.2 × from ssthresh/2 on."""
        if self._srtt is None or not self._options.pacing:
            return None
        gain = _SLOW_START_PACING if self._cwnd < self._ssthresh / 2 else _AVOIDANCE_PACING
        return gain * self._cwnd / self._srtt

    def on_sent(self, *, now: float, size: int, in_flight: int, app_limited: bool) -> None:
        self._account.on_sent(size, in_flight)
        self._peak = max(self._peak, in_flight)
        if in_flight <= size:  # nothing was under way: the time since the last acknowledgement was idle
            self._seen = now

    def on_ack(self, sample: AckSample) -> None:
        self._account.on_ack(sample)
        self._timed_out = False
        if sample.round_start:
            self._last_peak, self._peak = self._peak, 0
        used = self._window_was_used(sample)
        if used and self._seen is not None:
            self._active += max(0.0, sample.now - self._seen)
        self._seen = sample.now
        if sample.rtt is not None and sample.rtt > 0:
            self._srtt = sample.rtt if self._srtt is None else self._srtt + (sample.rtt - self._srtt) / 8  # RFC 6298

        newer = sample.sent_at >= self._reacted_at
        if newer:
            self._recovering = False
        if sample.ecn_ce:
            self._undo = None
            if newer:
                self._reduce(sample.now, least=self._mss)
                self._undo = None  # a mark is never spurious
        if self._recovering:
            return
        if self._hystart is not None and self._ssthresh == math.inf:
            self._watch_delay(self._hystart, sample)
        if used:
            self._grow(sample.acked)

    def on_loss(self, *, now: float, sent_at: float, lost: int, in_flight: int, persistent: bool) -> None:
        self._account.on_loss(lost, in_flight)
        if sent_at >= self._reacted_at and not (persistent and self._timed_out):
            self._reduce(now, least=2 * self._mss)
        if persistent:
            # As Reno after a timeout (RFC 5681 3.1; RFC 9438 4.8): one segment, then slow start up to ssthresh. What is
            # lost once more meanwhile leaves ssthresh alone.
            self._cwnd = float(self._mss)
            self._w_max = None
            self._t_epoch = None
            self._reacted_at = now
            self._recovering = self._timed_out = True

    def on_spurious_loss(self, *, now: float) -> None:
        """Take the last congestion event back (RFC 9438 4.9), unless it was a mark or the window has outgrown it."""
        undo, self._undo = self._undo, None
        if undo is None or self._cwnd >= undo.cwnd:
            return
        self._cwnd, self._cwnd_prior, self._ssthresh, self._w_max, self._k, self._t_epoch, self._w_est, *_ = undo
        self._reacted_at = undo.reacted_at
        self._recovering = self._timed_out = False

    def state(self) -> Mapping[str, float | str]:
        """With CUBIC's own: ``mode`` (slow_start, css, recovery, congestion_avoidance) and the variables of RFC 9438.

        ``ssthresh``, ``w_max``, ``cwnd_prior`` and ``w_est`` in bytes, ``k`` and ``t`` (of this congestion avoidance
        stage) in seconds; ``region`` is reno_friendly, concave or convex. What has no meaning yet is not there.
        """
        own: dict[str, float | str] = {"mode": self._mode(), "beta": BETA}
        if self._ssthresh < math.inf:
            own["ssthresh"] = self._ssthresh
        if self._w_max is not None:
            own["w_max"] = self._w_max
        if self._cwnd_prior is not None:
            own["cwnd_prior"] = self._cwnd_prior
        if self._t_epoch is not None:
            own |= {"k": self._k, "t": self._active - self._t_epoch, "w_est": self._w_est, "region": self._region()}
        return self._account.state(self.name, window=self.window, pacing_rate=self.pacing_rate) | own

    def _mode(self) -> str:
        if self._recovering:
            return "recovery"
        if self._cwnd >= self._ssthresh:
            return "congestion_avoidance"
        css = self._hystart is not None and self._hystart.in_css and self._ssthresh == math.inf
        return "css" if css else "slow_start"

    def _region(self) -> str:
        if self._in_reno_region():
            return "reno_friendly"
        return "concave" if self._w_max is not None and self._cwnd < self._w_max else "convex"

    def _window_was_used(self, sample: AckSample) -> bool:
        """Whether the window, not the application, held the sender back (RFC 9438 5.8).

        A driver that never says app_limited is not believed for ever: half of the window must have been in flight, as
        Linux wants it of slow start (``tcp_is_cwnd_limited``).
        """
        if sample.app_limited:
            return sample.prior_in_flight + self._mss > self._cwnd
        return 2 * max(self._peak, self._last_peak) > self._cwnd

    def _watch_delay(self, hystart: HyStart, sample: AckSample) -> None:
        if sample.round_start and hystart.on_round():
            self._ssthresh = self._cwnd_prior = self._cwnd
        elif sample.rtt is not None:
            hystart.on_rtt(sample.rtt)

    def _grow(self, acked: float) -> None:
        if self._cwnd < self._ssthresh:
            acked = self._slow_start(acked)
        if acked > 0:
            self._avoid_congestion(acked)

    def _slow_start(self, acked: float) -> float:
        """Grow by what is acknowledged, to ssthresh at most; returns what is left of it then."""
        if not self._options.pacing:
            acked = min(acked, float(L_UNPACED * self._mss))
        divisor = CSS_GROWTH_DIVISOR if self._mode() == "css" else 1
        room = (self._ssthresh - self._cwnd) * divisor
        if acked < room:
            self._cwnd += acked / divisor
            return 0.0
        self._cwnd = self._ssthresh
        return acked - room

    def _avoid_congestion(self, acked: float) -> None:
        """RFC 9438 4.2 to 4.5."""
        if self._t_epoch is None:
            self._begin_epoch()
        self._accrue_reno(acked)
        if self._in_reno_region():
            self._cwnd = max(self._cwnd, self._w_est)
            return
        target = min(max(self._w_cubic(self._srtt or 0.0), self._cwnd), 1.5 * self._cwnd)
        # One segment moves the window by the n-th part of what the target is away, n being its own length in segments.
        share = 1 - (1 - self._mss / self._cwnd) ** (acked / self._mss)
        self._cwnd += (target - self._cwnd) * share

    def _begin_epoch(self) -> None:
        self._t_epoch = self._active
        self._w_est = self._cwnd
        if self._w_max is None or self._w_max <= self._cwnd:  # after HyStart++ (4.10) or a timeout (4.8)
            self._w_max = self._cwnd
        self._k = math.cbrt((self._w_max - self._cwnd) / (C * self._mss))

    def _w_cubic(self, ahead: float) -> float:
        assert self._t_epoch is not None and self._w_max is not None
        t = self._active - self._t_epoch + ahead
        return float(C * self._mss * (t - self._k) ** 3 + self._w_max)

    def _in_reno_region(self) -> bool:
        return self._options.reno_friendly and self._w_cubic(0.0) < self._w_est

    def _accrue_reno(self, acked: float) -> None:
        """W_est grows by alpha segments per round trip, by one from cwnd_prior on (4.3)."""
        per_segment = self._mss / self._cwnd
        if self._cwnd_prior is not None and self._w_est < self._cwnd_prior:
            room = (self._cwnd_prior - self._w_est) / (ALPHA * per_segment)
            self._w_est += ALPHA * per_segment * min(acked, room)
            acked -= room
        if acked > 0:
            self._w_est += per_segment * acked

    def _reduce(self, now: float, *, least: int) -> None:
        """A congestion event (RFC 9438 4.6, 4.7)."""
        cwnd = self._cwnd
        self._undo = _Undo(
            cwnd, self._cwnd_prior, self._ssthresh, self._w_max, self._k, self._t_epoch, self._w_est, self._reacted_at
        )
        falls_short = self._w_max is not None and cwnd < self._w_max
        self._w_max = cwnd * (1 + BETA) / 2 if falls_short and self._options.fast_convergence else cwnd
        self._cwnd_prior = cwnd
        peak = max(self._peak, self._last_peak)
        flight_size = cwnd if peak + self._mss > cwnd else peak
        self._ssthresh = max(flight_size * BETA, 2.0 * self._mss)
        self._cwnd = min(cwnd, max(flight_size * BETA, float(least)))
        self._t_epoch = None
        self._reacted_at = now
        self._recovering = True


def _checked(options: Mapping[str, object]) -> CubicOptions:
    known = {field.name: field.default for field in fields(CubicOptions)}
    faults = [f"plugins.cubic.{key} is unknown; known are {', '.join(known)}" for key in options if key not in known]
    for key, default in known.items():
        value = options.get(key, default)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                faults.append(f"plugins.cubic.{key} = {value!r} must be true or false")
        elif isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_INITIAL_WINDOW:
            faults.append(
                f"plugins.cubic.{key} = {value!r} must be a whole number of segments, 1 to {_MAX_INITIAL_WINDOW}"
            )
    if faults:
        raise ConfigError("; ".join(faults))
    return CubicOptions(**options)  # type: ignore[arg-type]  # each was checked above
