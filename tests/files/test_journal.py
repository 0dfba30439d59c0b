"""The journal of a partial file: what is found again after any cut, any damage, any crash, and in which order."""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from amst_core.files import journal as module
from amst_core.files.journal import (
    HEADER_SIZE,
    MAX_SPAN,
    RECORD_SIZE,
    Fsync,
    Journal,
    Record,
    SourceMark,
    decode_header,
    decode_record,
    encode_header,
    encode_record,
    sift,
)

MARK = SourceMark(b"source", 1 << 20, -5)
RECORDS = [Record(at * 4096, 4096, at * 0x1111) for at in range(6)]

marks = st.builds(
    SourceMark,
    st.binary(min_size=1, max_size=64),
    st.integers(0, (1 << 64) - 1),
    st.integers(-(1 << 63), (1 << 63) - 1),
)


def written(path: Path, records: list[Record], *, mark: SourceMark = MARK) -> Path:
    path.write_bytes(encode_header(mark) + b"".join(map(encode_record, records)))
    return path


def found(path: Path, *, mark: SourceMark = MARK, keep: Callable[[Record], bool] = lambda _: True) -> list[Record]:
    """The records that are found, and left, in the journal."""
    asked: list[Record] = []
    fd = os.open(path, os.O_RDWR)
    try:
        count = sift(fd, mark=mark, keep=lambda record: keep(record) and (asked.append(record) or True))
    finally:
        os.close(fd)
    assert count == len(asked)
    assert path.stat().st_size == HEADER_SIZE + len(asked) * RECORD_SIZE
    return asked


def deadline(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[Journal, int]]]:
    """Makes a journal in `tmp_path` / "journal", and a descriptor of the file it is for."""
    made: list[tuple[Journal, int]] = []

    def make(fsync: Fsync = Fsync.NEVER) -> tuple[Journal, int]:
        fd = os.open(written(tmp_path / "journal", []), os.O_RDWR)
        data_fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT)
        made.append((Journal(fd, shown="f", fsync=fsync), data_fd))
        return made[-1]

    yield make
    for journal, data_fd in made:
        journal.close()
        os.close(data_fd)


# ---- codec -------------------------------------------------------------------------------------


def test_the_layout_is_fixed() -> None:
    record = struct.pack("!QII", 1 << 40, 5, 0xE3069283) + bytes(12)
    assert encode_record(Record(1 << 40, 5, 0xE3069283)) == record + struct.pack("!I", crc32c(record))
    header = b"AMSTJRNL\x01\x06\0\0" + b"source".ljust(64, b"\0") + struct.pack("!Qq", 1 << 20, -5)
    assert encode_header(MARK) == header + struct.pack("!I", crc32c(header))
    assert (HEADER_SIZE, RECORD_SIZE) == (96, 32)


@given(marks)
def test_headers_are_read_back(mark: SourceMark) -> None:
    assert decode_header(encode_header(mark)) == mark


