"""From settings to the parts of a session, the same on both sides."""

from __future__ import annotations

from ..control.handshake import Terms
from ..engine import Limits
from ..interfaces import Advertisement, LaneTimeouts
from ..session.core import INITIAL_CREDIT, SessionCore
from ..settings.values import Settings


def own_terms(settings: Settings, advertised: tuple[Advertisement, ...] = ()) -> Terms:
    return Terms(
        max_chunk=max(settings.transport.amst.chunk_size, 1 << 20),
        max_open=settings.limits.open_transfers,
        initial_credit=INITIAL_CREDIT,
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
