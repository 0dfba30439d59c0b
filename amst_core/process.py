"""What belongs to the process that made it: in a forked child it refuses to work, and leaves the parent's alone.

Threads do not survive a fork and locks may be held in the copy for ever, so nothing of a session can be used there; and
what would close or reset a socket would do so to the parent's connection. The weak set below knows the live
objects only so that the hook can reach them; it holds no settings and shares nothing between them.
"""

from __future__ import annotations

import os
import weakref
from typing import Final, NoReturn, Protocol

from .errors import UsageError


class Owned(Protocol):
    """An object that must not be used after a fork; it must be hashable and weakly referable."""

    def forked(self, foreign: Foreign) -> None:
        """This is the child's copy: put ``foreign`` in the place of everything that works."""


class Foreign:
    """Stands for the parts of an object of another process: whatever is asked of it raises `UsageError`."""

    def __init__(self, what: str, owner: int) -> None:
        self.__dict__.update(what=what, owner=owner)

    @property
    def error(self) -> UsageError:
        return UsageError(
            f"this {self.what} belongs to process {self.owner} and cannot be used after a fork; open one in this "
            f"process ({os.getpid()}), or start it by spawn"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise self.error


_owned: Final[weakref.WeakSet[Owned]] = weakref.WeakSet()
_owner: int = os.getpid()


def own(thing: Owned) -> None:
    """Have ``thing`` told when it wakes up in a forked child."""
    _owned.add(thing)


def _after_fork() -> None:
    global _owner
    owner, _owner = _owner, os.getpid()
    for thing in list(_owned):
        thing.forked(Foreign(type(thing).__name__.lower(), owner))
    _owned.clear()


os.register_at_fork(after_in_child=_after_fork)
