"""What broken copies have left below a directory: partial files and journals, told and not touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import AmstError, error_from_os
from .entries import display_path
from .journal import HEADER_SIZE, SourceMark, decode_header
from .partial import JOURNAL, LEFTOVER, PART, PartialPolicy, is_ours, partial_names


@dataclass(frozen=True, slots=True)
class Leftover:
    """One partial file or journal. ``size`` in bytes, ``age_s`` since it was last changed.

    ``resumable``: the one and the other are there. ``target``: the file of the same directory that a copy would have
    replaced, if one is there. ``source`` is what the journal says of the other file. ``ours``: made by this user, else
    nobody cleans it up. ``left_s``: how long it stays before the next copy into its directory removes it, 0 when that
    may be now.
    """

    path: bytes
    size: int
    age_s: float
    in_use: bool
    resumable: bool
    ours: bool
    target: bytes | None
    source: SourceMark | None
    left_s: float


def find_leftovers(
    directory: str | bytes | os.PathLike[str], *, policy: PartialPolicy | None = None
) -> Iterator[Leftover | AmstError]:
    """Everything of that kind at any depth below ``directory``, no link followed; what cannot be read as an error.

    Raises:
        NotFoundError, RefusedError, StorageError: ``directory`` itself cannot be read (by the iterator).
    """
    policy = PartialPolicy() if policy is None else policy
    top = os.fsencode(directory)
    try:
        os.scandir(top).close()
    except OSError as err:
        raise error_from_os(err, "cannot list", path=display_path(top)) from err
    failed: list[AmstError] = []

    def note(err: OSError) -> None:
        failed.append(error_from_os(err, "cannot list", path=display_path(os.fsencode(err.filename or ""))))

    for folder, folders, files in os.walk(top, onerror=note):
        folders.sort()
        yield from failed
        failed.clear()
        yield from _in(folder, sorted(files), policy)
    yield from failed


def _in(folder: bytes, files: list[bytes], policy: PartialPolicy) -> Iterator[Leftover]:
    found = [name for name in files if LEFTOVER.fullmatch(os.fsdecode(name))]
    if not found:
        return
    locked = _locked_inodes()
    owners = {name: leaf for leaf in files for name in partial_names(leaf)}
    for name in found:
        path = os.path.join(folder, name)
        try:
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                continue
            stem = name.rpartition(b".")[0]
            journal = _look(os.path.join(folder, stem + JOURNAL))
        except OSError:
            continue  # it is gone, or another's: no copy would touch it either
        changed = max(status.st_ctime, journal.st_ctime if journal is not None else 0.0)
        has_both = journal is not None and (stem + PART) in files
        age_s = max(0.0, policy.now() - changed)
        yield Leftover(
            path=path,
            size=status.st_size,
            age_s=age_s,
            resumable=has_both,
            in_use=status.st_ino in locked,
            ours=is_ours(status),
            target=owners.get(name),
            source=_source(os.path.join(folder, stem + JOURNAL)) if journal is not None else None,
            left_s=max(0.0, (policy.keep_s if has_both else policy.orphan_s) - age_s),
        )


def _look(path: bytes) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _locked_inodes() -> frozenset[int]:
    """Numbers of the files that some process holds a lock on: taking one to find out could get in a copy's way."""
    try:
        with open("/proc/locks", encoding="ascii") as locks:
            fields = [line.split() for line in locks]
    except OSError:
        return frozenset()
    return frozenset(int(field.rpartition(":")[2]) for line in fields for field in line if field.count(":") == 2)


def _source(journal: bytes) -> SourceMark | None:
    try:
        fd = os.open(journal, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return decode_header(os.read(fd, HEADER_SIZE))
    except OSError:
        return None
    finally:
        os.close(fd)
