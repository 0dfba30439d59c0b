"""docs/wire-format.md, vectors.json and amst_core.wire say the same.

The encoder here is written from the document and shares nothing with amst_core: it reads the message table of
the document for the order and types of the fields, and knows the field types, the header and the seals by itself.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
import re
import struct
import typing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from amst_core import errors
from amst_core.control import handshake
from amst_core.errors import ProtocolError
from amst_core.interfaces import HEADER_SIZE, PREAMBLE, PREAMBLE_MAGIC
from amst_core.security import keys
from amst_core.security.seal import Protection, make_opener, make_sealer
from amst_core.wire import fields, frames, messages, requests
from amst_core.wire.frames import FrameFlags, FrameHeader, FrameKind

DOCUMENT = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text("utf-8")
VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text("utf-8"))

CLASSES = {re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper(): cls for cls in typing.get_args(messages.Message)}
"""Name in the document → message class: LaneRequest is LANE_REQUEST."""


def table(heading: str) -> list[list[str]]:
    """The cells of the first table whose header row is ``heading``."""
    found = re.search(rf"^\| {re.escape(heading)} ?\|\n\|[-|]+\n((?:\|.*\n)+)", DOCUMENT, re.MULTILINE)
    assert found, f"no table is headed {heading!r}"
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in found[1].splitlines()]


MESSAGES = {
    name: (int(number), re.findall(r"`(\w+)` (\w+)", listed))
    for number, name, _, listed in table("no. | message | from | fields")
}
"""Name → number, and (field, type) in order; out of the document."""

FRAMES = {name: int(number) for number, name, *_ in table("no. | frame | from | payload, before sealing")}


# ---- the second encoder ---------------------------------------------------------------------


def sized(size: str, raw: bytes) -> bytes:
    return struct.pack(size, len(raw)) + raw


def text(value: str) -> bytes:
    return sized(">H", value.encode("utf-8"))


def raw_bytes(value: dict[str, str]) -> bytes:
    return sized(">I", bytes.fromhex(value["bytes"]))


def many(items: list[bytes]) -> bytes:
    return struct.pack(">I", len(items)) + b"".join(items)


def pairs(values: list[tuple[int, int]]) -> bytes:
    return many([struct.pack(">QQ", *pair) for pair in values])


def attributes(values: dict[str, Any]) -> bytes:
    raw = struct.pack(">H", len(values))
    for key, value in values.items():  # vectors.json has them in the order in which they were sent
        if isinstance(value, bool):
            typed = b"\x03" + bytes([value])
        elif isinstance(value, int):
            typed = b"\x00" + struct.pack(">q", value)
        elif isinstance(value, str):
            typed = b"\x01" + text(value)
        else:
            typed = b"\x02" + raw_bytes(value)
        raw += text(key) + typed
    return raw


BY_HAND = {
    "u8": lambda v: struct.pack(">B", v),
    "u16": lambda v: struct.pack(">H", v),
    "u32": lambda v: struct.pack(">I", v),
    "u64": lambda v: struct.pack(">Q", v),
    "bytes": raw_bytes,
    "text": text,
    "prose": text,
    "truth": lambda v: struct.pack(">B", v),
    "spans": pairs,
    "u16s": lambda v: many([struct.pack(">H", n) for n in v]),
    "credits": pairs,
    "addresses": lambda v: many([text(name) + struct.pack(">H", tag) + text(at) for name, tag, at in v]),
    "held": lambda v: many([struct.pack(">QQ", transfer, prefix) + pairs(spans) for transfer, prefix, spans in v]),
    "attributes": attributes,
}

CODECS = {
    "u8": fields.U8,
    "u16": fields.U16,
    "u32": fields.U32,
    "u64": fields.U64,
    "bytes": fields.Bytes,
    "text": fields.Text,
    "prose": fields.Prose,
    "truth": fields.Truth,
    "spans": fields.Spans,
    "u16s": fields.U16s,
    "credits": fields.Credits,
    "addresses": fields.Addresses,
    "held": fields.Held,
    "attributes": fields.Attributes,
}


def record(name: str, values: dict[str, Any]) -> bytes:
    number, listed = MESSAGES[name]
    assert list(values) == [field for field, _ in listed]
    body = b"".join(BY_HAND[kind](values[field]) for field, kind in listed)
    return struct.pack(">IB", 1 + len(body), number) + body


def header(frame: dict[str, Any]) -> bytes:
    return struct.pack(
        ">BBHIQQII",
        1,
        FRAMES[frame["kind"]],
        0,
        frame["check"],
        frame["transfer"],
        frame["offset"],
        frame["length"],
        frame["wire_length"],
    )


def slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def ack_payload(held: list[Any], limits: list[Any]) -> bytes:
    return BY_HAND["held"](held) + BY_HAND["credits"](limits)


def seal(frame: dict[str, Any]) -> tuple[bytes, bytes]:
    payload = bytes.fromhex(frame["payload"])
    bare = {**frame, "check": 0, "length": len(payload), "wire_length": len(payload)}
    if frame["protection"] == "crc":
        return header({**bare, "check": slow_crc32c(header(bare) + payload)}), payload
    if frame["protection"] in ("transport", "none"):
        return header(bare), payload
    sealed_header = header({**bare, "wire_length": len(payload) + 16})
    nonce = bytes(4) + struct.pack(">Q", frame["count"])
    return sealed_header, AESGCM(bytes.fromhex(frame["key"])).encrypt(nonce, payload, sealed_header)


def admission(entry: dict[str, Any]) -> tuple[bytes, bytes]:
    challenge = bytes.fromhex(entry["challenge"])
    claim = b"admit" + struct.pack(">Q", entry["incarnation"]) + challenge
    bare = {"transfer": 0, "offset": 0, "length": 0, "wire_length": 32, "check": 0}
    mac = hmac.digest(bytes.fromhex(entry["secret"]), claim, "sha256")
    return (
        header({**bare, "kind": "CHALLENGE"}) + challenge,
        header({**bare, "kind": "ADMIT", "transfer": entry["incarnation"]}) + mac,
    )


# ---- vectors against both ---------------------------------------------------------------------


def value_of(kind: str, value: Any) -> Any:
    """A value of vectors.json as the message's field holds it."""
    if kind == "bytes":
        return bytes.fromhex(value["bytes"])
    if kind == "attributes":
        # backwards, because the order in which the vectors have them is the encoder's doing
        return {k: bytes.fromhex(v["bytes"]) if isinstance(v, dict) else v for k, v in reversed(value.items())}
    return as_tuples(value)


