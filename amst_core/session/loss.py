"""How much of what was sent lately had to go again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..interfaces import PathStats

MIN_SEGMENTS: Final = 1000
"""Segments that must have been sent before a loss rate means anything."""


class LossMeter:
    """The share of segments that were sent again since the last answer, over the lanes that are there for both.

    It answers about ``least`` segments or more.
    """

    def __init__(self, least: int = MIN_SEGMENTS) -> None:
        self._least = least
        self._before: dict[int, tuple[int, int]] = {}
        self._sent = 0
        self._again = 0

    def look(self, paths: Mapping[int, PathStats]) -> float | None:
        """The statistics of the lanes now, by lane; None while too little was sent to tell."""
        now = {
            lane: (path.segments_sent, path.segments_retransmitted)
            for lane, path in paths.items()
            if path.segments_sent is not None and path.segments_retransmitted is not None
        }
        for lane, (sent, again) in now.items():
            sent_before, again_before = self._before.get(lane, (sent, again))
            self._sent += sent - sent_before
            self._again += again - again_before
        self._before = now
        if self._sent < self._least:
            return None
        loss = self._again / self._sent
        self._sent = self._again = 0
        return loss
