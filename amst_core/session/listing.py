"""Lists of what lies at a peer: both ends of the operation LIST, which goes page by page so that nothing is held long.

The asker names where it is, so the answering side keeps nothing that it must; what a page says is not believed before
it was checked, as the peer may say anything and go on for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from ..errors import ProtocolError, error_from_kind
from ..files.entries import Entry, WalkError, display_path, from_attributes, split_path, to_attributes
from ..wire import requests as ops
from ..wire.fields import AttributeValue
from .requests import Requests

_MOST_WORDS: Final = 1000
"""Characters of the reason why an entry cannot be told."""


def describe(found: Entry | WalkError) -> dict[str, AttributeValue]:
    """One entry as LIST tells it."""
    if isinstance(found, WalkError):
        error = found.error
        return {ops.PATH: found.path, ops.KIND: error.kind, ops.MESSAGE: error.message[:_MOST_WORDS]}
    return {**to_attributes(found), ops.SIZE: found.size}


def listed(requests: Requests, path: bytes, *, recursive: bool) -> Iterator[Entry | WalkError]:
    """Ask for page after page, each when the one before was used up; see `Session.list`."""
    pages = Pages(path, recursive=recursive)
    while not pages.ended:
        with requests.list_turn:
            reply = requests.ask(ops.LIST, pages.wish()).wait()
        yield from pages.read(reply)


class Pages:
    """Where the asker is in a list; what is asked and answered goes by whatever way suits the caller."""

    def __init__(self, path: bytes, *, recursive: bool) -> None:
        self._path = path
        self._recursive = recursive
        self._after = b""
        self._last: list[bytes] | None = None  # components of the path that came last
        self.ended = False

    def wish(self) -> dict[str, AttributeValue]:
        """What to ask for the next page with."""
        return {ops.PATH: self._path, ops.AFTER: self._after, ops.RECURSIVE: self._recursive}

    def read(self, reply: Mapping[str, AttributeValue]) -> Iterator[Entry | WalkError]:
        """The entries of a page, to be used up before the next `wish`.

        Raises:
            ProtocolError: it does not go on where the last one ended.
        """
        page, more = reply.get(ops.ENTRIES), reply.get(ops.MORE)
        if not isinstance(page, bytes) or type(more) is not bool:
            raise ProtocolError("the answer to a list lacks its entries, or does not say whether there are more")
        if more and not page:
            raise ProtocolError("the answer to a list says that there are more entries and has none")
        for attributes in ops.decode_entries(page):
            found = _read(attributes)
            here = found.path.split(b"/") if found.path else []
            if here <= self._last if self._last is not None else here:
                begins = "begins with" if self._last is None else f"goes on after {display_path(self._after)} with"
                raise ProtocolError(f"a list {begins} {display_path(found.path)}")
            if not self._recursive and len(here) > 1:
                raise ProtocolError(f"{display_path(found.path)} in the list of one directory")
            self._after, self._last = found.path, here
            yield found
        self.ended = not more


def _read(attributes: Mapping[str, AttributeValue]) -> Entry | WalkError:
    kind, message, path = (attributes.get(key) for key in (ops.KIND, ops.MESSAGE, ops.PATH))
    if kind is not None:
        if not isinstance(kind, str) or not isinstance(message, str) or not isinstance(path, bytes):
            raise ProtocolError("an entry of a list that could not be read lacks its path, kind or message")
        split_path(path)
        return WalkError(path, error_from_kind(kind, message))
    size = attributes.get(ops.SIZE)
    if type(size) is not int:
        raise ProtocolError("an entry of a list without a size")
    return from_attributes(attributes, size=size)