def as_tuples(value: Any) -> Any:
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def message_of(entry: dict[str, Any]) -> messages.Message:
    name = entry["message"]
    kinds = dict(MESSAGES[name][1])
    message: messages.Message = CLASSES[name](**{f: value_of(kinds[f], v) for f, v in entry["fields"].items()})
    return message


def named(entries: list[dict[str, Any]], *parts: str) -> list[Any]:
    return [pytest.param(entry, id=f"{i}-" + "-".join(entry[p] for p in parts)) for i, entry in enumerate(entries)]


@pytest.mark.parametrize("entry", named(VECTORS["messages"], "message"))
def test_records_are_what_the_document_says(entry):
    assert record(entry["message"], entry["fields"]).hex() == entry["record"]


@pytest.mark.parametrize("entry", named(VECTORS["messages"], "message"))
def test_messages_encode_to_the_record(entry):
    assert messages.encode(message_of(entry)).hex() == entry["record"]


@pytest.mark.parametrize("entry", named(VECTORS["messages"], "message"))
def test_records_decode_to_the_message(entry):
    raw = bytes.fromhex(entry["record"])
    decoded = messages.decode(raw[4], raw[5:])
    assert decoded == message_of(entry)
    # True == 1: attributes must come back with their types
    for sent, came in zip(attribute_types(message_of(entry)), attribute_types(decoded), strict=True):
        assert sent == came


def attribute_types(message: messages.Message) -> list[tuple[str, type]]:
    return sorted((k, type(v)) for k, v in getattr(message, "attributes", {}).items())


def test_attributes_are_taken_in_any_order():
    ordered = {"a": 1, "b": True, "c": "x"}
    backwards = dict(reversed(ordered.items()))
    values = {"request": 1, "kind": "", "message": "", "attributes": backwards}
    raw = record("REPLY", values)
    assert messages.decode(raw[4], raw[5:]) == messages.Reply(1, "", "", ordered)


@pytest.mark.parametrize("entry", named(VECTORS["headers"], "kind"))
def test_headers_are_what_the_document_says(entry):
    raw = bytes.fromhex(entry["header"])
    assert header(entry) == raw
    value = FrameHeader(
        FrameKind[entry["kind"]],
        entry["transfer"],
        entry["offset"],
        entry["length"],
        entry["wire_length"],
        entry["check"],
    )
    assert value.pack() == raw
    assert FrameHeader.unpack(raw) == value


