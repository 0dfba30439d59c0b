"""Idle told from dead: every lane is asked for a sign of life now and then, and dropped when its path gives none.

Silence alone proves nothing: a lane may be idle, in the middle of a long chunk, or its peer busy with a disk. So
what counts is progress: frames heard, or bytes that the transport saw acknowledged or received. A lane on which
neither moves while bytes wait to be acknowledged has lost its path. No payload is touched: PING and PONG are
frames of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import DeadlineError
from ..wire.frames import FrameHeader, FrameKind

if TYPE_CHECKING:
    from .core import SessionCore
    from .lanes import LaneWorker

_JUDGE_EVERY_S: Final = 0.25

_HURRY_S: Final = 5.0
"""After a failure, paths get so long to move instead of the interval: what broke one may have broken more."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A PING under way: since when nothing has moved, and where the path's counters stood then."""

    since: float
    patience_s: float
    progress: tuple[int | None, int | None]


class LaneMonitor:
    """Checks the lanes of one session every ``interval_s``, and at once after an error. Driven by the control loop.

    ``stuck_s``: a lane whose peer's kernel takes everything, but whose peer answers nothing for so long, is stuck.
    """

    def __init__(self, core: SessionCore, *, interval_s: float, stuck_s: float) -> None:
        self._core = core
        self._interval_s = interval_s
        self._stuck_s = stuck_s
        self._next_round: float | None = None
        self._next_look = 0.0
        self.checked_at: float | None = None

    def tick(self, now: float) -> None:
        """Ask and judge what is due at ``now`` (monotonic seconds)."""
        core = self._core
        if self._next_round is None:
            self._next_round = now + self._interval_s
        hurry = core.lanes_in_doubt
        if hurry or now >= self._next_round:
            core.lanes_in_doubt = False
            self._next_round = now + self._interval_s
            self.checked_at = now
            self._ask(now, min(self._interval_s, _HURRY_S) if hurry else self._interval_s)
        if now >= self._next_look:
            self._next_look = now + _JUDGE_EVERY_S
            for lane in list(core.lanes.values()):
                self._judge(lane, now)

    @property
    def deadline(self) -> float:
        """When to call `tick` again, even if nothing happens."""
        if any(lane.probe is not None for lane in list(self._core.lanes.values())):
            return self._next_look
        return self._next_round if self._next_round is not None else 0.0

    def _ask(self, now: float, patience_s: float) -> None:
        for lane in list(self._core.lanes.values()):
            probe = lane.probe
            if probe is not None:
                if patience_s < probe.patience_s:
                    lane.probe = Probe(probe.since, patience_s, probe.progress)
                continue
            lane.probe = Probe(now, patience_s, _progress(lane))
            with self._core.lock:
                lane.send_frame_locked(FrameHeader(FrameKind.PING, offset=int(now * 1e6)))

    def _judge(self, lane: LaneWorker, now: float) -> None:
        probe = lane.probe
        if probe is None or lane.dead:
            return
        if lane.heard_at > probe.since:
            lane.probe, lane.suspect = None, False
            return
        silent_s = now - probe.since
        lane.suspect = silent_s > probe.patience_s / 2
        if silent_s < probe.patience_s:
            return
        stats = lane.lane.path_stats()
        progress = (stats.bytes_acknowledged, stats.bytes_received)
        if progress != probe.progress:
            lane.probe = Probe(now, probe.patience_s, progress)
        elif stats.bytes_waiting:
            self._drop(lane, f"nothing was acknowledged on it for {silent_s:.1f} s")
        elif silent_s >= self._stuck_s:
            self._drop(lane, f"the peer answered nothing on it for {silent_s:.0f} s")

    def _drop(self, lane: LaneWorker, why: str) -> None:
        error = DeadlineError(why, peer=self._core.peer, stream=lane.id)
        self._core.lane_ended(lane, error)


def _progress(lane: LaneWorker) -> tuple[int | None, int | None]:
    stats = lane.lane.path_stats()
    return stats.bytes_acknowledged, stats.bytes_received
