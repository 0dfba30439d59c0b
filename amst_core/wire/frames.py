"""Lane frames: the fixed 32-byte header that precedes every payload on a lane.

Layout, big-endian (docs/wire-format.md, "Lane frames")::

    0  version u8    1  kind u8     2  flags u16    4  check u32
    8  transfer u64                 16 offset u64
    24 length u32                   28 wire_length u32
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, Self

from ..errors import ProtocolError
from ..interfaces import HEADER_SIZE
from .fields import CREDITS, HELD, Reader
from .messages import Ack, Credit

WIRE_VERSION: Final = 1
MAX_OFFSET: Final = (1 << 63) - 1
"""Largest end of a span: offsets fit a signed 64-bit file offset."""

MAX_CHUNK: Final = 16 << 20
"""Largest payload of one frame that any peer may negotiate."""

MAX_ACK: Final = 64 << 10
"""Largest payload of an ACK frame."""

TAG_SIZE: Final = 16
"""Bytes that sealing adds to a payload (the AES-GCM tag)."""

_HEADER: Final = struct.Struct("!BBHIQQII")
_CHECK: Final = struct.Struct("!I")
_CHECK_AT: Final = 4


class FrameKind(enum.IntEnum):
    DATA = 1
    PING = 2
    PONG = 3
    FIN = 4
    ACK = 5  # acknowledgements and credit, where the control channel does not get through
    CHALLENGE = 16
    ADMIT = 17


_KINDS: Final = frozenset(FrameKind)
ADMISSION_KINDS: Final = frozenset({FrameKind.CHALLENGE, FrameKind.ADMIT})


class FrameFlags(enum.IntFlag):
    """Reserved bits; a frame that sets any of them is refused until its feature exists."""

    COMPRESSED = 1
    BATCH = 2


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A decoded frame header.

    For DATA, ``transfer``/``offset``/``length`` name the span, for ACK ``length`` is the payload's; PING and PONG
    carry a token in ``offset``; ADMIT carries the incarnation in ``transfer``. ``wire_length`` counts the payload as
    sent (tag included).
    """

    kind: FrameKind
    transfer: int = 0
    offset: int = 0
    length: int = 0
    wire_length: int = 0
    check: int = 0

    def pack(self) -> bytes:
        return _HEADER.pack(
            WIRE_VERSION, self.kind, 0, self.check, self.transfer, self.offset, self.length, self.wire_length
        )

    @classmethod
    def unpack(cls, raw: bytes | memoryview) -> Self:
        """Decode and check everything that needs no session state.

        Raises:
            ProtocolError: unknown version, kind or flags, or lengths that cannot be.
        """
        if len(raw) != HEADER_SIZE:
            raise ProtocolError(f"a frame header is {HEADER_SIZE} bytes, not {len(raw)}")
        version, kind, flags, check, transfer, offset, length, wire_length = _HEADER.unpack(raw)
        if version != WIRE_VERSION:
            raise ProtocolError(f"frame version {version} is not spoken here (this side speaks {WIRE_VERSION})")
        if kind not in _KINDS:
            raise ProtocolError(f"frame kind {kind} is unknown")
        if flags:
            raise ProtocolError(f"frame flags {flags:#x} are unknown or not built yet")
        if length > MAX_CHUNK or wire_length > MAX_CHUNK + TAG_SIZE:
            raise ProtocolError(f"frame of {max(length, wire_length)} bytes exceeds the format's {MAX_CHUNK}")
        if kind == FrameKind.DATA:
            if not length:
                raise ProtocolError("DATA frame without bytes")
            if offset + length > MAX_OFFSET:
                raise ProtocolError(f"span {offset}+{length} passes the largest offset")
        elif kind == FrameKind.ACK:
            if not 1 <= length <= MAX_ACK:
                raise ProtocolError(f"ACK frame of {length} bytes; {MAX_ACK} are allowed")
        elif length:
            raise ProtocolError(f"{FrameKind(kind).name} frame names a span")
        return cls(FrameKind(kind), transfer, offset, length, wire_length, check)


def encode_ack(ack: Ack, credit: Credit) -> bytes:
    """The payload of an ACK frame: the fields of both messages, one after the other."""
    return HELD.encode(ack.held) + CREDITS.encode(credit.limits)


def decode_ack(payload: bytes) -> tuple[Ack, Credit]:
    """Read the payload of an ACK frame.

    Raises:
        ProtocolError: it is not exactly those two fields.
    """
    reader = Reader(payload)
    ack, credit = Ack(HELD.decode(reader)), Credit(CREDITS.decode(reader))
    reader.finish()
    return ack, credit


def with_check(header: bytes, check: int) -> bytes:
    """``header`` with its check field set."""
    return header[:_CHECK_AT] + _CHECK.pack(check) + header[_CHECK_AT + 4 :]


def without_check(header: bytes) -> bytes:
    """``header`` as it is covered by the check or the tag: its check field zero."""
    return header[:_CHECK_AT] + b"\0\0\0\0" + header[_CHECK_AT + 4 :]
