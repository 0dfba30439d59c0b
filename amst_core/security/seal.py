"""Sealing of lane frames: AES-256-GCM, CRC-32C, or nothing where the transport itself is secure or nobody verifies.

A sealer writes one direction of one lane and an opener reads it, each used by one thread at a time. CHALLENGE
and ADMIT travel before a lane has keys and are never sealed; every other frame is (docs/security.md).
"""

from __future__ import annotations

import enum
import struct
from abc import ABC, abstractmethod
from typing import ClassVar, Final

from crc32c import crc32c
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import BrokenError, IntegrityError, ProtocolError
from ..wire.frames import ADMISSION_KINDS, TAG_SIZE, FrameHeader, with_check, without_check
from .crc import crc_of_rest
from .keys import KEY_SIZE

MAX_FRAMES_PER_KEY: Final = 1 << 32
"""Frames that one lane key may seal. With the largest chunk (2^20 AES blocks) that is 2^52 blocks, where an
attacker's advantage over AES-GCM is still below 2^-24 (2^-32 at 1 MiB chunks); see docs/security.md."""

_NONCE: Final = struct.Struct("!4xQ")
_CHECK: Final = struct.Struct("!4xI")

_WORTH_RECKONING: Final = 128 << 10
"""Bytes whose CRC takes longer to compute than to reckon from that of their frame."""


class Protection(enum.Enum):
    """What guards the frames of a lane."""

    AEAD = "aead"
    """AES-256-GCM: secret and authentic."""
    CRC = "crc"
    """CRC-32C (``--plaintext``): guards against accidents, not against people."""
    TRANSPORT = "transport"
    """The lane's transport is SECURE and does it all; the core adds nothing."""
    NONE = "none"
    """Nothing (``--plaintext --verify none``): what the transport lets through damaged arrives damaged."""


class FrameSealer(ABC):
    """Seals one direction of one lane."""

    overhead: ClassVar[int] = 0
    """Bytes by which the payload on the wire is longer than the plaintext."""

    def seal(
        self, header: FrameHeader, payload: memoryview, *, buffer: memoryview | None = None
    ) -> tuple[bytes, memoryview]:
        """Return the packed header and the payload to send.

        ``header.length`` must be the payload's bytes; its check and wire length are filled in. ``buffer`` is
        where AES-GCM puts its output, at least ``overhead`` bytes longer than the payload: the payload may
        be its very beginning (sealed in place) or lie wholly outside. Without a buffer one is allocated; CRC
        and secure transports return the payload itself and ignore it.

        Raises:
            ProtocolError: an admission frame, or lengths that contradict each other.
            BrokenError: this key has sealed all the frames it may; the lane must be replaced.
        """
        raw = self._pack(header)
        if payload.nbytes != header.length:
            raise ProtocolError(f"payload of {payload.nbytes} bytes under a header for {header.length}")
        return self._seal(raw, payload, buffer)

    def _pack(self, header: FrameHeader) -> bytes:
        if header.kind in ADMISSION_KINDS:
            raise ProtocolError(f"{header.kind.name} frames are never sealed")
        return FrameHeader(
            header.kind, header.transfer, header.offset, header.length, header.length + self.overhead
        ).pack()

    @abstractmethod
    def _seal(self, raw: bytes, payload: memoryview, buffer: memoryview | None) -> tuple[bytes, memoryview]:
        """Seal ``payload`` under the packed header ``raw``, whose check is zero."""


class FrameOpener(ABC):
    """Checks and opens one direction of one lane."""

    overhead: ClassVar[int] = 0

    def expected_wire_length(self, header: FrameHeader) -> int:
        """The bytes that follow ``header`` on the wire, once the header agrees; nothing is verified yet.

        Raises:
            ProtocolError: an admission frame on an admitted lane, or a wire length that is not the span's
                plus ``overhead``.
        """
        if header.kind in ADMISSION_KINDS:
            raise ProtocolError(f"{header.kind.name} frame on a lane that is already admitted")
        expected = header.length + self.overhead
        if header.wire_length != expected:
            raise ProtocolError(
                f"{header.kind.name} frame of {header.length} bytes says {header.wire_length} on the wire; "
                f"this lane's protection makes that {expected}"
            )
        return expected

    @abstractmethod
    def open(self, header: bytes, placed: memoryview, *, into: memoryview | None = None) -> memoryview:
        """Verify a received frame and return a view of its plaintext.

        ``header`` is as received, ``placed`` the payload as received, tag included. AES-GCM decrypts to
        the beginning of ``into``, which lies wholly outside ``placed``, or in place without it; what was
        written there before a tag failed is garbage. Otherwise ``placed`` itself is returned.

        Raises:
            IntegrityError: the frame is not what the peer sealed (AES-GCM: at this point of this lane);
                the lane must be dropped.
            ProtocolError: the payload is too short to be sealed, or the key is used up.
        """

    def payload_crc(self, header: bytes, length: int) -> int | None:
        """The CRC-32C of the ``length`` bytes that `open` has just verified, if it is known without reading them."""
        return None


