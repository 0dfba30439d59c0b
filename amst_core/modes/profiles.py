"""What a mode means for a session: how many streams it begins with, and how long its chunks are (requirements B, D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..interfaces import Mode
from ..pacing import Range
from ..settings.values import Settings
from ..units import format_duration

FAR_S: Final = 0.050
"""A round trip above this is the internet's, as long as nothing more is known of the path (requirements F2)."""

EXPRESS: Final = 2
"""Streams that a hybrid session keeps for short transfers, if it has as many for the others."""

_INTERNET_LEAST: Final = 4
_INTERNET_MOST: Final = 16
_INTERNET_CHUNK: Final = 256 << 10
_INTERNET_LONGEST: Final = 512 << 10
_INTERNET_SHORTEST: Final = 16 << 10
_DATACENTER_LONGEST: Final = 4 << 20  # beyond, caches lose more than fewer hand-overs gain


@dataclass(frozen=True, slots=True)
class Profile:
    """``streams``: how many to begin with, and how many there may be; ``chunk_size`` bytes, on a fast path up to
    ``longest_chunk``.

    On one that loses much down to ``shortest_chunk``; None: loss changes nothing.
    """

    mode: Mode
    streams: Range
    chunk_size: int
    longest_chunk: int
    shortest_chunk: int | None


def first_mode(rtt_s: float | None) -> Mode:
    """The mode that a session begins with, by the round trip of its control connection."""
    return Mode.INTERNET if rtt_s is not None and rtt_s > FAR_S else Mode.DATACENTER


def first_reason(rtt_s: float | None) -> str:
    """Why that."""
    if rtt_s is None:
        return "the round trip is not known"
    where = "above" if rtt_s > FAR_S else "not above"
    return f"the round trip of {format_duration(rtt_s)} is {where} {format_duration(FAR_S)}"


def agreed_streams(wished: Range, settings: Settings) -> Range:
    """How many streams a server has for what it sends to a client: what that wishes for, within its own bounds."""
    most = settings.transport.amst.max_streams
    asked = max(1, wished.start)
    start = min(asked, most)
    if not settings.transport.amst.auto_tune:
        return Range(start, start, start)
    return Range(start, max(1, min(wished.least, start)), max(start, min(wished.most, most)))


def profile(mode: Mode, settings: Settings, *, streams: int | None = None, max_streams: int | None = None) -> Profile:
    """The profile of ``mode``; hybrid has the internet's, and streams for short transfers besides.

    Chunks are never longer than ``transport.amst.chunk_size_kb`` asks for at first.
    ``streams``: so many and no others; ``max_streams``: more than the mode has by itself, or fewer, as far as
    ``transport.amst.max_streams`` goes.
    """
    amst, modes = settings.transport.amst, settings.transport.modes
    internet = mode is not Mode.DATACENTER
    apart = EXPRESS if mode is Mode.HYBRID else 0
    if streams is not None:
        range = Range(streams, streams, streams)
    else:
        start = modes.internet_streams + apart if internet else modes.datacenter_streams
        usual = max(start, _INTERNET_MOST + apart if internet else amst.max_streams)
        most = min(amst.max_streams, usual if max_streams is None else max_streams)
        least = max(amst.min_streams, min(start, _INTERNET_LEAST + apart if internet else 1))
        start = min(start, most)
        range = Range(start, min(least, most), most) if amst.auto_tune else Range(start, start, start)
    if internet:
        # many small chunks: on a slow stream a long one holds up what comes after it
        chunk_size = min(amst.chunk_size, _INTERNET_CHUNK)
        return Profile(mode, range, chunk_size, _INTERNET_LONGEST, _INTERNET_SHORTEST)
    return Profile(mode, range, amst.chunk_size, _DATACENTER_LONGEST, None)
