"""Every exception AMST raises on purpose, and how it travels: kind, peer, stream, cause, retryable.

Plugins raise these too, never roots of their own. The ``kind`` is a stable word: it is what ``--json``
prints, what travels in RESULT and CLOSE messages, and what the command line maps to an exit code.
"""

from __future__ import annotations

import errno
import traceback
from typing import ClassVar


class AmstError(Exception):
    """Root of all AMST errors.

    Attributes:
        kind: stable identifier of the class of failure.
        retryable: whether doing the same again may succeed without anybody changing anything.
        peer: the other side (``host:port``), when one is involved.
        stream: the id of the lane it happened on, when it happened on one.
        path: the file it concerns, when it concerns one.
        partial: what had been done before it, when a copy was cut short (a ``CopyResult``).
        delivery: which transfers the peer has, may have and has not, when a session was lost (a ``Delivery``).
    The cause, when there is one, is ``__cause__``.
    """

    kind: ClassVar[str] = "error"
    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        peer: str | None = None,
        stream: int | None = None,
        path: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.peer = peer
        self.stream = stream
        self.path = path
        self.partial: object = None
        self.delivery: object = None
        self.retryable = self.default_retryable if retryable is None else retryable

    def __str__(self) -> str:
        return self.message


class UsageError(AmstError):
    """The request makes no sense as written: a bad URL, size, rate or argument."""

    kind = "usage"


class ConfigError(AmstError):
    """Settings are unknown, of the wrong type or out of bounds; the message lists every fault."""

    kind = "config"


class PluginError(AmstError):
    """A plugin is missing, broken, in conflict or written for another API version."""

    kind = "plugin"


class UnavailableError(AmstError):
    """What was required (``--require``) cannot be had here."""

    kind = "unavailable"


class ConnectError(AmstError):
    """No session could be opened: unreachable, refused, not an AMST server, no common version."""

    kind = "connect"
    default_retryable = True


class AuthError(AmstError):
    """The proof of the token failed, or the peer allows less than what was asked."""

    kind = "auth"


class ClosedError(AmstError):
    """This side closed the session, lane or ticket; the call came too late."""

    kind = "closed"


class BrokenError(AmstError):
    """The peer or the network went away."""

    kind = "broken"
    default_retryable = True


class DeadlineError(BrokenError):
    """A wait ran into its deadline."""

    kind = "timeout"


class BusyError(AmstError, RuntimeError):
    """Two threads used at once what only one may use."""

    kind = "busy"


class ProtocolError(AmstError):
    """The peer sent something the wire format forbids."""

    kind = "protocol"


class IntegrityError(AmstError):
    """Bytes arrived that are not the bytes that were sent."""

    kind = "integrity"


class NotFoundError(AmstError):
    """The named source does not exist."""

    kind = "not_found"


class RefusedError(AmstError):
    """Not permitted: unreadable source, unwritable target, a path outside the root."""

    kind = "refused"


class StorageError(AmstError):
    """The file system refused for a reason other than permission: full, name too long, I/O error."""

    kind = "storage"


class SourceChangedError(AmstError):
    """A source file changed while it was being read; that file was not delivered."""

    kind = "source_changed"
    default_retryable = True


class CancelledError(AmstError):
    """The transfer was cancelled by the side that sent it."""

    kind = "cancelled"


_BY_KIND: dict[str, type[AmstError]] = {
    cls.kind: cls
    for cls in (
        UsageError, ConfigError, PluginError, UnavailableError, ConnectError, AuthError, ClosedError, BrokenError,
        DeadlineError, BusyError, ProtocolError, IntegrityError, NotFoundError, RefusedError, StorageError,
        SourceChangedError, CancelledError,
    )
}  # fmt: skip


def error_from_kind(kind: str, message: str, *, peer: str | None = None, path: str | None = None) -> AmstError:
    """Rebuild the error a peer reported by its ``kind``; an unknown kind gives a plain `AmstError`.

    Its words are a peer's too: they come out as `printable`.
    """
    return _BY_KIND.get(kind, AmstError)(printable(message), peer=peer, path=path)


def printable(text: str) -> str:
    r"""``text`` in one line that no terminal takes for a command: what cannot be printed as ``\xNN``, ``\n``..."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_NOT_FOUND = frozenset({errno.ENOENT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ETXTBSY})


def release_frames(error: BaseException) -> None:
    """Drop the local variables of every frame that ``error`` and what it came from went through.

    An error that is kept (as the last one of a stream) keeps its traceback, and that the buffers in use when it was
    raised: of a message of gigabytes, until the next error. The traceback still tells where it was.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += (one.__cause__, one.__context__)


def error_from_os(err: OSError, what: str, *, path: str | None = None) -> AmstError:
    """Map a file system error once, at the boundary: not found, refused or storage.

    ``what`` says what was being done ("cannot open"); the path and the system's own words follow it.
    """
    message = f"{what} {path}: {err.strerror or err}" if path is not None else f"{what}: {err.strerror or err}"
    if err.errno in _NOT_FOUND:
        return NotFoundError(message, path=path)
    if err.errno in _REFUSED:
        return RefusedError(message, path=path)
    return StorageError(message, path=path)
