"""What lies below a directory, in order and from any point of it on: for lists that are asked for page by page.

`Root.walk` serves copies: each directory after all that is in it. Here each comes before, and memory is bounded
however many names a directory has: so many are kept of it, and it is read again for those behind.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Final

from ..errors import AmstError, NotFoundError, error_from_os
from .entries import HIDDEN_PREFIX, Entry, EntryType, WalkError, display_path, join_path, split_path
from .root import Root

NAMES_KEPT: Final = 4096
"""Names that are taken from a directory at a time."""

_NAMES_HELD: Final = 4 * NAMES_KEPT
"""Names in all levels of one listing: beyond it those of the outer ones are dropped, and read again when needed."""


@dataclass(slots=True)
class _Level:
    """A directory that a listing is inside of: ``names`` are the next ones behind ``last``."""

    fd: int
    path: bytes
    last: bytes = b""
    names: deque[bytes] = field(default_factory=deque)
    complete: bool = False  # there are none behind ``names``


@dataclass(frozen=True, slots=True)
class _Rest:
    """Names that the page before did not get to: those of the directory ``path`` behind ``last``."""

    path: bytes
    last: bytes
    names: deque[bytes]
    complete: bool


class Listing:
    """Lists below one root. Made for one peer, who asks for page after page: what was read and not used is kept.

    Any thread.
    """

    def __init__(self, root: Root) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._rest: _Rest | None = None

    def entries(self, path: bytes, *, after: bytes = b"", recursive: bool = False) -> Generator[Entry | WalkError]:
        """What is at ``path``, then what is in it (``recursive``: all below it), sorted component by component.

        Paths are relative to ``path``, whose own entry has none and comes first. ``after`` is one of these paths:
        only what is behind it comes. Links are not followed. What cannot be looked at, and with ``recursive`` what
        cannot be entered, comes once, as `WalkError`. What comes or goes meanwhile may be missing. One descriptor a
        level is open until the iterator ends or is closed; one thread at a time.

        Raises:
            NotFoundError, RefusedError, StorageError: ``path`` itself is missing, out of reach or cannot be listed.
        """
        top = self._root.stat(path)
        if top is None:
            raise NotFoundError(f"{display_path(path)} does not exist", path=display_path(path))
        is_directory = top.type is EntryType.DIRECTORY
        levels = [_Level(self._root.open_directory(path), b"")] if is_directory else []
        try:
            if not after:
                yield replace(top, path=b"")
            elif is_directory:
                self._descend(levels, path, after, recursive=recursive)
            while levels:
                level = levels[-1]
                name = self._next_name(levels, path)
                if name is None:
                    os.close(levels.pop().fd)
                    continue
                here = join_path(level.path, name)
                try:
                    found = self._root.look(join_path(path, here), within=level.fd, relative=here)
                    if found is None:
                        continue
                    if recursive and found.type is EntryType.DIRECTORY:
                        levels.append(self._enter(level.fd, here, path))
                except NotFoundError:
                    continue  # it is gone since
                except AmstError as err:
                    yield WalkError(here, err)
                    continue
                yield found
        finally:
            self._keep_rest(levels, path)
            for level in levels:
                os.close(level.fd)

    def _enter(self, parent_fd: int, here: bytes, base: bytes) -> _Level:
        return _Level(self._root.open_directory(join_path(base, here), within=parent_fd), here)

    def _descend(self, levels: list[_Level], base: bytes, after: bytes, *, recursive: bool) -> None:
        """Open the directories on the way to where the page before ended, as far as they are still there."""
        for name in split_path(after) if recursive else (after,):
            level = levels[-1]
            level.last = name
            self._take_rest(level, base)
            if not recursive:
                return
            try:
                levels.append(self._enter(level.fd, join_path(level.path, name), base))
            except AmstError:
                return  # no directory, or none any more, or told already as one that cannot be entered

    def _next_name(self, levels: list[_Level], base: bytes) -> bytes | None:
        level = levels[-1]
        if not level.names and not level.complete:
            self._read_names(level, base)
            if sum(len(each.names) for each in levels) > _NAMES_HELD:
                for outer in levels[:-1]:
                    outer.names.clear()
                    outer.complete = False
        if not level.names:
            return None
        level.last = level.names.popleft()
        return level.last

    def _read_names(self, level: _Level, base: bytes) -> None:
        try:
            with os.scandir(level.fd) as found:
                names = (os.fsencode(entry.name) for entry in found)
                wanted = (name for name in names if name > level.last and not name.startswith(HIDDEN_PREFIX))
                level.names.extend(heapq.nsmallest(NAMES_KEPT, wanted))
        except OSError as err:
            raise error_from_os(err, "cannot list", path=display_path(join_path(base, level.path))) from err
        level.complete = len(level.names) < NAMES_KEPT

    def _keep_rest(self, levels: list[_Level], base: bytes) -> None:
        for level in reversed(levels):
            if level.names:
                rest = _Rest(join_path(base, level.path), level.last, level.names, level.complete)
                with self._lock:
                    self._rest = rest
                return

    def _take_rest(self, level: _Level, base: bytes) -> None:
        with self._lock:
            rest = self._rest
            if rest is None or (rest.path, rest.last) != (join_path(base, level.path), level.last):
                return
            self._rest = None
        level.names, level.complete = rest.names, rest.complete
