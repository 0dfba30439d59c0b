"""Whatever bytes a peer sends, the decoders answer with a value or a ProtocolError, and take no more memory for it."""

from __future__ import annotations

import dataclasses
import json
import struct
import tracemalloc
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amst_core.engine.engine import ACK_ENTRIES, ACK_SPANS
from amst_core.errors import ProtocolError
from amst_core.interfaces import HEADER_SIZE
from amst_core.wire import fields, frames, messages
from amst_core.wire.frames import FrameHeader, FrameKind, with_check, without_check
from amst_core.wire.messages import Close, Message, Open, Ping, Proof, RecordReader, decode, encode

CLASSES = typing.get_args(Message)
NUMBERS = {cls.TYPE for cls in CLASSES}
RECORDS = [
    bytes.fromhex(entry["record"])
    for entry in json.loads(Path(__file__).with_name("vectors.json").read_text("utf-8"))["messages"]
]
ALLOWANCE = 64 << 10
"""Bytes that decoding a record of a few hundred bytes may allocate; far below what it can announce."""

unhurried = settings(deadline=None)  # a busy machine is no failure

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # no surrogates: they are no UTF-8
u64 = st.integers(0, 2**64 - 1)
spans = st.lists(st.tuples(u64, u64), max_size=4).map(tuple)

STRATEGIES: dict[Any, st.SearchStrategy[Any]] = {
    fields.U8: st.integers(0, 2**8 - 1),
    fields.U16: st.integers(0, 2**16 - 1),
    fields.U32: st.integers(0, 2**32 - 1),
    fields.U64: u64,
    fields.Bytes: st.binary(max_size=100),
    fields.Text: texts,
    fields.Prose: texts,
    fields.Truth: st.booleans(),
    fields.Spans: spans,
    fields.Attributes: st.dictionaries(
        texts, st.integers(-(2**63), 2**63 - 1) | texts | st.binary(max_size=40) | st.booleans(), max_size=5
    ),
    fields.U16s: st.lists(st.integers(0, 2**16 - 1), max_size=5).map(tuple),
    fields.Credits: spans,
    fields.Addresses: st.lists(st.tuples(texts, st.integers(0, 2**16 - 1), texts), max_size=4).map(tuple),
    fields.Held: st.lists(st.tuples(u64, u64, spans), max_size=4).map(tuple),
}


def values_of(cls: Any) -> st.SearchStrategy[Message]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, *(STRATEGIES[hints[field.name]] for field in dataclasses.fields(cls)))


any_message = st.one_of([values_of(cls) for cls in CLASSES])


def body_of(message: Message) -> bytes:
    return encode(message)[5:]


def tolerated(type_number: int, body: bytes) -> Message | None:
    """Decode; None for a ProtocolError. Any other exception is the test's failure."""
    try:
        return decode(type_number, body)
    except ProtocolError:
        return None


def proven_reader() -> RecordReader:
    reader = RecordReader()
    reader.max_record = messages.MAX_RECORD
    return reader


def drain(reader: RecordReader) -> list[Message]:
    found = []
    while (message := reader.next_message()) is not None:
        found.append(message)
    return found


# ---- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@unhurried
@given(data=st.data())
def test_every_message_survives_the_way(cls, data):
    message = data.draw(values_of(cls))
    raw = encode(message)
    length, number = struct.unpack_from(">IB", raw)
    assert (length, number) == (len(raw) - 4, cls.TYPE)
    decoded = decode(number, raw[5:])
    assert decoded == message
    for key, value in getattr(message, "attributes", {}).items():
        assert type(decoded.attributes[key]) is type(value)  # type: ignore[union-attr]


@unhurried
@given(number=st.sampled_from(sorted(NUMBERS)) | st.integers(0, 255), body=st.binary(max_size=300))
def test_arbitrary_bodies_give_a_message_or_a_protocol_error(number, body):
    tolerated(number, body)


