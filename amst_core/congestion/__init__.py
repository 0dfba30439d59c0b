"""For congestion controllers, and for what drives them: what every one of them counts, and the samples they are fed.

Pure as the controllers are: no clock, no I/O, no thread.
"""

from __future__ import annotations

from .account import FlowAccount

__all__ = ["FlowAccount"]
