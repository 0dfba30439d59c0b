"""Exit codes: what a script can rely on to tell one failure from another (docs/cli.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..errors import AmstError

OK: Final = 0
OTHER: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
CONNECT: Final = 4
INTERRUPTED: Final = 5
REFUSED: Final = 6
INTEGRITY: Final = 7
UNAVAILABLE: Final = 8
SIGINT: Final = 130
SIGPIPE: Final = 141
SIGTERM: Final = 143

_BY_KIND: Final = {
    "usage": USAGE,
    "config": USAGE,
    "not_found": NOT_FOUND,
    "connect": CONNECT,
    "auth": REFUSED,
    "refused": REFUSED,
    "integrity": INTEGRITY,
    "unavailable": UNAVAILABLE,
}

_SESSION_LOST: Final = frozenset({"broken", "timeout", "protocol", "closed"})
"""Kinds that end a session: 4 or 5, by whether anything had arrived."""

_WORST_FIRST: Final = (INTEGRITY, REFUSED, INTERRUPTED, NOT_FOUND)


def for_error(error: AmstError, *, acknowledged: bool) -> int:
    """The exit code of a command that ``error`` ended; ``acknowledged``: a byte had arrived before."""
    if error.kind in _SESSION_LOST:
        return INTERRUPTED if acknowledged else CONNECT
    return _BY_KIND.get(error.kind, OTHER)


def for_failures(kinds: Iterable[str]) -> int:
    """The exit code of a copy in which single files failed: the gravest failure counts, 0 without any."""
    codes = {INTERRUPTED if kind in _SESSION_LOST or kind == "busy" else _BY_KIND.get(kind, OTHER) for kind in kinds}
    return next((code for code in _WORST_FIRST if code in codes), OTHER if codes else OK)
