"""Which mode fits a path, and what a mode means for a session. No I/O, no clock, no thread."""

from .detector import ThresholdDetector
from .profiles import EXPRESS, Profile, agreed_streams, first_mode, first_reason, profile
from .thresholds import Thresholds, tier_of

__all__ = [
    "EXPRESS",
    "Profile",
    "ThresholdDetector",
    "Thresholds",
    "agreed_streams",
    "first_mode",
    "first_reason",
    "profile",
    "tier_of",
]
