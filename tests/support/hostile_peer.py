"""A peer that lies: both sides of the protocol spoken by hand over real sockets, able to stop or lie at any step.

`RawClient` meets a real server, `RawServer` a real client. Both make the real keys, so that what they lie about
gets past TLS and the AEAD and reaches the code that has to find out.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from amst_core.interfaces import PREAMBLE, PREAMBLE_MAGIC
from amst_core.security import keys
from amst_core.security.identity import ServerIdentity
from amst_core.security.seal import Protection, make_opener, make_sealer
from amst_core.security.tls import ALPN, server_context
from amst_core.settings.load import load_settings
from amst_core.settings.values import Settings
from amst_core.wire.frames import FrameHeader, FrameKind
from amst_core.wire.messages import (
    MAX_RECORD,
    UNCOUNTED,
    Close,
    Hello,
    LaneGrant,
    LaneLost,
    Message,
    Params,
    Ping,
    Pong,
    Proof,
    RecordReader,
    Resume,
    Seen,
    encode,
)

TIMEOUT_S = 10.0
HEADER = struct.Struct("!BBHIQQII")
U64 = (1 << 64) - 1
MAX_OFFSET = (1 << 63) - 1

def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settings_with(overrides: dict[str, object]) -> Settings:
    return load_settings(environ={}, overrides={"transport.modes.auto_mode": False, **overrides})


class Ended(Exception):
    """The other side has closed the connection, in whatever way."""


def record(type_number: int, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A control record of any type with any body, and any length field."""
    return struct.pack("!IB", 1 + len(body) if length is None else length, type_number) + body


def host_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def hangs_up(sock: socket.socket, *, within_s: float = TIMEOUT_S) -> bool:
    """The other side ends the connection; what it says before is not looked at."""
    deadline = time.monotonic() + within_s
    with contextlib.suppress(OSError, Ended):
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(65536):
                return True
    return time.monotonic() < deadline


