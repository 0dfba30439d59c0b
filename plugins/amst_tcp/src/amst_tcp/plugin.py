"""Entry point of the TCP transport: light to import, the transport itself is imported on first use."""

from __future__ import annotations

from collections.abc import Mapping

from amst_core.hookspecs import hookimpl
from amst_core.interfaces import Transport


@hookimpl
def amst_make_transport(name: str, options: Mapping[str, object]) -> Transport | None:
    """Make the transport ``tcp``; None for any other name."""
    if name != "tcp":
        return None
    from .transport import TcpTransport

    return TcpTransport(options)
