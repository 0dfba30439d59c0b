"""From settings to the parts of a session, the same on both sides."""

from __future__ import annotations

from typing import Final

from ..control.handshake import Terms
from ..engine import Limits
from ..interfaces import Advertisement, LaneTimeouts
from ..session.core import SessionCore
from ..settings.values import Settings

MAX_INITIAL_CREDIT: Final = 64 << 10
"""Credit that comes with each OPEN: a message or file of this size needs no round trip for it."""


def own_terms(settings: Settings, advertised: tuple[Advertisement, ...] = ()) -> Terms:
    """What this side offers: its limits, and how it can be reached."""
    limits = settings.limits
    # messages not granted yet may fill this much each, so all of them together must stay a small part
    initial_credit = max(1024, min(MAX_INITIAL_CREDIT, limits.memory // 8 // limits.open_transfers))
    return Terms(
        max_chunk=max(settings.transport.amst.chunk_size, 1 << 20),
        max_open=settings.limits.open_transfers,
        initial_credit=initial_credit,
        transports=advertised,
    )


def make_core(settings: Settings, peer_terms: Terms, *, peer: str, is_opener: bool) -> SessionCore:
    own = own_terms(settings)
    return SessionCore(
        peer=peer,
        is_opener=is_opener,
        local=Limits(own.max_chunk, own.max_open, own.initial_credit),
        remote=Limits(peer_terms.max_chunk, peer_terms.max_open, peer_terms.initial_credit),
        memory=settings.limits.memory,
        max_message=settings.limits.max_message,
        chunk_size=settings.transport.amst.chunk_size,
        park_timeout_s=settings.limits.handshake_timeout,
    )


def lane_timeouts(settings: Settings) -> LaneTimeouts:
    amst = settings.transport.amst
    return LaneTimeouts(read_s=amst.read_timeout, write_s=amst.write_timeout)
