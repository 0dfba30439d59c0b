"""Which lanes are at work: on a short path no more than the processor serves, for the rest would only contend."""

from __future__ import annotations

import os
from typing import Final

SHORT_PATH_S: Final = 0.001
"""Round trip of a path on which one lane goes as fast as it is served."""

LEAST: Final = 4
"""Lanes that are at work at once whatever the processor, if there are as many."""

PER_CORE: Final = 2

STUCK_S: Final = 0.1
"""Who has had its chunk for so long waits for the network, and keeps nobody else from the processor."""


class Crew:
    """The lanes that have a chunk to send right now. The caller serialises calls."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}  # by lane, the one that has waited longest first
        self._limit: int | None = None

    def found_path(self, min_rtt_s: float | None) -> None:
        """So long is the path; None: not known."""
        if min_rtt_s is not None and min_rtt_s < SHORT_PATH_S:
            self._limit = max(LEAST, PER_CORE * len(os.sched_getaffinity(0)))
        else:
            self._limit = None

    def began(self, lane: int, now: float) -> None:
        """``lane`` has a chunk to send."""
        self._since[lane] = now

    def ended(self, lane: int) -> None:
        """It has none any more."""
        self._since.pop(lane, None)

    def is_full(self, now: float) -> bool:
        """More lanes at work would not help."""
        if self._limit is None or len(self._since) < self._limit:
            return False
        at_work = len(self._since)
        for since in self._since.values():
            if now - since < STUCK_S:
                break
            at_work -= 1
        return at_work >= self._limit