@unhurried
@given(raw=st.sampled_from(RECORDS), data=st.data())
def test_damaged_bodies_give_a_message_or_a_protocol_error(raw, data):
    body = bytearray(raw[5:])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        body[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    decoded = tolerated(raw[4], bytes(body))
    if decoded is not None:
        assert decode(decoded.TYPE, body_of(decoded)) == decoded


@pytest.mark.parametrize("raw", RECORDS, ids=range(len(RECORDS)))
def test_a_body_cut_short_or_with_bytes_left_over_is_refused(raw):
    for end in range(5, len(raw)):
        with pytest.raises(ProtocolError):
            decode(raw[4], raw[5:end])
    for more in (b"\0", b"\xff", raw):
        with pytest.raises(ProtocolError, match="too many"):
            decode(raw[4], raw[5:] + more)


def test_other_types_are_refused():
    for number in set(range(256)) - NUMBERS:
        with pytest.raises(ProtocolError, match=f"type {number} is unknown"):
            decode(number, b"")


def test_faults_name_the_message():
    with pytest.raises(ProtocolError, match="PING: message ends 8 bytes early"):
        decode(Ping.TYPE, b"")


@pytest.mark.parametrize("raw", RECORDS, ids=range(len(RECORDS)))
def test_what_is_announced_is_not_allocated(raw):
    tracemalloc.start()
    try:
        for at in range(5, len(raw)):
            for size in (2, 4):
                body = raw[5:at] + b"\xff" * size + raw[at + size :]
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                tolerated(raw[4], body)
                assert tracemalloc.get_traced_memory()[1] - before < ALLOWANCE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "smallest"),
    [(fields.U16s, 2), (fields.Spans, 16), (fields.Credits, 16), (fields.Addresses, 6), (fields.Held, 20)],
    ids=["u16s", "spans", "credits", "addresses", "held"],
)
def test_counts_are_checked_before_any_item_is_read(kind, smallest):
    codec = typing.get_args(kind)[1]
    for count, rest in ((2**32 - 1, 100), (2, 2 * smallest - 1)):
        with pytest.raises(ProtocolError, match=f"{count} items announced where {rest} bytes are left"):
            codec.decode(fields.Reader(struct.pack(">I", count) + bytes(rest)))
    assert len(codec.decode(fields.Reader(struct.pack(">I", 2) + bytes(2 * smallest)))) == 2


# ---- fields -----------------------------------------------------------------------------------


def reply(attributes: bytes) -> bytes:
    """The body of a REPLY with these attributes."""
    return bytes(8) + bytes(2) + bytes(2) + attributes


