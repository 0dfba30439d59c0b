"""The sans-IO heart: which bytes go where, which are held, which must go again. No I/O, clock or thread.

`Engine` is the only entry; the session calls it under one lock and carries out what it answers.
"""

from .engine import Delivery, Engine, Limits
from .events import Event
from .incoming import Placement, Verdict
from .outgoing import Chunk

__all__ = ["Chunk", "Delivery", "Engine", "Event", "Limits", "Placement", "Verdict"]
