"""The transport ``tcp``: lanes are connections to the core's own TCP listener."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import ClassVar, Final

from amst_core.errors import BrokenError, ConfigError, ConnectError
from amst_core.interfaces import (
    Advertisement,
    Candidate,
    Capability,
    Endpoint,
    Lane,
    LaneRequest,
    LaneTimeouts,
    Transport,
)

from .dial import address_text, dial
from .lane import SocketOptions, TcpLane
from .sysctl import sysctl

_MAX_BYTES: Final = (1 << 31) - 1  # the kernel takes these options as a C int
_CAPS: Final = {"send_buffer": "core/wmem_max", "receive_buffer": "core/rmem_max"}


class TcpTransport(Transport):
    """Opens and adopts TCP lanes. Holds no socket and no thread of its own; safe from any thread."""

    name: ClassVar[str] = "tcp"
    capabilities: ClassVar[Capability] = Capability.FILE_SPAN

    def __init__(self, options: Mapping[str, object]) -> None:
        """Check ``options``, the settings under ``plugins.tcp`` (see `SocketOptions`).

        Raises:
            ConfigError: an unknown option, or a value that is no number of bytes; names every fault.
        """
        self._options = _checked(options)

    def probe(self, peer: Endpoint | None) -> Candidate:
        """Usable wherever there are sockets; the facts tell the kernel's congestion control algorithms."""
        facts: dict[str, object] = {}
        available = sysctl("ipv4/tcp_available_congestion_control")
        if available is not None:
            facts["available_congestion"] = tuple(available.split())
        default = sysctl("ipv4/tcp_congestion_control")
        if default is not None:
            facts["default_congestion"] = default
        return Candidate(self.name, True, "; ".join(self._capped()) or "kernel TCP", score=1.0, facts=facts)

    def advertise(self, tag: int, deliver: Callable[[Lane], None]) -> Advertisement:
        """Answer only: the connections come to the core's listener and from there through `adopt`."""
        return Advertisement(self.name, tag)

    def connect(self, request: LaneRequest, timeouts: LaneTimeouts) -> TcpLane:
        sock = dial(request.host, request.port, timeout_s=request.timeout_s, prepare=self._options.set_buffers)
        try:
            sock.sendall(request.preamble)  # a few bytes into an empty buffer: never blocks
            return TcpLane(sock, timeouts, self._options)
        except OSError as err:
            sock.close()
            peer = address_text(request.host, request.port)
            raise ConnectError(
                f"{peer} accepted a lane and dropped it at once: {err.strerror or err}; see the server's log", peer=peer
            ) from err

    def adopt(self, sock: socket.socket, timeouts: LaneTimeouts) -> TcpLane:
        """Turn an accepted connection into a lane; from here on the socket is ours, also when this raises.

        Raises:
            BrokenError: the peer is already gone.
        """
        try:
            self._options.set_buffers(sock)
            return TcpLane(sock, timeouts, self._options)
        except OSError as err:
            sock.close()
            raise BrokenError(f"a lane's connection was gone before it was used: {err.strerror or err}") from err

    def close(self) -> None:
        """Nothing to release: the transport holds no listener, device or thread."""

    def _capped(self) -> list[str]:
        """Buffer sizes that the kernel will cut down without telling."""
        found = []
        for option, cap in _CAPS.items():
            asked, limit = getattr(self._options, option), sysctl(cap)
            if limit is not None and asked > int(limit):
                found.append(f"{option} {asked} is cut to net.{cap.replace('/', '.')} = {limit}")
        return found


def _checked(options: Mapping[str, object]) -> SocketOptions:
    known = [field.name for field in fields(SocketOptions)]
    faults = [f"plugins.tcp.{key} is unknown; known are {', '.join(known)}" for key in options if key not in known]
    values: dict[str, int] = {}
    for key in known:
        value = options.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_BYTES:
            faults.append(
                f"plugins.tcp.{key} = {value!r} must be a whole number of bytes, 0 (the kernel's own) to {_MAX_BYTES}"
            )
        elif key in options:
            values[key] = value
    if faults:
        raise ConfigError("; ".join(faults))
    return SocketOptions(**values)
