"""How a lane becomes part of a session: CHALLENGE, ADMIT, and the keys that follow (docs/security.md)."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import AuthError, BrokenError, ProtocolError
from ..interfaces import Capability, Lane, Transport
from ..security import keys
from ..security.seal import Protection, make_opener, make_sealer
from ..wire.frames import FrameHeader, FrameKind
from .core import SessionCore
from .lanes import LaneWorker

_MAC_SIZE = 32


def protection_for(transport: Transport, *, plaintext: bool, verified: bool) -> Protection:
    """What guards the frames of this transport's lanes; ``verified`` counts in plaintext only."""
    if Capability.SECURE in transport.capabilities:
        return Protection.TRANSPORT
    if not plaintext:
        return Protection.AEAD
    return Protection.CRC if verified else Protection.NONE


@dataclass(frozen=True, slots=True)
class LaneIdentity:
    """Which lane of which session: what its keys are derived from."""

    secret: bytes
    incarnation: int
    is_opener: bool

    def make_worker(
        self, core: SessionCore, lane: Lane, *, transport: Transport, protection: Protection
    ) -> LaneWorker:
        """The worker for an admitted lane, with its keys."""
        out, back = keys.Direction.CLIENT_TO_SERVER, keys.Direction.SERVER_TO_CLIENT
        if not self.is_opener:
            out, back = back, out
        return LaneWorker(
            core,
            lane,
            id=self.incarnation,
            transport=transport.name,
            takes_spans=Capability.FILE_SPAN in transport.capabilities,
            protection=protection,
            sealer=make_sealer(
                protection, keys.lane_key(self.secret, direction=out, incarnation=self.incarnation)
            ),
            opener=make_opener(
                protection, keys.lane_key(self.secret, direction=back, incarnation=self.incarnation)
            ),
        )


def answer_challenge(lane: Lane, *, secret: bytes, incarnation: int, timeout_s: float) -> None:
    """The opener's side on a new lane."""
    with _abort_after(lane, timeout_s):
        _, challenge = _receive(lane, FrameKind.CHALLENGE, keys.CHALLENGE_SIZE)
        mac = keys.admission_mac(secret, incarnation=incarnation, challenge=challenge)
        header = FrameHeader(FrameKind.ADMIT, transfer=incarnation, wire_length=len(mac))
        lane.send_frame(header.pack(), memoryview(mac))


@dataclass(frozen=True, slots=True)
class Claim:
    """What the other side of a new lane says: an incarnation, and the proof that it was granted to it."""

    incarnation: int
    challenge: bytes
    mac: bytes

    def check(self, secret: bytes) -> None:
        """Raise `AuthError` unless the proof was made with the session's ``secret``."""
        expected = keys.admission_mac(secret, incarnation=self.incarnation, challenge=self.challenge)
        if not keys.same_mac(expected, self.mac):
            raise AuthError(f"the admission of stream {self.incarnation} was not proven")


def challenge(lane: Lane, *, timeout_s: float) -> Claim:
    """The acceptor's side on a new lane: challenge it and return its claim, not checked yet."""
    number = secrets.token_bytes(keys.CHALLENGE_SIZE)
    with _abort_after(lane, timeout_s):
        lane.send_frame(FrameHeader(FrameKind.CHALLENGE, wire_length=len(number)).pack(), memoryview(number))
        header, mac = _receive(lane, FrameKind.ADMIT, _MAC_SIZE)
    return Claim(header.transfer, number, mac)


def _receive(lane: Lane, kind: FrameKind, size: int) -> tuple[FrameHeader, bytes]:
    payload = bytearray(size)

    def place(raw: memoryview) -> memoryview:
        header = FrameHeader.unpack(raw)
        if header.kind is not kind or header.wire_length != size:
            raise ProtocolError(f"{header.kind.name} of {header.wire_length} bytes where {kind.name} is due")
        return memoryview(payload)

    raw = lane.recv_frame(place)
    if raw is None:
        raise BrokenError("the peer closed a new stream before it was admitted")
    return FrameHeader.unpack(raw), bytes(payload)


@contextmanager
def _abort_after(lane: Lane, timeout_s: float) -> Iterator[None]:
    timer = threading.Timer(timeout_s, lane.abort)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
