"""How a rate is shared out among lanes."""

from __future__ import annotations

from collections.abc import Mapping


def shares(total: float, wants: Mapping[int, float]) -> float:
    """The cap that, put on every lane, lets them send ``total`` together (max-min fairness, by water-filling).

    ``wants`` is what each would send uncapped; all have room where that is less than ``total``, and the cap is then
    what would be left for one more, so that a lane that wakes up finds room.
    """
    left = total
    ordered = sorted(wants.values())
    for at, want in enumerate(ordered):
        level = left / (len(ordered) - at)
        if want >= level:
            return level
        left -= want
    return max(left, total / max(1, len(ordered)))