@pytest.mark.parametrize("entry", named(VECTORS["sealed"], "protection", "kind"))
def test_sealed_frames_are_what_the_document_says(entry):
    assert tuple(part.hex() for part in seal(entry)) == (entry["header"], entry["wire"])


@pytest.mark.parametrize("entry", named(VECTORS["sealed"], "protection", "kind"))
def test_frames_seal_and_open_as_in_the_vectors(entry):
    protection, key = Protection(entry["protection"]), bytes.fromhex(entry.get("key", "00" * 32))
    sealer, opener = make_sealer(protection, key), make_opener(protection, key)
    for _ in range(entry.get("count", 0)):
        raw, wire = sealer.seal(FrameHeader(FrameKind.PING), memoryview(b""))
        opener.open(raw, memoryview(bytearray(wire)))
    payload = bytes.fromhex(entry["payload"])
    value = FrameHeader(FrameKind[entry["kind"]], entry["transfer"], entry["offset"], len(payload))
    raw, wire = sealer.seal(value, memoryview(payload))
    assert (raw.hex(), bytes(wire).hex()) == (entry["header"], entry["wire"])
    placed = memoryview(bytearray.fromhex(entry["wire"]))
    received = FrameHeader.unpack(raw)
    assert opener.expected_wire_length(received) == placed.nbytes
    assert bytes(opener.open(bytes.fromhex(entry["header"]), placed)) == payload
    assert (received.kind, received.transfer, received.offset) == (value.kind, value.transfer, value.offset)


@pytest.mark.parametrize("entry", VECTORS["acks"])
def test_the_payload_of_an_ack_frame_is_what_the_document_says(entry):
    raw = ack_payload(entry["held"], entry["limits"])
    assert raw.hex() == entry["payload"]
    ack, credit = messages.Ack(as_tuples(entry["held"])), messages.Credit(as_tuples(entry["limits"]))
    assert frames.encode_ack(ack, credit) == raw
    assert frames.decode_ack(raw) == (ack, credit)


@pytest.mark.parametrize("entry", VECTORS["admission"])
def test_admission_is_what_the_document_says(entry):
    assert [frame.hex() for frame in admission(entry)] == [entry["challenge_frame"], entry["admit_frame"]]
    raw = bytes.fromhex(entry["admit_frame"])
    incarnation, challenge = entry["incarnation"], bytes.fromhex(entry["challenge"])
    mac = keys.admission_mac(bytes.fromhex(entry["secret"]), incarnation=incarnation, challenge=challenge)
    assert FrameHeader(FrameKind.ADMIT, transfer=incarnation, wire_length=len(mac)).pack() + mac == raw
    asked = FrameHeader(FrameKind.CHALLENGE, wire_length=len(challenge)).pack() + challenge
    assert asked.hex() == entry["challenge_frame"]


@pytest.mark.parametrize("entry", VECTORS["preamble"])
def test_the_preamble_is_what_the_document_says(entry):
    raw = b"AMSTL\x01" + struct.pack(">H", entry["tag"])
    assert raw.hex() == entry["preamble"]
    assert PREAMBLE.pack(PREAMBLE_MAGIC, entry["tag"]) == raw
    assert PREAMBLE.unpack(raw) == (PREAMBLE_MAGIC, entry["tag"])
    assert PREAMBLE_MAGIC.hex(" ") in DOCUMENT


# ---- nothing is left out ------------------------------------------------------------------------