class RawControl:
    """Control messages, and bytes that are none, over TLS."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self.heard: list[Message] = []
        self.counted = 0  # messages taken in that the other side keeps until it is told
        self.confirms = False  # tell it so, as an honest peer does
        self._records = RecordReader()
        self._records.max_record = MAX_RECORD

    def send(self, *what: Message | bytes) -> None:
        """Write messages and bytes, as one piece; `Ended` when the other side takes no more."""
        self.sock.settimeout(TIMEOUT_S)
        try:
            self.sock.sendall(b"".join(item if isinstance(item, bytes) else encode(item) for item in what))
        except OSError as err:
            raise Ended from err

    def recv(self, *, within_s: float = TIMEOUT_S) -> Message:
        """The next message but PINGs, which are answered. `Ended` at the end of the connection."""
        deadline = time.monotonic() + within_s
        while True:
            message = self._records.next_message()
            if isinstance(message, Ping):
                self.send(Pong(message.token))
            elif message is not None:
                self.heard.append(message)
                self.counted += not isinstance(message, UNCOUNTED)
                if self.confirms and self.counted and not self.counted % 64:
                    self.send(Seen(self.counted))
                return message
            else:
                self._read(deadline)

    def await_(self, cls: Any, matching: Callable[[Any], object] = lambda _: True) -> Any:
        """The next message of a class, or of several; others are passed over, but no end of the session."""
        while True:
            message = self.recv()
            if isinstance(message, cls) and matching(message):
                return message
            assert not isinstance(message, Close), f"waiting for {cls}: {message}"

    def ending(self, *, within_s: float = TIMEOUT_S) -> Close | None:
        """Hear the other side out until it hangs up: its CLOSE, None when it said none."""
        close: Close | None = None
        with contextlib.suppress(Ended):
            while True:
                message = self.recv(within_s=within_s)
                if isinstance(message, Close):
                    close = close or message
        return close

    def alive(self) -> None:
        """Everything sent so far was taken in and the session goes on."""
        token = secrets.randbits(64)
        self.send(Ping(token))
        self.await_(Pong, lambda pong: pong.token == token)

    def refused(self) -> str:
        """The session ends for what was sent so far: the kind of the CLOSE. It must not be tolerated first."""
        token = secrets.randbits(64)
        with contextlib.suppress(Ended):  # it may be over already
            self.send(Ping(token))
        while True:
            message = self.recv()
            assert not (isinstance(message, Pong) and message.token == token), "it was tolerated"
            if isinstance(message, Close):
                self.ending()
                return message.kind

    def hears_nothing(self, for_s: float) -> bool:
        """No message comes for a while, nor the end."""
        if self._records.next_message() is not None or self.sock.pending():
            return False
        return not select.select([self.sock], [], [], for_s)[0]

    def close(self) -> None:
        self.sock.close()

    def _read(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        assert left > 0, f"nothing came in time; heard so far: {self.heard[-5:]}"
        try:
            self.sock.settimeout(left)
            data = self.sock.recv(65536)
        except TimeoutError:
            return
        except OSError as err:
            raise Ended from err
        if not data:
            raise Ended
        self._records.feed(data)


class RawLane:
    """One lane's connection. Frames are sealed properly, whatever their headers say."""

    def __init__(self, sock: socket.socket, *, is_client: bool) -> None:
        self.sock = sock
        self.incarnation = 0
        self._is_client = is_client

    # ---- admission ---------------------------------------------------------------------------

    @classmethod
    def dial(cls, address: str, *, preamble: bytes = PREAMBLE.pack(PREAMBLE_MAGIC, 1)) -> RawLane:
        sock = socket.create_connection(host_port(address), TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(preamble)
        return cls(sock, is_client=True)

    def challenged(self) -> bytes:
        """The server's challenge."""
        header = FrameHeader.unpack(self.read(HEADER.size))
        assert header.kind is FrameKind.CHALLENGE
        return self.read(header.wire_length)

    def admit(self, secret: bytes, incarnation: int) -> None:
        """Answer the challenge as an honest client does."""
        mac = keys.admission_mac(secret, incarnation=incarnation, challenge=self.challenged())
        self.bare(FrameKind.ADMIT, transfer=incarnation, payload=mac)
        self.key(secret, incarnation)

    def key(self, secret: bytes, incarnation: int, protection: Protection = Protection.AEAD) -> None:
        out, back = keys.Direction.CLIENT_TO_SERVER, keys.Direction.SERVER_TO_CLIENT
        if not self._is_client:
            out, back = back, out
        self.incarnation = incarnation
        self.sealer = make_sealer(protection, keys.lane_key(secret, direction=out, incarnation=incarnation))
        self.opener = make_opener(protection, keys.lane_key(secret, direction=back, incarnation=incarnation))

    # ---- frames ------------------------------------------------------------------------------

    def bare(self, kind: int, *, transfer: int = 0, payload: bytes = b"", **lies: int) -> None:
        """A frame without protection."""
        self.raw(self._header(kind, payload, 0, **{"transfer": transfer, "length": 0, **lies}) + payload)

    def send(self, kind: int, *, payload: bytes = b"", **fields: int) -> None:
        """A sealed frame; ``fields`` overwrite those of its header, before sealing."""
        self.raw(self.sealed(kind, payload=payload, **fields))

    def sealed(self, kind: int, *, payload: bytes = b"", **fields: int) -> bytes:
        """The bytes of `send`."""
        raw = self._header(kind, payload, self.sealer.overhead, **fields)
        header, sealed = self.sealer._seal(raw, memoryview(payload), None)
        return header + bytes(sealed)

    def data(self, transfer: int, offset: int, payload: bytes, **lies: int) -> None:
        self.send(FrameKind.DATA, payload=payload, transfer=transfer, offset=offset, **lies)

    def raw(self, data: bytes) -> None:
        self.sock.settimeout(TIMEOUT_S)
        try:
            self.sock.sendall(data)
        except OSError as err:
            raise Ended from err

    def recv(self) -> tuple[FrameHeader, bytes]:
        """The next frame, opened; `Ended` at the end of the connection."""
        raw = self.read(HEADER.size)
        header = FrameHeader.unpack(raw)
        return header, bytes(self.opener.open(raw, memoryview(bytearray(self.read(header.wire_length)))))

    def await_(self, kind: FrameKind) -> tuple[FrameHeader, bytes]:
        while True:
            header, payload = self.recv()
            if header.kind is kind:
                return header, payload

    def alive(self) -> None:
        """Everything sent so far on this lane was taken in and it goes on."""
        token = secrets.randbits(64)
        self.send(FrameKind.PING, offset=token)
        while self.await_(FrameKind.PONG)[0].offset != token:
            pass

    def quiet(self) -> bool:
        """Nothing has come that was not read yet."""
        return not select.select([self.sock], [], [], 0.01)[0]

    def hangs_up(self, *, within_s: float = TIMEOUT_S) -> bool:
        return hangs_up(self.sock, within_s=within_s)

    def read(self, size: int) -> bytes:
        got = bytearray()
        deadline = time.monotonic() + TIMEOUT_S
        while len(got) < size:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                step = self.sock.recv(size - len(got))
            except TimeoutError:
                raise AssertionError("nothing came on the lane in time") from None
            except OSError as err:
                raise Ended from err
            if not step:
                raise Ended
            got += step
        return bytes(got)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """End the connection with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
        self.sock.close()

    @staticmethod
    def _header(kind: int, payload: bytes, overhead: int, **fields: int) -> bytes:
        header = {
            "version": 1, "kind": kind, "flags": 0, "check": 0, "transfer": 0, "offset": 0,
            "length": len(payload), "wire_length": len(payload) + overhead,
        }  # fmt: skip
        header.update(fields)
        return HEADER.pack(*header.values())


# ---- against a real server -----------------------------------------------------------------------


class RawClient:
    """Each step of a client by itself; the defaults are what an honest one says."""

    def __init__(self, address: str, token: bytes) -> None:
        self.address = address
        self.token = token
        self.lanes: list[RawLane] = []
        self.incarnations: list[int] = []
        self.nonce = secrets.token_bytes(32)
        self.half = secrets.token_bytes(32)
        self.plaintext = False

    @classmethod
    def agreed(
        cls, address: str, token: bytes, *, lanes: int = 1, plaintext: bool = False, credit: int = 60_000
    ) -> RawClient:
        """A session with its lanes, after an honest handshake."""
        client = cls(address, token)
        client.plaintext = plaintext
        client.tls()
        client.hello(attributes={"streams": lanes, "transports": "tcp", "plaintext": plaintext})
        client.heard_hello()
        client.proof()
        client.heard_proof()
        client.params(initial_credit=credit)
        client.control.counted, client.control.confirms = 0, True  # the count begins after the handshake
        client.control.await_(LaneGrant, client._granted)
        for _ in range(lanes):
            client.open_lane()
        return client

    # ---- the handshake's steps -----------------------------------------------------------------

    def tls(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([ALPN])
        sock = socket.create_connection(host_port(self.address), TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.control = RawControl(context.wrap_socket(sock))
        certificate = self.control.sock.getpeercert(binary_form=True)
        assert certificate is not None
        self.fingerprint = keys.certificate_fingerprint(certificate)

    def hello(
        self,
        *,
        versions: tuple[int, ...] = (1,),
        nonce: bytes | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self.nonce = self.nonce if nonce is None else nonce
        self.control.send(Hello(versions, self.nonce, attributes or {"streams": 1, "transports": "tcp"}))

    def heard_hello(self) -> None:
        self.server_nonce = self.control.await_(Hello).nonce

    def mac(self) -> bytes:
        """The proof as it has to be."""
        return keys.client_proof(
            self.token, fingerprint=self.fingerprint, client_nonce=self.nonce, server_nonce=self.server_nonce
        )

    def proof(self, mac: bytes | None = None) -> None:
        self.control.send(Proof(self.mac() if mac is None else mac))

    def heard_proof(self) -> None:
        self.control.await_(Proof)
        theirs = self.control.await_(Params)
        self.limits = theirs
        self.secret = keys.session_secret(self.half, theirs.secret)

    def params(self, **lies: Any) -> None:
        fields: dict[str, Any] = {
            "secret": self.half, "max_chunk": 1 << 20, "max_open": 64, "initial_credit": 60_000,
            "transports": (), "attributes": {},
        }  # fmt: skip
        self.control.send(Params(**{**fields, **lies}))

    # ---- the session's control channel, once more ---------------------------------------------------

    def again(self, *, epoch: int, **attributes: Any) -> RawClient:
        """Another connection that takes the session up again, as far as both proofs."""
        other = RawClient(self.address, self.token)
        other.secret, other.limits = self.secret, self.limits
        other.tls()
        other.hello(attributes={"session": self.limits.attributes["session"], "epoch": epoch, **attributes})
        other.heard_hello()
        other.proof()
        other.control.await_(Proof)
        return other

    def resume(self, *, epoch: int, received: int, **lies: Any) -> None:
        """RESUME; ``lies`` overwrite what its MAC covers, or the MAC itself."""
        covered = {
            "by_client": True, "epoch": epoch, "received": received, "fingerprint": self.fingerprint,
            "client_nonce": self.nonce, "server_nonce": self.server_nonce,
        }  # fmt: skip
        secret, mac = lies.pop("secret", self.secret), lies.pop("mac", None)
        self.control.send(Resume(epoch, received, mac or keys.resume_mac(secret, **{**covered, **lies})))

    # ---- lanes -----------------------------------------------------------------------------------

    def open_lane(self) -> RawLane:
        """A lane for the next incarnation granted, admitted."""
        lane = RawLane.dial(self.address)
        self.lanes.append(lane)
        incarnation = self.incarnations.pop(0)
        lane.admit(self.secret, incarnation)
        lane.key(self.secret, incarnation, Protection.CRC if self.plaintext else Protection.AEAD)
        return lane

    def _granted(self, grant: LaneGrant) -> bool:
        self.incarnations += range(grant.first, grant.first + grant.count)
        return True

    def lost(self, lane: RawLane) -> str:
        """The server gives a lane up; the kind it names."""
        kind = self.control.await_(LaneLost, lambda lost: lost.incarnation == lane.incarnation).kind
        assert lane.hangs_up(), "a lane that was given up is closed"
        return kind

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        with contextlib.suppress(AttributeError):  # it never got that far
            self.control.close()


# ---- against a real client -----------------------------------------------------------------------


class RawServer:
    """Listens on loopback; a test takes the connections one by one and answers them as it likes."""

    def __init__(self, state_dir: Path) -> None:
        identity = ServerIdentity.load_or_create(state_dir)
        self.token = identity.token
        self._context = server_context(identity.certificate_path, identity.key_path)
        self._fingerprint = keys.certificate_fingerprint(identity.certificate_der)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._waiting: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.half = secrets.token_bytes(32)
        self.nonce = secrets.token_bytes(32)
        self.lanes: list[RawLane] = []
        self.control: RawControl | None = None

    # ---- connections -----------------------------------------------------------------------------

    def accept(self) -> socket.socket:
        self._listener.settimeout(TIMEOUT_S)
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._waiting.append(sock)
        return sock

    def tls(self) -> RawControl:
        """The control connection of the next client, TLS established."""
        sock = self.accept()
        sock.settimeout(TIMEOUT_S)
        self._waiting.remove(sock)
        self.control = RawControl(self._context.wrap_socket(sock, server_side=True))
        return self.control

    def lane(self) -> RawLane:
        """The next lane's connection, its preamble read."""
        sock = self.accept()
        lane = RawLane(sock, is_client=False)
        self._waiting.remove(sock)
        self.lanes.append(lane)
        assert lane.read(PREAMBLE.size) == PREAMBLE.pack(PREAMBLE_MAGIC, 1)
        return lane

    def admitted_lane(self) -> RawLane:
        """The next lane, challenged and admitted; the client's answer is checked."""
        lane = self.lane()
        challenge = secrets.token_bytes(32)
        lane.bare(FrameKind.CHALLENGE, payload=challenge)
        header = FrameHeader.unpack(lane.read(HEADER.size))
        mac = lane.read(header.wire_length)
        assert mac == keys.admission_mac(self.secret, incarnation=header.transfer, challenge=challenge)
        lane.key(self.secret, header.transfer)
        return lane

    # ---- the handshake's steps --------------------------------------------------------------------

    def heard_hello(self) -> Hello:
        self.client_hello = self._control.await_(Hello)
        return self.client_hello

    def hello(
        self,
        *,
        versions: tuple[int, ...] = (1,),
        nonce: bytes | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self._control.send(Hello(versions, self.nonce if nonce is None else nonce, attributes or {}))

    def heard_proof(self) -> None:
        self._control.await_(Proof)

    def proof(self, mac: bytes | None = None) -> None:
        good = keys.server_proof(
            self.token,
            fingerprint=self._fingerprint,
            client_nonce=self.client_hello.nonce,
            server_nonce=self.nonce,
        )
        self._control.send(Proof(good if mac is None else mac))

    def params(self, **lies: Any) -> None:
        fields: dict[str, Any] = {
            "secret": self.half, "max_chunk": 1 << 20, "max_open": 64, "initial_credit": 60_000,
            "transports": (("tcp", 1, ""),), "attributes": {"session": bytes(16)},
        }  # fmt: skip
        self._control.send(Params(**{**fields, **lies}))

    def heard_params(self) -> None:
        self.limits = self._control.await_(Params)
        self.secret = keys.session_secret(self.limits.secret, self.half)

    def agree(self, *, lanes: int = 1) -> None:
        """An honest handshake, with so many lanes granted and admitted."""
        self.tls()
        self.heard_hello()
        self.hello()
        self.heard_proof()
        self.proof()
        self.params()
        self.heard_params()
        self._control.counted, self._control.confirms = 0, True
        self._control.send(LaneGrant(1, lanes, "tcp"))
        for _ in range(lanes):
            self.admitted_lane()

    @property
    def _control(self) -> RawControl:
        assert self.control is not None, "no client has come yet"
        return self.control

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        for sock in self._waiting:
            sock.close()
        if self.control is not None:
            self.control.close()
        self._listener.close()


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    try:
        yield thing
    finally:
        thing.close()
