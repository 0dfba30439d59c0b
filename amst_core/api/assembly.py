"""From settings to the parts of a session, the same on both sides."""

from __future__ import annotations

from ..congestion import CongestionPolicy
from ..control.handshake import Terms
from ..engine import Limits
from ..files.journal import Fsync
from ..files.partial import PartialPolicy
from ..interfaces import Advertisement, LaneTimeouts
from ..memory import MemoryBudget, MemoryShare
from ..modes import Profile
from ..session.core import SessionCore
from ..session.session import SessionLimits
from ..settings.values import Settings


def make_budget(settings: Settings, *, sessions: int = 1) -> MemoryBudget:
    """The memory of a side that has at most so many sessions at once."""
    return MemoryBudget(
        settings.limits.memory,
        max_message=settings.limits.max_message,
        max_open=settings.limits.open_transfers,
        chunk_size=settings.transport.amst.chunk_size,
        sessions=sessions,
    )


def own_terms(memory: MemoryShare, advertised: tuple[Advertisement, ...] = ()) -> Terms:
    """What this side offers: what it has memory for, and how it can be reached."""
    return Terms(memory.max_chunk, memory.max_open, memory.initial_credit, advertised)


def make_core(
    settings: Settings,
    memory: MemoryShare,
    peer_terms: Terms,
    *,
    peer: str,
    is_opener: bool,
    congestion: CongestionPolicy,
    profile: Profile,
) -> SessionCore:
    """The core of a session, which closes ``memory`` when it ends."""
    core = SessionCore(
        peer=peer,
        is_opener=is_opener,
        local=Limits(memory.max_chunk, memory.max_open, memory.initial_credit),
        remote=peer_limits(peer_terms),
        memory=memory,
        max_message=settings.limits.max_message,
        profile=profile,
        park_timeout_s=settings.limits.handshake_timeout,
        session_timeout_s=settings.limits.session_timeout,
        fsync=Fsync(settings.files.fsync),
        congestion=congestion,
        paced=settings.transport.amst.pacing_enabled,
    )
    core.limit_rate(settings.transport.amst.pacing_rate or None)
    return core


def peer_limits(terms: Terms) -> Limits:
    """What the peer takes; raises `ProtocolError` when that makes no sense."""
    return Limits(terms.max_chunk, terms.max_open, terms.initial_credit)


def session_limits(settings: Settings) -> SessionLimits:
    amst = settings.transport.amst
    return SessionLimits(
        max_message=settings.limits.max_message,
        max_streams=amst.max_streams,
        timeout_s=settings.limits.session_timeout,
        check_interval_s=amst.health_check_interval,
        stuck_s=amst.read_timeout,
        partials=partial_policy(settings),
    )


def partial_policy(settings: Settings) -> PartialPolicy:
    return PartialPolicy(keep_s=settings.files.keep_partial)


def lane_timeouts(settings: Settings) -> LaneTimeouts:
    amst = settings.transport.amst
    return LaneTimeouts(read_s=amst.read_timeout, write_s=amst.write_timeout)