def test_the_document_lists_every_message_with_its_number():
    assert {name: number for name, (number, _) in MESSAGES.items()} == {n: c.TYPE for n, c in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_the_document_lists_the_fields_in_order_with_their_types(name):
    hints = typing.get_type_hints(CLASSES[name], include_extras=True)
    listed = [(field, CODECS[kind]) for field, kind in MESSAGES[name][1]]
    assert listed == [(field.name, hints[field.name]) for field in dataclasses.fields(CLASSES[name])]


def test_the_document_explains_every_field_type():
    explained = " ".join(cells[0] for cells in table("type | bytes"))
    assert {kind for kind in CODECS if f"`{kind}`" not in explained} == set()


def test_the_document_lists_every_frame_kind_with_its_number():
    assert {kind.name: kind.value for kind in FrameKind} == FRAMES
    for flag in FrameFlags:
        assert f"bit {flag.value.bit_length() - 1} {flag.name}" in DOCUMENT


def test_the_document_lays_the_header_out_as_it_is():
    rows = [(int(at), int(size), name) for at, size, name, _ in table("offset | size | field |")]
    assert [at for at, _, _ in rows] == [sum(size for _, size, _ in rows[:i]) for i in range(len(rows))]
    assert sum(size for _, size, _ in rows) == HEADER_SIZE
    written = {"check": 3, "transfer": 4, "offset": 5, "length": 6, "wire_length": 7}
    numbers = {"version": frames.WIRE_VERSION, "kind": FrameKind.PING.value, "flags": 0, **written}
    raw = FrameHeader(FrameKind.PING, **written).pack()
    assert {name: int.from_bytes(raw[at : at + size]) for at, size, name in rows} == numbers


def test_the_document_names_every_error_kind():
    kinds = {cells[0].rstrip(" *").strip("`"): cells[0].endswith("*") for cells in table("kind | meaning")}
    classes = [errors.AmstError, *subclasses(errors.AmstError)]
    public = {cls.kind: cls.default_retryable for cls in classes if cls.__module__ == errors.__name__}
    assert kinds == {**public, handshake.VERSION_REFUSED: False}


def subclasses(cls: type) -> list[Any]:
    return [found for direct in cls.__subclasses__() for found in (direct, *subclasses(direct))]


def test_the_document_names_every_operation_and_attribute():
    operations = (requests.STAT, requests.LOOK, requests.LIST, requests.PACE, requests.FETCH, requests.MEASURE)
    assert [cells[0] for cells in table("operation | attributes | REPLY")] == [f"`{name}`" for name in operations]
    wishes = (
        handshake.SOFTWARE, handshake.STREAMS, handshake.TRANSPORTS, handshake.PLAINTEXT, handshake.VERIFY,
        handshake.CONGESTION, handshake.MODE, handshake.MIN_STREAMS, handshake.MAX_STREAMS, handshake.BACKEND,
        handshake.POLITE,
    )  # fmt: skip
    resuming = f"`{handshake.SESSION}`, `{handshake.EPOCH}`"
    assert [cells[0] for cells in table("key | type | meaning")] == [*(f"`{key}`" for key in wishes), resuming]
    answers = (requests.SIZE, requests.PRESENT, requests.RATE, requests.TOTAL_BYTES, requests.TOTAL_FILES)
    pages = (requests.AFTER, requests.RECURSIVE, requests.ENTRIES, requests.MORE)
    for key in (requests.PATH, messages.HOLD, *answers, *pages):
        assert f"`{key}`" in DOCUMENT


def test_the_document_says_which_messages_are_counted():
    counted = re.search(r"\*counted\* messages are all but ([A-Z, ]+) and ([A-Z]+),", DOCUMENT)
    assert counted
    names = {name.strip() for name in [*counted[1].split(","), counted[2]]}
    assert names == {name for name, cls in CLASSES.items() if cls in messages.UNCOUNTED}


def test_the_document_has_the_limits_of_the_code():
    words = " ".join(DOCUMENT.split())
    assert f"at most **{messages.MAX_RECORD_UNPROVEN}**" in words
    assert f"at most **{messages.MAX_RECORD}**" in words
    assert f"cut it to {fields.PROSE_SIZE} bytes" in words
    assert f"(1 … {frames.MAX_CHUNK})" in words
    assert frames.MAX_OFFSET == 2**63 - 1
    assert messages.SIZE_UNKNOWN == 2**64 - 1
    assert f"ACK with length 0 or above {frames.MAX_ACK}" in words


def test_vectors_cover_every_message_and_frame():
    assert {entry["message"] for entry in VECTORS["messages"]} == set(CLASSES)
    assert {entry["kind"] for entry in VECTORS["headers"]} == set(FRAMES)
    assert {(e["protection"], e["kind"]) for e in VECTORS["sealed"]} == {
        (protection.value, kind) for protection in Protection for kind in ("DATA", "PING", "PONG", "FIN", "ACK")
    }


def test_vectors_cover_every_attribute_type():
    values = [v for e in VECTORS["messages"] for v in e["fields"].get("attributes", {}).values()]
    assert {type(v) for v in values} == {int, str, bool, dict}


def test_numbers_that_the_document_does_not_list_are_refused():
    unlisted = set(range(256)) - {number for number, _ in MESSAGES.values()}
    for number in unlisted:
        with pytest.raises(ProtocolError, match=r"unknown|not built"):
            messages.decode(number, b"")
