"""What the engine tells the session. Each event is told once, in the order it came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..wire.messages import Open


@dataclass(frozen=True, slots=True)
class TransferOffered:
    """The peer opened a transfer: answer with `Engine.accept` or `Engine.refuse`."""

    open: Open


@dataclass(frozen=True, slots=True)
class PrefixGrew:
    """Of a transfer that was accepted as ``ordered``, all bytes up to ``end`` are held and verified."""

    transfer: int
    end: int


@dataclass(frozen=True, slots=True)
class TransferWhole:
    """Every byte is held and verified: make it available, then call `Engine.finish` (or `refuse`)."""

    transfer: int
    total: int


@dataclass(frozen=True, slots=True)
class TransferDropped:
    """An incoming transfer ended without success and no lane holds a view of its place any more."""

    transfer: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class SourceDrained:
    """Each byte of an outgoing transfer has been read once, or cannot change: check it, then `Engine.end`."""

    transfer: int


@dataclass(frozen=True, slots=True)
class SourceReleased:
    """Of a transfer opened with an unknown size, bytes up to ``end`` are held by the peer and no lane reads them."""

    transfer: int
    end: int


@dataclass(frozen=True, slots=True)
class Progress:
    """The peer holds ``acknowledged`` bytes of an outgoing transfer."""

    transfer: int
    acknowledged: int


@dataclass(frozen=True, slots=True)
class TransferDone:
    """The peer's verdict (or our reset) on an outgoing transfer; no lane reads its source any more.

    An empty ``kind`` is success.
    """

    transfer: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class SameAsked:
    """The peer has a whole file with this SHA-256 under the name: compare, then call `Engine.answer_same`."""

    transfer: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class SameAnswered:
    """What the peer says to `Engine.claim`: adopt the file that is there (then `adopted`), or `accept` anew."""

    transfer: int
    same: bool


@dataclass(frozen=True, slots=True)
class LaneOvertaken:
    """A copy came sooner of what ``lane`` still writes to its place, or still sends from its source: it is stuck.

    Nothing else can take the memory from it: drop it.
    """

    lane: int


Event: TypeAlias = (
    TransferOffered | PrefixGrew | TransferWhole | TransferDropped | SourceDrained | SourceReleased | Progress
    | TransferDone | SameAsked | SameAnswered | LaneOvertaken
)  # fmt: skip
