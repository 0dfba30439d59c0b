"""What a simulation writes down of a flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["TraceRecord"]


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """A flow at a moment. Seconds, bytes, bytes/s.

    Attributes:
        cwnd, pacing_rate: the controller's window and pacing rate.
        rtt: the last round trip that could be told, None before the first.
        sent, delivered, lost: totals, as `Flow` has them.
        queue: what waits at the bottleneck, of all flows.
        state: all of the controller's variables.
    """

    time: float
    cwnd: int
    in_flight: int
    pacing_rate: float | None
    rtt: float | None
    sent: int
    delivered: int
    lost: int
    queue: float
    state: Mapping[str, float | str]

    @property
    def mode(self) -> str | None:
        """The controller's ``mode``, None when it has none."""
        mode = self.state.get("mode")
        return mode if isinstance(mode, str) else None