def attribute(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack(">H", len(key)) + key + bytes([kind]) + value


def test_an_attribute_given_twice_is_refused():
    one, other = attribute(b"k", 3, b"\0"), attribute(b"k", 1, b"\0\0")
    decode(messages.Reply.TYPE, reply(b"\0\1" + one))
    for second in (one, other):
        with pytest.raises(ProtocolError, match="'k' is given twice"):
            decode(messages.Reply.TYPE, reply(b"\0\2" + one + second))


def test_an_attribute_of_another_type_is_refused():
    for kind in range(4, 256):
        with pytest.raises(ProtocolError, match=f"unknown type {kind}"):
            decode(messages.Reply.TYPE, reply(b"\0\1" + attribute(b"k", kind, bytes(8))))


def test_a_truth_value_is_zero_or_one():
    for value in range(2, 256):
        with pytest.raises(ProtocolError, match="neither 0 nor 1"):
            decode(messages.Reply.TYPE, reply(b"\0\1" + attribute(b"k", 3, bytes([value]))))


@pytest.mark.parametrize("raw", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
def test_text_that_is_not_utf8_is_refused(raw):
    with pytest.raises(ProtocolError, match="not UTF-8"):
        decode(Close.TYPE, struct.pack(">H", len(raw)) + raw + b"\0\0")
    with pytest.raises(ProtocolError, match="not UTF-8"):
        decode(messages.Reply.TYPE, reply(b"\0\1" + attribute(raw, 3, b"\0")))


@unhurried
@given(st.text(st.characters(), min_size=1, max_size=4).map(lambda part: part * 1500))
def test_words_for_people_are_cut_to_what_fits(words):
    decoded = decode(Close.TYPE, body_of(Close("protocol", words)))
    assert isinstance(decoded, Close)
    raw = words.encode("utf-8", "replace")
    if len(raw) <= fields.PROSE_SIZE:
        assert decoded.message.encode() == raw
    else:
        assert fields.PROSE_SIZE - 6 < len(decoded.message.encode()) <= fields.PROSE_SIZE
        assert decoded.message[-1] == "…"
        assert raw.startswith(decoded.message[:-1].encode())


def test_the_longest_refusal_reaches_a_peer_that_has_proven_nothing():
    reader = RecordReader()
    reader.feed(encode(Close("source_changed", "x" * 100_000)))
    message = reader.next_message()
    assert isinstance(message, Close)
    assert len(message.message.encode()) == fields.PROSE_SIZE


# ---- records ----------------------------------------------------------------------------------


@unhurried
@given(sent=st.lists(any_message, max_size=6), data=st.data())
def test_any_split_of_a_stream_gives_the_same_messages(sent, data):
    stream = b"".join(map(encode, sent))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    reader = proven_reader()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        reader.feed(stream[start:end])
        received += drain(reader)
    assert received == sent


def test_a_record_comes_out_with_its_last_byte():
    raw = encode(Open(1, messages.FILE, 10, 0, "c", {"path": b"x"}))
    reader = RecordReader()
    for i in range(len(raw)):
        assert reader.next_message() is None
        reader.feed(raw[i : i + 1])
    assert reader.next_message() == Open(1, messages.FILE, 10, 0, "c", {"path": b"x"})
    assert reader.next_message() is None


@unhurried
@given(st.binary(max_size=200) | st.lists(st.sampled_from(RECORDS) | st.binary(max_size=9)).map(b"".join))
def test_an_arbitrary_stream_gives_messages_or_a_protocol_error(stream):
    reader = RecordReader()
    reader.feed(stream)
    try:
        drain(reader)
    except ProtocolError:
        pass  # the other outcome allowed; anything else fails


@pytest.mark.parametrize("limit", [messages.MAX_RECORD_UNPROVEN, messages.MAX_RECORD])
def test_records_have_a_longest_length(limit):
    fits = Proof(bytes(limit - 5))
    reader = RecordReader()
    assert reader.max_record == messages.MAX_RECORD_UNPROVEN
    reader.max_record = limit
    reader.feed(encode(fits))
    assert reader.next_message() == fits
    for length in (limit + 1, 2**32 - 1, 0):
        reader = RecordReader()
        reader.max_record = limit
        reader.feed(struct.pack(">IB", length, Proof.TYPE))  # refused before any of the body is there
        with pytest.raises(ProtocolError, match=f"record of {length} bytes; {limit} are allowed"):
            reader.next_message()


def test_the_limit_holds_for_what_is_buffered_already():
    """PROOF and PARAMS arrive together: the second may be long because the first was right."""
    reader = RecordReader()
    long = Proof(bytes(messages.MAX_RECORD_UNPROVEN))
    reader.feed(encode(Ping(1)) + encode(long))
    assert reader.next_message() == Ping(1)
    with pytest.raises(ProtocolError):
        reader.next_message()
    reader.max_record = messages.MAX_RECORD
    assert reader.next_message() == long


# ---- frame headers ------------------------------------------------------------------------------

LONG_BODIES = (FrameKind.DATA, FrameKind.ACK)
headers = st.builds(
    FrameHeader,
    kind=st.sampled_from([kind for kind in FrameKind if kind not in LONG_BODIES]),
    transfer=u64,
    offset=u64,
    wire_length=st.integers(0, frames.MAX_CHUNK + frames.TAG_SIZE),
    check=st.integers(0, 2**32 - 1),
) | st.builds(
    FrameHeader,
    kind=st.just(FrameKind.DATA),
    transfer=u64,
    offset=st.integers(0, frames.MAX_OFFSET - frames.MAX_CHUNK),
    length=st.integers(1, frames.MAX_CHUNK),
    wire_length=st.integers(0, frames.MAX_CHUNK + frames.TAG_SIZE),
    check=st.integers(0, 2**32 - 1),
) | st.builds(
    FrameHeader,
    kind=st.just(FrameKind.ACK),
    transfer=u64,
    offset=u64,
    length=st.integers(1, frames.MAX_ACK),
    wire_length=st.integers(0, frames.MAX_CHUNK + frames.TAG_SIZE),
    check=st.integers(0, 2**32 - 1),
)


def raw_header(
    *, version: int = 1, kind: int = 1, flags: int = 0, offset: int = 0, length: int = 1, wire_length: int = 1
) -> bytes:
    return struct.pack(">BBHIQQII", version, kind, flags, 0, 1, offset, length, wire_length)


@unhurried
@given(headers)
def test_every_header_survives_the_way(header):
    raw = header.pack()
    assert len(raw) == HEADER_SIZE
    assert FrameHeader.unpack(raw) == header
    assert FrameHeader.unpack(memoryview(bytearray(raw))) == header


@unhurried
@given(
    st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE)
    | st.tuples(headers, st.integers(0, HEADER_SIZE - 1), st.integers(0, 255)).map(
        lambda t: t[0].pack()[: t[1]] + bytes([t[2]]) + t[0].pack()[t[1] + 1 :]
    )
)
def test_arbitrary_headers_are_taken_as_they_are_or_refused(raw):
    try:
        header = FrameHeader.unpack(raw)
    except ProtocolError:
        return
    assert header.pack() == raw
    assert header.length <= frames.MAX_CHUNK
    assert header.wire_length <= frames.MAX_CHUNK + frames.TAG_SIZE
    assert header.kind is not FrameKind.DATA or header.offset + header.length <= frames.MAX_OFFSET
    assert header.kind is not FrameKind.ACK or header.length <= frames.MAX_ACK
    assert header.kind in LONG_BODIES or not header.length


@unhurried
@given(st.binary(max_size=100).filter(lambda raw: len(raw) != HEADER_SIZE))
def test_a_header_has_one_size(raw):
    with pytest.raises(ProtocolError, match="header is 32 bytes"):
        FrameHeader.unpack(raw)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_other_frame_versions_are_refused(version):
    FrameHeader.unpack(raw_header())
    with pytest.raises(ProtocolError, match=f"version {version}"):
        FrameHeader.unpack(raw_header(version=version))


def test_other_frame_kinds_are_refused():
    for kind in set(range(256)) - set(FrameKind):
        with pytest.raises(ProtocolError, match=f"kind {kind} "):
            FrameHeader.unpack(raw_header(kind=kind))


@unhurried
@given(st.integers(1, 2**16 - 1))
def test_flags_are_refused(flags):
    with pytest.raises(ProtocolError, match=f"flags {flags:#x} "):
        FrameHeader.unpack(raw_header(flags=flags))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"length": 0}, "without bytes"),
        ({"length": frames.MAX_CHUNK + 1}, "exceeds"),
        ({"length": 2**32 - 1}, "exceeds"),
        ({"wire_length": frames.MAX_CHUNK + frames.TAG_SIZE + 1}, "exceeds"),
        ({"kind": 2, "length": 0, "wire_length": 2**32 - 1}, "exceeds"),
        ({"offset": 2**63 - 1}, "largest offset"),
        ({"offset": 2**64 - 1, "length": 2}, "largest offset"),
        ({"kind": 2}, "PING frame names a span"),
        ({"kind": 17}, "ADMIT frame names a span"),
        ({"kind": 5, "length": 0}, "ACK frame of 0 bytes"),
        ({"kind": 5, "length": frames.MAX_ACK + 1}, f"ACK frame of {frames.MAX_ACK + 1} bytes"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, why):
    with pytest.raises(ProtocolError, match=why):
        FrameHeader.unpack(raw_header(**changes))


