"""Trying again whenever there may be room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

from ..session.room import NotYet, Room
from .waking import Once

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Try(Protocol[T_co]):
    """Something that succeeds at once, or raises `NotYet` and has ``when_room`` called later."""

    def __call__(self, *, when_room: Callable[[], None]) -> T_co: ...


async def when_room(attempt: Try[T], lock: threading.Lock, room: Room) -> T:
    """What ``attempt`` returns, tried again whenever ``room``, whose lock is ``lock``, is notified."""
    while True:
        told = Once()
        try:
            return attempt(when_room=told.tell)
        except NotYet:
            pass
        came = False
        try:
            came = await told.wait()
        finally:
            if not came:
                with lock:
                    room.unwatch(told.tell)
