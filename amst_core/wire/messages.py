"""Control messages: what travels on the control channel, inside TLS (docs/wire-format.md).

A record is a u32 length, a u8 type and the body: the fields in the order of the dataclass. Adding a field
or a message is a new protocol version; what may vary without one travels in attributes.
"""

from __future__ import annotations

import dataclasses
import struct
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

from ..errors import ProtocolError
from .fields import (
    SPANS,
    U8,
    U16,
    U32,
    U64,
    Addresses,
    Attributes,
    Bytes,
    Codec,
    Credits,
    Held,
    Prose,
    Reader,
    Span,
    Spans,
    Text,
    Truth,
    U16s,
    are_in_order,
)

PROTOCOL_VERSION: Final = 1
SIZE_UNKNOWN: Final = (1 << 64) - 1
MAX_RECORD: Final = 1 << 20
"""Longest record after the proof; before it, `MAX_RECORD_UNPROVEN` holds."""
MAX_RECORD_UNPROVEN: Final = 4096
_PREFIX: Final = struct.Struct("!IB")


HOLD: Final = "hold"
"""Attribute of a FILE's OPEN, true: the sender waits for OPENED before it sends any of its bytes."""

HOLES: Final = "holes"
"""Attribute of a FILE's OPEN: encoded spans that read as zeros, and are not sent. Of a FETCH, true: tell of them."""

MAX_HOLES: Final = 1024
"""Holes that an OPEN may name: whoever receives it keeps them all."""

# transfer kinds (Open.kind)
MESSAGE: Final = 1
PIPE: Final = 2
FILE: Final = 3
PACK: Final = 4
"""Small files, links and directories together: ``entries`` in its OPEN has them, its bytes are the files' in turn."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First record of either side: versions it speaks, a fresh nonce, and facts without secrets."""

    TYPE: ClassVar[int] = 1
    versions: U16s
    nonce: Bytes
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Proof:
    """Knowledge of the token, bound to the TLS certificate and both nonces (docs/security.md)."""

    TYPE: ClassVar[int] = 2
    mac: Bytes


@dataclass(frozen=True, slots=True)
class Params:
    """After the proof: this side's half of the session secret, its limits, and its transports."""

    TYPE: ClassVar[int] = 3
    secret: Bytes
    max_chunk: U32
    max_open: U32
    initial_credit: U64
    transports: Addresses
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class LaneRequest:
    """Opener: grant me ``count`` more lanes. Acceptor: please run ``count`` lanes in all."""

    TYPE: ClassVar[int] = 4
    count: U16
    transport: Text


@dataclass(frozen=True, slots=True)
class LaneGrant:
    """Acceptor: the incarnations ``first`` … ``first + count - 1`` may each admit one lane."""

    TYPE: ClassVar[int] = 5
    first: U64
    count: U16
    transport: Text


@dataclass(frozen=True, slots=True)
class LaneLost:
    """This side saw that lane die (or found damage on it); the other drops it too."""

    TYPE: ClassVar[int] = 6
    incarnation: U64
    kind: Text
    message: Prose


@dataclass(frozen=True, slots=True)
class Open:
    """A transfer begins. ``request`` is the peer's request it answers, 0 for none."""

    TYPE: ClassVar[int] = 7
    transfer: U64
    kind: U8
    size: U64
    request: U64
    channel: Text
    attributes: Attributes


def holes_of(opened: Open) -> tuple[Span, ...]:
    """The spans of a file that are not sent, because they are zeros.

    Raises:
        ProtocolError: not such a file, or no such spans.
    """
    value = opened.attributes.get(HOLES)
    if value is None:
        return ()
    if opened.kind != FILE or opened.size == SIZE_UNKNOWN or not isinstance(value, bytes):
        raise ProtocolError(f"OPEN of transfer {opened.transfer} with an attribute {HOLES!r} that makes no sense")
    reader = Reader(value)
    holes: tuple[Span, ...] = SPANS.decode(reader)
    reader.finish()
    if len(holes) > MAX_HOLES or not are_in_order(holes, opened.size):
        raise ProtocolError(f"OPEN of transfer {opened.transfer} with too many holes, or out of order, or past its end")
    return holes


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to the OPEN of a file on hold: what the receiver has of it.

    ``held`` are spans kept from an earlier try and verified again; ``digest``, the SHA-256 of a whole file that
    has its name already, asks for a `Same`. Both empty: nothing is there.
    """

    TYPE: ClassVar[int] = 8
    transfer: U64
    held: Spans
    digest: Bytes


@dataclass(frozen=True, slots=True)
class Ack:
    """What the receiver holds, verified: cumulative, so that a lost or late ACK does no harm."""

    TYPE: ClassVar[int] = 9
    held: Held


@dataclass(frozen=True, slots=True)
class Credit:
    """Per transfer, the offset up to which the sender may send; never falls."""

    TYPE: ClassVar[int] = 10
    limits: Credits


@dataclass(frozen=True, slots=True)
class End:
    """The transfer has ``total`` bytes and its source was whole when the last of them was read."""

    TYPE: ClassVar[int] = 11
    transfer: U64
    total: U64


@dataclass(frozen=True, slots=True)
class Result:
    """Receiver's verdict; an empty ``kind`` means held whole, verified and (a file) under its name."""

    TYPE: ClassVar[int] = 12
    transfer: U64
    kind: Text
    message: Prose


