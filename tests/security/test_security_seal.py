"""Sealed frames open as sent, and in no other way."""

from __future__ import annotations

from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from amst_core.errors import BrokenError, IntegrityError, ProtocolError
from amst_core.interfaces import HEADER_SIZE
from amst_core.security import seal
from amst_core.security.keys import Direction, lane_key
from amst_core.security.seal import Protection, make_opener, make_sealer
from amst_core.wire.frames import TAG_SIZE, FrameHeader, FrameKind

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
SECRET = bytes.fromhex("84d597c9306d69c5f8245b634fac629d7d52e29c696bb097b857723c82a8816e")
KEY = lane_key(SECRET, direction=Direction.CLIENT_TO_SERVER, incarnation=1)

# The known frames of docs/security.md: AES-GCM computed with cryptography's Cipher interface instead of
# AESGCM, CRC-32C bit by bit (`slow_crc32c`).
DATA = (FrameHeader(FrameKind.DATA, transfer=7, offset=4096, length=11), b"hello, lane")
PING = (FrameHeader(FrameKind.PING, offset=5), b"")
AEAD_FRAMES = (
    ("0101000000000000000000000000000700000000000010000000000b0000001b",
     "60ade421a2764a2729e08c8e9da4ea1e2c4cd93ec178bd274ce240"),
    ("0102000000000000000000000000000000000000000000050000000000000010",
     "960cadd6888ccd9a27d10d5d040eb0f9"),
)  # fmt: skip
CRC_FRAMES = (
    ("010100008b3525cf000000000000000700000000000010000000000b0000000b", DATA[1].hex()),
    ("010200006c883300000000000000000000000000000000050000000000000000", ""),
)

protections = pytest.mark.parametrize("protection", Protection)
guarded = pytest.mark.parametrize("protection", [Protection.AEAD, Protection.CRC])
payloads = st.binary(min_size=1, max_size=200)


def data_header(payload: bytes, *, offset: int = 0) -> FrameHeader:
    return FrameHeader(FrameKind.DATA, transfer=3, offset=offset, length=len(payload))


def sealed(sealer: seal.FrameSealer, header: FrameHeader, payload: bytes) -> tuple[bytes, bytes]:
    raw, wire = sealer.seal(header, memoryview(payload))
    return raw, bytes(wire)


def opened(opener: seal.FrameOpener, raw: bytes, wire: bytes) -> bytes:
    return bytes(opener.open(raw, memoryview(bytearray(wire))))


def slow_crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(("protection", "frames"), [(Protection.AEAD, AEAD_FRAMES), (Protection.CRC, CRC_FRAMES)])
def test_known_frames(protection: Protection, frames: tuple[tuple[str, str], ...]) -> None:
    sealer, opener = make_sealer(protection, KEY), make_opener(protection, KEY)
    document = DOCUMENT.read_text()
    for (header, payload), (raw, wire) in zip((DATA, PING), frames, strict=True):
        assert [part.hex() for part in sealed(sealer, header, payload)] == [raw, wire]
        assert opened(opener, bytes.fromhex(raw), bytes.fromhex(wire)) == payload
        assert raw in document
        assert wire in document


def test_the_crc_covers_the_header_with_its_check_zero_and_the_payload() -> None:
    assert slow_crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value of the polynomial
    raw, wire = (bytes.fromhex(part) for part in CRC_FRAMES[0])
    assert FrameHeader.unpack(raw).check == slow_crc32c(raw[:4] + bytes(4) + raw[8:] + wire)


@protections
@given(frames=st.lists(st.one_of(payloads, st.just(b"")), max_size=5))
def test_what_is_sealed_opens_in_order(protection: Protection, frames: list[bytes]) -> None:
    sealer, opener = make_sealer(protection, KEY), make_opener(protection, KEY)
    for payload in frames:
        header = data_header(payload) if payload else FrameHeader(FrameKind.PING, offset=9)
        raw, wire = sealed(sealer, header, payload)
        received = FrameHeader.unpack(raw)
        assert (received.kind, received.offset, received.length) == (header.kind, header.offset, len(payload))
        assert opener.expected_wire_length(received) == len(wire) == len(payload) + sealer.overhead
        assert opened(opener, raw, wire) == payload


def test_aead_hides_the_payload_and_repeats_nothing() -> None:
    sealer = make_sealer(Protection.AEAD, KEY)
    payload = bytes(64)
    first, second = (sealed(sealer, data_header(payload), payload)[1] for _ in range(2))
    assert first != second
    assert bytes(8) not in first + second


