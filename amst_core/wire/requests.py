"""Operations that travel in REQUEST, and their attributes (docs/wire-format.md, "Requests")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from .fields import ATTRIBUTES, AttributeValue, Reader

STAT: Final = "stat"
"""``path`` → REPLY with the entry's attributes and ``size``, kind ``not_found`` when there is none."""

LOOK: Final = "look"
"""``path`` → REPLY with ``present``: whether anything is there, whole or begun, that a copy could go on from."""

LIST: Final = "list"
"""``path``, ``after``, ``recursive`` → REPLY with a page of ``entries``, and ``more``: whether to ask for the next."""

FETCH: Final = "fetch"
"""``path``, ``hold`` → one OPEN per entry below it, each naming the request, files on hold if so wished; then REPLY."""

MEASURE: Final = "measure"
"""``path`` → REPLY with ``total_bytes`` and ``total_files`` of what FETCH would send."""

PACE: Final = "pace"
"""``rate`` → an empty REPLY: send at most so many payload bytes per second in this session, 0: as fast as may be."""

PATH: Final = "path"
SIZE: Final = "size"
PRESENT: Final = "present"
RATE: Final = "rate"
TOTAL_BYTES: Final = "total_bytes"
TOTAL_FILES: Final = "total_files"
AFTER: Final = "after"
RECURSIVE: Final = "recursive"
ENTRIES: Final = "entries"
MORE: Final = "more"
KIND: Final = "kind"
MESSAGE: Final = "message"

PAGE_BYTES: Final = 64 << 10
"""A page of LIST ends with the entry that reaches this size: so many pages wait unconfirmed (SEEN) without harm."""


def encode_entry(attributes: Mapping[str, AttributeValue]) -> bytes:
    """One of the ``entries`` of LIST; they follow each other without anything between."""
    encoded: bytes = ATTRIBUTES.encode(attributes)
    return encoded


def decode_entries(data: bytes) -> Iterator[Mapping[str, AttributeValue]]:
    """The attributes of each of the ``entries`` of LIST, decoded only when its turn comes.

    Raises:
        ProtocolError: the bytes are no such entries.
    """
    reader = Reader(data)
    while reader.left():
        yield ATTRIBUTES.decode(reader)