@dataclass(frozen=True, slots=True)
class Reset:
    """Sender gives the transfer up; the receiver drops what it has of it."""

    TYPE: ClassVar[int] = 13
    transfer: U64
    kind: Text
    message: Prose


@dataclass(frozen=True, slots=True)
class Request:
    """Ask the peer for something: see `amst_core.wire.requests` for the operations."""

    TYPE: ClassVar[int] = 14
    request: U64
    operation: Text
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a `Request`; an empty ``kind`` means done."""

    TYPE: ClassVar[int] = 15
    request: U64
    kind: Text
    message: Prose
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Ping:
    TYPE: ClassVar[int] = 16
    token: U64


@dataclass(frozen=True, slots=True)
class Pong:
    TYPE: ClassVar[int] = 17
    token: U64


@dataclass(frozen=True, slots=True)
class Propose:
    """Opener: let the session be in ``mode`` from ``epoch`` on, which rises. Acceptor: please propose that.

    ``forced``: somebody has said so. ``streams``, ``least`` and ``most``: how many the acceptor has for what it sends
    then, to begin with and later; the opener reads nothing into them.
    """

    TYPE: ClassVar[int] = 18
    epoch: U32
    mode: Text
    forced: Truth
    streams: U16
    least: U16
    most: U16
    reason: Prose


@dataclass(frozen=True, slots=True)
class Accept:
    """Acceptor: the session is in ``mode`` from ``epoch`` on; another one than was proposed where it is forced here."""

    TYPE: ClassVar[int] = 19
    epoch: U32
    mode: Text
    forced: Truth
    reason: Prose


@dataclass(frozen=True, slots=True)
class Close:
    """The session ends; an empty ``kind`` is an orderly end."""

    TYPE: ClassVar[int] = 20
    kind: Text
    message: Prose


@dataclass(frozen=True, slots=True)
class Missing:
    """Receiver: a copy of this span was dropped as a duplicate and the other copy failed; send it again."""

    TYPE: ClassVar[int] = 21
    transfer: U64
    offset: U64
    length: U32


@dataclass(frozen=True, slots=True)
class Same:
    """Sender: the file whose digest `Opened` told is (not) the source; if it is, all of it counts as held."""

    TYPE: ClassVar[int] = 22
    transfer: U64
    same: Truth


@dataclass(frozen=True, slots=True)
class Resume:
    """In a handshake that takes a session up again: the epoch, how much came through before, the proof of S."""

    TYPE: ClassVar[int] = 23
    epoch: U64
    received: U64
    mac: Bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """So many of the peer's counted messages have been taken in since the session began."""

    TYPE: ClassVar[int] = 24
    count: U64


Message: TypeAlias = (
    Hello | Proof | Params | LaneRequest | LaneGrant | LaneLost | Open | Opened | Ack | Credit | End | Result | Reset
    | Request | Reply | Ping | Pong | Propose | Accept | Close | Missing | Same | Resume | Seen
)  # fmt: skip

UNCOUNTED: Final = (Ack, Credit, Ping, Pong, Close, Seen)
"""Messages that are not sent again after the control channel was lost: later ones make up for them."""


def _codecs(message: type[Any]) -> tuple[tuple[str, Codec], ...]:
    hints = typing.get_type_hints(message, include_extras=True)
    return tuple((f.name, typing.get_args(hints[f.name])[1]) for f in dataclasses.fields(message))


_MESSAGES: Final = {cls.TYPE: (cls, _codecs(cls)) for cls in typing.get_args(Message)}
_FIELDS: Final = {cls: codecs for cls, codecs in _MESSAGES.values()}


def encode(message: Message) -> bytes:
    """One record: length, type, fields."""
    body = b"".join(codec.encode(getattr(message, name)) for name, codec in _FIELDS[type(message)])
    return _PREFIX.pack(1 + len(body), message.TYPE) + body


def decode(type_number: int, body: bytes) -> Message:
    """Rebuild a message.

    Raises:
        ProtocolError: unknown type, a field out of bounds, or bytes left over.
    """
    if type_number not in _MESSAGES:
        raise ProtocolError(f"message type {type_number} is unknown")
    cls, codecs = _MESSAGES[type_number]
    reader = Reader(body)
    try:
        values = [codec.decode(reader) for _, codec in codecs]
        reader.finish()
    except ProtocolError as err:
        raise ProtocolError(f"{cls.__name__.upper()}: {err}") from err
    message: Message = cls(*values)
    return message


class RecordReader:
    """Cuts a byte stream into messages, whatever the boundaries it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.max_record = MAX_RECORD_UNPROVEN

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next_message(self) -> Message | None:
        """The next whole message, None when more bytes are needed.

        Raises:
            ProtocolError: a record longer than allowed at this point, or one that does not decode.
        """
        if len(self._buffer) < _PREFIX.size:
            return None
        length, type_number = _PREFIX.unpack_from(self._buffer)
        if not 1 <= length <= self.max_record:
            raise ProtocolError(f"control record of {length} bytes; {self.max_record} are allowed here")
        end = 4 + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_PREFIX.size : end])
        del self._buffer[:end]
        return decode(type_number, body)
