"""Waiting for what must come, with a deadline: a condition, or the outcome of a function that runs in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 60.0  # under load, too


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Look until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.005)


class Task(threading.Thread):
    """A thread that keeps what its function returned or raised."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(daemon=True)
        self._call = (function, args, kwargs)
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, args, kwargs = self._call
        try:
            self._result = function(*args, **kwargs)
        except BaseException as err:
            self._error = err

    @property
    def running(self) -> bool:
        return self.is_alive()

    def outcome(self, timeout_s: float = DEADLINE_S) -> Any:
        """What the function returned; raises what it raised."""
        error = self.error(timeout_s)
        if error is not None:
            raise error
        return self._result

    def error(self, timeout_s: float = DEADLINE_S) -> BaseException | None:
        """What the function raised, None when it returned."""
        self.join(timeout_s)
        assert not self.is_alive(), "the thread is still blocked"
        return self._error
