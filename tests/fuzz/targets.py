"""What sees bytes that nobody vouches for, each as a function of bytes that raises only when something is wrong.

`fuzz.py` drives them with atheris, `test_corpus.py` with the seeds in ``corpus/`` and mutations of them.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any, Final

from crc32c import crc32c

from amst_core.cli import traffic
from amst_core.control import handshake
from amst_core.control.listener import Listener
from amst_core.engine import Chunk, Engine, Limits, Placement, Verdict
from amst_core.engine.events import (
    LaneOvertaken,
    SameAnswered,
    SameAsked,
    SourceDrained,
    TransferDone,
    TransferDropped,
    TransferOffered,
    TransferWhole,
)
from amst_core.errors import AmstError, BrokenError, ProtocolError
from amst_core.files import entries, journal
from amst_core.interfaces import HEADER_SIZE, PREAMBLE, PREAMBLE_MAGIC, Endpoint
from amst_core.security import keys
from amst_core.session import listing
from amst_core.wire import requests
from amst_core.wire.frames import MAX_OFFSET, FrameHeader, decode_ack, encode_ack
from amst_core.wire.messages import (
    FILE,
    MAX_RECORD,
    MESSAGE,
    PIPE,
    SIZE_UNKNOWN,
    Ack,
    Close,
    Credit,
    End,
    Hello,
    Message,
    Missing,
    Open,
    Opened,
    Params,
    Proof,
    RecordReader,
    Request,
    Reset,
    Result,
    Resume,
    Same,
    decode,
    encode,
)

# ---- bytes to values -------------------------------------------------------------------------------


def message(data: bytes) -> None:
    """A type and a body. What decodes can be written again, and says the same."""
    if not data:
        return
    try:
        decoded = decode(data[0], data[1:])
    except ProtocolError:
        return
    raw = encode(decoded)
    assert decode(raw[4], raw[5:]) == decoded or len(data) > 3072, "only words for people are cut"


def records(data: bytes) -> None:
    """A stream of records, in pieces that the first bytes decide."""
    reader = RecordReader()
    if data[:1] > b"\x7f":
        reader.max_record = MAX_RECORD
    step = 1 + (data[1] if len(data) > 1 else 0) * 7
    with suppress(ProtocolError):
        for at in range(2, len(data), step):
            reader.feed(data[at : at + step])
            while reader.next_message() is not None:
                pass
            assert len(reader._buffer) <= reader.max_record + 4


def frame(data: bytes) -> None:
    """A frame's header. What is taken is written in the same bytes."""
    with suppress(ProtocolError):
        header = FrameHeader.unpack(data[:HEADER_SIZE])
        assert header.pack() == data[:HEADER_SIZE]


def acknowledgement(data: bytes) -> None:
    """The payload of an ACK frame."""
    with suppress(ProtocolError):
        ack, credit = decode_ack(data)
        assert encode_ack(ack, credit) == data


def entry(data: bytes) -> None:
    """Attributes that describe a file, and its path."""
    with suppress(AmstError):
        opened = decode(Open.TYPE, struct.pack("!QBQQH", 1, FILE, data[0] if data else 0, 0, 0) + data[1:])
        assert isinstance(opened, Open)
        found = entries.from_attributes(opened.attributes, size=opened.size)
        assert entries.from_attributes(entries.to_attributes(found), size=opened.size) == found
    with suppress(AmstError):
        parts = entries.split_path(data)
        assert not any(part in (b"", b".", b"..") or b"/" in part or b"\0" in part for part in parts)
        assert not any(part.startswith(entries.HIDDEN_PREFIX) for part in parts)
        assert b"/".join(parts) == data
    with suppress(AmstError):
        entries.split_path(entries.normalise_user_path(data))
    assert entries.display_path(data).isprintable()


def table(data: bytes) -> None:
    """The entries of a pack. What is taken can be written again, and says the same."""
    with suppress(AmstError):
        found = entries.decode_table(data)
        again = b"".join(entries.encode_row(each, each.path) for each in found)
        assert entries.decode_table(again) == found
        assert all(entries.split_path(each.path) or not each.path for each in found)


