"""What parts the modes from each other (requirements F2), and the tiers (requirements F5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_TIERS_S: Final = (0.005, 0.050, 0.150)


def tier_of(latency_s: float) -> int:
    """The tier of a path by its round trip: 1 below 5 ms, 2 below 50 ms, 3 below 150 ms, 4 above."""
    return 1 + sum(latency_s >= bound for bound in _TIERS_S)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where modes end; seconds, bytes/s, and a share of the segments.

    Attributes:
        near_s: a shorter round trip is a datacenter's.
        far_s: a longer one is the internet's.
        fast: the rate of a datacenter's link by its name; what it delivers is less (0.94 of it, of Ethernet).
        lossy: more than this lost is the internet's.
    """

    near_s: float = 0.010
    far_s: float = 0.050
    fast: float = 125e6
    lossy: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.near_s <= self.far_s:
            raise ValueError(f"a datacenter's round trips end at {self.near_s} s, the internet's begin at {self.far_s}")
        if not (self.fast > 0 and 0 < self.lossy < 1):
            raise ValueError(f"a rate of {self.fast} bytes/s, a loss of {self.lossy}")