@guarded
@given(payload=payloads, change=st.integers(1, 255), data=st.data())
def test_no_changed_byte_is_accepted(protection: Protection, payload: bytes, change: int, data: st.DataObject) -> None:
    raw, wire = sealed(make_sealer(protection, KEY), data_header(payload, offset=77), payload)
    at = data.draw(st.integers(0, len(raw + wire) - 1))
    frame = bytearray(raw + wire)
    frame[at] ^= change
    with pytest.raises(IntegrityError):
        opened(make_opener(protection, KEY), bytes(frame[:HEADER_SIZE]), bytes(frame[HEADER_SIZE:]))


@guarded
@pytest.mark.parametrize("kind", [FrameKind.DATA, FrameKind.PING, FrameKind.PONG, FrameKind.FIN])
def test_every_single_bit_counts(protection: Protection, kind: FrameKind) -> None:
    payload = b"seventeen bytes !" if kind is FrameKind.DATA else b""
    raw, wire = sealed(make_sealer(protection, KEY), FrameHeader(kind, 1, 2, len(payload)), payload)
    for bit in range(8 * len(raw + wire)):
        frame = bytearray(raw + wire)
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            opened(make_opener(protection, KEY), bytes(frame[:HEADER_SIZE]), bytes(frame[HEADER_SIZE:]))
    assert opened(make_opener(protection, KEY), raw, wire) == payload


@given(count=st.integers(2, 6), data=st.data())
def test_aead_frames_open_in_their_order_and_once_only(count: int, data: st.DataObject) -> None:
    sealer, opener = make_sealer(Protection.AEAD, KEY), make_opener(Protection.AEAD, KEY)
    frames = [sealed(sealer, data_header(b"same"), b"same") for _ in range(count)]
    good = data.draw(st.integers(0, count - 1))
    for raw, wire in frames[:good]:
        assert opened(opener, raw, wire) == b"same"
    wrong = data.draw(st.sampled_from([i for i in range(count) if i != good]))  # replayed, or ahead of its turn
    with pytest.raises(IntegrityError, match="repeated or out of order"):
        opened(opener, *frames[wrong])


