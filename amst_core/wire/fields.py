"""Typed fields of control messages: each knows how to write itself and how to read itself with bounds.

A message is a dataclass whose annotations name these fields (`amst_core.wire.messages`). Integers are
big-endian; text is UTF-8; every count and length is checked against what is left before anything is built.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from ..errors import ProtocolError


class Reader:
    """A cursor over one message body that refuses to read past its end."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._body):
            raise ProtocolError(f"message ends {end - len(self._body)} bytes early")
        raw = self._body[self._at : end]
        self._at = end
        return raw

    def left(self) -> int:
        return len(self._body) - self._at

    def finish(self) -> None:
        if self.left():
            raise ProtocolError(f"{self.left()} bytes too many at the end of a message")


@dataclass(frozen=True, slots=True)
class Codec:
    """How one field is written and read."""

    encode: Callable[[Any], bytes]
    decode: Callable[[Reader], Any]


def _unsigned(fmt: str) -> Codec:
    layout = struct.Struct(fmt)

    def encode(value: int) -> bytes:
        return layout.pack(value)

    def decode(reader: Reader) -> int:
        value: int = layout.unpack(reader.take(layout.size))[0]
        return value

    return Codec(encode, decode)


_U8, _U16, _U32, _U64, _I64 = (_unsigned(f) for f in ("!B", "!H", "!I", "!Q", "!q"))


def _sized(count: Codec) -> Codec:
    def encode(value: bytes) -> bytes:
        return count.encode(len(value)) + value

    def decode(reader: Reader) -> bytes:
        return reader.take(count.decode(reader))

    return Codec(encode, decode)


def _text(raw: Codec) -> Codec:
    def decode(reader: Reader) -> str:
        try:
            return str(raw.decode(reader), "utf-8")
        except UnicodeDecodeError as err:
            raise ProtocolError("text is not UTF-8") from err

    return Codec(lambda value: raw.encode(value.encode("utf-8", "replace")), decode)


_BYTES = _sized(_U32)
_SHORT_TEXT = _text(_sized(_U16))

PROSE_SIZE: Final = 3072
"""Bytes to which text for people is cut: whatever it quotes, a refusal stays inside the records a stranger may send."""


def _cut(text: str) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= PROSE_SIZE else raw[: PROSE_SIZE - 3].decode("utf-8", "ignore") + "…"


_PROSE = Codec(lambda value: _SHORT_TEXT.encode(_cut(value)), _SHORT_TEXT.decode)


def _decode_bool(reader: Reader) -> bool:
    value: int = _U8.decode(reader)
    if value > 1:
        raise ProtocolError(f"a truth value of {value}, which is neither 0 nor 1")
    return bool(value)


_BOOL = Codec(_U8.encode, _decode_bool)


def _many(item: Codec, smallest: int) -> Codec:
    """A u32 count and that many items, each at least ``smallest`` bytes on the wire."""

    def encode(values: tuple[Any, ...]) -> bytes:
        return _U32.encode(len(values)) + b"".join(map(item.encode, values))

    def decode(reader: Reader) -> tuple[Any, ...]:
        count = _U32.decode(reader)
        if count * smallest > reader.left():
            raise ProtocolError(f"{count} items announced where {reader.left()} bytes are left")
        return tuple(item.decode(reader) for _ in range(count))

    return Codec(encode, decode)


def _record(*parts: Codec) -> Codec:
    return Codec(
        lambda values: b"".join(part.encode(value) for part, value in zip(parts, values, strict=True)),
        lambda reader: tuple(part.decode(reader) for part in parts),
    )


SPANS: Final = _many(_record(_U64, _U64), 16)
CREDITS: Final = _many(_record(_U64, _U64), 16)
HELD: Final = _many(_record(_U64, _U64, SPANS), 20)

AttributeValue: TypeAlias = int | str | bytes | bool
_ATTRIBUTE_TYPES: Final[tuple[tuple[type, Codec], ...]] = (
    (int, _I64),
    (str, _SHORT_TEXT),
    (bytes, _BYTES),
    (bool, _BOOL),
)


def _encode_attributes(attributes: Mapping[str, AttributeValue]) -> bytes:
    parts = [_U16.encode(len(attributes))]
    for key in sorted(attributes):
        value = attributes[key]
        tag = next(i for i, (kind, _) in enumerate(_ATTRIBUTE_TYPES) if type(value) is kind)
        parts += [_SHORT_TEXT.encode(key), _U8.encode(tag), _ATTRIBUTE_TYPES[tag][1].encode(value)]
    return b"".join(parts)


def _decode_attributes(reader: Reader) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {}
    for _ in range(_U16.decode(reader)):
        key, tag = _SHORT_TEXT.decode(reader), _U8.decode(reader)
        if key in attributes or tag >= len(_ATTRIBUTE_TYPES):
            raise ProtocolError(f"attribute {key!r} is given twice or has the unknown type {tag}")
        attributes[key] = _ATTRIBUTE_TYPES[tag][1].decode(reader)
    return attributes


ATTRIBUTES: Final = Codec(_encode_attributes, _decode_attributes)

U8 = Annotated[int, _U8]
U16 = Annotated[int, _U16]
U32 = Annotated[int, _U32]
U64 = Annotated[int, _U64]
Truth = Annotated[bool, _BOOL]
Bytes = Annotated[bytes, _BYTES]
Text = Annotated[str, _SHORT_TEXT]
Prose = Annotated[str, _PROSE]
"""Text for people, cut to `PROSE_SIZE` bytes when it is sent."""
Attributes = Annotated[Mapping[str, AttributeValue], ATTRIBUTES]
Span: TypeAlias = tuple[int, int]
"""``(start, end)``, end exclusive."""
Spans = Annotated[tuple[Span, ...], SPANS]
U16s = Annotated[tuple[int, ...], _many(_U16, 2)]
Credits = Annotated[tuple[tuple[int, int], ...], CREDITS]
Addresses = Annotated[tuple[tuple[str, int, str], ...], _many(_record(_SHORT_TEXT, _U16, _SHORT_TEXT), 6)]
Held = Annotated[tuple[tuple[int, int, tuple[Span, ...]], ...], HELD]
"""Per transfer: its id, the contiguous prefix held, and the spans held beyond it."""


def are_in_order(spans: tuple[Span, ...], size: int) -> bool:
    """None is empty, each begins at or behind the end of the one before it, and the last ends within ``size``."""
    ends = (0, *(end for _, end in spans))
    return all(at <= start < end <= size for at, (start, end) in zip(ends, spans, strict=False))
