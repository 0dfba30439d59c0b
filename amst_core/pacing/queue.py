"""A queue of one's own told from that of others, and taken down."""

from __future__ import annotations

from typing import Final

from .flow import SessionFlow

STANDING: Final = 1.3
"""With so many times the path's product under way for a whole round trip, a queue is standing."""

GONE: Final = 1.05
DRAIN_GAIN: Final = 0.7
_LEAST_EXCESS_S: Final = 0.004
_MOST_TIMES: Final = 2.0
_MORE_ROUNDS: Final = 2.0
_BACK_OFF_S: Final = 4.0
_LONGEST_BACK_OFF_S: Final = 32.0


class QueueGuard:
    """Sees a standing queue and has it drained; one that draining does not shorten is made by others.

    Beside flows that fill the queue, draining hands them the path. So after an attempt in vain the guard lets the queue
    be for `_BACK_OFF_S`, twice as long after each further one.
    """

    def __init__(self) -> None:
        self._least = float("inf")  # of what was under way, in this round
        self._round = -1
        self._drain_until: float | None = None
        self._quiet_until = 0.0
        self._back_off_s = _BACK_OFF_S

    @property
    def draining(self) -> bool:
        """A queue is being taken down now."""
        return self._drain_until is not None

    def rest(self) -> None:
        """Nothing is sent for a while: there is no queue of ours."""
        self._least = float("inf")
        self._drain_until = None

    def look(self, flow: SessionFlow, now: float) -> bool:
        """Whether the queue is to be drained, at ``now``."""
        bdp = flow.bdp
        if not bdp:
            return False
        if self._drain_until is not None:
            if flow.in_flight <= GONE * bdp:
                self._drain_until = None
                self._back_off_s = _BACK_OFF_S
                self._least = float("inf")
            elif now > self._drain_until:
                self._drain_until = None
                self._quiet_until = now + self._back_off_s
                self._back_off_s = min(2 * self._back_off_s, _LONGEST_BACK_OFF_S)
            return self._drain_until is not None
        if flow.rounds != self._round:
            standing = self._least > max(STANDING * bdp, bdp + flow.bandwidth * _LEAST_EXCESS_S)
            if standing and self._least < float("inf") and now >= self._quiet_until:
                needs_s = (flow.in_flight - bdp) / ((1 - DRAIN_GAIN) * flow.bandwidth)
                self._drain_until = now + _MOST_TIMES * needs_s + _MORE_ROUNDS * flow.min_rtt_s
            self._round = flow.rounds
            self._least = float("inf")
        self._least = min(self._least, flow.in_flight)
        return self._drain_until is not None
