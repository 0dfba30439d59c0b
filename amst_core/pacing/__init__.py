"""One pace for a session: its lanes as one flow, the congestion controller that limits it, how many lanes it needs.

Sans-IO: what lanes tell (`FlowSample`) goes in, what each may send and how many there should be comes out.
"""

from __future__ import annotations

from .flow import SessionFlow
from .pacer import ControllerPacer, GuardPacer, Pace, SessionPacer
from .queue import QueueGuard
from .sharing import shares
from .streams import Range, RateTuner, StreamTuner, WindowTuner

__all__ = [
    "ControllerPacer",
    "GuardPacer",
    "Pace",
    "QueueGuard",
    "Range",
    "RateTuner",
    "SessionFlow",
    "SessionPacer",
    "StreamTuner",
    "WindowTuner",
    "shares",
]
