"""The one TCP listener: it looks at the first bytes of a connection and hands it to whom it is for.

A TLS ClientHello is a control channel; the lane preamble names a transport, whose `adopt` gets the socket.
Everything else is closed without a word, at the first byte that fits neither.

One thread accepts all connections and watches them until their first bytes are there; only then does one get a
thread of its own, for its handshake. So an idle stranger costs a descriptor, and nothing else. Of strangers in either
stage there are never more than a limit: the oldest makes room for the newest.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from ..errors import AmstError, ConnectError, UsageError
from ..interfaces import PREAMBLE, PREAMBLE_MAGIC, Endpoint

_log = logging.getLogger("amst.control")

_BACKLOG: Final = 1024
_TLS_HANDSHAKE: Final = b"\x16\x03"
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NEW_BYTES: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR

_ACCEPT_BATCH: Final = 64
"""Connections accepted before those that are watched get their turn again."""

_HEADROOM: Final = 64
"""Descriptors that are left to those who have proven themselves, of a limit that is not small; else a quarter of it."""

_PAUSE_S: Final = 0.05
"""How long nothing is accepted when it cannot be and no stranger can make room."""

_GRACE_S: Final = 2.0
"""How long after its deadline a handshake may still be telling the peer why it failed."""

_QUIET_S: Final = 60.0
"""What strangers can bring about is logged as a warning at most so often."""


def format_address(host: str, port: int) -> str:
    """``HOST:PORT``, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Newcomer:
    """A connection that has not proven itself. Whoever gets it owns ``sock`` and has until ``deadline`` (monotonic)."""

    __slots__ = ("_listener", "deadline", "greeted", "peer", "sock")

    def __init__(self, listener: Listener, sock: socket.socket, peer: str, deadline: float) -> None:
        self._listener = listener
        self.sock = sock
        self.peer = peer
        self.deadline = deadline
        self.greeted = False  # a thread has it

    def proven(self) -> None:
        """It is one of ours: from now on it is not cut. Idempotent; the return of its callback says the same."""
        self._listener._forget(self)


