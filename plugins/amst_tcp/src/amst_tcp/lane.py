"""A lane over one kernel TCP connection: blocking calls with kernel timeouts, no poll per call."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from amst_core.errors import AmstError, BrokenError, BusyError, ClosedError, UnavailableError
from amst_core.interfaces import FileSpan, FlowSample, LaneTimeouts, PathStats, Placer, StreamLane

from .congestion import choose_congestion
from .dial import address_text
from .tcpinfo import read_flow, read_path_stats

_KEEPALIVE_PROBES: Final = 6
_KEEPALIVE_MAX_S: Final = 32767  # the kernel's bound of TCP_KEEPIDLE and TCP_KEEPINTVL
_DISCARD_STEP: Final = 65536
_DISCARD_STEPS: Final = 1024  # 64 MiB: above what a receive buffer holds by default
_READ_STEP: Final = 65536
_SO_MAX_PACING_RATE: Final = 47  # Python's socket module does not name it
_UNPACED: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """Options of every lane's socket, in bytes; 0 leaves the kernel's own (autotuned) value.

    ``notsent_lowat`` bounds what waits unsent in the socket (TCP_NOTSENT_LOWAT): data stays in the cache,
    and switching, pacing and closing act at once. Fixed buffers end the kernel's autotuning.
    """

    notsent_lowat: int = 256 << 10
    send_buffer: int = 0
    receive_buffer: int = 0

    def set_buffers(self, sock: socket.socket) -> None:
        """Set the buffer sizes; on a socket that will connect, before it does (they decide the window scale)."""
        if self.send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
        if self.receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)


class TcpLane(StreamLane):
    """A connected TCP socket as a lane. Thread rules as for `Lane`; breaking them raises `BusyError`.

    A thread blocked in a system call must never see its descriptor closed: the number could already belong
    to another connection. So ``close`` and ``abort`` only wake such threads, and whoever leaves last closes
    the descriptor. Each direction has a gate, held by the thread inside; with both gates nobody is inside.

    ``close`` sends what was sent and ends the stream. Bytes from the peer that arrive after that make the
    kernel reset the connection (RFC 1122, section 4.2.2.13), so the core lets both sides finish first (FIN).

    ``abort`` must show the peer an error, not an end of stream. A shutdown would send FIN, which between
    frames looks like an orderly end; closing with SO_LINGER 0 sends RST but wakes nobody and frees the
    descriptor. ``connect`` to AF_UNSPEC does both at once: RST to the peer, blocked readers and writers
    wake, the descriptor stays. Kernels of 2023 (6.4, 6.5 and the stable releases of those months) refuse it
    while a thread waits (EBUSY); `abort` then does it in two steps.
    """

    def __init__(self, sock: socket.socket, timeouts: LaneTimeouts, options: SocketOptions) -> None:
        """Take over a connected socket (not closed if this raises).

        Raises:
            OSError: the connection is already gone, or the kernel refuses an option.
        """
        super().__init__()
        local, peer = sock.getsockname(), sock.getpeername()
        self._peer = address_text(peer[0], peer[1])
        self._description = f"tcp {address_text(local[0], local[1])} -> {self._peer}"
        _set_options(sock, timeouts, options)
        self._sock = sock
        self._timeouts = timeouts
        self._notsent_lowat = options.notsent_lowat
        self._send_gate = threading.Lock()
        self._recv_gate = threading.Lock()
        self._guard = threading.RLock()  # re-entrant: a signal handler may abort what it interrupted
        self._closed = False
        self._aborted = False
        self._last_stats = PathStats()

    @property
    def description(self) -> str:
        return self._description

    # ---- frames ----------------------------------------------------------------------------

    def send_frame(self, header: bytes, payload: memoryview) -> None:
        self._enter(self._send_gate, "sends")
        try:
            super().send_frame(header, payload)
        finally:
            self._leave(self._send_gate)

    def send_span(self, header: bytes, span: FileSpan) -> None:
        """As promised, by sendfile(2): the bytes go from the page cache without a copy.

        Where the kernel or the file system will not, or the file has become shorter, the rest is read and sent. That is
        tried anew with each frame: it costs one call.
        """
        self._enter(self._send_gate, "sends")
        try:
            self._write_more(memoryview(header))
            start, end = self._send_file(span), span.offset + span.nbytes
            if start < end:
                buffer = memoryview(bytearray(min(_READ_STEP, end - start)))
                for at in range(start, end, _READ_STEP):
                    piece = buffer[: end - at]
                    span.read(at, piece)
                    self.write_whole([piece])
        finally:
            self._leave(self._send_gate)

    def recv_frame(self, place: Placer) -> bytes | None:
        self._enter(self._recv_gate, "receives")
        try:
            return super().recv_frame(place)
        finally:
            self._leave(self._recv_gate)

    def write(self, parts: Sequence[memoryview]) -> int:
        try:
            # No SIGPIPE: a program that embeds AMST may have restored its default, which is to die.
            return self._sock.sendmsg(parts, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise self._error(self._nothing_sent()) from None
        except OSError as err:
            raise self._error(err.strerror or str(err)) from err

    def _write_more(self, view: memoryview) -> None:
        """Write ``view`` whole; what comes next may go in the same segment."""
        while view.nbytes:
            try:
                view = view[self._sock.send(view, socket.MSG_NOSIGNAL | socket.MSG_MORE) :]
            except BlockingIOError:
                raise self._error(self._nothing_sent()) from None
            except OSError as err:
                raise self._error(err.strerror or str(err)) from err

    def _send_file(self, span: FileSpan) -> int:
        """Send as much of ``span`` as the system sends by itself; up to which offset of the file that is."""
        at, end = span.offset, span.offset + span.nbytes
        with _no_sigpipe():
            while at < end:
                try:
                    sent = os.sendfile(self._sock.fileno(), span.fd, at, end - at)
                except BlockingIOError:
                    raise self._error(self._nothing_sent()) from None
                except OSError:
                    return at  # if it is not the file but the connection, who writes next hears of it
                if not sent:
                    return at
                at += sent
        return at

    def _nothing_sent(self) -> str:
        return f"could send nothing for {self._timeouts.write_s:g} s"

    def read_into(self, view: memoryview, *, idle: bool) -> int:
        while True:
            try:
                # Waiting in the kernel for the whole view saves a call (and a turn at the GIL) per segment.
                got = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                if idle and not self._closed:
                    continue
                raise self._error(f"nothing arrived for {self._timeouts.read_s:g} s inside a frame") from None
            except OSError as err:
                raise self._error(err.strerror or str(err)) from err
            if not got and (self._closed or not idle):
                raise self._error("the peer closed the connection inside a frame")
            return got

    def _error(self, what: str) -> AmstError:
        if self._closed:
            return ClosedError(f"{self._description}: this side closed the lane", peer=self._peer)
        return BrokenError(f"{self._description}: {what}", peer=self._peer)

    # ---- end -------------------------------------------------------------------------------

    def close(self) -> None:
        with self._guard:
            if self._closed:
                return
            self._last_stats = self.path_stats()
            self._closed = True
            with suppress(OSError):
                # The reading half too when somebody waits there: it wakes that thread.
                self._sock.shutdown(socket.SHUT_RDWR if self._recv_gate.locked() else socket.SHUT_WR)
        self._close_if_unused()

    def abort(self) -> None:
        with self._guard:
            if self._aborted or self._sock.fileno() < 0:
                return
            if not self._closed:
                self._last_stats = self.path_stats()
            self._closed = self._aborted = True
            if not _reset(self._sock):
                # Wake each direction by its half only, so that FIN goes out only inside a cut frame; RST
                # follows when the last thread has left and the descriptor is closed.
                with suppress(OSError):
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
                    self._sock.shutdown(socket.SHUT_RDWR if self._send_gate.locked() else socket.SHUT_RD)
        self._close_if_unused()

    def set_congestion(self, algorithm: str) -> str:
        """As promised, by TCP_CONGESTION."""
        with self._guard:
            if self._closed:
                raise self._error("closed")
            return choose_congestion(self._sock, algorithm)

    def set_pacing(self, rate: float | None) -> None:
        """As promised, by SO_MAX_PACING_RATE: the kernel spaces segments out itself, with or without the fq qdisc.

        The rate counts IP packets (kernel: ``sk_pacing_rate`` is divided by a packet's length in the queue).
        """
        value = _UNPACED if rate is None else max(1, min(int(rate), _UNPACED - 1))
        with self._guard:
            if self._closed:
                raise self._error("closed")
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, struct.pack("=Q", value))
            except OSError as err:
                raise UnavailableError(f"{self._description}: the kernel does not pace: {err.strerror or err}") from err

    def limit_unsent(self, nbytes: int) -> None:
        """As promised, by TCP_NOTSENT_LOWAT, and never above what the settings have."""
        most = self._notsent_lowat
        with self._guard, suppress(OSError):
            if not self._closed and most:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, max(1, min(nbytes, most)))

    def flow_sample(self) -> FlowSample | None:
        with self._guard:
            if not self._closed:
                with suppress(OSError):
                    return read_flow(self._sock)
        return None

    def path_stats(self) -> PathStats:
        with self._guard:
            if not self._closed:
                with suppress(OSError):
                    self._last_stats = read_path_stats(self._sock)
            return self._last_stats

    def _enter(self, gate: threading.Lock, does: str) -> None:
        if not gate.acquire(blocking=False):
            if self._closed:
                raise self._error("closed")
            raise BusyError(f"{self._description}: another thread already {does} on this lane", peer=self._peer)
        if self._closed:
            self._leave(gate)
            raise self._error("closed")

    def _leave(self, gate: threading.Lock) -> None:
        gate.release()
        if self._closed:
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        with self._guard:
            if self._send_gate.acquire(blocking=False):
                if self._recv_gate.acquire(blocking=False):
                    with suppress(OSError):
                        if not self._aborted:
                            self._discard_arrived()
                    with suppress(OSError):
                        self._sock.close()
                    self._recv_gate.release()
                self._send_gate.release()

    def _discard_arrived(self) -> None:
        """Drop what the peer had sent already: closing over unread bytes would reset what we still have to send."""
        scratch = bytearray(_DISCARD_STEP)
        for _ in range(_DISCARD_STEPS):
            if not self._sock.recv_into(scratch, 0, socket.MSG_DONTWAIT | socket.MSG_TRUNC):
                return


def _set_options(sock: socket.socket, timeouts: LaneTimeouts, options: SocketOptions) -> None:
    sock.setblocking(True)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeouts.read_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeouts.write_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle_s = min(max(1, math.ceil(timeouts.keepalive_s)), _KEEPALIVE_MAX_S)
    # TCP_USER_TIMEOUT, where set, decides instead of the number of probes when an idle peer is given up.
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, idle_s),
        (socket.TCP_KEEPINTVL, max(1, idle_s // 3)),
        (socket.TCP_KEEPCNT, _KEEPALIVE_PROBES),
        (socket.TCP_USER_TIMEOUT, math.ceil(timeouts.unacknowledged_s * 1000)),
        (socket.TCP_NOTSENT_LOWAT, options.notsent_lowat),  # 0: what sysctl net.ipv4.tcp_notsent_lowat says
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


@contextmanager
def _no_sigpipe() -> Iterator[None]:
    """Keep from this thread the SIGPIPE that sendfile, unlike sendmsg, cannot be told not to send."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    finally:
        if signal.SIGPIPE not in before:
            signal.sigtimedwait({signal.SIGPIPE}, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _timeval(seconds: float) -> bytes:
    """``struct timeval``; never zero, which would mean no limit."""
    micros = max(1, round(seconds * 1e6))
    return struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)


def _reset(sock: socket.socket) -> bool:
    """Reset the connection now (RST to the peer, blocked calls return) by connecting to AF_UNSPEC.

    Python's own ``connect`` cannot name that family. False where the kernel or the C library will not.
    """
    try:
        connect = ctypes.CDLL(None).connect
    except (OSError, AttributeError):
        return False
    unspecified = struct.pack("=H14x", socket.AF_UNSPEC)
    return bool(connect(sock.fileno(), unspecified, len(unspecified)) == 0)
