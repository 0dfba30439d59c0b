"""The one TCP listener: it looks at the first bytes of a connection and hands it to whom it is for.

A TLS ClientHello is a control channel; the lane preamble names a transport, whose `adopt` gets the socket.
Everything else is closed without a word.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from ..errors import AmstError, ConnectError, UsageError
from ..interfaces import PREAMBLE, PREAMBLE_MAGIC, Endpoint

_log = logging.getLogger("amst.control")

_BACKLOG: Final = 1024
_TLS_HANDSHAKE: Final = b"\x16\x03"
_TIMEVAL: Final = struct.Struct("@ll")

MAX_PENDING: Final = 1024
"""Connections that may be in their handshake at once; beyond it new ones are closed at once."""


def format_address(host: str, port: int) -> str:
    """``HOST:PORT``, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Listener:
    """Accepts connections and hands each, on a thread of its own, to ``on_control`` or ``on_lane``.

    Both take the socket over; what they raise is logged and closes it. They must end within the handshake
    timeout or hand the socket on.

    Raises:
        ConnectError: the address cannot be listened on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        on_control: Callable[[socket.socket, str], None],
        on_lane: Callable[[socket.socket, int, str], None],
        handshake_timeout_s: float,
    ) -> None:
        self._on_control = on_control
        self._on_lane = on_lane
        self._timeout_s = handshake_timeout_s
        self._sock = _listen(endpoint)
        self._pending: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        host, port = self._sock.getsockname()[:2]
        self.address = format_address(host, port)
        self._thread = threading.Thread(target=self._accept, name=f"amst-listen-{port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting and cut what is still in its handshake. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            pending = list(self._pending)
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        except OSError:
            pass  # some systems refuse it on a listening socket; close below then does the waking
        self._sock.close()
        for sock in pending:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # already gone
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._sock.accept()
            except OSError as err:
                if self._closed:
                    return
                _log.warning("cannot accept a connection: %s", err)
                time.sleep(0.05)  # out of descriptors: give those in use a moment to be released
                continue
            peer = format_address(*address[:2])
            with self._lock:
                refused = self._closed or len(self._pending) >= MAX_PENDING
                if not refused:
                    self._pending.add(sock)
            if refused:
                sock.close()
                continue
            threading.Thread(target=self._greet, args=(sock, peer), name=f"amst-greet-{peer}", daemon=True).start()

    def _greet(self, sock: socket.socket, peer: str) -> None:
        try:
            self._dispatch(sock, peer)
        except AmstError as err:
            _log.info("connection from %s ended: %s", peer, err)
            sock.close()
        except OSError as err:
            _log.info("connection from %s failed: %s", peer, err)
            sock.close()
        except Exception:
            _log.exception("connection from %s ended by an unexpected error", peer)
            sock.close()
        finally:
            with self._lock:
                self._pending.discard(sock)

    def _dispatch(self, sock: socket.socket, peer: str) -> None:
        first = self._peek(sock)
        if first.startswith(_TLS_HANDSHAKE):
            self._on_control(sock, peer)
        elif len(first) == PREAMBLE.size and first.startswith(PREAMBLE_MAGIC):
            sock.recv(PREAMBLE.size)
            self._on_lane(sock, PREAMBLE.unpack(first)[1], peer)
        else:
            _log.info("%s speaks neither TLS nor the lane protocol (%r)", peer, first)
            sock.close()

    def _peek(self, sock: socket.socket) -> bytes:
        """The first bytes, left in the socket; fewer than a preamble when they do not come in time."""
        seconds = int(self._timeout_s)
        timeout = _TIMEVAL.pack(seconds, int((self._timeout_s - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        try:
            return sock.recv(PREAMBLE.size, socket.MSG_PEEK | socket.MSG_WAITALL)
        except BlockingIOError:
            return b""
        finally:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, 0))


def _listen(endpoint: Endpoint) -> socket.socket:
    where = (endpoint.host, endpoint.port)
    try:
        if endpoint.host in ("::", "") and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("::", endpoint.port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
        host = "0.0.0.0" if endpoint.host in ("::", "") else endpoint.host
        family, _, _, _, address = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except socket.gaierror as err:
        raise UsageError(f"cannot listen on {format_address(*where)}: {err.strerror}") from err
    except OSError as err:
        raise ConnectError(f"cannot listen on {format_address(*where)}: {err.strerror}", retryable=False) from err