class Listener:
    """Accepts connections and hands each, on a thread of its own, to ``on_control`` or ``on_lane``.

    Both take the socket over; what they raise is logged and closes it. A connection that has neither proven itself
    nor made its callback return within ``handshake_timeout_s`` of its arrival is closed (`_GRACE_S` later, if it has
    a callback that should have ended by itself). ``unauthenticated`` bounds the connections that have not proven
    themselves, and the threads that serve them: one more cuts the oldest, as does a want of descriptors.

    Raises:
        ConnectError: the address cannot be listened on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        on_control: Callable[[Newcomer], None],
        on_lane: Callable[[Newcomer, int], None],
        handshake_timeout_s: float,
        unauthenticated: int,
    ) -> None:
        self._on_control = on_control
        self._on_lane = on_lane
        self._timeout_s = handshake_timeout_s
        self._most = unauthenticated
        self._sock = _listen(endpoint)
        self._sock.setblocking(False)
        host, port = self._sock.getsockname()[:2]
        self.address = format_address(host, port)
        self._lock = threading.Lock()
        self._unproven: OrderedDict[Newcomer, None] = OrderedDict()  # the oldest first
        self._greeting = 0  # threads
        self._closed = False
        # from here on the accepting thread's own
        self._watched: OrderedDict[int, Newcomer] = OrderedDict()  # by descriptor, the oldest first
        self._ready: deque[Newcomer] = deque()  # their first bytes are there, and no thread is free
        self._paused_until: float | None = None
        self._full = _Seldom()
        self._failing = _Seldom()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._sock, select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=f"amst-listen-{port}", daemon=True)
        self._thread.start()

    @property
    def unauthenticated(self) -> int:
        """Connections that have not proven themselves yet."""
        return len(self._unproven)

    def close(self) -> None:
        """Stop accepting and cut what has not proven itself. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.eventfd_write(self._wake, 1)
        self._thread.join()

    # ---- the accepting thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                try:
                    self._turn()
                except Exception:
                    if self._failing.now():
                        _log.exception("accepting connections: unexpected error")
                    time.sleep(_PAUSE_S)
        finally:
            self._end()

    def _turn(self) -> None:
        now = time.monotonic()
        self._cut_late(now)
        self._greet_ready()
        if self._paused_until is not None and now >= self._paused_until:
            self._paused_until = None
            self._poll.modify(self._sock, select.EPOLLIN)
        accept = False
        for descriptor, events in self._poll.poll(self._patience_s(now)):
            if descriptor == self._wake:
                os.eventfd_read(self._wake)
            elif descriptor in self._watched:
                self._look(self._watched[descriptor], events)
            else:
                accept = True
        if accept:  # last: a new connection may get the number of one whose event was still to come
            self._accept()

    def _patience_s(self, now: float) -> float | None:
        """Until when nothing happens by itself."""
        watched = _first(self._watched.values())
        with self._lock:
            unproven = _first(self._unproven)
        times = [
            *([] if self._paused_until is None else [self._paused_until]),
            *([] if watched is None else [watched.deadline]),
            *([] if unproven is None else [unproven.deadline + _GRACE_S]),
        ]
        return max(0.0, min(times) - now) if times else None

    def _accept(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as err:
                self._cannot_accept(err)
                return
            sock.setblocking(True)  # whatever the default of the process
            with self._lock:
                full = len(self._unproven) >= self._most
            if full:
                if self._full.now():
                    _log.warning("%d connections have not proven themselves (limits.unauthenticated): "
                                 "the oldest make room for the newest", self._most)  # fmt: skip
                self._cut_oldest("made room for a newer one")
            self._keep_headroom(sock.fileno())
            newcomer = Newcomer(self, sock, format_address(*address[:2]), time.monotonic() + self._timeout_s)
            with self._lock:
                self._unproven[newcomer] = None
            self._watched[sock.fileno()] = newcomer
            self._poll.register(sock, _NEW_BYTES)
            self._look(newcomer, 0)  # mostly they are there by now, and a full house has no time to wait

    def _keep_headroom(self, newest: int) -> None:
        """Sessions need descriptors for more than their connections: strangers do not get the last ones.

        The system hands out the lowest number that is free, so the newest one tells how many are left.
        """
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most == resource.RLIM_INFINITY or newest < most - min(_HEADROOM, most // 4):
            return
        if self._failing.now():
            _log.warning("of %d descriptors few are left (ulimit -n): strangers are cut to make room", most)
        for _ in range(2):  # one for the newest, and one towards having enough again
            self._cut_oldest("made room, for lack of descriptors")

    def _cannot_accept(self, err: OSError) -> None:
        if self._failing.now():
            _log.warning("cannot accept a connection: %s; strangers are cut to make room", err)
        if err.errno in _EXHAUSTED and self._cut_oldest("made room, for lack of descriptors"):
            return
        self._paused_until = time.monotonic() + _PAUSE_S
        self._poll.modify(self._sock, 0)

    def _look(self, newcomer: Newcomer, events: int) -> None:
        """Something came, or ended: enough to know what it is?"""
        try:
            first = newcomer.sock.recv(PREAMBLE.size, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            ended = not first or bool(events & _ENDED)
        except BlockingIOError:
            first, ended = b"", bool(events & _ENDED)
        except OSError:
            first, ended = b"", True
        if not any(first[: len(magic)] == magic[: len(first)] for magic in (_TLS_HANDSHAKE, PREAMBLE_MAGIC)):
            self._drop(newcomer, f"speaks neither TLS nor the lane protocol ({first!r})")
        elif len(first) == PREAMBLE.size:
            self._unwatch(newcomer)
            self._ready.append(newcomer)
            self._greet_ready()
        elif ended:
            self._drop(newcomer, "ended before it had said what it is")

    def _cut_late(self, now: float) -> None:
        while (watched := _first(self._watched.values())) is not None and watched.deadline <= now:
            self._drop(watched, f"did not say what it is within {self._timeout_s:g} s")
        while True:
            with self._lock:
                unproven = _first(self._unproven)
            if unproven is None or now < unproven.deadline + _GRACE_S:
                return
            self._cut_oldest("did not prove itself in time")

    def _cut_oldest(self, why: str) -> bool:
        """Cut the oldest stranger, if there is one; whether its descriptor is free already."""
        with self._lock:
            oldest = _first(self._unproven)
            if oldest is None:
                return False
            if oldest.greeted:  # under the lock: it cannot turn out to be proven meanwhile
                del self._unproven[oldest]
                _shut_down(oldest.sock)  # its thread sees the end, and closes it
        if not oldest.greeted:
            self._drop(oldest, why)
            return True
        _log.info("connection from %s %s", oldest.peer, why)
        return False

    def _drop(self, newcomer: Newcomer, why: str) -> None:
        """Close a connection that no thread has."""
        _log.info("connection from %s %s", newcomer.peer, why)
        self._forget(newcomer)
        if newcomer.sock.fileno() in self._watched:
            self._unwatch(newcomer)
        else:
            self._ready.remove(newcomer)
        newcomer.sock.close()

    def _unwatch(self, newcomer: Newcomer) -> None:
        del self._watched[newcomer.sock.fileno()]
        with suppress(OSError):  # it was refused: the system watches as much as it can
            self._poll.unregister(newcomer.sock)

    def _forget(self, newcomer: Newcomer) -> None:
        with self._lock:
            self._unproven.pop(newcomer, None)

    def _greet_ready(self) -> None:
        """Give threads to those whose first bytes are there."""
        while self._ready:
            with self._lock:
                if self._greeting >= self._most:
                    return  # one that ends wakes this thread
                self._greeting += 1
                newcomer = self._ready.popleft()
                newcomer.greeted = True
            try:
                name = f"amst-greet-{newcomer.peer}"
                threading.Thread(target=self._greet, args=(newcomer,), name=name, daemon=True).start()
            except RuntimeError as err:  # the system has no more threads
                if self._failing.now():
                    _log.warning("cannot serve a connection: %s", err)
                newcomer.sock.close()
                self._greeted(newcomer)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            for newcomer in self._unproven:
                if newcomer.greeted:
                    _shut_down(newcomer.sock)
                else:
                    newcomer.sock.close()
            self._unproven.clear()
            self._sock.close()
            self._poll.close()
            os.close(self._wake)

    # ---- the thread of a connection ------------------------------------------------------------

    def _greet(self, newcomer: Newcomer) -> None:
        sock, peer = newcomer.sock, newcomer.peer
        try:
            self._dispatch(newcomer)
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
            self._greeted(newcomer)

    def _greeted(self, newcomer: Newcomer) -> None:
        with self._lock:
            self._unproven.pop(newcomer, None)
            self._greeting -= 1
            if self._ready and not self._closed:
                os.eventfd_write(self._wake, 1)

    def _dispatch(self, newcomer: Newcomer) -> None:
        first = newcomer.sock.recv(PREAMBLE.size, socket.MSG_PEEK)
        if first.startswith(_TLS_HANDSHAKE):
            self._on_control(newcomer)
        else:
            newcomer.sock.recv(PREAMBLE.size)
            self._on_lane(newcomer, PREAMBLE.unpack(first)[1])


class _Seldom:
    """Lets one warning through per burst of what it is about."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def now(self) -> bool:
        """It happened; true when it had not for `_QUIET_S`, or not been said for so long."""
        now = time.monotonic()
        if now - self._last < _QUIET_S:
            return False
        self._last = now
        return True


def _first(newcomers: Iterable[Newcomer]) -> Newcomer | None:
    return next(iter(newcomers), None)


def _shut_down(sock: socket.socket) -> None:
    with suppress(OSError):  # already gone
        sock.shutdown(socket.SHUT_RDWR)


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
