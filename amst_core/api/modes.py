"""From settings to what decides about the mode of a session."""

from __future__ import annotations

import logging
from typing import Final

from ..congestion import AUTO
from ..errors import AmstError, UsageError
from ..interfaces import Mode, ModeDetector
from ..modes import ThresholdDetector, Thresholds
from ..plugins import Plugins, how_to_get
from ..session.session import as_mode
from ..settings.registry import THRESHOLD
from ..settings.values import Settings

_log = logging.getLogger("amst.api")

GROUP: Final = "amst.mode"


def forced_mode(settings: Settings, named: Mode | str | None) -> Mode | None:
    """The mode that this side asks for: the one ``named``, else that of ``transport.modes.mode``; None: the path's.

    Raises:
        UsageError: there is none of that name.
    """
    word = settings.transport.modes.mode if named is None else named
    return None if word == AUTO else as_mode(word)


def make_detector(plugins: Plugins, settings: Settings) -> ModeDetector | None:
    """A new detector; None where the mode does not follow the path (``transport.modes.auto_mode``).

    An installed plugin's comes before the core's own, which also stands in for one that cannot be made.

    Raises:
        UsageError: several are installed, and ``transport.modes.detector`` names none of them.
    """
    modes = settings.transport.modes
    if not modes.auto_mode:
        return None
    name = modes.detector
    if name == AUTO:
        installed = plugins.names(GROUP)
        if len(installed) > 1:
            raise UsageError(
                f"several mode detectors are installed ({', '.join(installed)}): say which one decides, or"
                f" {THRESHOLD}, in transport.modes.detector"
            )
        name = installed[0] if installed else THRESHOLD
    if name != THRESHOLD:
        try:
            if name not in plugins.names(GROUP):
                raise UsageError(f"no installed plugin offers mode detector {name!r}{how_to_get(GROUP, name)}")
            return plugins.detector(name, settings.plugins.get(name, {}))
        except AmstError as err:
            _log.warning("%s; the core's own detector decides", err)
    return ThresholdDetector(
        Thresholds(
            near_s=modes.datacenter_latency,
            far_s=modes.internet_latency,
            fast=modes.datacenter_bandwidth,
            lossy=modes.internet_loss,
        )
    )