class AeadSealer(FrameSealer):
    """AES-256-GCM. The nonce counts the frames of this key, so a key must serve one sealer only."""

    overhead = TAG_SIZE

    def __init__(self, key: bytes) -> None:
        self._aead = _cipher(key)
        self._count = 0

    def _seal(self, raw: bytes, payload: memoryview, buffer: memoryview | None) -> tuple[bytes, memoryview]:
        if self._count >= MAX_FRAMES_PER_KEY:
            raise BrokenError(f"this lane's key has sealed its {MAX_FRAMES_PER_KEY} frames; open a new lane")
        size = payload.nbytes + TAG_SIZE
        if buffer is None:
            buffer = memoryview(bytearray(size))
        elif buffer.nbytes < size:
            raise ProtocolError(f"{payload.nbytes} bytes are sealed into {size}, but the buffer has {buffer.nbytes}")
        sealed = buffer[:size]
        nonce = _NONCE.pack(self._count)
        self._count += 1  # before sealing: whatever happens next, this nonce is never used again
        self._aead.encrypt_into(nonce, payload, raw, sealed)
        return raw, sealed


class AeadOpener(FrameOpener):
    """The other end of an `AeadSealer` with the same key: frames open once each and in their order only."""

    overhead = TAG_SIZE

    def __init__(self, key: bytes) -> None:
        self._aead = _cipher(key)
        self._count = 0

    def open(self, header: bytes, placed: memoryview, *, into: memoryview | None = None) -> memoryview:
        size = placed.nbytes - TAG_SIZE
        if size < 0:
            raise ProtocolError(f"sealed payload of {placed.nbytes} bytes is shorter than its {TAG_SIZE}-byte tag")
        if self._count >= MAX_FRAMES_PER_KEY:
            raise ProtocolError(f"the peer sealed more than {MAX_FRAMES_PER_KEY} frames under one lane key")
        plain = placed[:size] if into is None else into[:size]
        try:
            # The header is covered exactly as received: a changed check or length fails like a changed payload.
            self._aead.decrypt_into(_NONCE.pack(self._count), placed, header, plain)
        except InvalidTag as err:
            raise IntegrityError("a frame arrived changed, repeated or out of order (its AES-GCM tag fails)") from err
        self._count += 1  # only now: behind a bad frame nothing opens that the peer did not seal at this very place
        return plain


class CrcSealer(FrameSealer):
    """CRC-32C over the header (check zero) and the payload, which is neither changed nor copied.

    The package releases the GIL from 32 KiB on, where that costs less than it frees (2 µs a chunk).
    """

    def _seal(self, raw: bytes, payload: memoryview, buffer: memoryview | None) -> tuple[bytes, memoryview]:
        return with_check(raw, crc32c(payload, crc32c(raw))), payload


class CrcOpener(FrameOpener):
    """The other end of a `CrcSealer`."""

    def open(self, header: bytes, placed: memoryview, *, into: memoryview | None = None) -> memoryview:
        found = crc32c(placed, crc32c(without_check(header)))
        (said,) = _CHECK.unpack_from(header)
        if found != said:
            raise IntegrityError(f"a frame arrived changed (CRC-32C {found:08x}, sent as {said:08x})")
        return placed

    def payload_crc(self, header: bytes, length: int) -> int | None:
        if length < _WORTH_RECKONING:
            return None
        (said,) = _CHECK.unpack_from(header)
        return crc_of_rest(said, crc32c(without_check(header)), length)


class BareSealer(FrameSealer):
    """Adds nothing; for lanes of a SECURE transport, and those that nobody verifies."""

    def seal_unseen(self, header: FrameHeader) -> bytes:
        """As `seal`, of a payload that need not be shown: the packed header."""
        return self._pack(header)

    def _seal(self, raw: bytes, payload: memoryview, buffer: memoryview | None) -> tuple[bytes, memoryview]:
        return raw, payload


class BareOpener(FrameOpener):
    """The other end of a `BareSealer`; a check that is not zero is refused."""

    def open(self, header: bytes, placed: memoryview, *, into: memoryview | None = None) -> memoryview:
        (check,) = _CHECK.unpack_from(header)
        if check:
            raise ProtocolError(f"frame with check {check:08x} on a lane that is sealed without")
        return placed


def make_sealer(protection: Protection, key: bytes) -> FrameSealer:
    """The sealer for one direction of a lane; ``key`` (`keys.lane_key`) matters to AEAD only."""
    match protection:
        case Protection.AEAD:
            return AeadSealer(key)
        case Protection.CRC:
            return CrcSealer()
        case Protection.TRANSPORT | Protection.NONE:
            return BareSealer()


def make_opener(protection: Protection, key: bytes) -> FrameOpener:
    """The opener for one direction of a lane; ``key`` as for `make_sealer`."""
    match protection:
        case Protection.AEAD:
            return AeadOpener(key)
        case Protection.CRC:
            return CrcOpener()
        case Protection.TRANSPORT | Protection.NONE:
            return BareOpener()


def _cipher(key: bytes) -> AESGCM:
    # AESGCM takes shorter keys too, and would silently be AES-128.
    if len(key) != KEY_SIZE:
        raise ProtocolError(f"lane key of {len(key)} bytes; AES-256 has {KEY_SIZE}")
    return AESGCM(key)
