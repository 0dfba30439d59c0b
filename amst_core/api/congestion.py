"""Which congestion controllers there are, and which one this side asks for."""

from __future__ import annotations

import logging
from typing import Final

from ..congestion import AUTO, NAME, Backend, CongestionPolicy
from ..errors import AmstError, PluginError, UsageError
from ..interfaces import CongestionController
from ..plugins import Plugins, how_to_get
from ..settings.values import Settings

_log = logging.getLogger("amst.api")

GROUP: Final = "amst.congestion"
_MSS: Final = 1460  # a controller is only asked what the system calls it

_SESSION_MSS: Final = 4 * _MSS
"""What counts as a segment where a controller paces a session: the least that it sends must do for several lanes."""


class Controllers:
    """The congestion controllers that are installed, each made once to learn what the system calls it.

    One that cannot be made is as good as absent: a warning tells why, and nobody who did not ask for it notices.
    """

    def __init__(self, plugins: Plugins, settings: Settings) -> None:
        self._system_names: dict[str, str | None] = {}
        self._broken: dict[str, str] = {}
        self._plugins = plugins
        self._settings = settings
        for name in plugins.names(GROUP):
            try:
                if not NAME.fullmatch(name):
                    raise PluginError(f"{name!r} is no name of a congestion control (it must match {NAME.pattern})")
                made = plugins.controller(name, settings.plugins.get(name, {}), mss=_MSS)
                self._system_names[name] = _checked(made.kernel_name)
            except AmstError as err:
                self._broken[name] = err.message
                _log.warning("congestion control %s cannot be used: %s", name, err)

    def asked_for(self, settings: Settings, named: str | None) -> str:
        """The controller that this side asks for: the one ``named``, else that of ``congestion.algorithm``.

        What only a file asks for and no plugin offers is a warning, and as if nothing had been asked for.

        Raises:
            UsageError: no installed plugin offers the one that is ``named``, or it cannot be used.
        """
        name = named if named is not None else settings.congestion.algorithm
        if name == AUTO or name in self._system_names:
            return name
        why = self._why_not(name)
        if named is not None:
            raise UsageError(why)
        _log.warning("%s (congestion.algorithm); the path decides", why)
        return AUTO

    def policy(self, asked: str, *, backend: Backend = Backend.AUTO, polite: bool = False) -> CongestionPolicy:
        """The choice for the lanes of a session that asks for ``asked``, run by ``backend`` unless the settings say."""
        congestion = self._settings.congestion
        own = Backend(congestion.backend)
        paced = self._settings.transport.amst.pacing_enabled
        return CongestionPolicy(
            asked,
            self._system_names,
            self._broken,
            backend=backend if own is Backend.AUTO else own,
            base=congestion.base,
            make=self._make if paced else None,
            polite=polite,
        )

    def _make(self, name: str) -> CongestionController:
        return self._plugins.controller(name, self._settings.plugins.get(name, {}), mss=_SESSION_MSS)

    def _why_not(self, name: str) -> str:
        if name in self._broken:
            return f"congestion control {name!r} cannot be used: {self._broken[name]}"
        return (
            f"no installed plugin offers congestion control {name!r}; installed:"
            f" {', '.join(self._system_names) or 'none'}{how_to_get(GROUP, name)}"
        )


def _checked(kernel_name: object) -> str | None:
    """What a plugin says that the system calls it.

    Raises:
        PluginError: that is no such name.
    """
    if kernel_name is None:
        return None
    if isinstance(kernel_name, str) and kernel_name.isascii() and kernel_name.isprintable() and kernel_name:
        return kernel_name
    raise PluginError(f"its kernel_name is {kernel_name!r}: it must be None or a name in ASCII")