class _Page:
    """Answers a request for a list with the same page again and again."""

    def __init__(self, data: bytes) -> None:
        self._reply = {"entries": data[1:], "more": bool(data[:1] > b"\x7f")}
        self.list_turn = nullcontext()

    def ask(self, operation: str, attributes: Any) -> _Page:
        return self

    def wait(self) -> dict[str, Any]:
        return self._reply


def page(data: bytes) -> None:
    """A page of a list, which a server may repeat: what comes out of it is in order, and it ends."""
    for recursive in (False, True):
        found = []
        with suppress(AmstError):
            for each in listing.listed(_Page(data), b"", recursive=recursive):  # type: ignore[arg-type]
                found.append(each.path.split(b"/") if each.path else [])
        assert all(one < next_ for one, next_ in pairwise(found))
        assert all(len(path) <= (256 if recursive else 1) for path in found)


def journal_file(data: bytes) -> None:
    """A journal as it is found on a disk: which records are kept, and what is left of it.

    Odd first byte: checks are made to fit, so that what is behind them is reached.
    """
    if not data:
        return
    mark = journal.SourceMark(b"identity", 1 << 20, 5)
    content = bytearray(journal.encode_header(mark) if data[0] & 2 else b"")
    content += data[1:]
    if data[0] & 1:
        for at in range(len(content) if not data[0] & 2 else journal.HEADER_SIZE, len(content), journal.RECORD_SIZE):
            body = content[at : at + journal.RECORD_SIZE - 4]
            content[at : at + journal.RECORD_SIZE] = body + struct.pack("!I", crc32c(bytes(body)))
    kept: list[journal.Record] = []

    def keep(record: journal.Record) -> bool:
        assert 1 <= record.length <= journal.MAX_SPAN and record.offset + record.length <= mark.size
        if record.crc & 1:
            return False
        kept.append(record)
        return True

    fd = os.memfd_create("journal")
    try:
        os.write(fd, content)
        count = journal.sift(fd, mark=mark, keep=keep)
        if count is None:
            assert os.pread(fd, len(content) + 1, 0) == content, "what is not ours is not touched"
        else:
            assert count == len(kept)
            left = os.pread(fd, len(content) + 1, 0)
            assert len(left) == journal.HEADER_SIZE + count * journal.RECORD_SIZE
            assert kept == [
                journal.decode_record(left[at : at + journal.RECORD_SIZE], size=mark.size)
                for at in range(journal.HEADER_SIZE, len(left), journal.RECORD_SIZE)
            ]
    finally:
        os.close(fd)


class _BenchPeer:
    """A session whose peer sends the same control message again and again."""

    peer = "peer"

    def __init__(self, data: bytes) -> None:
        self._data = data

    def send(self, data: bytes, *, channel: str) -> None:
        pass

    def recv(self, channel: str, *, timeout: float | None = None) -> memoryview:
        return memoryview(self._data if channel == traffic.CONTROL else b"")


def bench(data: bytes) -> None:
    """What the two sides of ``amst bench`` tell each other, as JSON."""
    with suppress(AmstError):
        load = traffic._parse_load(traffic._parse(memoryview(data)))
        assert load.message <= traffic.MAX_MESSAGE and load.window <= traffic.MAX_WINDOW
    with suppress(AmstError):
        traffic.receive(
            _BenchPeer(data),  # type: ignore[arg-type]
            traffic.Load(1, None, 1, 1),
            traffic.Tally(),
            progress=lambda: None,
        )


# ---- the first bytes of a connection ----------------------------------------------------------------


