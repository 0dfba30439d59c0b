"""What a copy would do, entry by entry, without doing it: both sides are listed, nothing is opened or changed."""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import AmstError, NotFoundError, RefusedError, StorageError
from ..files.entries import Entry, EntryType, WalkError, display_path, join_path
from ..files.listing import Listing
from ..files.root import Root
from .copying import LocalPath, open_local

if TYPE_CHECKING:
    from .session import Session


class Action(enum.StrEnum):
    """What would become of one entry."""

    COPY = "copy"  # nothing has its name
    REPLACE = "replace"  # a file or link that has its name goes
    COMPARE = "compare"  # a file of its size and time is there: sent only if its bytes differ
    MAKE = "make"  # a directory that is missing
    KEEP = "keep"  # a directory that is there: it gets mode and time
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of a copy that is only planned. ``type`` is None where the source could not be looked at.

    ``source`` and ``target`` are full paths, as they would be given for that entry by itself.
    """

    source: bytes
    target: bytes
    type: EntryType | None
    size: int
    action: Action
    error: AmstError | None = None


def plan_upload(session: Session, items: Sequence[tuple[LocalPath, bytes]]) -> Iterator[Step]:
    """What `copying.upload` would do with the same items.

    Raises:
        AmstError: the session ended, or the peer said what makes no sense.
    """
    for local, remote in items:
        yield from _plan(os.fsencode(local), _below_here(local), remote, session.list(remote, recursive=True))


def plan_download(
    session: Session, items: Sequence[tuple[bytes, LocalPath]], *, to_make: LocalPath | None = None
) -> Iterator[Step]:
    """What `copying.download` would do with the same items, had the directory ``to_make`` been made before.

    Raises:
        AmstError: as `plan_upload`.
    """
    for remote, local in items:
        there = _there_here(local, to_make=to_make)
        yield from _plan(remote, session.list(remote, recursive=True), os.fsencode(local), there)


def plan_here(items: Sequence[tuple[LocalPath, LocalPath]], *, to_make: LocalPath | None = None) -> Iterator[Step]:
    """What a copy of each first path to the second would do, both on this machine; otherwise as `plan_download`."""
    for source, target in items:
        there = _there_here(target, to_make=to_make)
        yield from _plan(os.fsencode(source), _below_here(source), os.fsencode(target), there)


def _below_here(local: LocalPath) -> Iterator[Entry | WalkError]:
    root, name = open_local(local)
    with root, closing(Listing(root).entries(name, recursive=True)) as entries:
        yield from entries


def _there_here(local: LocalPath, *, to_make: LocalPath | None) -> Iterator[Entry | WalkError]:
    path = os.fsencode(local)
    directory, name = os.path.split(path.rstrip(b"/"))
    if name in (b"", b".", b".."):
        raise RefusedError(f"{display_path(path)} is not a name for a copy; write where it shall go in full")
    if not os.path.isdir(directory or b".") and (to_make is None or directory != os.fsencode(to_make)):
        raise RefusedError(f"the target directory {display_path(directory)} does not exist; make it first")
    with Root(directory or b".") as root, closing(Listing(root).entries(name, recursive=True)) as entries:
        yield from entries


def _plan(
    source: bytes, found: Iterable[Entry | WalkError], target: bytes, there: Iterable[Entry | WalkError]
) -> Iterator[Step]:
    """Walk along both lists, which have the same order."""
    beside = iter(there)
    other: Entry | WalkError | None = None
    try:
        other = next(beside, None)
    except NotFoundError:
        pass
    except (RefusedError, StorageError) as err:
        yield Step(source, target, None, 0, Action.FAIL, err)
        return
    blocked: tuple[list[bytes], AmstError] | None = None  # a directory that cannot be made: nothing below it can
    try:
        for entry in found:
            here = entry.path.split(b"/") if entry.path else []
            while other is not None and _before(other, here):
                other = next(beside, None)
            match = other if other is not None and other.path == entry.path else None
            full = join_path(target, entry.path)
            action, error = _judge(entry, match, full)
            if blocked is not None and here[: len(blocked[0])] == blocked[0]:
                action, error = Action.FAIL, blocked[1]
            elif error is not None and isinstance(entry, Entry) and entry.type is EntryType.DIRECTORY:
                blocked = here, error
            kind, size = (entry.type, entry.size) if isinstance(entry, Entry) else (None, 0)
            yield Step(join_path(source, entry.path), full, kind, size, action, error)
    except (NotFoundError, RefusedError, StorageError) as err:
        yield Step(source, target, None, 0, Action.FAIL, err)


def _before(other: Entry | WalkError, here: list[bytes]) -> bool:
    return (other.path.split(b"/") if other.path else []) < here


def _judge(entry: Entry | WalkError, there: Entry | WalkError | None, target: bytes) -> tuple[Action, AmstError | None]:
    if isinstance(entry, WalkError):
        return Action.FAIL, entry.error
    shown = display_path(target)
    if entry.type is EntryType.DIRECTORY:
        if there is None:
            return Action.MAKE, None
        if isinstance(there, WalkError):
            return Action.FAIL, there.error
        if there.type is EntryType.DIRECTORY:
            return Action.KEEP, None
        return Action.FAIL, RefusedError(f"{shown} is a {there.type.value}, not a directory", path=shown)
    if there is None:
        return Action.COPY, None
    if isinstance(there, Entry):
        if there.type is EntryType.DIRECTORY:
            return Action.FAIL, RefusedError(f"{shown} is a directory, which no file replaces", path=shown)
        if entry.type is there.type is EntryType.FILE and (entry.size, entry.mtime_ns) == (there.size, there.mtime_ns):
            return Action.COMPARE, None
    return Action.REPLACE, None
