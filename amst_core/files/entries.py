"""Names and attributes of what a tree holds: how they are checked, shown, and carried in messages.

A path is bytes, its components separated by ``/``, relative to a root; ``b""`` is the root itself.
"""

from __future__ import annotations

import enum
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from ..errors import AmstError, ProtocolError, RefusedError, StorageError, printable
from ..wire.fields import AttributeValue

HIDDEN_PREFIX: Final = b".amst-"
"""Names that begin so are temporary files of ours: never listed, never reachable by a path."""

MAX_NAME: Final = 255
MAX_PATH: Final = 4096
MAX_DEPTH: Final = 256
"""Bytes in a component, bytes in a path, components in a path."""

MAX_IDENTITY: Final = 64
"""Bytes that may name a file being sent."""

MAX_ROWS: Final = 1024
"""Entries in a table."""

_MODE_MAX: Final = 0o7777
_PERMISSIONS: Final = 0o777
_MTIME_MIN: Final = -(1 << 63)
_MTIME_MAX: Final = (1 << 63) - 1

_ROW: Final = struct.Struct("!BHqQHH")
"""Type, mode, modification time, size, lengths of path and target."""

_T = TypeVar("_T", int, str, bytes)


class EntryType(enum.StrEnum):
    """What an entry is; the value is what travels in messages."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"


_TYPES: Final = (EntryType.FILE, EntryType.DIRECTORY, EntryType.SYMLINK)
"""By their numbers in a table."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or symbolic link.

    ``path`` is relative to the thing that was walked (``b""`` is that thing itself), ``mode`` holds the
    permission bits, ``mtime_ns`` nanoseconds since 1970 (negative before), ``size`` bytes of a file and 0 for
    the others, ``target`` what a symbolic link says, byte for byte. ``identity`` names a file being sent: with equal
    identity, size and time, equal bytes; empty when nobody said.
    """

    path: bytes
    type: EntryType
    mode: int
    mtime_ns: int
    size: int = 0
    target: bytes = b""
    identity: bytes = b""


@dataclass(frozen=True, slots=True)
class WalkError:
    """Something below a walked directory that cannot be copied, and why; the walk went on."""

    path: bytes
    error: AmstError


# ---- paths --------------------------------------------------------------------------------


def display_path(path: bytes) -> str:
    r"""``path`` for people: UTF-8 where it is that, ``\xNN`` and ``\n`` where it is not; ``.`` for the root."""
    return printable(path.decode("utf-8", "backslashreplace") or ".")


def split_path(path: bytes) -> tuple[bytes, ...]:
    """The components of a path as peers send it; joined below a directory they cannot leave it.

    Raises:
        RefusedError: absolute, ``.``, ``..``, NUL, an empty component, or a name reserved for temporary files.
        StorageError: a component, the path or its depth exceeds the limits.
    """
    if not path:
        return ()
    parts = tuple(path.split(b"/"))
    if len(path) > MAX_PATH or len(parts) > MAX_DEPTH or not all(map(is_legal_name, parts)):
        raise _illegal(path, parts)
    return parts


def is_legal_name(name: bytes) -> bool:
    """Whether a path may have a component ``name``, which holds no slash."""
    return (
        name not in (b"", b".", b"..")
        and len(name) <= MAX_NAME
        and not name.startswith(HIDDEN_PREFIX)
        and b"\0" not in name
    )


def _illegal(path: bytes, parts: tuple[bytes, ...]) -> AmstError:
    """What is wrong with a path that `split_path` does not take."""
    if len(path) > MAX_PATH:
        shown = display_path(path[:MAX_NAME]) + "..."
        return StorageError(f"{shown}: a path of {len(path)} bytes exceeds the limit of {MAX_PATH}", path=shown)
    shown = display_path(path)
    if path.startswith(b"/"):
        return RefusedError(f"{shown}: the path is absolute; give it relative to the root", path=shown)
    if b"\0" in path:
        return RefusedError(f"{shown}: the path holds a NUL byte", path=shown)
    if len(parts) > MAX_DEPTH:
        return StorageError(f"{shown}: {len(parts)} path components exceed the limit of {MAX_DEPTH}", path=shown)
    part = next(part for part in parts if not is_legal_name(part))
    if part in (b"", b".", b".."):
        word = f"a component {part.decode()!r}" if part else "an empty component"
        return RefusedError(f"{shown}: the path holds {word}; name the real path", path=shown)
    if part.startswith(HIDDEN_PREFIX):
        return RefusedError(
            f"{shown}: names that begin with {HIDDEN_PREFIX.decode()} are kept for temporary files", path=shown
        )
    return StorageError(f"{shown}: a name of {len(part)} bytes exceeds the limit of {MAX_NAME}", path=shown)


def normalise_user_path(path: bytes) -> bytes:
    """A path as a user writes it in a URL, in the form `split_path` takes: single slashes, no ``.``.

    Raises:
        RefusedError, StorageError: as `split_path`; ``..`` is refused, never resolved.
    """
    clean = b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
    split_path(clean)
    return clean


def join_path(base: bytes, relative: bytes) -> bytes:
    """``relative`` below ``base``, where either may be empty."""
    return base + b"/" + relative if base and relative else base or relative


# ---- attributes ---------------------------------------------------------------------------


def entry_type(st_mode: int) -> EntryType | None:
    """The type of a file system object from its ``st_mode``; None for what cannot be copied."""
    if stat.S_ISREG(st_mode):
        return EntryType.FILE
    if stat.S_ISDIR(st_mode):
        return EntryType.DIRECTORY
    return EntryType.SYMLINK if stat.S_ISLNK(st_mode) else None


def special_name(st_mode: int) -> str:
    """What to call an object that has no `EntryType`."""
    for test, name in ((stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "character device")):
        if test(st_mode):
            return name
    return "block device"


def to_attributes(entry: Entry) -> dict[str, AttributeValue]:
    """An entry as message attributes; the size travels beside them, in OPEN.

    A modification time outside 1677 to 2262 does not fit 64 bits of nanoseconds and travels as the nearest that does.
    """
    attributes: dict[str, AttributeValue] = {
        "path": entry.path,
        "type": entry.type.value,
        "mode": entry.mode,
        "mtime_ns": min(max(entry.mtime_ns, _MTIME_MIN), _MTIME_MAX),
    }
    if entry.type is EntryType.SYMLINK:
        attributes["target"] = entry.target
    if entry.type is EntryType.FILE and entry.identity:
        attributes["identity"] = entry.identity
    return attributes


def from_attributes(attributes: Mapping[str, AttributeValue], *, size: int = 0) -> Entry:
    """The entry a peer described; keys that are not an entry's are left to whoever put them there.

    Only ``rwxrwxrwx`` of the mode is kept: a peer does not get to make setuid, setgid or sticky files here.

    Raises:
        ProtocolError: a key is missing, of the wrong type or out of range.
        RefusedError, StorageError: the path is one that `split_path` does not take.
    """
    word = _get(attributes, "type", str)
    try:
        kind = EntryType(word)
    except ValueError as err:
        raise ProtocolError(f"entry type {word!r} is unknown") from err
    mtime_ns = _get(attributes, "mtime_ns", int)
    if not _MTIME_MIN <= mtime_ns <= _MTIME_MAX:
        raise ProtocolError(f"entry mtime_ns {mtime_ns} does not fit 64 bits")
    identity = b""
    if kind is EntryType.FILE and "identity" in attributes:
        identity = _get(attributes, "identity", bytes)
        if not 1 <= len(identity) <= MAX_IDENTITY:
            raise ProtocolError(f"entry identity of {len(identity)} bytes; 1 to {MAX_IDENTITY} are allowed")
    target = _get(attributes, "target", bytes) if kind is EntryType.SYMLINK else b""
    mode = _get(attributes, "mode", int)
    return _entry(_get(attributes, "path", bytes), kind, mode, mtime_ns, size, target, identity)


# ---- tables -------------------------------------------------------------------------------


def encode_row(entry: Entry, path: bytes) -> bytes:
    """An entry as a row of a table, under the name ``path``; rows follow each other without anything between.

    The identity does not travel.
    """
    kind, mtime_ns = _TYPES.index(entry.type), min(max(entry.mtime_ns, _MTIME_MIN), _MTIME_MAX)
    return _ROW.pack(kind, entry.mode, mtime_ns, entry.size, len(path), len(entry.target)) + path + entry.target


def decode_table(table: bytes) -> list[Entry]:
    """The entries that a peer put in a table, checked as by `from_attributes`.

    Raises:
        ProtocolError: these are no rows, or something in one is out of range.
        RefusedError, StorageError: a path is one that `split_path` does not take.
    """
    entries: list[Entry] = []
    at = 0
    while at < len(table):
        if len(entries) >= MAX_ROWS:
            raise ProtocolError(f"a table of more than {MAX_ROWS} entries")
        try:
            number, mode, mtime_ns, size, path_size, target_size = _ROW.unpack_from(table, at)
            kind = _TYPES[number]
        except (struct.error, IndexError) as err:
            raise ProtocolError("a table of entries ends early, or has one of an unknown type") from err
        at += _ROW.size
        path, target = table[at : at + path_size], table[at + path_size : at + path_size + target_size]
        if len(path) + len(target) != path_size + target_size:
            raise ProtocolError("a table of entries ends early")
        at += path_size + target_size
        entries.append(_entry(path, kind, mode, mtime_ns, size, target, b""))
    return entries


def _entry(
    path: bytes, kind: EntryType, mode: int, mtime_ns: int, size: int, target: bytes, identity: bytes
) -> Entry:
    """What a peer said, if it makes sense."""
    split_path(path)
    if not 0 <= mode <= _MODE_MAX:
        raise ProtocolError(f"entry mode {mode} is not within 0 and {_MODE_MAX}")
    if size < 0 or (size and kind is not EntryType.FILE):
        raise ProtocolError(f"entry of type {kind.value} cannot have {size} bytes")
    is_link = kind is EntryType.SYMLINK
    if bool(target) is not is_link or b"\0" in target or len(target) >= MAX_PATH:
        raise ProtocolError(f"link target of {len(target)} bytes is empty, too long or holds a NUL byte")
    return Entry(path, kind, mode & _PERMISSIONS, mtime_ns, size, target, identity)


def _get(attributes: Mapping[str, AttributeValue], key: str, kind: type[_T]) -> _T:
    value = attributes.get(key)
    if type(value) is not kind:  # exactly: a bool is not a number here
        raise ProtocolError(f"entry attribute {key!r} must be {kind.__name__}, not {type(value).__name__}")
    return value
