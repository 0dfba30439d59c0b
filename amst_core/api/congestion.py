"""Which congestion controllers there are, and which one this side asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from ..congestion import AUTO, CongestionPolicy
from ..errors import ConfigError, PluginError, UsageError
from ..plugins import FIRST_PARTY, Plugins
from ..settings.values import Settings

_log = logging.getLogger("amst.api")

GROUP: Final = "amst.congestion"
_MSS: Final = 1460  # a controller is only asked what the system calls it


def asked_for(plugins: Plugins, settings: Settings, named: str | None) -> str:
    """The controller that this side asks for: the one ``named``, else that of ``congestion.algorithm``.

    What only a file asks for and no plugin offers is a warning, and as if nothing had been asked for.

    Raises:
        UsageError: no installed plugin offers the one that is ``named``.
    """
    name = named if named is not None else settings.congestion.algorithm
    offered = plugins.names(GROUP)
    if name == AUTO or name in offered:
        return name
    distribution = FIRST_PARTY.get((GROUP, name))
    why = (
        f"no installed plugin offers congestion control {name!r}; installed: {', '.join(offered) or 'none'}"
        f"{f'; pip install {distribution}' if distribution else ''}"
    )
    if named is not None:
        raise UsageError(why)
    _log.warning("%s (congestion.algorithm); the path decides", why)
    return AUTO


def make_policy(plugins: Plugins, settings: Settings, asked: str) -> CongestionPolicy:
    """The choice for the lanes of a session, among the controllers that are installed and work."""
    return CongestionPolicy(asked, _system_names(plugins, settings))


def _system_names(plugins: Plugins, settings: Settings) -> Mapping[str, str | None]:
    names: dict[str, str | None] = {}
    for name in plugins.names(GROUP):
        try:
            names[name] = plugins.controller(name, settings.plugins.get(name, {}), mss=_MSS).kernel_name
        except (PluginError, ConfigError) as err:
            _log.warning("congestion control %s cannot be used: %s", name, err)
    return names
