"""Copies from here to here: which directory takes them, and what may not be copied where."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from ..errors import RefusedError
from ..files.entries import display_path
from .locations import Local, final_names


def resolved(target: Local) -> tuple[Local, bool]:
    """The target, where it is a directory under its real name, and whether it is one.

    What the user names is resolved as usual; only below it is no link followed.
    """
    is_dir = os.path.isdir(target.path)
    return (Local(target.text, os.path.realpath(target.path), target.slash) if is_dir else target), is_dir


def placed(sources: Sequence[Local], target: Local, *, is_dir: bool) -> tuple[bytes, dict[Local, bytes]]:
    """The directory that takes the copies, and each copy's name below it.

    Raises:
        UsageError, RefusedError: as `final_names`; or the directory does not exist.
    """
    parent = os.path.dirname(target.path) or b"."
    if not os.path.isdir(parent):
        raise RefusedError(f"the target directory {display_path(parent)} does not exist; make it first")
    names = final_names(sources, target, exists=os.path.lexists(target.path), is_dir=is_dir)
    cut = 0 if parent == b"." else len(parent)
    return parent, {source: name[cut:].lstrip(b"/") for source, name in zip(sources, names, strict=True)}


def below(root: bytes, name: bytes) -> bytes:
    """The path of a name that `placed` gave, as people write it."""
    return name if root == b"." else os.path.join(root, name)


def refuse_itself(source: Local, target: bytes) -> None:
    """Refuse to copy what is at ``source`` to the path ``target`` where the two meet.

    Raises:
        RefusedError: both are the same file, or a directory would be copied into itself.
    """
    about = os.lstat(source.path)
    named = display_path(source.path), display_path(target)
    if os.path.lexists(target) and _ids(source.path) & _ids(target):
        raise RefusedError(f"{named[0]} and {named[1]} are the same {_noun(about)}", path=named[0])
    if stat.S_ISDIR(about.st_mode):
        above = os.path.dirname(target) or b"."
        while not os.path.isdir(above):  # it will be made
            above = os.path.dirname(above) or b"."
        while True:
            here = os.stat(above)
            if os.path.samestat(here, about):
                raise RefusedError(f"cannot copy the directory {named[0]} into itself, {named[1]}", path=named[0])
            over = os.path.join(above, b"..")
            if os.path.samestat(os.stat(over), here):
                return
            above = over


def _ids(path: bytes) -> set[tuple[int, int]]:
    """What is at ``path``, and what it is a link to."""
    found = [os.lstat(path), *([os.stat(path)] if os.path.exists(path) else ())]
    return {(status.st_dev, status.st_ino) for status in found}


def _noun(about: os.stat_result) -> str:
    return "directory" if stat.S_ISDIR(about.st_mode) else "file"
