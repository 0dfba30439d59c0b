"""What the checks of `lanes` and `transport` share: rules, how each is tried, and the error that names a broken one.

Whatever a check calls runs on a thread of its own and is waited for with a deadline: an implementation that
hangs breaks a rule and hangs nobody.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Generic, NoReturn, Self, TypeVar

from ..errors import UsageError

PATIENCE_S: Final = 10.0
"""How long a check waits for what must happen, in seconds."""

SETTLE_S: Final = 0.05
"""How long a thread is given to run into what should block it. Too short a time makes a check weaker, never wrong."""

_LOOK_EVERY_S: Final = 0.002


class ConformanceError(AssertionError):
    """An implementation breaks a rule.

    An `AssertionError`, because that is what every test runner reports as a failed test, and what no implementation
    may catch; it is no `AmstError`, which is for what goes wrong in use and may travel to a peer.

    Attributes:
        rule: the rule's name, as `rules` lists it.
        expected, seen: what the rule asks for and what happened instead, in words.
    """

    def __init__(self, rule: str, *, expected: str, seen: str) -> None:
        super().__init__(f"rule {rule!r} is broken: expected {expected}; seen: {seen}")
        self.rule = rule
        self.expected = expected
        self.seen = seen


class NotApplicable(Exception):
    """A rule cannot be tried on this implementation; the message says why."""


@dataclass(frozen=True, slots=True)
class Conformance:
    """Outcome of a check that found no fault: which rules held, and why others were not tried."""

    held: tuple[str, ...]
    skipped: Mapping[str, str]


T = TypeVar("T", bound="Trial", contravariant=True)


@dataclass(frozen=True, slots=True)
class Rule(Generic[T]):
    """One requirement: a stable name, what it asks for in a line, and how it is tried."""

    name: str
    promise: str
    attempt: Callable[[T], None]


def chosen(rules: Sequence[Rule[T]], only: Collection[str] | None) -> list[Rule[T]]:
    """The rules named in ``only``, all of them when it is None.

    Raises:
        UsageError: a name that no rule has.
    """
    unknown = set(only or ()) - {rule.name for rule in rules}
    if unknown:
        raise UsageError(f"no such rule: {', '.join(sorted(unknown))}; amst_core.testing.rules() lists them")
    return [rule for rule in rules if only is None or rule.name in only]


class Call(threading.Thread):
    """A call into an implementation, on a thread of its own."""

    def __init__(self, what: str, function: Callable[..., Any], *args: Any) -> None:
        super().__init__(name=f"amst-check {what}", daemon=True)
        self.what = what
        self._call = (function, args)
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, args = self._call
        try:
            self.result = function(*args)
        except BaseException as err:
            self.error = err

    def ended(self, timeout_s: float) -> bool:
        """Whether it returned or raised within ``timeout_s``."""
        self.join(timeout_s)
        return not self.is_alive()


class Trial:
    """One rule tried once: starts calls, waits for them, says what was expected; in the end everything is undone."""

    def __init__(self, rule: str, patience_s: float) -> None:
        self.rule = rule
        self.patience_s = patience_s
        self._calls: list[Call] = []
        self._undo: list[Callable[[], object]] = []

    def fail(self, expected: str, seen: str) -> NoReturn:
        """The rule is broken."""
        raise ConformanceError(self.rule, expected=expected, seen=seen)

    def check(self, holds: object, expected: str, seen: object) -> None:
        if not holds:
            self.fail(expected, str(seen))

    def begin(self, what: str, function: Callable[..., Any], *args: Any) -> Call:
        """Start a call; ``what`` is how messages name it."""
        call = Call(what, function, *args)
        self._calls.append(call)
        return call

    def returns(self, call: Call) -> Any:
        """What ``call`` returns; that it raises or never comes back breaks the rule."""
        if not call.ended(self.patience_s):
            self.fail(f"{call.what} to return", f"it was still blocked after {self.patience_s:g} s")
        if call.error is not None:
            self.fail(f"{call.what} to return", f"it raised {call.error!r}")
        return call.result

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` returns, as `returns`."""
        return self.returns(self.begin(what, function, *args))

    def raises(self, call: Call, kind: type[BaseException]) -> BaseException:
        """The error of ``call``; another outcome breaks the rule."""
        expected = f"{call.what} to raise {kind.__name__}"
        if not call.ended(self.patience_s):
            self.fail(expected, f"it was still blocked after {self.patience_s:g} s")
        if call.error is None:
            self.fail(expected, f"it returned {call.result!r}")
        if not isinstance(call.error, kind):
            self.fail(expected, f"it raised {call.error!r}")
        return call.error

    def wait(self, condition: Callable[[], object], expected: str, seen: Callable[[], object]) -> None:
        """Look until ``condition`` holds."""
        deadline = time.monotonic() + self.patience_s
        while not condition():
            if time.monotonic() > deadline:
                self.fail(expected, f"after {self.patience_s:g} s: {seen()}")
            time.sleep(_LOOK_EVERY_S)

    def afterwards(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` when the trial is over, whatever came of it; the last one first."""
        self._undo.append(undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + self.patience_s
        while self._undo:  # a lane may still arrive
            Call("clean up", self._undo.pop()).ended(max(0.0, deadline - time.monotonic()))
        for call in self._calls:  # those that a broken implementation never lets go are daemons
            call.ended(max(0.0, deadline - time.monotonic()))


def attempt(trial: T, rule: Rule[T], what: str) -> None:
    """Try all of ``rule`` on a thread of its own; whatever the ``what`` that is tried raises breaks it."""
    call = Call(rule.name, rule.attempt, trial)
    if not call.ended(trial.patience_s):
        trial.fail(f"the {what} to return", f"it was still busy after {trial.patience_s:g} s")
    if isinstance(call.error, ConformanceError):
        raise call.error
    if call.error is not None:
        trial.fail("no exception", f"the {what} raised {call.error!r}")


class Counted:
    """How many threads and descriptors the process had; other parts of the program have theirs."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[int, int]:
        descriptors = 0
        with suppress(OSError):  # no Linux: threads only
            descriptors = len(os.listdir("/proc/self/fd"))
        return descriptors, threading.active_count()

    def nothing_of(self, count: int, what: str) -> None:
        """Wait until there are fewer than ``count`` more than then, which would be one of each."""

        def more() -> tuple[int, int]:
            now = self._now()
            return now[0] - self._before[0], now[1] - self._before[1]

        self._trial.wait(
            lambda: max(more()) < count,
            f"no thread and no descriptor of {what}",
            lambda: "{} descriptors and {} threads more than before".format(*more()),
        )
