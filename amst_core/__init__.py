"""AMST, the Adaptive Multi-Stream Transport: moves bulk data between machines and proves that it arrived.

>>> with amst_core.connect("amst://peer:9000") as session:          # doctest: +SKIP
...     session.send(b"hello").wait()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import AmstError

if TYPE_CHECKING:
    from .api.client import connect
    from .api.server import Server, listen
    from .session.pipes import PipeReader, PipeWriter
    from .session.session import Session
    from .session.tickets import Ticket
    from .settings.load import load_settings
    from .settings.values import Settings

__all__ = [
    "AmstError", "PipeReader", "PipeWriter", "Server", "Session", "Settings", "Ticket", "connect", "listen",
    "load_settings",
]  # fmt: skip

_HOMES = {
    "Server": "api.server",
    "connect": "api.client",
    "listen": "api.server",
    "PipeReader": "session.pipes",
    "PipeWriter": "session.pipes",
    "Session": "session.session",
    "Ticket": "session.tickets",
    "load_settings": "settings.load",
    "Settings": "settings.values",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: ``import amst_core`` alone stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
