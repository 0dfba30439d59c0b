"""The largest or smallest of what was measured lately, in constant space and time per measurement.

Kathleen Nichols' algorithm, after Linux lib/win_minmax.c: of everything in the window only the best, the second and
the third best are kept, each measured no earlier than the one before it. A new best makes everything older useless.
The later choices are taken from the later quarters of the window, so when the best grows too old there is another.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

from ..errors import UsageError

__all__ = ["WindowedMax", "WindowedMin"]

_CHOICES: Final = 3


class _Windowed:
    """Keeps maxima; a minimum is the maximum of what is negative."""

    __slots__ = ("_span", "_times", "_values")
    _sign: ClassVar[float]

    def __init__(self, span: float) -> None:
        """Keep ``span`` of the past, in the unit of the times that `update` will be told (seconds, round trips).

        Raises:
            UsageError: ``span`` is no positive number.
        """
        if not (span > 0 and math.isfinite(span)):
            raise UsageError(f"a window spans a positive, finite time, not {span!r}")
        self._span = span
        self._times = [0.0] * _CHOICES
        self._values: list[float] | None = None

    @property
    def value(self) -> float | None:
        """The best of the window that ended with the last `update`; None before the first."""
        return None if self._values is None else self._sign * self._values[0]

    def reset(self, value: float, now: float) -> float:
        """Forget everything but ``value``, measured at ``now``; return it."""
        self._times = [now] * _CHOICES
        self._values = [self._sign * value] * _CHOICES
        return value

    def update(self, value: float, now: float) -> float:
        """Add ``value``, measured at ``now`` (never earlier than the last one); return the best of the window.

        What is returned was measured in the window. It is the very best of it, unless the best has just grown too old
        and a better value than the next choice was not kept.
        """
        values, times = self._values, self._times
        signed = self._sign * value
        if values is None or signed >= values[0] or now - times[2] > self._span:
            return self.reset(value, now)
        if signed >= values[1]:
            values[1] = values[2] = signed
            times[1] = times[2] = now
        elif signed >= values[2]:
            values[2] = signed
            times[2] = now
        self._age(values, times, signed, now)
        return self._sign * values[0]

    def _age(self, values: list[float], times: list[float], signed: float, now: float) -> None:
        age = now - times[0]
        if age > self._span:
            # The second choice may be too old as well; the third is not, update has looked.
            while now - times[0] > self._span:
                values[:] = values[1], values[2], signed
                times[:] = times[1], times[2], now
        elif times[1] == times[0] and age > self._span / 4:
            values[1] = values[2] = signed
            times[1] = times[2] = now
        elif times[2] == times[1] and age > self._span / 2:
            values[2] = signed
            times[2] = now


class WindowedMax(_Windowed):
    """The largest value measured within a span of time (BBR's bottleneck bandwidth over 10 round trips)."""

    __slots__ = ()
    _sign = 1.0


class WindowedMin(_Windowed):
    """The smallest value measured within a span of time (the round trip without queue over 10 s)."""

    __slots__ = ()
    _sign = -1.0
