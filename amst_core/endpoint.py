"""Addresses as users write them."""

from __future__ import annotations

import re
from typing import Final

from .errors import UsageError
from .interfaces import Endpoint

DEFAULT_PORT: Final = 9000
SCHEME: Final = "amst"

_FORM: Final = re.compile(
    r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?:\[(?P<v6>[^\[\]]*)\]|(?P<host>[^\[\]:/@?#\s]*))(?::(?P<port>\d{1,5}))?/?",
    re.IGNORECASE,
)


def parse_endpoint(text: str) -> Endpoint:
    """``amst://HOST:PORT``, ``HOST:PORT`` or ``HOST``; an IPv6 address stands in brackets.

    Raises:
        UsageError: it is not of that form, the scheme is unknown, or the port is out of range.
    """
    match = _FORM.fullmatch(text)
    host = match and (match["v6"] or match["host"])
    if match is None or not host:
        raise UsageError(f"{text!r} is not an address; write {SCHEME}://HOST:PORT, an IPv6 address in brackets")
    scheme = (match["scheme"] or SCHEME).lower()
    if scheme != SCHEME:
        raise UsageError(f"{text!r} has the scheme {scheme!r}; {SCHEME}:// is what is spoken here")
    port = int(match["port"] or DEFAULT_PORT)
    if port > 65535:
        raise UsageError(f"{text!r} has port {port}; ports end at 65535")
    return Endpoint(scheme, host, port)
