"""What a mode means for a session: how many streams it begins with, and how long its chunks are (requirements B, D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..interfaces import Mode
from ..settings.values import Settings

FAR_S: Final = 0.050
"""A round trip above this is the internet's, as long as nothing more is known of the path (requirements F2)."""

_INTERNET_CHUNK: Final = 256 << 10
_INTERNET_LONGEST: Final = 512 << 10
_INTERNET_SHORTEST: Final = 16 << 10
_DATACENTER_LONGEST: Final = 4 << 20  # beyond, caches lose more than fewer hand-overs gain


@dataclass(frozen=True, slots=True)
class Profile:
    """``streams`` to begin with; ``chunk_size`` bytes, on a fast path up to ``longest_chunk``.

    On one that loses much down to ``shortest_chunk``; None: loss changes nothing.
    """

    mode: Mode
    streams: int
    chunk_size: int
    longest_chunk: int
    shortest_chunk: int | None


def first_mode(rtt_s: float | None) -> Mode:
    """The mode that a session begins with, by the round trip of its control connection."""
    return Mode.INTERNET if rtt_s is not None and rtt_s > FAR_S else Mode.DATACENTER


def profile(mode: Mode, settings: Settings) -> Profile:
    """The profile of ``mode``; chunks are never longer than ``transport.amst.chunk_size_kb`` asks for at first."""
    amst, modes = settings.transport.amst, settings.transport.modes
    if mode is Mode.INTERNET:
        # many small chunks: on a slow stream a long one holds up what comes after it
        chunk_size = min(amst.chunk_size, _INTERNET_CHUNK)
        return Profile(mode, modes.internet_streams, chunk_size, _INTERNET_LONGEST, _INTERNET_SHORTEST)
    return Profile(mode, modes.datacenter_streams, amst.chunk_size, _DATACENTER_LONGEST, None)
