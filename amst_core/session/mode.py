"""Which mode a session is in: what the path calls for, what somebody has said, and what both sides agree on.

The side that opened the session decides (requirements F): it proposes a mode, the other one enters it and answers, and
then it enters it too. What the acceptor finds, it suggests; what is forced there it insists on. Nothing that is sent
waits for any of this: lanes go on, and what they carry is the same in all modes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from ..errors import DeadlineError, ProtocolError, RefusedError
from ..interfaces import Mode, ModeDecision, ModeDetector
from ..modes import Profile, ThresholdDetector
from ..pacing import Range
from ..wire.messages import Accept, Propose
from .core import SessionCore
from .path import SAMPLE_S, PathMeter

_log = logging.getLogger("amst.session")

_EVIDENCE: Final = 5
"""Samples with something sent that a side must have of the path before what it finds counts."""

ASKED: Final = "asked for"
RELEASED: Final = "released"


@dataclass(frozen=True, slots=True)
class ModePlan:
    """What decides about a session's mode on this side.

    Attributes:
        begin: the profile that it begins with.
        why: why that.
        forced: the mode that somebody has asked for; None: the path decides.
        detector: None: the mode is that of the beginning, and what the opener proposes.
        check_every_s: how often the detector's word counts.
        profile: of what this side sends in a mode. The acceptor is told how many streams the opener wishes for, and
            has as many as its settings allow.
    """

    begin: Profile
    why: str
    forced: Mode | None
    detector: ModeDetector | None
    check_every_s: float
    profile: Callable[[Mode, Range | None], Profile]


@dataclass(frozen=True, slots=True)
class ModeState:
    """The mode of a session: since when (monotonic seconds) and why, and how often it has changed.

    ``forced``: by this side; ``forced_by_peer``: by the other. ``tier`` is 1–4 by the round trip, None while unknown.
    """

    mode: Mode
    reason: str
    since: float
    switches: int
    forced: Mode | None
    forced_by_peer: bool
    tier: int | None


class ModeKeeper:
    """Keeps the mode of one session. ``changed`` is told of each change: the mode before, the new one, and why."""

    def __init__(self, core: SessionCore, plan: ModePlan, changed: Callable[[Mode, Mode, str], None]) -> None:
        self._core = core
        self._plan = plan
        self._told = changed
        self._detector = plan.detector
        self._meter = PathMeter()
        self._lock = threading.Lock()
        self._moved = threading.Condition(self._lock)
        now = time.monotonic()
        self._state = ModeState(plan.begin.mode, plan.why, now, 0, plan.forced, forced_by_peer=False, tier=None)
        self._epoch = 0
        self._pending: Propose | None = None  # the opener's, without an answer yet
        self._decision: ModeDecision | None = None
        self._sampled_at = now
        self._check_at = now + plan.check_every_s
        self._counted = (0, 0)  # bytes sent and received, at the last check
        self._evidence = 0
        self._sent_before = 0

    @property
    def state(self) -> ModeState:
        """The mode now."""
        return self._state

    # ---- by somebody's word ------------------------------------------------------------------------

    def force(self, mode: Mode, timeout: float) -> None:
        """Be in ``mode`` until `release`; returns when both sides are.

        Raises:
            RefusedError: the peer is the server, and another mode is forced there.
            DeadlineError: the peer has not answered within ``timeout`` seconds.
            AmstError: the session has ended.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._core_is_open()
            self._state = replace(self._state, forced=mode)
            if self._core.is_opener:
                self._propose(mode, ASKED)
            else:
                self._suggest(mode, ASKED)
            while self._state.mode is not mode or self._pending is not None:
                if self._state.forced is not mode:
                    return  # somebody else has said something else meanwhile
                if self._core.is_opener and self._pending is None and self._state.forced_by_peer:
                    raise RefusedError(
                        f"{self._core.peer} keeps to {self._state.mode.value}, which is forced there",
                        peer=self._core.peer,
                    )
                self._core_is_open()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineError(
                        f"{self._core.peer} has not answered the change to {mode.value} within {timeout:g} s",
                        peer=self._core.peer,
                    )
                self._moved.wait(min(left, 1.0))

    def release(self) -> None:
        """Let the path decide again, as far as this side goes; until the next check the mode stays."""
        with self._lock:
            if self._state.forced is None:
                return
            self._state = replace(self._state, forced=None)
            if self._core.is_opener:
                self._propose(self._on_its_way, RELEASED)
            else:
                self._suggest(self._state.mode, RELEASED)

    def begin(self) -> None:
        """The session can exchange messages: insist on what is forced here."""
        with self._lock:
            forced = self._state.forced
            if forced is not None and not self._core.is_opener:
                self._suggest(forced, ASKED)

    # ---- by the path -------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Look at the path, and at what that means, when it is time; cheap when called too often."""
        if self._detector is None or now - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = now
        self._decision = self._decide(self._detector, now)
        sent, received = self._core.moved()
        self._evidence += sent > self._sent_before
        self._sent_before = sent
        with self._lock:
            if self._decision.tier != self._state.tier:
                self._state = replace(self._state, tier=self._decision.tier)
            if now < self._check_at:
                return
            self._check_at = now + self._plan.check_every_s
            since = sent - self._counted[0], received - self._counted[1]
            self._counted = sent, received
            if since[0] < since[1] + (not self._core.is_opener):
                self._evidence = 0  # it is the other one that knows
            elif self._evidence >= _EVIDENCE:
                self._follow(self._decision)

    def _decide(self, detector: ModeDetector, now: float) -> ModeDecision:
        core = self._core
        paths = {id: worker.lane.path_stats() for id, worker in list(core.lanes.items())}
        sample = self._meter.sample(paths, now, limited=core.is_rate_limited)
        try:
            decision = detector.update(sample, now=now)
            if not isinstance(decision, ModeDecision) or not isinstance(decision.mode, Mode):
                raise TypeError(f"update returned {decision!r}")
        except Exception:  # anybody's code
            _log.exception("%s: mode detector %s failed; the core's own decides", core.peer, detector.name)
            self._detector = ThresholdDetector()
            return self._detector.update(sample, now=now)
        return decision

    def _follow(self, decision: ModeDecision) -> None:
        state = self._state
        if state.forced is not None or state.forced_by_peer or decision.mode is state.mode:
            return
        if self._core.is_opener:
            self._want(decision.mode, decision.reason)
        else:
            self._suggest(decision.mode, decision.reason)

    # ---- with the peer -----------------------------------------------------------------------------

    def proposed(self, message: Propose) -> None:
        """The peer says PROPOSE (on the control loop's thread). Raises `ProtocolError` when that makes no sense."""
        mode = _mode(message.mode)
        with self._lock:
            self._state = replace(self._state, forced_by_peer=message.forced)
            if self._core.is_opener:
                if message.forced or (self._state.forced is None and self._detector is not None):
                    self._want(mode, f"{self._core.peer}: {message.reason}")
                elif self._state.forced is not None:
                    self._want(self._state.forced, ASKED)  # which the peer's word may have overruled until now
                self._moved.notify_all()
                return
            if message.epoch <= self._epoch:
                raise ProtocolError(f"PROPOSE of epoch {message.epoch} after {self._epoch}")
            if not 1 <= message.least <= message.streams <= message.most:
                raise ProtocolError(
                    f"PROPOSE of {message.streams} streams, within {message.least} and {message.most}"
                )
            self._epoch = message.epoch
            wished: Range | None = Range(message.streams, message.least, message.most)
            reason, forced = message.reason, self._state.forced
            if forced is not None and forced is not mode:
                mode, wished, reason = forced, None, "it is forced there"
            change = self._enter(mode, reason, self._plan.profile(mode, wished))
            self._core.tell(Accept(message.epoch, mode.value, forced is not None, reason))
        self._tell(change)

    def accepted(self, message: Accept) -> None:
        """The acceptor says ACCEPT (on the control loop's thread). Raises `ProtocolError` when that makes no sense."""
        mode = _mode(message.mode)
        change = None
        with self._lock:
            if not self._core.is_opener or not 0 < message.epoch <= self._epoch:
                raise ProtocolError(f"ACCEPT of epoch {message.epoch}, which was not proposed")
            self._state = replace(self._state, forced_by_peer=message.forced)
            pending = self._pending
            if pending is not None and pending.epoch == message.epoch:
                self._pending = None
                reason = pending.reason if mode.value == pending.mode else f"{self._core.peer}: {message.reason}"
                change = self._enter(mode, reason, self._plan.profile(mode, None))
            self._moved.notify_all()
        self._tell(change)

    def end(self) -> None:
        """The session has ended: whoever waits looks again."""
        with self._lock:
            self._moved.notify_all()

    def _want(self, mode: Mode, reason: str) -> None:
        """The opener: propose ``mode`` unless that is where the session is, or is on its way to (the lock held)."""
        if mode is not self._on_its_way:
            self._propose(mode, reason)

    @property
    def _on_its_way(self) -> Mode:
        """The mode that the opener will be in when what it has proposed is accepted."""
        return self._state.mode if self._pending is None else Mode(self._pending.mode)

    def _propose(self, mode: Mode, reason: str) -> None:
        """The opener: have both sides enter ``mode``, or know who forces it (the lock held)."""
        streams = self._plan.profile(mode, None).streams
        self._epoch += 1
        self._pending = Propose(
            self._epoch,
            mode.value,
            self._state.forced is not None,
            streams.start,
            streams.least,
            streams.most,
            reason,
        )
        self._core.tell(self._pending)

    def _suggest(self, mode: Mode, reason: str) -> None:
        """The acceptor: ask the opener to propose ``mode`` (the lock held)."""
        self._core.tell(Propose(self._epoch, mode.value, self._state.forced is not None, 0, 0, 0, reason))

    def _enter(self, mode: Mode, reason: str, profile: Profile) -> tuple[Mode, Mode, str] | None:
        """Be in ``mode`` (the lock held); what changed."""
        before = self._state
        if mode is before.mode:
            if reason == ASKED:
                self._state = replace(before, reason=reason)
            return None
        self._core.adopt(profile)
        self._state = replace(
            before, mode=mode, reason=reason, since=time.monotonic(), switches=before.switches + 1
        )
        self._moved.notify_all()
        return before.mode, mode, reason

    def _tell(self, change: tuple[Mode, Mode, str] | None) -> None:
        if change is None:
            return
        old, new, why = change
        _log.info(
            "mode changed", extra={"old_mode": old.value, "new_mode": new.value, "why": why, "peer": self._core.peer}
        )
        self._told(old, new, why)

    def _core_is_open(self) -> None:
        with self._core.lock:
            self._core.check_open_locked()


def _mode(word: str) -> Mode:
    try:
        return Mode(word)
    except ValueError:
        raise ProtocolError(f"mode {word[:32]!r} is unknown") from None
