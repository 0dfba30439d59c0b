"""How long to wait before trying again: doubling, with jitter, so that many who failed together do not return so."""

from __future__ import annotations

import random
from typing import Final

FIRST_S: Final = 0.02
MOST_S: Final = 1.0
"""Pause before the first retry and the longest one, each ± 50 %."""


def pause_s(attempt: int) -> float:
    """The pause after ``attempt`` failures in a row (from 0), in seconds."""
    return min(MOST_S, FIRST_S * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.5)
