"""Which transports can be used, which one runs, and why not another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from ..errors import ConnectError, PluginError, UnavailableError, UsageError
from ..interfaces import Candidate, Endpoint, Mode, Transport
from ..plugins import Plugins, how_to_get
from ..session.session import Session
from ..settings.values import Settings

_log = logging.getLogger("amst.api")

TRANSPORT_GROUP: Final = "amst.transport"


class TransportChoice:
    """Which transports the client can use towards a peer, and which one runs, with the reason."""

    def __init__(
        self, plugins: Plugins, settings: Settings, peer: Endpoint, *, preferred: str | None, required: str | None
    ) -> None:
        self._plugins = plugins
        self._required = required
        self._asked = required or preferred
        self._session: Session | None = None
        self.reason = ""
        installed = plugins.names(TRANSPORT_GROUP)
        if required is not None and required not in installed:
            advice = how_to_get(TRANSPORT_GROUP, required)
            raise UnavailableError(f"transport {required!r} is required and not installed{advice}")
        if preferred is not None and preferred not in installed:
            raise UsageError(
                f"no installed plugin offers transport {preferred!r}; installed: {', '.join(installed) or 'none'}"
                f"{how_to_get(TRANSPORT_GROUP, preferred)}"
            )
        self.transports: dict[str, Transport] = {}
        candidates: list[Candidate] = []
        self._why_not: dict[str, str] = {}
        for name in [required] if required is not None else installed:
            try:
                transport = plugins.transport(name, settings.plugins.get(name, {}))
            except PluginError as err:
                self._why_not[name] = str(err)
                continue
            candidate = transport.probe(peer)
            if candidate.usable:
                self.transports[name] = transport
                candidates.append(candidate)
            else:
                transport.close()
                self._why_not[name] = candidate.reason
        for name, why in self._why_not.items():
            _log.warning("transport %s cannot be used: %s", name, why)
        if required is not None and required not in self.transports:
            raise UnavailableError(f"transport {required!r} is required and cannot be used: {self._why_not[required]}")
        if not self.transports:
            raise _no_transport(self._why_not)
        candidates.sort(key=lambda c: (c.transport != self._asked, -c.score))
        self.order = [candidate.transport for candidate in candidates]

    def settle(self, offered: Sequence[str]) -> str:
        """The transport that runs, given what the peer offers.

        Raises:
            UnavailableError: the required one is not among them.
            ConnectError: none is.
        """
        common = [name for name in self.order if name in offered]
        if self._required is not None and not common:
            raise UnavailableError(
                f"transport {self._required!r} is required; the peer offers {', '.join(offered) or 'none'}"
            )
        if not common:
            raise ConnectError(
                f"no common transport: this side has {', '.join(self.order)}, the peer {', '.join(offered) or 'none'}",
                retryable=False,
            )
        if self._asked is not None and common[0] != self._asked:
            why = self._why_not.get(self._asked, "the peer does not offer it")
            self.reason = f"{self._asked} was asked for, {common[0]} runs: {why}"
            _log.warning("%s", self.reason)
        return common[0]

    def opened(self, session: Session, mode: Mode) -> None:
        """A session came about; its end is told by `close`."""
        self._session = session
        self._plugins.notify(
            "amst_session_opened",
            session_id=session.id,
            peer=session.peer,
            transport=session.wanted_transport,
            mode=mode.value,
        )

    def mode_changed(self, session: Session, old: Mode, new: Mode, reason: str) -> None:
        """A session is in another mode."""
        self._plugins.notify("amst_mode_changed", session_id=session.id, old=old, new=new, reason=reason)

    def close(self) -> None:
        """The session is over, or never came about."""
        if self._session is not None:
            self._plugins.notify("amst_session_closed", session_id=self._session.id, error=self._session.error)
        for transport in self.transports.values():
            transport.close()


def usable_transports(plugins: Plugins, settings: Settings) -> dict[str, Transport]:
    """Every installed transport that works here; the others are reported by name."""
    usable: dict[str, Transport] = {}
    why_not: dict[str, str] = {}
    for name in plugins.names(TRANSPORT_GROUP):
        try:
            transport = plugins.transport(name, settings.plugins.get(name, {}))
        except PluginError as err:
            why_not[name] = str(err)
            continue
        candidate = transport.probe(None)
        if candidate.usable:
            usable[name] = transport
        else:
            transport.close()
            why_not[name] = candidate.reason
    for name, why in why_not.items():
        _log.warning("transport %s cannot be used: %s", name, why)
    if not usable:
        raise _no_transport(why_not)
    return usable


def _no_transport(why_not: Mapping[str, str]) -> PluginError:
    if why_not:
        reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items())
        return PluginError(f"no transport can be used here ({reasons})")
    return PluginError("no transport plugin is installed; install one, for example: pip install amst-tcp")
