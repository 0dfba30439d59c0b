"""The sans-IO heart: which bytes go where, which are held, which must go again. No I/O, clock or thread.

`Engine` is the only entry; the session calls it under one lock and carries out what it answers.
"""

from .engine import Chunk, Engine, Limits, Placement, Verdict
from .events import Event

__all__ = ["Chunk", "Engine", "Event", "Limits", "Placement", "Verdict"]