@given(marks, st.integers(0, HEADER_SIZE * 8 - 1))
def test_a_flipped_bit_in_a_header_is_noticed(mark: SourceMark, bit: int) -> None:
    raw = bytearray(encode_header(mark))
    raw[bit // 8] ^= 1 << bit % 8
    assert decode_header(bytes(raw)) is None


@given(st.integers(0, (1 << 63) - 1), st.integers(1, MAX_SPAN), st.integers(0, (1 << 32) - 1))
def test_records_are_read_back_unless_they_pass_the_size(offset: int, length: int, crc: int) -> None:
    raw = encode_record(Record(offset, length, crc))
    assert decode_record(raw, size=offset + length) == Record(offset, length, crc)
    assert decode_record(raw, size=offset + length - 1) is None
    assert decode_record(encode_record(Record(offset, MAX_SPAN + length, crc)), size=1 << 63) is None


@given(st.integers(0, 1 << 40), st.integers(1, MAX_SPAN), st.integers(0, RECORD_SIZE * 8 - 1))
def test_a_flipped_bit_in_a_record_is_noticed(offset: int, length: int, bit: int) -> None:
    raw = bytearray(encode_record(Record(offset, length, 7)))
    raw[bit // 8] ^= 1 << bit % 8
    assert decode_record(bytes(raw), size=1 << 63) is None


@given(st.binary(max_size=HEADER_SIZE + 9))
def test_garbage_is_no_header_and_no_record(raw: bytes) -> None:
    assert decode_header(raw) is None
    assert decode_record(raw, size=1 << 62) is None


def test_a_header_of_another_version_or_without_identity_is_none() -> None:
    for at, value in ((8, 2), (9, 0), (9, 65), (0, 0x42)):
        raw = bytearray(encode_header(MARK)[:-4])
        raw[at] = value
        assert decode_header(bytes(raw) + struct.pack("!I", crc32c(bytes(raw)))) is None


@pytest.mark.parametrize("identity", [b"", b"x" * 65])
def test_a_mark_needs_an_identity(identity: bytes) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        SourceMark(identity, 1, 1)


# ---- reading -------------------------------------------------------------------------------------


def test_a_journal_torn_anywhere_keeps_what_is_whole_and_is_cut_there(tmp_path: Path) -> None:
    path = written(tmp_path / "j", RECORDS)
    whole = path.read_bytes()
    for length in range(HEADER_SIZE, len(whole)):
        path.write_bytes(whole[:length])
        count = (length - HEADER_SIZE) // RECORD_SIZE
        assert found(path) == RECORDS[:count]
        journal = Journal(os.open(path, os.O_RDWR), shown="f", count=count)  # and appending goes on from there
        journal.append(8192, memoryview(b"more"), data_fd=-1)
        journal.close()
        assert found(path) == [*RECORDS[:count], Record(8192, 4, crc32c(b"more"))]


def test_a_journal_torn_in_its_header_is_none(tmp_path: Path) -> None:
    whole = written(tmp_path / "j", RECORDS).read_bytes()
    for length in range(HEADER_SIZE):
        path = tmp_path / "torn"
        path.write_bytes(whole[:length])
        with open(path, "r+b") as file:
            assert sift(file.fileno(), mark=MARK, keep=lambda _: True) is None
        assert path.read_bytes() == whole[:length]


def test_reading_stops_at_a_damaged_record(tmp_path: Path) -> None:
    whole = written(tmp_path / "j", RECORDS).read_bytes()
    for at in range(HEADER_SIZE, len(whole)):
        raw = bytearray(whole)
        raw[at] ^= 0x10
        (tmp_path / "j").write_bytes(raw)
        assert found(tmp_path / "j") == RECORDS[: (at - HEADER_SIZE) // RECORD_SIZE]


@pytest.mark.parametrize(
    "bad",
    [
        Record(0, 0, 0), Record(MARK.size, 1, 0), Record(MARK.size - 1, 2, 0), Record((1 << 64) - 1, 1, 0),
        Record(0, MAX_SPAN + 1, 0), Record(0, (1 << 32) - 1, 0),
    ],
)  # fmt: skip
def test_a_record_of_what_cannot_be_ends_the_journal(tmp_path: Path, bad: Record) -> None:
    assert found(written(tmp_path / "j", [RECORDS[0], bad, RECORDS[1]])) == [RECORDS[0]]


@pytest.mark.parametrize(
    "other", [SourceMark(b"other", 1 << 20, -5), SourceMark(b"source", 9, -5), SourceMark(b"source", 1 << 20, -4)]
)
def test_a_journal_of_another_source_is_left_alone(tmp_path: Path, other: SourceMark) -> None:
    path = written(tmp_path / "j", RECORDS)
    before = path.read_bytes()
    with open(path, "r+b") as file:
        assert sift(file.fileno(), mark=other, keep=lambda _: pytest.fail("asked")) is None
    assert path.read_bytes() == before


def test_only_wanted_records_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    path = written(tmp_path / "j", RECORDS)
    wanted = [RECORDS[1], RECORDS[2], RECORDS[5]]
    assert found(path, keep=wanted.__contains__) == wanted
    assert found(path) == wanted


class Crash(Exception):
    """The process ends here."""


def crash_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``count`` more records be written in place, as a kill between two pages of one write would."""
    real = os.pwrite, os.ftruncate
    left = iter(range(count))

    def pwrite(fd: int, view: memoryview, at: int) -> int:
        for done in range(0, len(view), RECORD_SIZE):
            if next(left, None) is None:
                raise Crash
            real[0](fd, view[done : done + RECORD_SIZE], at + done)
        return len(view)

    def ftruncate(fd: int, size: int) -> None:
        if next(left, None) is None:
            raise Crash
        real[1](fd, size)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "ftruncate", ftruncate)


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_a_crash_while_compacting_loses_no_wanted_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(module, "_BATCH", batch)
    records = [Record(at, 1, at) for at in range(12)]
    wanted = [record for record in records if record.offset % 3]
    for steps in range(100):
        path = written(tmp_path / "j", records)
        with monkeypatch.context() as patch:
            crash_after(steps, patch)
            try:
                found(path, keep=wanted.__contains__)
                break
            except Crash:
                pass
        after = found(path)
        assert set(wanted) <= set(after) <= set(records)
    assert len(wanted) <= steps < 100


def test_being_stopped_leaves_every_record(tmp_path: Path) -> None:
    path = written(tmp_path / "j", RECORDS)

    def stop(record: Record) -> bool:
        if record == RECORDS[3]:
            raise InterruptedError
        return False

    with pytest.raises(InterruptedError):
        found(path, keep=stop)
    assert found(path) == RECORDS


def test_a_long_journal_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(encode_header(MARK) + encode_record(RECORDS[0]) * 60_000)
    fd = os.open(path, os.O_RDWR)
    tracemalloc.start()
    try:
        assert sift(fd, mark=MARK, keep=lambda _: True) == 60_000
        assert tracemalloc.get_traced_memory()[1] < 400_000  # the file has 1.9 MB
    finally:
        tracemalloc.stop()
        os.close(fd)


def test_a_journal_that_claims_to_be_endless_ends_at_its_first_hole(tmp_path: Path) -> None:
    path = written(tmp_path / "j", RECORDS)
    os.truncate(path, 1 << 40)
    assert found(path) == RECORDS


# ---- appending -----------------------------------------------------------------------------------


def test_many_threads_append(opened: Callable[..., tuple[Journal, int]], tmp_path: Path) -> None:
    journal, data_fd = opened()
    with ThreadPoolExecutor(16) as pool:
        for done in [
            pool.submit(journal.append, at, memoryview(b"%d" % at), data_fd=data_fd) for at in range(0, 1000 * 8, 8)
        ]:
            done.result(30)
    assert journal.count == 1000
    assert sorted(found(tmp_path / "journal"), key=lambda record: record.offset) == [
        Record(at, len(b"%d" % at), crc32c(b"%d" % at)) for at in range(0, 1000 * 8, 8)
    ]


@pytest.mark.parametrize("fsync", [Fsync.NEVER, Fsync.END])
def test_a_record_is_one_write_at_once_and_no_sync(
    opened: Callable[..., tuple[Journal, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Fsync
) -> None:
    journal, data_fd = opened(fsync)
    calls: list[int] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(len(data)) or real(fd, data))
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("synced"))
    for number in range(1, 4):
        journal.append(number, memoryview(b"x"), data_fd=data_fd)
        assert len(found(tmp_path / "journal")) == number  # a process killed now has lost nothing
    assert calls == [RECORD_SIZE] * 3


def test_a_crc_that_is_known_is_not_computed(
    opened: Callable[..., tuple[Journal, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, data_fd = opened()
    journal.append(7, memoryview(b"four"), data_fd=data_fd, crc=0x1234)
    monkeypatch.setattr(module, "MAX_SPAN", 4)
    journal.append(100, memoryview(b"01234"), data_fd=data_fd, crc=0x5678)
    assert found(tmp_path / "journal") == [
        Record(7, 4, 0x1234), Record(100, 4, crc32c(b"0123")), Record(104, 1, crc32c(b"4"))
    ]  # fmt: skip


def test_a_long_span_has_several_records(
    opened: Callable[..., tuple[Journal, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SPAN", 4)
    journal, data_fd = opened()
    journal.append(100, memoryview(b"0123456789"), data_fd=data_fd)
    assert found(tmp_path / "journal") == [
        Record(100, 4, crc32c(b"0123")), Record(104, 4, crc32c(b"4567")), Record(108, 2, crc32c(b"89")),
    ]  # fmt: skip
    assert journal.count == 3


def test_always_syncs_bytes_then_writes_then_syncs_the_record(
    opened: Callable[..., tuple[Journal, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, data_fd = opened(Fsync.ALWAYS)
    events: list[str] = []
    real_sync, real_write = os.fdatasync, os.write

    def sync(fd: int) -> None:
        events.append("data" if fd == data_fd else "journal")
        real_sync(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(os, "write", lambda fd, data: events.append("write") or real_write(fd, data))
    journal.append(0, memoryview(b"x"), data_fd=data_fd)
    assert events == ["data", "write", "journal"]


def test_threads_that_come_together_share_their_syncs(
    opened: Callable[..., tuple[Journal, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, data_fd = opened(Fsync.ALWAYS)
    go, syncs = threading.Event(), []
    real = os.fdatasync

    def sync(fd: int) -> None:
        syncs.append(fd)
        assert go.wait(30)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(journal.append, 0, memoryview(b"x"), data_fd=data_fd)
        deadline(lambda: bool(syncs))
        others = [pool.submit(journal.append, at, memoryview(b"x"), data_fd=data_fd) for at in range(1, 9)]
        deadline(lambda: len(journal._next.records) == 8 * RECORD_SIZE)
        assert not any(done.done() for done in (first, *others))
        go.set()
        for done in (first, *others):
            done.result(30)
    assert len(syncs) == 4  # bytes and journal, for the first and for all the others
    assert len(found(tmp_path / "journal")) == 9


def test_bytes_that_cannot_be_synced_fail_every_writer_and_are_not_recorded(
    opened: Callable[..., tuple[Journal, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, data_fd = opened(Fsync.ALWAYS)
    go, real = threading.Event(), os.fdatasync

    def sync(fd: int) -> None:
        assert go.wait(30)
        if fd == data_fd:
            raise OSError(errno.EIO, "sick disk")
        real(fd)

    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(os, "fdatasync", sync)
        waiting = [pool.submit(journal.append, at, memoryview(b"x"), data_fd=data_fd) for at in range(4)]
        deadline(lambda: len(journal._next.records) == 3 * RECORD_SIZE)
        go.set()
        for done in waiting:
            with pytest.raises(OSError) as caught:
                done.result(30)
            assert caught.value.errno == errno.EIO
    assert found(tmp_path / "journal") == []
    journal.append(9, memoryview(b"x"), data_fd=data_fd)
    assert len(found(tmp_path / "journal")) == 1


@pytest.mark.parametrize("fault", ["full", "half", "sync"])
def test_a_journal_that_cannot_be_written_is_given_up_once_and_keeps_what_it_has(
    opened: Callable[..., tuple[Journal, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    journal, data_fd = opened(Fsync.ALWAYS)
    journal.append(0, memoryview(b"x"), data_fd=data_fd)
    real_write, real_sync = os.write, os.fdatasync

    def write(fd: int, data: bytes) -> int:
        if fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(fd, data[:7] if fault == "half" else data)

    def sync(fd: int) -> None:
        if fault == "sync" and fd != data_fd:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_sync(fd)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fdatasync", sync)
    with caplog.at_level(logging.WARNING, "amst.files"):
        for at in range(1, 5):
            journal.append(at, memoryview(b"x"), data_fd=data_fd)
    assert len(caplog.records) == 1
    assert "journal of f" in caplog.text
    assert found(tmp_path / "journal") == [Record(at, 1, crc32c(b"x")) for at in range(2 if fault == "sync" else 1)]