def listener(data: bytes) -> None:
    """The first bytes of a connection: who it is handed to, or that it is closed."""
    handed: list[str] = []

    def control(newcomer: Any) -> None:
        handed.append("control")
        newcomer.sock.close()

    def lane(newcomer: Any, tag: int) -> None:
        handed.append(f"lane {tag}")
        newcomer.sock.close()

    listening = Listener(
        Endpoint("amst", "127.0.0.1", 0), on_control=control, on_lane=lane, handshake_timeout_s=5.0, unauthenticated=4
    )
    try:
        with socket.create_connection(("127.0.0.1", int(listening.address.rpartition(":")[2])), 5) as sock:
            with suppress(OSError):
                sock.sendall(data[:200])
                sock.shutdown(socket.SHUT_WR)
            sock.settimeout(4)
            with suppress(ConnectionError):
                assert sock.recv(1) == b"", "not a word is said, and nobody waits for more"
    finally:
        listening.close()
    first = data[: PREAMBLE.size]
    if len(first) < PREAMBLE.size:
        expected = []
    elif first.startswith(b"\x16\x03"):
        expected = ["control"]
    else:
        expected = [f"lane {PREAMBLE.unpack(first)[1]}"] if first.startswith(PREAMBLE_MAGIC) else []
    assert handed == expected


# ---- the handshake ----------------------------------------------------------------------------------

_TOKEN: Final = b"t" * 32
_CERTIFICATE: Final = b"certificate"
_GOOD: Final = b"good"
"""Stands for a proof that is right: nobody finds one by chance."""


class _Channel:
    """A control channel whose peer sends the messages in some bytes; its proofs hold where they say so."""

    peer = "peer"

    def __init__(self, data: bytes, *, server_side: bool) -> None:
        self._reader = RecordReader()
        self._reader.feed(data)
        self._server_side = server_side
        self._nonces = {"client_nonce": b"", "server_nonce": b""}
        self.sent: list[Message] = []

    def establish(self, deadline: float) -> None:
        pass

    def certificate(self) -> bytes:
        return _CERTIFICATE

    def prove(self) -> None:
        self._reader.max_record = MAX_RECORD

    def send(self, message: Message) -> None:
        encode(message)
        self.sent.append(message)
        if isinstance(message, Hello):
            self._nonces["server_nonce" if self._server_side else "client_nonce"] = message.nonce

    def flush_all(self, deadline: float) -> None:
        pass

    def wait_message(self, deadline: float) -> Message:
        message = self._reader.next_message()
        if message is None:
            raise BrokenError("the peer says no more")
        if isinstance(message, Hello):
            self._nonces["client_nonce" if self._server_side else "server_nonce"] = message.nonce
        if isinstance(message, Proof) and message.mac == _GOOD:
            prove = keys.client_proof if self._server_side else keys.server_proof
            return Proof(prove(_TOKEN, **self._binding()))
        if isinstance(message, Resume) and message.mac == _GOOD:
            mac = keys.resume_mac(
                _Session.secret, by_client=self._server_side, epoch=message.epoch, received=message.received,
                **self._binding(),
            )  # fmt: skip
            return Resume(message.epoch, message.received, mac)
        return message

    def _binding(self) -> dict[str, bytes]:
        return {"fingerprint": keys.certificate_fingerprint(_CERTIFICATE), **self._nonces}


class _Session:
    """One that may be taken up again."""

    secret = b"s" * 32
    epoch = 5

    def yield_channel(self, epoch: int, timeout_s: float) -> int:
        assert epoch >= 1
        if epoch <= self.epoch:
            raise ProtocolError("over")
        return 7


def handshake_server(data: bytes) -> None:
    """Everything a client may say to a server."""
    channel: Any = _Channel(data, server_side=True)
    with suppress(AmstError):
        handshake.accept(
            channel,
            token=_TOKEN,
            certificate=_CERTIFICATE,
            admit=lambda wish: handshake.Terms(1, 1, 1),
            find=lambda session: _Session() if session == bytes(16).hex() else None,
            deadline=0.0,
        )
        return
    assert not any(isinstance(m, Params) for m in channel.sent) or channel._reader.max_record == MAX_RECORD


def handshake_client(data: bytes) -> None:
    """Everything a server may say to a client, in a new session and in one that is taken up again."""
    channel: Any = _Channel(data[1:], server_side=False)
    terms = handshake.Terms(1, 1, 1)
    wish = handshake.Wish(False, 1, ("tcp",))
    with suppress(AmstError):
        if data[:1] > b"\x7f":
            fingerprint = keys.certificate_fingerprint(_CERTIFICATE)
            agreed = handshake.Agreement(bytes(16).hex(), _Session.secret, terms, wish, fingerprint)
            handshake.resume(channel, token=_TOKEN, agreed=agreed, epoch=9, received=3, deadline=0.0)
        else:
            handshake.connect(channel, token=_TOKEN, wish=wish, terms=terms, deadline=0.0)
        return
    assert not any(isinstance(m, Params) for m in channel.sent) or channel._reader.max_record == MAX_RECORD


