"""Connect to a name or address: every address it has, in the resolver's order, under one deadline.

A small form of Happy Eyeballs (RFC 8305, section 5): the next address is tried when the last one failed or
has kept silent for `STAGGER_S`, the earlier attempts going on meanwhile; the first to connect wins.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from amst_core.errors import ConnectError

STAGGER_S: Final = 0.25
"""Head start of one address over the next: RFC 8305's "Connection Attempt Delay"."""

_IN_PROGRESS: Final = frozenset({errno.EINPROGRESS, errno.EAGAIN})


@dataclass(frozen=True, slots=True)
class _Target:
    family: socket.AddressFamily
    sockaddr: Any

    def __str__(self) -> str:
        host, port = self.sockaddr[:2]
        return address_text(host, port)


def address_text(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets, as ``ss`` writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dial(host: str, port: int, *, timeout_s: float, prepare: Callable[[socket.socket], None]) -> socket.socket:
    """Connect to ``host:port`` within ``timeout_s`` and return the blocking socket; safe from any thread.

    ``prepare`` sets what must be set before the handshake (buffer sizes decide the window scale). Resolving
    a name is the resolver's own time and counts, but cannot be cut short.

    Raises:
        ConnectError: the name does not resolve, or no address answered; each one is named with its reason.
    """
    deadline = time.monotonic() + timeout_s
    targets = deque(_resolve(host, port))
    pending: dict[socket.socket, _Target] = {}
    failed: list[str] = []
    with selectors.DefaultSelector() as selector:
        try:
            while (targets or pending) and time.monotonic() < deadline:
                if targets:
                    target = targets.popleft()
                    try:
                        sock = _start(target, prepare)
                    except OSError as err:
                        failed.append(f"{target}: {err.strerror or err}")
                        continue
                    pending[sock] = target
                    selector.register(sock, selectors.EVENT_WRITE)
                patience_s = max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(min(patience_s, STAGGER_S) if targets else patience_s):
                    sock = key.fileobj  # type: ignore[assignment]  # only sockets are registered
                    selector.unregister(sock)
                    reason = _outcome(sock)
                    if reason is None:
                        del pending[sock]
                        sock.setblocking(True)
                        return sock
                    failed.append(f"{pending.pop(sock)}: {reason}")
                    sock.close()
        finally:
            for sock in pending:
                sock.close()
    failed += [f"{target}: no answer within {timeout_s:g} s" for target in pending.values()]
    failed += [f"{target}: not tried, the {timeout_s:g} s were over" for target in targets]
    raise ConnectError(
        f"cannot connect to {address_text(host, port)} ({'; '.join(failed)}): "
        "check that the server runs there and that no firewall is between",
        peer=address_text(host, port),
    )


def _resolve(host: str, port: int) -> list[_Target]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as err:  # ValueError: not a name at all (too long a label, a NUL)
        reason = err.strerror if isinstance(err, OSError) and err.strerror else err
        raise ConnectError(
            f"cannot resolve {host!r}: {reason}; check the name or give an address", peer=address_text(host, port)
        ) from err
    return [_Target(family, sockaddr) for family, _, _, _, sockaddr in found]


def _start(target: _Target, prepare: Callable[[socket.socket], None]) -> socket.socket:
    """Begin to connect; whether that has worked is known when the socket turns writable."""
    sock = socket.socket(target.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        prepare(sock)
        code = sock.connect_ex(target.sockaddr)
        if code and code not in _IN_PROGRESS:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _outcome(sock: socket.socket) -> str | None:
    """Why the attempt failed, None when it is connected."""
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        return os.strerror(code)
    # On one machine a dial to a free port may be given that very port and meet itself (simultaneous open).
    if sock.getsockname() == sock.getpeername():
        return os.strerror(errno.ECONNREFUSED)
    return None
