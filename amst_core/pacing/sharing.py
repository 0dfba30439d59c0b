"""How a rate is shared out among lanes."""

from __future__ import annotations

from collections.abc import Mapping


def shares(total: float, wants: Mapping[int, float]) -> float:
    """The cap that, put on every lane, lets them send ``total`` together (max-min fairness, by water-filling).

    ``wants`` is what each would send uncapped. Where that is less than ``total``, all have room, and the cap is what
    the one that wants most could have, so that a lane that wakes up finds room.
    """
    left = level = total
    ordered = sorted(wants.values())
    for at, want in enumerate(ordered):
        level = left / (len(ordered) - at)
        if want >= level:
            break
        left -= want
    return level