def test_the_largest_chunk_at_the_last_place_is_taken():
    FrameHeader.unpack(
        raw_header(
            offset=frames.MAX_OFFSET - frames.MAX_CHUNK,
            length=frames.MAX_CHUNK,
            wire_length=frames.MAX_CHUNK + frames.TAG_SIZE,
        )
    )


# ---- the payload of ACK frames ----------------------------------------------------------------

HELD_STRATEGY = STRATEGIES[fields.Held]


@unhurried
@given(held=HELD_STRATEGY, limits=spans)
def test_every_ack_payload_survives_the_way(held, limits):
    ack, credit = messages.Ack(held), messages.Credit(limits)
    raw = frames.encode_ack(ack, credit)
    assert frames.decode_ack(raw) == (ack, credit)
    for end in range(len(raw)):
        with pytest.raises(ProtocolError):
            frames.decode_ack(raw[:end])
    with pytest.raises(ProtocolError, match="too many"):
        frames.decode_ack(raw + b"\0")


@unhurried
@given(st.binary(max_size=200))
def test_an_arbitrary_ack_payload_is_read_or_refused(raw):
    try:
        ack, credit = frames.decode_ack(raw)
    except ProtocolError:
        return
    assert frames.encode_ack(ack, credit) == raw


def test_the_fullest_reports_of_an_engine_fit_an_ack_frame():
    spans_of_one = tuple((i, i + 1) for i in range(10, 10 + 2 * ACK_SPANS, 2))
    full = messages.Ack(((1, 5, spans_of_one),) * (ACK_ENTRIES // ACK_SPANS))
    assert len(frames.encode_ack(full, messages.Credit(()))) <= frames.MAX_ACK
    many = messages.Ack(tuple((i, 5, ()) for i in range(ACK_ENTRIES)))
    assert len(frames.encode_ack(many, messages.Credit(()))) <= frames.MAX_ACK
    limits = messages.Credit(tuple((i, 5) for i in range(ACK_ENTRIES)))
    assert len(frames.encode_ack(messages.Ack(()), limits)) <= frames.MAX_ACK


@unhurried
@given(headers, st.integers(0, 2**32 - 1))
def test_the_check_is_set_and_cleared_without_touching_the_rest(header, check):
    raw = with_check(header.pack(), check)
    assert FrameHeader.unpack(raw) == dataclasses.replace(header, check=check)
    assert FrameHeader.unpack(without_check(raw)) == dataclasses.replace(header, check=0)
