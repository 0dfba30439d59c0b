"""Where from and where to: locations as users write them, and cp's rules for the names that copies get."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from ..endpoint import DEFAULT_PORT, SCHEME
from ..errors import RefusedError, UsageError
from ..files.entries import display_path, normalise_user_path
from ..interfaces import Endpoint

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SSH: Final = re.compile(r"[^/@]+@(\[[^\]/]*\]|[^/:@]+):.*", re.DOTALL)
_HOST: Final = re.compile(r"[^\s\x00-\x20/\\%@:?#\[\]]+")
_STRAY_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ITSELF: Final = (b"", b".", b"..")

FORM: Final = "write amst://HOST[:PORT]/PATH"


@dataclass(frozen=True, slots=True)
class Local:
    """A path on this machine. ``slash``: it was written with a trailing ``/``, which ``path`` no longer has."""

    text: str
    path: bytes
    slash: bool


@dataclass(frozen=True, slots=True)
class Remote:
    """A path on a server, relative to its root (``b""`` is the root); ``slash`` as in `Local`.

    ``name`` is what a copy of it is called, empty when it stands for what it holds (the root, ``x/.``).
    """

    text: str
    endpoint: Endpoint
    path: bytes
    slash: bool
    name: bytes

    @property
    def address(self) -> str:
        """The server as `amst_core.connect` takes it."""
        return f"{SCHEME}://{self.endpoint}"


@dataclass(frozen=True, slots=True)
class Standard:
    """``-``: standard input as a source, standard output as a target."""

    text: str


def parse_location(text: str) -> Local | Remote | Standard:
    """Read a location of the command line.

    Raises:
        UsageError: not a location, or one of a kind that is not built yet.
        RefusedError, StorageError: a remote path that leaves the root (``..``) or is too long.
    """
    if not text:
        raise UsageError("an empty location; give a path, or . for this directory")
    if text == "-":
        return Standard(text)
    if scheme := _SCHEME.match(text):
        if scheme[1].lower() != SCHEME:
            raise UsageError(f"{text}: the scheme {scheme[1]} is unknown; {FORM}, or ./... for a local path")
        return _parse_url(text, text[scheme.end() :])
    if _SSH.fullmatch(text):
        raise UsageError(f"{text}: ssh locations are not built yet; {FORM} (a local path of this form: ./{text})")
    path = os.fsencode(text)
    return Local(text, path.rstrip(b"/") or b"/", path.endswith(b"/"))


def parse_server(text: str) -> Remote:
    """Read a URL that names a server and nothing on it.

    Raises:
        UsageError: not such a URL.
    """
    location = parse_location(text)
    if not isinstance(location, Remote) or location.path:
        raise UsageError(f"{text}: this takes a server without a path: amst://HOST[:PORT]")
    return location


def _parse_url(text: str, rest: str) -> Remote:
    authority, _, path = rest.partition("/")
    if "@" in authority:
        raise UsageError(f"{text}: a user name has no meaning here; {FORM}")
    for mark, code in (("?", "%3F"), ("#", "%23")):
        if mark in rest:
            raise UsageError(f"{text}: a URL of amst has nothing after {mark!r}; in a name write it as {code}")
    if stray := _STRAY_PERCENT.search(path):
        raise UsageError(f"{text}: {stray[0]!r} is not followed by two hex digits; in a name write it as %25")
    raw = unquote_to_bytes(os.fsencode(path))
    clean = normalise_user_path(raw)
    last = raw.rstrip(b"/").rpartition(b"/")[2]
    return Remote(
        text=text,
        endpoint=_parse_authority(text, authority),
        path=clean,
        slash=not clean or raw.endswith(b"/"),
        name=b"" if last in _ITSELF else last,
    )


def _parse_authority(text: str, authority: str) -> Endpoint:
    if authority.startswith("["):
        host, bracket, after = authority[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise UsageError(f"{text}: the brackets of the address do not fit; write amst://[::1]:{DEFAULT_PORT}/PATH")
        host = host.replace("%25", "%", 1)  # RFC 6874: how a URL writes the % before a zone
        try:
            ipaddress.IPv6Address(host)
        except ValueError as err:
            raise UsageError(f"{text}: {host!r} is not an IPv6 address") from err
        port = after[1:] if after else str(DEFAULT_PORT)
    else:
        host, colon, port = authority.partition(":")
        if ":" in port:
            raise UsageError(f"{text}: an IPv6 address stands in brackets: amst://[::1]:{DEFAULT_PORT}/PATH")
        if not _HOST.fullmatch(host):
            raise UsageError(f"{text}: {'no host is given' if not host else f'{host!r} is not a host name'}; {FORM}")
        port = port if colon else str(DEFAULT_PORT)
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:9]) <= 65535):
        raise UsageError(f"{text}: {port!r} is not a port; give a number from 1 to 65535")
    return Endpoint(SCHEME, host, int(port))


# ---- names --------------------------------------------------------------------------------


def source_name(source: Local | Remote) -> bytes:
    """What a copy of ``source`` is called in a directory; empty when only what it holds is meant."""
    if isinstance(source, Remote):
        return source.name
    last = source.path.rpartition(b"/")[2]
    return b"" if last in _ITSELF else last


def final_names(
    sources: Sequence[Local | Remote], target: Local | Remote, *, exists: bool, is_dir: bool
) -> list[bytes]:
    """The full name of each source's copy, by cp's rules.

    Raises:
        UsageError: several sources without a directory, or two that would get one name.
        RefusedError: the target is written as a directory and is none.
    """
    into = target.slash or is_dir
    if exists and not is_dir:
        if len(sources) > 1:
            raise UsageError(f"{target.text} is not a directory, and several sources need one")
        if target.slash:
            path = target.text.rstrip("/")
            raise RefusedError(f"{path} is not a directory; without the trailing / it would be replaced", path=path)
    if len(sources) > 1 and not into:
        raise UsageError(f"several sources need a directory: to make {target.text}, write it with a trailing /")
    names: dict[bytes, str] = {}
    for source in sources:
        name = _below(target.path, source_name(source)) if into else target.path
        if name in names:
            raise UsageError(f"{names[name]} and {source.text} would both become {display_path(name)}")
        names[name] = source.text
    return list(names)


def _below(directory: bytes, name: bytes) -> bytes:
    if not name or not directory:
        return name or directory
    return directory + name if directory.endswith(b"/") else directory + b"/" + name
