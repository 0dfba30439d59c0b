"""For congestion controllers, and for what drives them: what every one of them counts, the samples they are fed, and
which of them a lane gets.
"""

from __future__ import annotations

from .account import FlowAccount
from .delivery import DeliveryRateSampler, SentPacket
from .policy import AUTO, FAR_S, NAME, Backend, CongestionPolicy
from .windowed import WindowedMax, WindowedMin

__all__ = [
    "AUTO",
    "FAR_S",
    "NAME",
    "Backend",
    "CongestionPolicy",
    "DeliveryRateSampler",
    "FlowAccount",
    "SentPacket",
    "WindowedMax",
    "WindowedMin",
]