def test_behind_a_bad_frame_aead_opens_nothing_later() -> None:
    sealer, opener = make_sealer(Protection.AEAD, KEY), make_opener(Protection.AEAD, KEY)
    raw, wire = sealed(sealer, data_header(b"a"), b"a")
    with pytest.raises(IntegrityError):
        opened(opener, raw, wire[:-1] + bytes([wire[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        opened(opener, *sealed(sealer, data_header(b"b"), b"b"))


@pytest.mark.parametrize(
    ("direction", "incarnation"),
    [(Direction.SERVER_TO_CLIENT, 1), (Direction.CLIENT_TO_SERVER, 2), (Direction.CLIENT_TO_SERVER, 1 << 56)],
)
def test_keys_of_another_direction_or_incarnation_open_nothing(direction: Direction, incarnation: int) -> None:
    frame = sealed(make_sealer(Protection.AEAD, KEY), *PING)
    other = lane_key(SECRET, direction=direction, incarnation=incarnation)
    with pytest.raises(IntegrityError):
        opened(make_opener(Protection.AEAD, other), *frame)


def test_aead_seals_and_opens_in_place() -> None:
    buffer = bytearray(b"in place" + bytes(TAG_SIZE))
    view = memoryview(buffer)
    raw, wire = make_sealer(Protection.AEAD, KEY).seal(data_header(b"in place"), view[:8], buffer=view)
    assert wire.obj is buffer
    assert bytes(buffer[:8]) != b"in place"
    plain = make_opener(Protection.AEAD, KEY).open(raw, wire)
    assert plain.obj is buffer
    assert bytes(buffer[:8]) == bytes(plain) == b"in place"


def test_aead_seals_and_opens_from_one_buffer_to_another() -> None:
    source, sealed_in, opened_in = b"left alone", bytearray(40), bytearray(40)
    raw, wire = make_sealer(Protection.AEAD, KEY).seal(
        data_header(source), memoryview(source), buffer=memoryview(sealed_in)
    )
    assert wire.obj is sealed_in
    assert wire.nbytes == len(source) + TAG_SIZE
    before = bytes(sealed_in)
    plain = make_opener(Protection.AEAD, KEY).open(raw, wire, into=memoryview(opened_in))
    assert plain.obj is opened_in
    assert bytes(plain) == source
    assert bytes(sealed_in) == before


@pytest.mark.parametrize("protection", [Protection.CRC, Protection.TRANSPORT, Protection.NONE])
def test_the_others_neither_copy_nor_change_the_payload(protection: Protection) -> None:
    payload = memoryview(b"read-only, untouched")
    raw, wire = make_sealer(protection, KEY).seal(
        data_header(payload.tobytes()), payload, buffer=memoryview(bytearray(64))
    )
    assert wire is payload
    assert make_opener(protection, KEY).open(raw, wire, into=memoryview(bytearray(64))) is payload


@protections
@pytest.mark.parametrize("kind", [FrameKind.CHALLENGE, FrameKind.ADMIT])
def test_admission_frames_are_never_sealed(protection: Protection, kind: FrameKind) -> None:
    with pytest.raises(ProtocolError, match=f"{kind.name} frames are never sealed"):
        make_sealer(protection, KEY).seal(FrameHeader(kind), memoryview(b""))
    overhead = make_opener(protection, KEY).overhead
    with pytest.raises(ProtocolError, match="already admitted"):
        make_opener(protection, KEY).expected_wire_length(FrameHeader(kind, wire_length=overhead))


@protections
@pytest.mark.parametrize("kind", [FrameKind.DATA, FrameKind.PING, FrameKind.FIN])
@pytest.mark.parametrize("wrong", [-1, 1, 16, -16])
def test_wire_lengths_that_do_not_fit_are_refused(protection: Protection, kind: FrameKind, wrong: int) -> None:
    length = 100 if kind is FrameKind.DATA else 0
    opener = make_opener(protection, KEY)
    right = length + opener.overhead
    assert opener.expected_wire_length(FrameHeader(kind, length=length, wire_length=right)) == right
    with pytest.raises(ProtocolError, match="on the wire"):
        opener.expected_wire_length(FrameHeader(kind, length=length, wire_length=right + wrong))


@protections
def test_a_payload_must_have_the_length_its_header_says(protection: Protection) -> None:
    for payload in (b"abc", b"abcde"):
        with pytest.raises(ProtocolError, match="under a header for 4"):
            make_sealer(protection, KEY).seal(data_header(b"abcd"), memoryview(payload))


def test_a_buffer_without_room_for_the_tag_is_refused() -> None:
    buffer = memoryview(bytearray(4 + TAG_SIZE - 1))
    with pytest.raises(ProtocolError, match="the buffer has 19"):
        make_sealer(Protection.AEAD, KEY).seal(data_header(b"abcd"), memoryview(b"abcd"), buffer=buffer)


def test_a_payload_shorter_than_a_tag_is_refused() -> None:
    with pytest.raises(ProtocolError, match="shorter than its 16-byte tag"):
        opened(make_opener(Protection.AEAD, KEY), FrameHeader(FrameKind.PING).pack(), bytes(15))


def test_a_secure_transports_frames_carry_no_check() -> None:
    with pytest.raises(ProtocolError, match="00000001"):
        opened(make_opener(Protection.TRANSPORT, KEY), FrameHeader(FrameKind.PING, check=1).pack(), b"")


@pytest.mark.parametrize("size", [0, 16, 24, 31, 33])
def test_only_256_bit_keys_will_do(size: int) -> None:
    for make in (make_sealer, make_opener):
        with pytest.raises(ProtocolError, match="AES-256"):
            make(Protection.AEAD, bytes(size))


def test_a_key_is_used_up_before_its_nonces_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    sealer, opener = make_sealer(Protection.AEAD, KEY), make_opener(Protection.AEAD, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(seal, "MAX_FRAMES_PER_KEY", 2)
        frames = [sealed(sealer, *DATA) for _ in range(2)]
        with pytest.raises(BrokenError, match="open a new lane"):
            sealed(sealer, *DATA)
    frames.append(sealed(sealer, *DATA))  # by a peer that does not count
    monkeypatch.setattr(seal, "MAX_FRAMES_PER_KEY", 2)
    assert [opened(opener, *frame) for frame in frames[:2]] == [DATA[1]] * 2
    with pytest.raises(ProtocolError, match="more than 2 frames"):
        opened(opener, *frames[2])


@protections
@pytest.mark.parametrize("size", [1, (128 << 10) - 1, 128 << 10, (1 << 20) + 7])
def test_the_crc_of_a_payload_is_known_from_a_long_frame_that_has_one(protection: Protection, size: int) -> None:
    payload = bytes(range(251)) * (size // 251 + 1)
    payload = payload[:size]
    raw, wire = sealed(make_sealer(protection, KEY), data_header(payload, offset=5), payload)
    opener = make_opener(protection, KEY)
    opened(opener, raw, wire)
    known = opener.payload_crc(raw, size)
    if protection is Protection.CRC and size >= 128 << 10:
        assert known == crc32c(payload)
    else:
        assert known is None
