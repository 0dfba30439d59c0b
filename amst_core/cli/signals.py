"""SIGINT and SIGTERM end a command by an exception in its main thread, wherever that waits.

A command may have other things done first: stop in an orderly way on the first SIGTERM, say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

_REPEAT_S: Final = 0.1


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread, like KeyboardInterrupt for SIGINT."""


class Actions:
    """What a command does about a signal instead of being ended by it, on a thread that holds no lock."""

    def __init__(self) -> None:
        self._once: dict[int, Callable[[], None]] = {}
        self._unseen: set[int] = set()  # those of them that no handler has seen: the action may run before it does
        self._always: dict[int, Callable[[], None]] = {}

    def once(self, number: int, act: Callable[[], None]) -> None:
        """Have the first signal ``number`` call ``act``; the next one ends the command as usual."""
        self._once[number] = act
        self._unseen.add(number)

    def always(self, number: int, act: Callable[[], None]) -> None:
        """Have each signal ``number`` (one that is not used otherwise) call ``act``."""
        self._always[number] = act
        signal.signal(number, lambda number, frame: None)  # so that the wake-up descriptor tells of it

    def clear(self) -> None:
        """Do nothing more."""
        for number in self._always:
            signal.signal(number, signal.SIG_DFL)
        self._once.clear()
        self._unseen.clear()
        self._always.clear()

    def first(self, number: int) -> bool:
        """Whether this one is for an action: asked by the signal handler, once for each signal."""
        if number not in self._unseen:
            return False
        self._unseen.discard(number)
        return True

    def run(self, number: int) -> bool:
        """Do what is to be done; whether there was anything."""
        act = self._once.pop(number, None) or self._always.get(number)
        if act is None:
            return False
        act()
        return True


@contextlib.contextmanager
def raising() -> Iterator[Actions]:
    """While the block runs, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated` in it. Main thread only.

    CPython looks for signals between instructions, and a wait for a lock is interrupted only by a signal that
    comes during it: one that comes just before is not seen until the wait ends, which may be never. And what is
    raised while a finalizer runs goes no further. So a thread hears of every signal, and sends it again to the main
    thread until it is seen where it counts.
    """
    heard: set[int] = set()
    actions = Actions()

    def handle(number: int, frame: FrameType | None) -> None:
        if actions.first(number):
            return
        heard.add(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def repeat() -> None:
        while arrived := os.read(reading, 1):
            number = arrived[0]
            if actions.run(number):
                continue
            while number in before and number not in heard and not done.wait(_REPEAT_S):
                if number not in heard:
                    signal.pthread_kill(threading.main_thread().ident or 0, number)

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(what.exc_type)
        if number is None or number not in heard:
            before_hook(what)
            return
        heard.discard(number)
        os.write(writing, bytes([number]))

    done = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A command that was started to ignore SIGINT (by a shell, in the background) goes on to do so.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    before_hook, sys.unraisablehook = sys.unraisablehook, unraisable
    thread = threading.Thread(target=repeat, name="amst-signals", daemon=True)
    thread.start()
    try:
        yield actions
    finally:
        done.set()
        actions.clear()
        sys.unraisablehook = before_hook
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        thread.join()
        os.close(reading)
