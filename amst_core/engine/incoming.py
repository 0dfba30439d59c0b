"""The receiving side's ledger: which spans of each transfer are held, which a lane is filling right now."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..errors import ProtocolError
from ..wire.fields import Span
from ..wire.messages import SIZE_UNKNOWN, Open
from .intervals import IntervalSet


class Verdict(enum.Enum):
    """Where an arriving chunk goes."""

    FILL = "fill"  # straight into its place; this lane is now its only writer
    COPY = "copy"  # a duplicate: aside, verified, then shown to `Engine.copied`
    PARK = "park"  # its OPEN has not arrived yet: wait, then ask again


@dataclass(slots=True, eq=False)
class Placement:
    """The engine's answer to a DATA header; ``end`` is exclusive.

    Whoever has a FILL must `claim` the right to write before touching the place. Until then, a copy that comes
    whole over another lane may take the span over: then the claim fails, and the chunk is a copy itself.
    """

    verdict: Verdict
    transfer: int
    start: int
    end: int
    lane: int
    in_place: bool = False
    _right: list[None] = field(default_factory=lambda: [None])

    def claim(self, *, in_place: bool = False) -> bool:
        """Take the right to write; true for the first who asks. Atomic, from any thread.

        ``in_place``: the lane writes as it receives, for as long as that takes.
        """
        self.in_place = self.in_place or in_place
        try:
            self._right.pop()
        except IndexError:
            return False
        return True


class Incoming:
    """One transfer this side receives.

    A span is in one of three states: missing, being filled by exactly one lane (invariant 9), or held.
    """

    __slots__ = (
        "accepted", "claimed", "dropped_copies", "filling", "held", "holes", "limit", "on_hold", "open", "ordered",
        "prefix_told", "told", "total", "verdict", "window",
    )  # fmt: skip

    def __init__(self, opened: Open, *, limit: int, on_hold: bool, holes: tuple[Span, ...] = ()) -> None:
        self.open = opened
        self.on_hold = on_hold  # the sender waits for OPENED
        self.holes = holes  # zeros that are not sent: held as soon as it is accepted
        self.claimed = False  # a whole file of ours is compared with the sender's
        self.held = IntervalSet()
        self.filling: dict[int, Placement] = {}  # by start
        self.total: int | None = None  # set by END
        self.limit = limit  # highest offset the peer may send, as told in CREDIT
        self.window: int | None = None  # credit follows what is held, by this much; None: granted by hand
        self.accepted = False
        self.ordered = False  # whoever takes it wants to hear how far it goes without a gap
        self.prefix_told = 0
        self.told = False  # TransferWhole told
        self.verdict: tuple[str, str] | None = None
        self.dropped_copies: list[Span] = []

    @property
    def size(self) -> int | None:
        return None if self.open.size == SIZE_UNKNOWN else self.open.size

    def check_span(self, start: int, end: int) -> None:
        """Refuse a span that no honest peer would send."""
        bound = self.size if self.total is None else self.total
        if bound is not None and end > bound:
            raise ProtocolError(f"span {start}–{end} passes the end of transfer {self.open.transfer} ({bound} bytes)")
        if end > self.limit:
            raise ProtocolError(f"span {start}–{end} of transfer {self.open.transfer} passes its credit, {self.limit}")

    def is_free(self, start: int, end: int) -> bool:
        """Neither held nor being filled, in whole or in part."""
        if self.held.overlaps(start, end):
            return False
        return not self._is_filled(start, end)

    def copies_left_missing(self, start: int, end: int) -> list[Span]:
        """Copies dropped because of ``[start, end)`` whose bytes are now neither held nor being filled."""
        touched = [c for c in self.dropped_copies if c[0] < end and start < c[1]]
        missing: list[Span] = []
        for copy in touched:
            if self._is_filled(*copy):
                continue  # another lane still fills a part: decided when it ends
            self.dropped_copies.remove(copy)
            missing.extend(self.held.gaps(*copy))
        return missing

    def _is_filled(self, start: int, end: int) -> bool:
        return any(start < fill.end and fill.start < end for fill in self.filling.values())

    def take_over(self, start: int, end: int) -> list[Placement]:
        """Take ``[start, end)`` from lanes that have not begun to write to their places; who cannot give way."""
        stuck = []
        for fill in [f for f in self.filling.values() if start < f.end and f.start < end]:
            if fill.claim():
                del self.filling[fill.start]
            else:
                stuck.append(fill)
        return stuck

    def is_whole(self) -> bool:
        return self.total is not None and self.held.total == self.total and not self.filling

    def set_total(self, total: int) -> None:
        if self.total is not None or (self.size is not None and total != self.size) or total < self.held.end:
            raise ProtocolError(f"END of transfer {self.open.transfer} at {total} contradicts what came before")
        if any(fill.end > total for fill in self.filling.values()):
            raise ProtocolError(f"END of transfer {self.open.transfer} at {total} cuts a span in flight")
        self.total = total

    def next_limit(self) -> int | None:
        """The credit to tell the peer now, None while the old one is good enough."""
        if self.window is None:
            return None
        limit = self.held.total + self.window
        if self.size is not None:
            limit = min(limit, self.size)
        if limit <= self.limit or (limit - self.limit < self.window // 4 and limit != self.size):
            return None
        self.limit = limit
        return limit
