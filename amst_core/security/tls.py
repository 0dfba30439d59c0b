"""TLS 1.3 for the control channel, sans-IO: bytes in, bytes out, no socket and no clock.

OpenSSL runs over memory buffers, so that the caller decides who reads and who writes the socket. No authority
vouches for the certificates: the proof of the token binds the one that was seen (docs/security.md).
"""

from __future__ import annotations

import os
import ssl
from typing import Final

from ..errors import (
    AmstError,
    BrokenError,
    ClosedError,
    ConfigError,
    ConnectError,
    IntegrityError,
    ProtocolError,
    error_from_os,
)

ALPN: Final = "amst/1"
"""The application protocol both sides must agree on."""

_READ_SIZE: Final = 16384
"""The most plaintext that a TLS record holds."""


def client_context() -> ssl.SSLContext:
    """Settings of the client side: TLS 1.3 only, any certificate (the token's proof binds it)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return _common(context)


def server_context(certificate_path: str | os.PathLike[str], key_path: str | os.PathLike[str]) -> ssl.SSLContext:
    """Settings of the server side: TLS 1.3 only, with this certificate and key (PEM).

    Raises:
        ConfigError: the files hold no certificate and key, or they do not belong together.
        NotFoundError, RefusedError, StorageError: a file cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A resumed connection would show no certificate, and its proof would have nothing to bind to.
    context.num_tickets = 0
    pair = f"{os.fspath(certificate_path)} and {os.fspath(key_path)}"
    try:
        context.load_cert_chain(certificate_path, key_path, password=_no_password)
    except ssl.SSLError as err:
        raise ConfigError(
            f"cannot use certificate and key {pair}: {_words(err)}; they must be an unencrypted PEM pair"
        ) from err
    except OSError as err:
        raise error_from_os(err, "cannot read certificate and key", path=pair) from err
    return _common(context)


class TlsStream:
    """One end of a TLS 1.3 connection that is fed and drained by its caller.

    Drive it: `feed` what the socket gave, step `handshake` until it is true, then `receive` and `send`; after
    every call, also one that raised, write what `outgoing` returns (it may hold an alert for the peer).
    Never two threads at once: the caller holds one lock around each call, and keeps the order of `outgoing`.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        peer: str | None = None,
    ) -> None:
        """``server_hostname`` is sent in the clear (SNI); ``peer`` only names the other side in errors."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._server_side = server_side
        self._peer = peer
        self._established = False
        self._ended = False
        self._closed = False
        self._failure: AmstError | None = None
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )

    @property
    def ended(self) -> bool:
        """Whether the peer has said that it will send no more (close_notify)."""
        return self._ended

    def feed(self, encrypted: bytes) -> None:
        """Take bytes that arrived from the peer."""
        self._incoming.write(encrypted)

    def feed_eof(self) -> None:
        """Take note that the connection ended; what was fed before can still be received."""
        self._incoming.write_eof()

    def outgoing(self) -> bytes:
        """Take the bytes that are to be written to the peer now, possibly none."""
        return self._outgoing.read()

    def handshake(self) -> bool:
        """Go as far as the bytes fed allow; true when the handshake is complete.

        Raises:
            ConnectError: on the client side, the peer is not an AMST server (not retryable), or it closed
                the connection in mid-handshake (retryable).
            ProtocolError: on the server side, the peer is not an AMST client.
            BrokenError: on the server side, the connection ended in mid-handshake.
        """
        if self._established:
            return True
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as err:
            raise self._cut_short() from err
        except ssl.SSLError as err:
            raise self._stranger(f"TLS 1.3 handshake failed: {_words(err)}") from err
        if self._tls.selected_alpn_protocol() != ALPN:
            raise self._stranger(f"it speaks TLS, but not {ALPN}")
        self._established = True
        return True

    def peer_certificate(self) -> bytes:
        """The certificate that the server showed in this handshake, DER; for the client side, when established.

        Raises:
            ProtocolError: the peer has shown none.
        """
        der = self._tls.getpeercert(binary_form=True) if self._established else None
        if not der:
            raise ProtocolError("the peer has shown no certificate", peer=self._peer)
        return der

    def receive(self) -> bytes:
        """Everything decrypted so far, b"" when more must be fed first, or when the stream has `ended`.

        Raises:
            IntegrityError: a record was changed on its way.
            BrokenError: the connection was cut without the peer's close_notify, or the peer gave up.
            ProtocolError: the peer broke the rules of TLS.
        """
        parts: list[bytes] = []
        while not (self._ended or self._failure):
            try:
                part = self._tls.read(_READ_SIZE)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:  # instead of b"" once this side has said goodbye too
                self._ended = True
            except ssl.SSLError as err:
                self._failure = self._fault(err)
                self._failure.__cause__ = err
            else:
                self._ended = not part
                parts.append(part)
        if self._failure and not parts:  # what arrived whole before the fault comes first
            raise self._failure
        return b"".join(parts)

    def send(self, plaintext: bytes) -> None:
        """Encrypt ``plaintext`` for `outgoing`; the handshake must be complete.

        Raises:
            ClosedError: after `close`.
            BrokenError, IntegrityError, ProtocolError: the connection has failed, as in `receive`.
        """
        if self._failure:
            raise self._failure
        if self._closed:
            raise ClosedError("this side has closed its TLS channel", peer=self._peer)
        left = memoryview(plaintext)
        try:
            while left.nbytes:
                left = left[self._tls.write(left) :]
        except ssl.SSLError as err:
            raise self._fault(err) from err

    def close(self) -> None:
        """Put a close_notify into `outgoing`; nothing can be sent after it. Idempotent, never raises.

        `receive` goes on working, but what was fed and not yet received is lost: receive it first.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            # It wants the peer's close_notify, which `receive` waits for; or the channel has failed already,
            # and then there is nobody to take leave of.
            return

    def _stranger(self, why: str) -> AmstError:
        if self._server_side:
            return ProtocolError(f"not an AMST client: {why}", peer=self._peer)
        where = self._peer or "the peer"
        return ConnectError(
            f"{where} is not an AMST server: {why}; check host and port", peer=self._peer, retryable=False
        )

    def _cut_short(self) -> AmstError:
        if self._server_side:
            return BrokenError("the client closed the connection during the TLS handshake", peer=self._peer)
        where = self._peer or "the peer"
        return ConnectError(
            f"{where} closed the connection during the TLS handshake; is it an AMST server?", peer=self._peer
        )

    def _fault(self, err: ssl.SSLError) -> AmstError:
        if isinstance(err, ssl.SSLEOFError):
            return BrokenError("the control connection was cut without notice", peer=self._peer)
        if err.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC":
            return IntegrityError("a TLS record of the control channel arrived changed", peer=self._peer)
        if "ALERT" in (err.reason or ""):
            return BrokenError(f"the peer gave the control channel up: {_words(err)}", peer=self._peer)
        return ProtocolError(f"the control channel broke the rules of TLS: {_words(err)}", peer=self._peer)


def _common(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context


def _no_password() -> str:
    return ""  # an encrypted key fails; without this OpenSSL asks for its password on the terminal


def _words(err: ssl.SSLError) -> str:
    return (err.reason or str(err)).replace("_", " ").lower()
