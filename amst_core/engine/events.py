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
    """Each byte of an outgoing transfer has been read once: check the source, then `Engine.end`."""

    transfer: int


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


Event: TypeAlias = TransferOffered | TransferWhole | TransferDropped | SourceDrained | Progress | TransferDone
