"""The questions the core asks plugins, and what it tells them; docs/plugins.md explains each.

A plugin decorates functions of these names with `hookimpl`. Every hook is synchronous and is called once
per session or change of state, never per chunk: the ``make`` hooks return an object, and the hot path
calls that object's methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pluggy

from .errors import AmstError
from .interfaces import CongestionController, MetricsExporter, Mode, ModeDetector, Transport

PROJECT: Final = "amst"

hookspec: Final = pluggy.HookspecMarker(PROJECT)
hookimpl: Final = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of the same name."""


@hookspec(firstresult=True)
def amst_make_transport(name: str, options: Mapping[str, object]) -> Transport | None:
    """Return a new transport called ``name``, or None when that name is not yours.

    ``options`` are the settings under ``plugins.<name>``; every one of them may be missing.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of bounds.
    """


@hookspec(firstresult=True)
def amst_make_controller(name: str, options: Mapping[str, object], mss: int) -> CongestionController | None:
    """Return a new congestion controller called ``name``, or None when that name is not yours.

    ``mss`` is the path's maximum segment size in bytes.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of bounds.
    """


@hookspec(firstresult=True)
def amst_make_detector(name: str, options: Mapping[str, object]) -> ModeDetector | None:
    """Return a new mode detector called ``name``, or None when that name is not yours.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of bounds.
    """


@hookspec(firstresult=True)
def amst_make_exporter(name: str, options: Mapping[str, object]) -> MetricsExporter | None:
    """Return a new metrics exporter called ``name``, or None when that name is not yours.

    Nothing is published before `MetricsExporter.start`.

    Raises:
        ConfigError: an option is unknown, of the wrong type or out of bounds.
    """


@hookspec
def amst_session_opened(session_id: str, peer: str, transport: str, mode: Mode) -> None:
    """A session was authenticated and may carry transfers.

    ``peer`` is ``host:port``; ``transport`` the name of the one in use, several joined by ``+``. Called on
    the session's thread: return quickly. What it raises is logged and goes no further.
    """


@hookspec
def amst_session_closed(session_id: str, error: AmstError | None) -> None:
    """A session ended; ``error`` says why when it did not end as asked, None otherwise.

    Called once for every session that was reported as opened.
    """


@hookspec
def amst_mode_changed(session_id: str, old: Mode, new: Mode, reason: str) -> None:
    """A session went from profile ``old`` to ``new``; ``reason`` is the detector's or the operator's."""
