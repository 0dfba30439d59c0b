"""The bottleneck that all flows of a simulation share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from ...errors import UsageError
from .loss import LossModel

__all__ = ["Link"]

_UNCHANGED: Final[Any] = object()
_ROUNDING: Final = 0.01
"""Bytes by which what waits, which is told from times, may seem too much."""


class Link:
    """A queue that drops what does not fit, a wire of a rate, and the time to the receiver and back.

    It has a state, and is for one simulation.
    Losses at random happen on the wire: what is lost has taken its share of the rate, and its place in the queue.
    Acknowledgements are not lost, take no rate, and come back in the order in which they left.

    Args:
        rate: bytes/s.
        delay: seconds from the queue's end to the receiver.
        back: seconds from the receiver to the sender; None: as ``delay``.
        buffer: bytes that may wait or be on their way onto the wire; more is dropped. None: any number. An idle link
            takes a packet whatever the buffer.
        loss: how packets are lost on the wire, None: none. Each flow has a sequence of its own of it.

    Raises:
        UsageError: a rate, delay or buffer that makes no sense.
    """

    def __init__(
        self,
        rate: float,
        delay: float,
        *,
        back: float | None = None,
        buffer: float | None = None,
        loss: LossModel | None = None,
    ) -> None:
        self.rate = 0.0
        self.delay = 0.0
        self.back = 0.0
        self.buffer = self.room = math.inf
        self.loss: LossModel | None = None
        self.max_queue = 0.0
        """The most bytes that ever waited."""
        self.idle_at = 0.0
        """When the last of what is queued will be on the wire; in the past: the link is idle."""
        self._taken = False
        self._retime: Callable[[float], None] = lambda old_rate: None
        self._reseed: Callable[[], None] = lambda: None
        self.set(rate=rate, delay=delay, back=delay if back is None else back, buffer=buffer, loss=loss)

    def set(
        self,
        *,
        rate: float = _UNCHANGED,
        delay: float = _UNCHANGED,
        back: float = _UNCHANGED,
        buffer: float | None = _UNCHANGED,
        loss: LossModel | None = _UNCHANGED,
    ) -> None:
        """Change what is given, from now on (`Simulation.at` says when); a ``delay`` given alone leaves ``back``.

        What is queued leaves at the new rate and has the new delays; what is on its way already has the old ones.
        What is in the queue stays there when the buffer becomes smaller.

        Raises:
            UsageError: a rate, delay or buffer that makes no sense.
        """
        old_rate = self.rate
        if rate is not _UNCHANGED:
            if not 0 < rate < math.inf:
                raise UsageError(f"link: rate is {rate!r}; it is bytes/s, above 0 (Bernoulli(1.0) cuts a link off)")
            self.rate = rate
        if delay is not _UNCHANGED:
            self.delay = _seconds("delay", delay)
        if back is not _UNCHANGED:
            self.back = _seconds("back", back)
        if buffer is not _UNCHANGED:
            if buffer is not None and not buffer >= 0:
                raise UsageError(f"link: buffer is {buffer!r}; it is bytes, 0 or more, or None for no limit")
            self.buffer = math.inf if buffer is None else buffer
            self.room = self.buffer + _ROUNDING
        if rate is not _UNCHANGED or delay is not _UNCHANGED or back is not _UNCHANGED:
            self._retime(old_rate)
        if loss is not _UNCHANGED:
            self.loss = loss
            self._reseed()

    @property
    def round_trip(self) -> float:
        """Seconds there and back when nothing is queued and a packet takes no time to send."""
        return self.delay + self.back

    @property
    def bdp(self) -> float:
        """Bytes in flight that fill the link without a queue: rate * round trip."""
        return self.rate * self.round_trip

    def queue(self, now: float) -> float:
        """Bytes that wait or are on their way onto the wire at ``now``."""
        return max(0.0, (self.idle_at - now) * self.rate)


def _seconds(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise UsageError(f"link: {name} is {value!r}; it is seconds, 0 or more")
    return value
