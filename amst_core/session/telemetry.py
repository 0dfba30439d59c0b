"""A session's numbers, read from plain counters when somebody asks."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

from ..interfaces import PathStats, SessionMetrics
from .core import SessionCore
from .loss import MIN_SEGMENTS
from .mode import ModeKeeper

_WINDOW_S: Final = 5.0
_STEP_S: Final = 0.5


class Telemetry:
    """Computes `SessionMetrics` (requirements A2, A3). Thread-safe by reading each counter once."""

    def __init__(self, core: SessionCore, modes: ModeKeeper, *, session_id: str) -> None:
        self._core = core
        self._modes = modes
        self._session_id = session_id
        self._history: deque[tuple[float, int, int]] = deque([(time.monotonic(), 0, 0)], maxlen=64)

    def sample(self, now: float) -> None:
        """Remember the totals; called while traffic moves, cheap when called too often."""
        if now - self._history[-1][0] >= _STEP_S:
            self._history.append((now, *self._core.moved()))

    def read(self, last_health_check: float | None) -> SessionMetrics:
        """The numbers now."""
        core = self._core
        now = time.monotonic()
        self.sample(now)
        with core.lock:
            live = core.live_lanes_locked()
            shown = core.streams.shown()
        streams = tuple(stream.health() for stream in shown)
        paths = [stream.path for stream in streams]
        sent, received = self._core.moved()
        throughput = self._throughput(now, sent, received)
        congestion = sorted({path.congestion for path in paths if path.congestion})
        in_force = [stream.congestion for stream in streams if stream.congestion is not None]
        backends = sorted({one.backend for one in in_force if one.backend is not None})
        mode = self._modes.state
        return SessionMetrics(
            session_id=self._session_id,
            remote_addr=core.peer,
            transport_type="+".join(sorted({stream.transport for stream in streams})),
            mode=mode.mode.value,
            mode_reason=mode.reason,
            switches=mode.switches,
            congestion="+".join(congestion) or None,
            congestion_backend="+".join(backends) or None,
            congestion_reason="; or ".join(sorted({one.reason for one in in_force})) or None,
            active_streams=len(live),
            streams_reason=core.streams_reason,
            total_streams=core.total_lanes,
            failed_connections=core.failed_connections,
            bytes_sent=sent,
            bytes_received=received,
            retransmitted_bytes=core.engine.bytes_retransmitted,
            throughput_mbps=throughput * 8 / 1e6,
            average_latency_s=_mean([path.rtt_s for path in paths if path.rtt_s is not None]),
            packet_loss_rate=_loss(paths),
            bandwidth_utilization_percent=_utilisation(throughput, paths),
            lane_failures=core.lane_failures,
            healthy=core.error is None and bool(live),
            last_error=None if core.last_error is None else core.last_error.message,
            last_health_check=last_health_check,
            streams=streams,
        )

    def _throughput(self, now: float, sent: int, received: int) -> float:
        """Bytes/s of the larger direction over the last five seconds (or since the last sample before them)."""
        since = self._history[0]
        for sample in list(self._history):
            if sample[0] > now - _WINDOW_S:
                break
            since = sample
        elapsed = now - since[0]
        return max(sent - since[1], received - since[2]) / elapsed if elapsed > 0 else 0.0


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _loss(paths: list[PathStats]) -> float | None:
    sent = sum(path.segments_sent or 0 for path in paths)
    again = sum(path.segments_retransmitted or 0 for path in paths)
    return again / sent if sent >= MIN_SEGMENTS else None


def _utilisation(throughput: float, paths: list[PathStats]) -> float | None:
    estimates = [path.delivery_rate for path in paths if path.delivery_rate and not path.app_limited]
    if not estimates or len(estimates) * 2 < len(paths):
        return None
    # lanes without an estimate of their own count as the average of those that have one
    estimate = sum(estimates) / len(estimates) * len(paths)
    return min(100.0, 100.0 * throughput / estimate)
