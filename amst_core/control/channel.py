"""Control messages over TLS 1.3 over one TCP socket.

The socket never blocks and one thread at a time drives a channel, so OpenSSL is never entered twice.
During the handshake that thread waits with a deadline (`wait_message`); afterwards the session's control
loop polls `fileno` together with its own wake-ups.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Iterator
from typing import Final

from ..errors import AmstError, BrokenError, DeadlineError
from ..security.tls import TlsStream
from ..wire.messages import MAX_RECORD, Message, RecordReader, encode

_INT: Final = struct.Struct("@i")
_RTT: Final = struct.Struct("=I")
_RTT_AT: Final = 68  # tcpi_rtt, microseconds (include/uapi/linux/tcp.h)

_READ_SIZE: Final = 16 << 10
"""About one TLS record; a larger buffer would be mapped, touched and unmapped again at every call."""

_MAX_UNSENT: Final = 8 << 20
"""Bytes that may wait for the peer to read them."""

_GOODBYE_S: Final = 1.0
"""How long `ControlChannel.close` waits for the peer to hang up too."""


class ControlChannel:
    """Messages in both directions; ``peer`` names the other side in errors."""

    def __init__(self, sock: socket.socket, tls: TlsStream, *, peer: str) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._tls = tls
        self._records = RecordReader()
        self._plain = bytearray()
        self._unsent = bytearray()
        self._written = 0  # bytes that the socket took
        self._acknowledged = 0  # of them, that the peer's kernel has
        self._moved_at = time.monotonic()  # when that last rose, or there was nothing to rise
        self.settled = True  # the peer's kernel has all that was written, as `stalled_s` last saw it
        self.peer = peer

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def remote_address(self) -> tuple[str, int]:
        """Host and port that the connection reached or came from; BrokenError when it is gone."""
        try:
            host, port = self._sock.getpeername()[:2]
        except OSError as err:
            raise BrokenError(f"control connection to {self.peer} failed: {err}", peer=self.peer) from err
        return str(host), int(port)

    @property
    def rtt_s(self) -> float | None:
        """The round trip that the kernel has measured, which knows nothing of how busy the processes are."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RTT_AT + _RTT.size)
            return float(_RTT.unpack_from(info, _RTT_AT)[0]) / 1e6 or None
        except (OSError, struct.error):
            return None

    @property
    def wants_write(self) -> bool:
        """Bytes wait for the socket to take them."""
        return bool(self._plain or self._unsent)

    def certificate(self) -> bytes:
        """The certificate that the server showed, DER (client side, after `establish`)."""
        return self._tls.peer_certificate()

    def prove(self) -> None:
        """The peer has proven the token: records of full length are allowed from now on."""
        self._records.max_record = MAX_RECORD

    # ---- non-blocking ----------------------------------------------------------------------

    def send(self, message: Message) -> int:
        """Queue a message, return its size; `flush` writes it with its neighbours: one TLS record instead of many."""
        record = encode(message)
        self._plain += record
        return len(record)

    def flush(self) -> None:
        """Write what the socket takes now.

        Raises:
            BrokenError: the connection is gone.
        """
        if self._plain:
            self._tls.send(bytes(self._plain))
            self._plain.clear()
        self._unsent += self._tls.outgoing()
        if len(self._unsent) > _MAX_UNSENT:
            raise BrokenError(f"{self.peer} does not read its control connection", peer=self.peer)
        while self._unsent:
            try:
                done = self._sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as err:
                raise BrokenError(f"control connection to {self.peer} failed: {err}", peer=self.peer) from err
            self._written += done
            del self._unsent[:done]

    def stalled_s(self, now: float) -> float:
        """How long the peer's kernel has acknowledged nothing of what waits for it; 0 when nothing waits."""
        try:
            (waiting,) = _INT.unpack(fcntl.ioctl(self._sock, termios.TIOCOUTQ, _INT.pack(0)))
        except OSError:
            return 0.0  # it is gone, as the next read will tell
        acknowledged = self._written - waiting
        self.settled = not (waiting or self._unsent)
        if self.settled or acknowledged > self._acknowledged:
            self._acknowledged, self._moved_at = acknowledged, now
        return now - self._moved_at

    def receive(self) -> Iterator[Message]:
        """The messages that have arrived, each decoded only when its turn comes.

        Raises:
            BrokenError: the connection is gone or ended.
            ProtocolError: the peer sent what the wire format forbids.
        """
        ended = self._read()
        self._records.feed(self._tls.receive())
        silent = True
        while (message := self._records.next_message()) is not None:
            silent = False
            yield message
        if silent and (ended or self._tls.ended):
            raise BrokenError(f"{self.peer} closed the control connection", peer=self.peer)

    def abort(self) -> None:
        """Close at once, whatever is under way. Idempotent, never raises; by the thread that drives it."""
        self._sock.close()

    def close(self) -> None:
        """Write what is queued and close. Idempotent, never raises, takes `_GOODBYE_S` at most."""
        if self._sock.fileno() < 0:
            return
        deadline = time.monotonic() + _GOODBYE_S
        try:
            self.flush()
            self._tls.close()
            self._drain(deadline)
            self._sock.shutdown(socket.SHUT_WR)
            # Closing with unread bytes would send a reset, which may overtake what was just written.
            while self._recv() != b"":
                self._wait(select.POLLIN, deadline)
        except (AmstError, OSError):
            pass  # the peer is gone or says nothing; either way there is nobody to wait for
        self._sock.close()

    # ---- with a deadline, for the handshake --------------------------------------------------

    def establish(self, deadline: float) -> None:
        """Run the TLS handshake.

        Raises:
            AmstError: as `TlsStream.handshake`, `DeadlineError` past ``deadline`` (monotonic seconds).
        """
        try:
            while not self._tls.handshake():
                self._drain(deadline)
                self._wait(select.POLLIN, deadline)
                self._read()
        finally:
            self.flush()  # also after a failure: it may be the alert that tells the peer why

    def wait_message(self, deadline: float) -> Message:
        """The next message, waiting until ``deadline`` (monotonic seconds)."""
        while True:
            self._drain(deadline)
            self._records.feed(self._tls.receive())
            message = self._records.next_message()
            if message is not None:
                return message
            if self._tls.ended:
                raise BrokenError(f"{self.peer} closed the control connection", peer=self.peer)
            self._wait(select.POLLIN, deadline)
            self._read()

    def flush_all(self, deadline: float) -> None:
        """Write everything queued, waiting until ``deadline`` (monotonic seconds)."""
        self._drain(deadline)

    # ---- inside ------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Feed one piece of what the socket has; true at the end of the stream.

        One piece only: what a stranger sends is decrypted or refused before more of it is taken in.
        """
        data = self._recv()
        if data is None:
            return False
        if data:
            self._tls.feed(data)
        else:
            self._tls.feed_eof()
        return not data

    def _recv(self) -> bytes | None:
        """What the socket has, b"" at its end, None when it has nothing now."""
        try:
            return self._sock.recv(_READ_SIZE)
        except BlockingIOError:
            return None
        except OSError as err:
            raise BrokenError(f"control connection to {self.peer} failed: {err}", peer=self.peer) from err

    def _drain(self, deadline: float) -> None:
        self.flush()
        while self._unsent:
            self._wait(select.POLLOUT, deadline)
            self.flush()

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise DeadlineError(f"{self.peer} did not answer in time", peer=self.peer)