# ---- the engine ------------------------------------------------------------------------------------

_LOCAL: Final = Limits(max_chunk=64, max_open=4, initial_credit=100)
_PEER: Final = Limits(max_chunk=50, max_open=3, initial_credit=80)
_NUMBERS: Final = (
    0, 1, 2, 3, 4, 5, 7, 10, 31, 32, 50, 64, 65, 80, 99, 100, 101, 200, 255, 1000, (1 << 31) - 1, (1 << 32) - 1,
    1 << 40, MAX_OFFSET - 64, MAX_OFFSET - 1, MAX_OFFSET, MAX_OFFSET + 1, (1 << 64) - 2, SIZE_UNKNOWN,
)  # fmt: skip


class _Bytes:
    """Small decisions out of bytes; `StopIteration` when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._left: Iterator[int] = iter(data)

    def u8(self) -> int:
        return next(self._left)

    def up_to(self, bound: int) -> int:
        return self.u8() % (bound + 1)

    def number(self) -> int:
        """Mostly small, or at some bound."""
        return _NUMBERS[self.u8() % len(_NUMBERS)]

    def spans(self) -> tuple[tuple[int, int], ...]:
        spans = []
        at = 0
        for _ in range(self.up_to(3)):
            if self.u8() < 200:  # mostly as they should be
                at += self.up_to(40)
                spans.append((at, at := at + 1 + self.up_to(20)))
            else:
                spans.append((self.number(), self.number()))
        return tuple(spans)


class _EngineUnderFire:
    """An engine whose peer says anything, while its own side does what a session does, in any order."""

    def __init__(self, data: bytes) -> None:
        self.bytes = _Bytes(data)
        self.engine = Engine(local=_LOCAL, peer=_PEER)
        self.now = 0.0
        self.lanes: list[int] = []
        self.next_lane = 0
        self.receiving: list[Placement] = []  # FILL or COPY, not ended
        self.reading: list[tuple[int, Chunk]] = []
        self.written: dict[int, list[tuple[int, int]]] = {}  # of incoming transfers, what has been stored
        self.offered: set[int] = set()
        self.whole: set[int] = set()
        self.dropped: set[int] = set()
        self.done: set[int] = set()
        self.to_finish: list[int] = []
        self.asked: list[int] = []
        self.answered: list[tuple[int, bool]] = []
        self.parked_open: list[tuple[int, bool]] = []  # offered, not decided
        for _ in range(2):
            self.join()

    def run(self) -> None:
        with suppress(StopIteration):
            while True:
                try:
                    self.step()
                except ProtocolError:
                    break  # the session ends
                self.work()
                self.check()
        self.end()

    # -- the peer

    def control(self) -> None:
        self.engine.receive(self.message(), self.now)

    def message(self) -> Message:
        """Mostly what an honest peer could say now, sometimes anything."""
        b = self.bytes
        lies = b.u8() > 244
        out = self.engine._outgoing.get(self.id(self.engine._opened_out))
        incoming = self.engine._incoming.get(self.id(self.engine._opened_in))
        match b.up_to(13):
            case 0 | 1:
                right = self.engine._opened_in + 1
                on_hold = b.u8() < 60
                kind = FILE if on_hold else (MESSAGE, FILE, FILE, PIPE)[b.up_to(3)]
                size = b.number() if lies else SIZE_UNKNOWN if kind == PIPE else b.up_to(150)
                if self.engine.receiving >= _LOCAL.max_open and not lies:
                    return Credit(())
                return Open(right, b.u8() if lies else kind, size, 0, "", {"hold": True} if on_hold else {})
            case 2 | 3 if out is not None and not lies:
                prefix = b.up_to(out.cursor) if out.cursor else 0
                return Ack(((out.id, prefix, tuple(s for s in b.spans() if prefix < s[0] < s[1] <= out.cursor)),))
            case 2 | 3:
                return Ack(((self.id(self.engine._opened_out), b.number(), b.spans()),) if lies else ())
            case 4 | 5:
                limit = b.number() if lies else b.up_to(255)
                return Credit(((self.id(self.engine._opened_out), limit),) if lies or out is not None else ())
            case 6 | 7 if incoming is not None and not lies:
                told = incoming.total is not None or bool(incoming.filling and incoming.size is None)
                total = incoming.held.end if incoming.size is None else incoming.size
                return Credit(()) if told else End(incoming.open.transfer, total)
            case 6 | 7:
                return End(self.id(self.engine._opened_in), b.number()) if lies else Credit(())
            case 8 if out is not None and (lies or (out.ended and out.cursor == out.available)):
                return Result(out.id, "", "")
            case 8:
                return Result(out.id, "refused", "") if out is not None and b.u8() < 40 else Credit(())
            case 9 if incoming is not None and b.u8() < 60:
                return Reset(incoming.open.transfer, "", "")
            case 10 if out is not None:
                return Missing(out.id, b.number() if lies else b.up_to(200), b.number() & 0xFFFFFFFF)
            case 11 if out is not None and (lies or out.on_hold):
                size = out.size or 0
                digest = bytes(32) if b.u8() < 80 else bytes(b.up_to(40)) if lies else b""
                spans = b.spans() if lies else tuple(span for span in b.spans() if span[1] <= size)
                return Opened(out.id, () if digest else spans, digest)
            case 12 if incoming is not None and (lies or incoming.claimed):
                return Same(incoming.open.transfer, bool(b.up_to(1)))
            case 13 if lies:
                return Close("", "") if b.u8() < 128 else Request(1, "stat", {})
            case _:
                return Credit(())

    def id(self, highest: int) -> int:
        b = self.bytes
        return b.number() if b.u8() > 252 else max(1, highest - b.up_to(3))

    def data(self) -> None:
        if not self.lanes:
            return
        b = self.bytes
        lane = self.lanes[b.up_to(len(self.lanes) - 1)]
        if any(placement.lane == lane for placement in self.receiving):
            return  # it is in the middle of one
        transfer = self.id(self.engine._opened_in)
        incoming = self.engine._incoming.get(transfer)
        offset, length = b.up_to(150), 1 + b.up_to(63)
        if b.u8() > 248:
            offset, length = b.number(), b.number()
        elif incoming is not None:
            end = min(incoming.limit, incoming.limit if incoming.size is None else incoming.size)
            end = min(end, end if incoming.total is None else incoming.total)
            if not end:
                return
            offset %= end
            length = min(length, end - offset)
        try:
            placement = self.engine.place(lane, transfer, offset, length)
        except ProtocolError:
            self.lose(lane)
            return
        if placement.verdict is not Verdict.PARK:
            self.receiving.append(placement)

    def arrived(self) -> None:
        """A chunk is there, intact or not; it goes to its place, or is shown as a copy."""
        if not self.receiving:
            return
        b = self.bytes
        placement = self.receiving.pop(b.up_to(len(self.receiving) - 1))
        intact = b.u8() < 200
        fills = placement.verdict is Verdict.FILL and placement.claim()
        if intact and not fills:
            copied = self.engine.copied(placement)
            if copied is None:
                return
            placement, fills = copied, True
        if intact and fills:
            self.store(placement)
        if placement.verdict is Verdict.FILL:
            self.engine.placed(placement, intact=intact and fills, now=self.now)
        if not intact:
            self.lose(placement.lane)

    def store(self, placement: Placement) -> None:
        spans = self.written.setdefault(placement.transfer, [])
        assert all(end <= placement.start or placement.end <= start for start, end in spans), "a byte is written once"
        assert placement.transfer not in self.whole | self.dropped, "nothing is written after the end"
        spans.append((placement.start, placement.end))

    # -- this side

    def join(self) -> None:
        if len(self.lanes) < 4:
            self.next_lane += 1
            self.lanes.append(self.next_lane)
            self.engine.lane_joined(self.next_lane)

    def lose(self, lane: int) -> None:
        if lane in self.lanes:
            self.lanes.remove(lane)
        self.engine.lane_lost(lane)
        for placement in [p for p in self.receiving if p.lane == lane]:
            self.receiving.remove(placement)
            if placement.verdict is Verdict.FILL:
                self.engine.placed(placement, intact=False, now=self.now)
        for item in [item for item in self.reading if item[0] == lane]:
            self.reading.remove(item)
            self.engine.chunk_left(item[1])

    def local(self) -> None:
        b, engine = self.bytes, self.engine
        match b.up_to(11):
            case 0:
                if engine.can_open:
                    kind = b.up_to(2)
                    size = None if kind == 0 else b.up_to(150)
                    on_hold = kind == 2 and b.u8() < 128
                    engine.open((PIPE, MESSAGE, FILE)[kind], size=size, flow=b.up_to(2), on_hold=on_hold)
            case 1:
                engine.offer(self.id(engine._opened_out), b.up_to(200))
            case 2:
                transfer = engine._outgoing.get(self.id(engine._opened_out))
                if transfer is not None and transfer.size is None and transfer.cursor == transfer.available:
                    engine.end(transfer.id)
            case 3:
                engine.reset(self.id(engine._opened_out), "cancelled", "")
            case 4:
                self.join()
            case 5:
                if self.lanes:
                    self.lose(self.lanes[b.up_to(len(self.lanes) - 1)])
            case 6:
                if self.lanes:
                    engine.lane_left(self.lanes[b.up_to(len(self.lanes) - 1)])
            case 7:
                if self.asked:
                    engine.answer_same(self.asked.pop(), bool(b.up_to(1)))
            case 8:
                if b.up_to(1):
                    engine.control_lost()
                else:
                    engine.control_resumed()
            case 9:
                self.now += b.u8() / 50
                engine.resend_late(self.now)
            case 10:
                engine.grant(self.id(engine._opened_in), b.number() % 1000)
            case _:
                engine.refuse(self.id(engine._opened_in), "refused", "")

    def send(self) -> None:
        if self.lanes:
            lane = self.lanes[self.bytes.up_to(len(self.lanes) - 1)]
            chunk = self.engine.next_chunk(lane, self.now)
            if chunk is not None:
                self.reading.append((lane, chunk))

    def sent(self) -> None:
        if self.reading:
            self.engine.chunk_left(self.reading.pop(self.bytes.up_to(len(self.reading) - 1))[1])

    def decide(self) -> None:
        """What was offered is taken, taken up again, compared or refused."""
        if not self.parked_open:
            return
        b = self.bytes
        transfer, hold = self.parked_open.pop(b.up_to(len(self.parked_open) - 1))
        incoming = self.engine._incoming.get(transfer)
        choice = b.up_to(5)
        if choice == 0:
            self.engine.refuse(transfer, "refused", "")
        elif hold and choice == 1:
            self.engine.claim(transfer, bytes(32))
        elif hold and choice == 2 and incoming is not None and incoming.size:
            held = ((0, min(10, incoming.size)),)
            if incoming.verdict is None:
                self.written.setdefault(transfer, []).extend(held)
            self.engine.accept(transfer, window=50, held=held)
        else:
            self.engine.accept(transfer, window=None if choice == 3 else 50)

    def step(self) -> None:
        choice = self.bytes.up_to(31)
        if choice < 8:
            self.control()
        elif choice < 14:
            self.data()
        elif choice < 19:
            self.arrived()
        elif choice < 22:
            self.local()
        elif choice < 25:
            self.send()
        elif choice < 27:
            self.sent()
        elif choice < 30:
            self.decide()
        else:
            self.finish()

    def finish(self) -> None:
        if self.answered:
            transfer, same = self.answered.pop()
            if same:
                incoming = self.engine._incoming.get(transfer)
                if incoming is not None and incoming.size is not None:
                    self.written[transfer] = [(0, incoming.size)]
                self.engine.adopted(transfer)
            else:
                self.engine.accept(transfer, window=50)
        elif self.to_finish:
            self.engine.finish(self.to_finish.pop(0))

    def work(self) -> None:
        for event in self.engine.events():
            match event:
                case TransferOffered(opened):
                    assert opened.transfer not in self.offered
                    self.offered.add(opened.transfer)
                    self.parked_open.append((opened.transfer, opened.attributes.get("hold") is True))
                case TransferWhole(transfer, total):
                    assert transfer not in self.whole | self.dropped, "told once"
                    spans = sorted(self.written.get(transfer, []))
                    assert sum(end - start for start, end in spans) == total, "every byte was written"
                    self.whole.add(transfer)
                    self.to_finish.append(transfer)
                case TransferDropped(transfer):
                    assert transfer not in self.dropped, "told once"
                    assert not any(
                        p.transfer == transfer and p.verdict is Verdict.FILL and not self.overtaken(p)
                        for p in self.receiving
                    ), "no lane writes to it"
                    self.dropped.add(transfer)
                    self.to_finish = [other for other in self.to_finish if other != transfer]
                case SourceDrained(transfer):
                    self.engine.end(transfer)
                case TransferDone(transfer):
                    assert transfer not in self.done, "told once"
                    assert not any(chunk.transfer == transfer for _, chunk in self.reading), "no lane reads it"
                    self.done.add(transfer)
                case SameAsked(transfer):
                    self.asked.append(transfer)
                case SameAnswered(transfer, same):
                    self.answered.append((transfer, same))
                case LaneOvertaken(lane):
                    self.lose(lane)
        for said in self.engine.messages(self.now):
            raw = encode(said)
            assert decode(raw[4], raw[5:]) == said, "what it says can be read"

    def overtaken(self, placement: Placement) -> bool:
        incoming = self.engine._incoming.get(placement.transfer)
        return incoming is None or incoming.filling.get(placement.start) is not placement

    def check(self) -> None:
        engine = self.engine
        assert len(engine._incoming) - engine._ending <= _LOCAL.max_open
        assert len(engine._outgoing) <= _PEER.max_open
        for incoming in engine._incoming.values():
            taken = sorted((fill.start, fill.end) for fill in incoming.filling.values())
            assert all(a[1] <= b[0] for a, b in pairwise(taken)), "one lane a place"
            assert not any(incoming.held.overlaps(*span) for span in taken), "what is held is not filled"
            assert incoming.size is None or incoming.held.end <= incoming.size
            assert len(incoming.dropped_copies) <= 64, "what is remembered of copies is bounded"
        for out in engine._outgoing.values():
            assert 0 <= out.cursor <= max(out.available, out.acked.end)
            assert out.size is None or out.acked.end <= out.size
            queued = sum(end - start for start, end in out.lost)
            assert queued <= 3 * out.cursor, "what is to go again is bounded"

    def end(self) -> None:
        """The session is over: lanes are lost, and nothing objects."""
        for lane in list(self.lanes):
            self.lose(lane)
        for placement in list(self.receiving):
            self.lose(placement.lane)
        for item in list(self.reading):
            self.lose(item[0])
        self.engine.delivery()


def engine(data: bytes) -> None:
    """Messages and placements of any kind, in any order."""
    _EngineUnderFire(data).run()


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        message, records, frame, acknowledgement, entry, table, page, journal_file, bench, listener, handshake_server,
        handshake_client, engine,
    )
}  # fmt: skip


# ---- seeds -----------------------------------------------------------------------------------------


_LISTED: Final[tuple[dict[str, Any], ...]] = (
    {"path": b"", "type": "directory", "mode": 0o755, "mtime_ns": 0, "size": 0},
    {"path": b"a", "type": "file", "mode": 0o644, "mtime_ns": -1, "size": 5},
    {"path": b"b", "type": "symlink", "mode": 0o777, "mtime_ns": 1, "size": 0, "target": b"/x"},
    {"path": b"b/c", "kind": "refused", "message": "no"},
)


_PACKED: Final = (
    entries.Entry(b"d/a", entries.EntryType.FILE, 0o644, -1, 5),
    entries.Entry(b"d", entries.EntryType.DIRECTORY, 0o755, 1 << 60),
    entries.Entry(b"e\xff", entries.EntryType.SYMLINK, 0o777, 0, 0, b"../x"),
)


def seeds(vectors: dict[str, Any]) -> dict[str, list[bytes]]:
    """What `corpus` begins with, per target: from the vectors of the wire format, and by hand."""
    raw = [bytes.fromhex(vector["record"]) for vector in vectors["messages"]]
    headers = [bytes.fromhex(vector["header"]) for vector in vectors["headers"]]
    entry_attributes = encode(
        Open(1, FILE, 0, 0, "", {"path": b"a/b", "type": "symlink", "mode": 0o777, "mtime_ns": -1, "target": b"../c"})
    )[5 + struct.calcsize("!QBQQH") :]
    hello, proof = encode(Hello((1,), bytes(32), {"streams": 3, "transports": "tcp"})), encode(Proof(_GOOD))
    resuming = encode(Hello((1,), bytes(32), {"session": bytes(16), "epoch": 9}))
    params = encode(Params(bytes(32), 1, 1, 1, (("tcp", 1, ""),), {"session": bytes(16)}))
    resume = encode(Resume(9, 3, _GOOD))
    records_ = [
        journal.encode_record(journal.Record(offset, 1 << 16, crc)) for offset, crc in ((0, 2), (1 << 16, 3), (5, 4))
    ]
    chance = random.Random(1)
    found = {
        "message": [record[4:] for record in raw],
        "records": [
            b"\xff\x10" + b"".join(raw), b"\0\1" + b"".join(raw[:3]), *(b"\xff\0" + record for record in raw[:4]),
        ],
        "frame": headers,
        "acknowledgement": [
            encode_ack(Ack(()), Credit(())),
            encode_ack(Ack(((1, 5, ((7, 9),)), (2, 0, ()))), Credit(((1, 1 << 40), (2, 7)))),
        ],
        "entry": [b"\0" + entry_attributes, b"a/b", b"../x", b".amst-x", b"/", b"a\0b", "é/\u2028".encode(), b"\xff"],
        "table": [
            b"".join(entries.encode_row(each, each.path) for each in chosen)
            for chosen in (_PACKED, _PACKED[:1], _PACKED[::-1], ())
        ],
        "page": [
            more + b"".join(map(requests.encode_entry, listed))
            for more, listed in (
                (b"\0", _LISTED), (b"\xff", _LISTED), (b"\0", _LISTED[1:]), (b"\0", _LISTED[::-1]), (b"\xff", ()),
            )
        ],
        "journal_file": [
            bytes([3]) + b"".join(records_), bytes([1]) + bytes(200), bytes([2]), bytes([3]) + records_[0][:11],
        ],
        "bench": [
            json.dumps(value).encode()
            for value in (
                {"send": False}, {"ready": True}, {"error": "x"}, {"bytes": 0, "seconds": 1.5}, [], None,
                {"send": True, "size": 5, "seconds": None, "message": 1, "window": 1},
            )
        ],
        "listener": [
            b"", b"\x16", b"\x16\x03\x01\0\5hello", PREAMBLE.pack(PREAMBLE_MAGIC, 1), PREAMBLE.pack(PREAMBLE_MAGIC, 9),
            b"AMSTL", b"AMSTL\2\0\1", b"GET / HTTP/1.1\r\n\r\n",
        ],
        "handshake_server": [hello + proof + params, resuming + proof + resume, hello + encode(Close("", ""))],
        "handshake_client": [b"\0" + hello + proof + params, b"\xff" + hello + proof + resume],
        "engine": [chance.randbytes(1200) for _ in range(24)],
    }  # fmt: skip
    assert set(found) == set(TARGETS)
    return found


def mutated(data: bytes, chance: random.Random) -> bytes:
    """``data`` with a few bytes changed, removed or put in, the same ones for the same ``chance``."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(out))
        match chance.randrange(5):
            case 0:
                out[at : at + 1] = chance.randbytes(1)
            case 1:
                del out[at : at + chance.randint(1, 8)]
            case 2:
                out[at:at] = chance.randbytes(chance.randint(1, 8))
            case 3:
                out[at : at + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
            case _:
                out[at:at] = out[: chance.randint(0, 64)]
    return bytes(out)
