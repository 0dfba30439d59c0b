"""SIGINT and SIGTERM end a command by an exception in its main thread, wherever that waits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

_REPEAT_S: Final = 0.1


class Terminated(BaseException):
    """SIGTERM arrived; raised in the main thread, like KeyboardInterrupt for SIGINT."""


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """While the block runs, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated` in it. Main thread only.

    CPython looks for signals between instructions, and a wait for a lock is interrupted only by a signal that
    comes during it: one that comes just before is not seen until the wait ends, which may be never. So a
    thread hears of every signal, and sends it again to the main thread until it is seen.
    """
    heard: set[int] = set()

    def handle(number: int, frame: FrameType | None) -> None:
        heard.add(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def repeat() -> None:
        while arrived := os.read(reading, 1):
            number = arrived[0]
            while number in before and number not in heard and not done.wait(_REPEAT_S):
                if number not in heard:
                    signal.pthread_kill(threading.main_thread().ident or 0, number)

    done = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # A command that was started to ignore SIGINT (by a shell, in the background) goes on to do so.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    thread = threading.Thread(target=repeat, name="amst-signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        thread.join()
        os.close(reading)
