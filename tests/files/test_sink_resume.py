"""What a broken copy leaves, who may go on with it, and that a file is whole or absent whatever dies when."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import amst_core
from amst_core.errors import AmstError, ClosedError, StorageError
from amst_core.files import partial as partial_module
from amst_core.files import sink as sink_module
from amst_core.files.entries import Entry, EntryType
from amst_core.files.journal import HEADER_SIZE, RECORD_SIZE, Fsync, SourceMark, encode_header
from amst_core.files.partial import PartialPolicy, partial_names
from amst_core.files.root import Root
from amst_core.files.sink import FileSink, Recovered

KIB = 1024
SPAN = 256 * KIB
SIZE = 6 * SPAN
DATA = random.Random(6).randbytes(SIZE)
MTIME_NS = 1_000_000_007
MARK = SourceMark(b"source", SIZE, MTIME_NS)
PART, JOURNAL = (name.decode() for name in partial_names(b"f"))
PACKAGE = Path(amst_core.__path__[0]).parent


def entry(size: int = SIZE, *, mode: int = 0o644) -> Entry:
    return Entry(b"", EntryType.FILE, mode, MTIME_NS, size)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def sink_of(root: Root, *, mark: SourceMark | None = MARK, idle: bool = False, fsync: Fsync = Fsync.NEVER) -> FileSink:
    return root.open_sink(b"f", size=SIZE, source=mark, fsync=fsync, is_idle=lambda: idle)


def put(sink: FileSink, *spans: int, data: bytes = DATA) -> None:
    for number in spans:
        sink.write(number * SPAN, memoryview(data)[number * SPAN : (number + 1) * SPAN])


def span(*numbers: int) -> tuple[tuple[int, int], ...]:
    """The merged spans (start, end) of these chunks."""
    merged: list[tuple[int, int]] = []
    for number in sorted(numbers):
        start, end = number * SPAN, (number + 1) * SPAN
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return tuple(merged)


def leave(top: Path, *spans: int, mark: SourceMark = MARK) -> None:
    """A partial file with these chunks, as a killed process leaves it."""
    with Root(top) as root:
        sink = sink_of(root, mark=mark)
        put(sink, *spans)
        sink.abort(keep=True)
    assert names(top) == sorted({*names(top), PART, JOURNAL})


def held_now(top: Path, *, mark: SourceMark = MARK) -> Recovered:
    """What another try would find; it is left as it is."""
    with Root(top) as root:
        sink = sink_of(root, mark=mark)
        try:
            return sink.recover()
        finally:
            sink.abort(keep=True)


def complete(root: Root, top: Path, *, others: tuple[str, ...] = ()) -> Recovered:
    """Try again to the end, and see that all is well."""
    sink = sink_of(root)
    recovered = sink.recover()
    if recovered.digest == hashlib.sha256(DATA).digest():
        sink.adopt()
    else:
        assert not recovered.digest
        have = {number for number in range(6) if any(s <= number * SPAN < e for s, e in recovered.held)}
        put(sink, *sorted(set(range(6)) - have))
    sink.finish(entry())
    assert (top / "f").read_bytes() == DATA
    assert ((top / "f").stat().st_mode & 0o7777, (top / "f").stat().st_mtime_ns) == (0o644, MTIME_NS)
    assert names(top) == sorted(["f", *others])
    return recovered


def deadline(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# ---- what is left and found again ------------------------------------------------------------------


def test_the_names_follow_from_the_files(top: Path) -> None:
    stem = ".amst-" + hashlib.sha256(b"f").hexdigest()[:32]
    assert (PART, JOURNAL) == (f"{stem}.part", f"{stem}.journal")
    leave(top, 0)
    assert names(top) == sorted([PART, JOURNAL])
    for name in (PART, JOURNAL):
        assert (top / name).stat().st_mode & 0o777 == 0o600


def test_a_kept_part_is_continued_with_what_is_missing(root: Root, top: Path) -> None:
    leave(top, 4, 0, 1)
    assert complete(root, top).held == span(0, 1, 4)


def test_it_is_continued_as_often_as_it_breaks(root: Root, top: Path) -> None:
    leave(top, 0)
    for number in (2, 1, 5):
        sink = sink_of(root)
        sink.recover()
        put(sink, number)
        sink.abort(keep=True)
    assert complete(root, top).held == span(0, 1, 2, 5)


def test_nothing_missing_needs_no_write(root: Root, top: Path) -> None:
    leave(top, *range(6))
    assert complete(root, top).held == ((0, SIZE),)


def test_nothing_is_touched_before_the_first_call(root: Root, top: Path) -> None:
    leave(top, 0)
    before = {name: (top / name).read_bytes() for name in names(top)}
    sink_of(root).abort()
    assert {name: (top / name).read_bytes() for name in names(top)} == before


def test_recover_makes_no_file(root: Root, top: Path) -> None:
    sink = sink_of(root)
    assert sink.recover() == Recovered()
    assert names(top) == []
    sink.abort(keep=True)


def test_without_recover_a_part_is_begun_anew(root: Root, top: Path) -> None:
    leave(top, 0, 1, 2)
    sink = sink_of(root)
    put(sink, 5)
    sink.abort(keep=True)
    assert held_now(top).held == span(5)


def test_without_a_source_nothing_is_recovered_and_nothing_kept(root: Root, top: Path) -> None:
    leave(top, 0)
    sink = sink_of(root, mark=None)
    assert sink.recover() == Recovered()
    put(sink, 1)
    assert names(top) == [PART]
    sink.abort(keep=True)
    assert names(top) == []


@pytest.mark.parametrize(
    "other", [SourceMark(b"other", SIZE, MTIME_NS), SourceMark(b"source", SIZE, MTIME_NS + 1)], ids=["identity", "time"]
)
def test_another_source_is_begun_anew(root: Root, top: Path, other: SourceMark) -> None:
    leave(top, 0, 1, mark=other)
    assert complete(root, top) == Recovered()


def test_another_size_is_begun_anew(root: Root, top: Path) -> None:
    with Root(top) as before:
        sink = before.open_sink(b"f", size=SIZE + 1, source=SourceMark(b"source", SIZE + 1, MTIME_NS))
        put(sink, 0)
        sink.abort(keep=True)
    assert complete(root, top) == Recovered()


def test_a_source_of_another_size_than_announced_is_a_mistake(root: Root) -> None:
    with pytest.raises(ValueError, match="announced"):
        root.open_sink(b"f", size=SIZE, source=SourceMark(b"x", SIZE - 1, 0))


def test_a_small_file_has_no_journal_but_the_same_name(root: Root, top: Path) -> None:
    size = sink_module.JOURNAL_FROM
    sink = root.open_sink(b"f", size=size, source=SourceMark(b"s", size, 0))
    sink.write(0, memoryview(b"x"))
    assert names(top) == [PART]
    with Root(top) as other:  # as after a kill, when the lock is gone: here a copy of what is left
        sink._part.descriptor.close()  # type: ignore[union-attr]
        again = other.open_sink(b"f", size=size, source=SourceMark(b"s", size, 0))
        assert again.recover() == Recovered()
        again.write(3, memoryview(b"y"))
        assert names(top) == [PART]
        assert (top / PART).read_bytes() == b"\0\0\0y"
        again.abort()
    sink.abort()
    assert names(top) == []


def test_a_flipped_bit_costs_its_span_and_no_other(root: Root, top: Path) -> None:
    leave(top, 0, 1, 2, 3)
    with open(top / PART, "r+b") as file:
        file.seek(2 * SPAN + 77)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x20]))
    assert held_now(top).held == span(0, 1, 3)
    assert (top / JOURNAL).stat().st_size == HEADER_SIZE + 3 * RECORD_SIZE
    assert complete(root, top).held == span(0, 1, 3)


def test_a_part_cut_short_has_what_is_before_the_cut(root: Root, top: Path) -> None:
    leave(top, 0, 1, 2, 3)
    os.truncate(top / PART, 2 * SPAN + 5)
    assert complete(root, top).held == span(0, 1)


def test_a_record_ahead_of_its_bytes_is_found_out(root: Root, top: Path) -> None:
    leave(top, 0, 1)
    os.truncate(top / PART, SPAN)
    os.truncate(top / PART, SIZE)  # a hole, as after a power cut
    assert complete(root, top).held == span(0)


def test_a_torn_journal_is_cut_and_gone_on_with(root: Root, top: Path) -> None:
    leave(top, 0, 1, 2)
    os.truncate(top / JOURNAL, HEADER_SIZE + 2 * RECORD_SIZE + 9)
    sink = sink_of(root)
    assert sink.recover().held == span(0, 1)
    put(sink, 5)
    sink.abort(keep=True)
    assert complete(root, top).held == span(0, 1, 5)


def test_a_journal_does_not_grow_by_what_was_written_twice(root: Root, top: Path) -> None:
    leave(top, 0, 1, 0, 0, 1)
    assert held_now(top).held == span(0, 1)
    assert (top / JOURNAL).stat().st_size == HEADER_SIZE + 2 * RECORD_SIZE


def test_a_damaged_header_means_anew(root: Root, top: Path) -> None:
    leave(top, 0)
    with open(top / JOURNAL, "r+b") as file:
        file.write(b"x")
    assert complete(root, top) == Recovered()


def test_a_part_without_journal_and_a_journal_without_part_are_harmless(root: Root, top: Path) -> None:
    leave(top, 0)
    (top / PART).unlink()
    assert complete(root, top) == Recovered()
    (top / "f").unlink()
    leave(top, 0)
    (top / JOURNAL).unlink()
    assert complete(root, top) == Recovered()


def test_a_journal_without_part_says_nothing_about_a_new_part(root: Root, top: Path) -> None:
    leave(top, 0, 1)
    (top / PART).unlink()
    sink = sink_of(root)
    put(sink, 3)
    sink.abort(keep=True)
    assert held_now(top).held == span(3)


def test_what_is_claimed_has_a_limit(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, 0, 2, 4, 1)
    monkeypatch.setattr(sink_module, "MAX_HELD", 2)
    assert complete(root, top).held == span(0, 1, 2)


def test_recover_ends_early_when_the_sink_is_aborted(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, *range(6))
    sink = sink_of(root)
    real, reads = os.preadv, 0

    def read(fd: int, views: list[memoryview], at: int) -> int:
        nonlocal reads
        reads += 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(sink.abort, keep=True).result(30)  # it does not wait for us
        return real(fd, views, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        with pytest.raises(ClosedError):
            sink.recover()
    assert reads == 1
    assert held_now(top).held == ((0, SIZE),)


def test_an_abort_during_recover_can_remove_all(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, *range(6))
    sink = sink_of(root)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: sink.abort() or real(fd, views, at))
    with pytest.raises(ClosedError):
        sink.recover()
    assert names(top) == []


def test_a_span_that_cannot_be_read_is_not_held(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, 0, 1, 2)
    real = os.preadv

    def read(fd: int, views: list[memoryview], at: int) -> int:
        if at == SPAN:
            raise OSError(errno.EIO, "bad sector")
        return real(fd, views, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        assert held_now(top).held == span(0, 2)
    assert complete(root, top).held == span(0, 2)


def test_a_journal_that_cannot_be_cut_means_anew(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, 0, 1)
    real = os.ftruncate

    def cut(fd: int, size: int) -> None:
        if size:
            raise OSError(errno.EIO, "sick disk")
        real(fd, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", cut)
        assert held_now(top) == Recovered()
    assert names(top) == []  # nothing was left to keep
    assert complete(root, top) == Recovered()


def test_a_second_writer_waits_until_the_old_part_is_emptied(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(top, 3)
    sink = sink_of(root)
    real = os.ftruncate
    second: list[threading.Thread] = []

    class Turn:
        """Lets the first writer go on once the second one waits for it."""

        def __init__(self) -> None:
            self.lock, self.wanted = threading.Lock(), threading.Event()

        def acquire(self) -> None:
            if second and threading.current_thread() is second[0]:
                self.wanted.set()
            self.lock.acquire()

        def release(self) -> None:
            self.lock.release()

    turn = Turn()

    def cut(fd: int, size: int) -> None:
        if not second:
            second.append(threading.Thread(target=put, args=(sink, 1)))
            second[0].start()
            assert turn.wanted.wait(30)
        real(fd, size)

    monkeypatch.setattr(sink, "_turn", turn)
    monkeypatch.setattr(os, "ftruncate", cut)
    put(sink, 0)
    second[0].join(30)
    sink.abort(keep=True)
    assert held_now(top).held == span(0, 1)


@pytest.mark.parametrize("first", ["recover", "write"])
def test_a_part_that_cannot_be_emptied_is_not_written_to(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    leave(top, 3, mark=SourceMark(b"other", SIZE, MTIME_NS))

    def fail(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "sick disk")

    sink = sink_of(root)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(StorageError, match="sick disk"):
            if first == "recover":
                sink.recover()
            else:
                put(sink, 0)
    put(sink, 1)
    sink.abort(keep=True)
    assert held_now(top).held == span(1)
    assert (top / PART).stat().st_size == 2 * SPAN


# ---- keeping and removing ---------------------------------------------------------------------------


def test_abort_removes_part_and_journal(root: Root, top: Path) -> None:
    sink = sink_of(root)
    put(sink, 0)
    sink.abort()
    assert names(top) == []


def test_a_journal_without_records_is_not_kept(root: Root, top: Path) -> None:
    sink = sink_of(root)
    sink.write(0, memoryview(b""))
    assert names(top) == sorted([PART, JOURNAL])
    sink.abort(keep=True)
    assert names(top) == []


def test_what_was_held_is_kept_again_without_new_records(top: Path) -> None:
    leave(top, 0)
    assert held_now(top).held == span(0)
    assert held_now(top).held == span(0)


def test_finish_removes_the_journal(root: Root, top: Path) -> None:
    sink = sink_of(root)
    put(sink, *range(6))
    assert JOURNAL in names(top)
    sink.finish(entry())
    assert names(top) == ["f"]


def test_a_failed_finish_leaves_nothing(root: Root, top: Path) -> None:
    sink = sink_of(root)
    put(sink, *range(6))
    (top / "f").mkdir()
    with pytest.raises(AmstError):
        sink.finish(entry())
    assert names(top) == ["f"]


def test_a_part_whose_target_became_a_directory_is_refused_at_finish(root: Root, top: Path) -> None:
    leave(top, *range(6))
    (top / "f").mkdir()
    sink = sink_of(root)
    assert sink.recover().held == ((0, SIZE),)
    with pytest.raises(AmstError, match="cannot finish"):
        sink.finish(entry())
    assert names(top) == ["f"]


@pytest.mark.parametrize("mode", [0o664, 0o666, 0o444, 0o000, 0o755])
def test_every_mode_arrives(root: Root, top: Path, mode: int) -> None:
    sink = sink_of(root)
    put(sink, *range(6))
    sink.finish(entry(mode=mode))
    assert (top / "f").stat().st_mode & 0o7777 == mode


# ---- a whole file that is there already -----------------------------------------------------------------


def whole(top: Path, *, mode: int = 0o600) -> os.stat_result:
    (top / "f").write_bytes(DATA)
    os.chmod(top / "f", mode)
    os.utime(top / "f", ns=(5, MTIME_NS))
    return (top / "f").stat()


def test_a_whole_file_is_told_by_its_digest_and_adopted(root: Root, top: Path) -> None:
    before = whole(top)
    sink = sink_of(root)
    assert sink.recover() == Recovered((), hashlib.sha256(DATA).digest())
    sink.adopt()
    with pytest.raises(ClosedError):
        put(sink, 0)
    sink.finish(entry(mode=0o640))
    sink.finish(entry(mode=0o640))
    after = (top / "f").stat()
    assert (after.st_ino, after.st_mode & 0o7777, after.st_mtime_ns) == (before.st_ino, 0o640, MTIME_NS)
    assert names(top) == ["f"]


def test_a_small_or_empty_file_is_told_too(root: Root, top: Path) -> None:
    for data in (b"", b"small"):
        (top / "f").write_bytes(data)
        os.utime(top / "f", ns=(0, 9))
        sink = root.open_sink(b"f", size=len(data), source=SourceMark(b"s", len(data), 9))
        assert sink.recover().digest == hashlib.sha256(data).digest()
        sink.adopt()
        sink.finish(Entry(b"", EntryType.FILE, 0o600, 9, len(data)))


def test_adopting_removes_what_a_broken_copy_left(root: Root, top: Path) -> None:
    leave(top, 0, mark=SourceMark(b"other", SIZE, MTIME_NS))
    whole(top)
    complete(root, top)
    leave(top, 0)
    (top / PART).unlink()
    complete(root, top)  # a journal alone, as a kill after the rename leaves it


def test_a_whole_file_that_is_not_the_source_is_replaced(root: Root, top: Path) -> None:
    before = whole(top)
    sink = sink_of(root)
    assert sink.recover().digest
    put(sink, *range(6), data=DATA[::-1])  # the sender said that it is not the same
    sink.finish(entry())
    assert (top / "f").stat().st_ino != before.st_ino
    assert (top / "f").read_bytes() == DATA[::-1]
    assert names(top) == ["f"]


def test_aborting_leaves_the_whole_file(root: Root, top: Path) -> None:
    before = whole(top)
    for adopt in (False, True):
        sink = sink_of(root)
        sink.recover()
        if adopt:
            sink.adopt()
        sink.abort()
        with pytest.raises(ClosedError):
            sink.finish(entry())
    assert same_state((top / "f").stat(), before)


def same_state(now: os.stat_result, before: os.stat_result) -> bool:
    return all(getattr(now, name) == getattr(before, name) for name in ("st_ino", "st_mode", "st_mtime_ns", "st_ctime"))


def change_bytes(path: Path) -> None:
    """Only its ctime tells, and that may tick but every 4 ms."""
    before = path.stat().st_ctime_ns

    def change() -> bool:
        with open(path, "r+b") as file:
            file.write(b"changed")
        os.utime(path, ns=(0, MTIME_NS))
        return path.stat().st_ctime_ns != before

    deadline(change)


def replace(path: Path) -> None:
    path.with_name("g").write_bytes(DATA)
    os.utime(path.with_name("g"), ns=(0, MTIME_NS))
    os.rename(path.with_name("g"), path)


@pytest.mark.parametrize("change", [change_bytes, replace, os.unlink])
@pytest.mark.parametrize("when", ["adopt", "finish"])
def test_a_file_that_changed_meanwhile_is_not_adopted(
    root: Root, top: Path, change: Callable[[Path], None], when: str
) -> None:
    whole(top)
    sink = sink_of(root)
    assert sink.recover().digest
    if when == "finish":
        sink.adopt()
    change(top / "f")
    with pytest.raises(StorageError, match="changed while it was compared"):
        if when == "adopt":
            sink.adopt()
        else:
            sink.finish(entry(mode=0o777))
    sink.abort()
    if change is not os.unlink:
        assert (top / "f").stat().st_mode & 0o777 != 0o777


def test_a_file_that_changes_while_it_is_hashed_is_not_told(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(top)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: change_bytes(top / "f") or real(fd, views, at))
    assert sink_of(root).recover() == Recovered()


def test_hashing_ends_early_when_the_sink_is_aborted(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(top)
    sink = sink_of(root)
    reads: list[int] = []
    real = os.preadv

    def read(fd: int, views: list[memoryview], at: int) -> int:
        reads.append(at)
        sink.abort()
        return real(fd, [views[0][:1000]], at)

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(ClosedError):
        sink.recover()
    assert reads == [0]


def test_what_is_no_candidate_is_not_read(
    root: Root, top: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read"))

    def hardlinked() -> None:
        whole(top)
        os.link(top / "f", top / "other")

    def linked() -> None:
        whole(top)
        os.rename(top / "f", top / "g")
        (top / "f").symlink_to("g")

    for make in (
        lambda: (top / "f").write_bytes(DATA),  # another time
        lambda: whole(top) and os.utime(top / "f", ns=(0, MTIME_NS + 1)),
        lambda: whole(top) and (os.truncate(top / "f", SIZE - 1), os.utime(top / "f", ns=(0, MTIME_NS))),
        hardlinked,
        linked,
        lambda: os.mkfifo(top / "f"),
        lambda: (top / "f").mkdir(),
    ):
        make()
        assert sink_of(root).recover() == Recovered()
        if (top / "f").is_dir() and not (top / "f").is_symlink():
            (top / "f").rmdir()
        else:
            (top / "f").unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_somebody_else_is_replaced_not_adopted(root: Root, top: Path) -> None:
    whole(top)
    os.chown(top / "f", 65534, 65534)
    os.utime(top / "f", ns=(0, MTIME_NS))
    assert sink_of(root).recover() == Recovered()


# ---- what is planted -------------------------------------------------------------------------------------


def plant_symlink(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "precious")


def plant_dangling(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "made")


def plant_hardlink(path: Path, outside: Path) -> None:
    path.with_name("victim").write_bytes(b"victim")
    os.link(path.with_name("victim"), path)


def plant_writable(path: Path, outside: Path) -> None:
    path.write_bytes(b"x")
    os.chmod(path, 0o660)


def plant_fifo(path: Path, outside: Path) -> None:
    os.mkfifo(path, 0o600)


def plant_directory(path: Path, outside: Path) -> None:
    path.mkdir()


def plant_foreign(path: Path, outside: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    path.write_bytes(b"x")
    os.chmod(path, 0o600)
    os.chown(path, 65534, 65534)


PLANTS = [
    plant_symlink, plant_dangling, plant_hardlink, plant_writable, plant_fifo, plant_directory, plant_foreign,
]  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", [PART, JOURNAL], ids=["part", "journal"])
@pytest.mark.parametrize("plant", PLANTS)
def test_what_was_planted_is_not_touched(
    root: Root, top: Path, outside: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    leave(top, 0, 1)
    (top / name).unlink()
    if name == JOURNAL:
        (top / PART).unlink()
    plant(top / name, outside)
    before = names(top), os.lstat(top / name)
    assert not root.has_partial(b"f")
    sink = sink_of(root)
    assert sink.recover() == Recovered()
    put(sink, *range(6))
    (part,) = set(names(top)) - set(before[0])
    assert (top / part).stat().st_mode & 0o777 == 0o600
    sink.finish(entry())
    assert (top / "f").read_bytes() == DATA
    os.unlink(top / "f")
    after = names(top), os.lstat(top / name)
    assert after[0] == before[0]
    assert (after[1].st_ino, after[1].st_mode, after[1].st_mtime_ns) == (
        before[1].st_ino, before[1].st_mode, before[1].st_mtime_ns,
    )  # fmt: skip


def test_a_planted_journal_beside_a_part_of_ours(root: Root, top: Path, outside: Path) -> None:
    leave(top, 0)
    (top / JOURNAL).unlink()
    (top / JOURNAL).symlink_to(outside / "precious")
    size = (top / PART).stat().st_size
    sink = sink_of(root)
    assert sink.recover() == Recovered()
    put(sink, *range(6))
    sink.finish(entry())
    assert (top / "f").read_bytes() == DATA
    assert names(top) == sorted(["f", PART, JOURNAL])
    assert (top / PART).stat().st_size == size


# ---- locks ---------------------------------------------------------------------------------------------

OTHER = """
import sys
from amst_core.files.journal import SourceMark
from amst_core.files.root import Root

size, mtime_ns, span = map(int, sys.argv[2:])
data = sys.stdin.buffer.read(size)
sink = Root(sys.argv[1]).open_sink(b"f", size=size, source=SourceMark(b"source", size, mtime_ns))
print(sum(end - start for start, end in sink.recover().held), flush=True)
for at in range(0, size, span):
    sink.write(at, memoryview(data)[at : at + span])
    print(at, flush=True)
    sys.stdin.buffer.read(1)
"""


@contextmanager
def other_process(top: Path, code: str, *arguments: object, **options: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(top), *map(str, arguments)],
        cwd=PACKAGE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **options},
    )  # fmt: skip
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def test_a_part_in_use_by_another_process_is_left_to_it(root: Root, top: Path) -> None:
    with other_process(top, OTHER, SIZE, MTIME_NS, SPAN) as other:
        assert other.stdin and other.stdout
        other.stdin.write(DATA)
        other.stdin.flush()
        assert [other.stdout.readline() for _ in range(2)] == [b"0\n", b"0\n"]
        theirs = (top / PART).read_bytes(), (top / JOURNAL).read_bytes()
        sink = sink_of(root)
        assert sink.recover() == Recovered()
        put(sink, *range(6))
        assert len(names(top)) == 3  # no journal of ours
        sink.abort(keep=True)
        assert names(top) == sorted([PART, JOURNAL])
        complete(root, top, others=(PART, JOURNAL))
        assert ((top / PART).read_bytes(), (top / JOURNAL).read_bytes()) == theirs
        os.unlink(top / "f")
        other.kill()
        other.wait(30)
    assert complete(root, top).held == span(0)  # the lock went with it


def test_a_part_in_use_below_another_root_is_left_to_it(root: Root, top: Path) -> None:
    with Root(top) as other:
        sink = sink_of(other, idle=True)  # another root does not know
        put(sink, 0)
        complete(root, top, others=(PART, JOURNAL))
        put(sink, *range(6))
        sink.finish(entry())
    assert names(top) == ["f"]


def test_a_file_system_without_locks_works_without_resuming(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    sink = sink_of(root)
    put(sink, 0)
    assert PART not in names(top)
    assert len(names(top)) == 1
    sink.abort(keep=True)
    assert names(top) == []
    assert complete(root, top) == Recovered()


def test_a_part_that_got_its_final_name_before_the_lock_is_not_written_to(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(top, *range(6))
    real, done = fcntl.flock, []

    def lock(fd: int, how: int) -> None:
        if not done:  # its owner is quicker: finishes, and ends
            done.append(fd)
            os.rename(top / PART, top / "f")
            os.unlink(top / JOURNAL)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    inode = (top / PART).stat().st_ino
    sink = sink_of(root)
    put(sink, 0, data=DATA[::-1])
    assert (top / "f").stat().st_ino == inode != (top / PART).stat().st_ino
    assert (top / "f").read_bytes() == DATA
    sink.abort()


def test_a_part_that_was_removed_before_the_lock_is_made_again(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(top, 0)
    real, done = fcntl.flock, []

    def lock(fd: int, how: int) -> None:
        if not done:
            done.append(fd)
            os.unlink(top / PART)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    sink = sink_of(root)
    put(sink, 1)
    assert PART in names(top)
    sink.abort(keep=True)
    assert held_now(top).held == span(1)


def test_a_part_that_changes_hands_all_the_time_counts_as_in_use(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: os.unlink(top / PART) or real(fd, how))
    sink = sink_of(root)
    put(sink, 0)
    assert PART not in names(top)
    sink.abort()
    assert names(top) == []


def test_the_lock_is_held_until_the_file_has_its_name(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = sink_of(root)
    put(sink, *range(6))
    real, tried = os.rename, []

    def rename(*arguments: str, **options: int) -> None:
        for _ in "before", "after":
            with open(top / PART if not tried else top / "f", "rb") as file:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not tried:
                real(*arguments, **options)
            tried.append(1)

    monkeypatch.setattr(os, "rename", rename)
    sink.finish(entry())
    assert len(tried) == 2
    with open(top / "f", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_journal_begun_by_the_next_copy_is_not_removed_by_the_last(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = sink_of(root)
    put(sink, *range(6))
    real, made = os.rename, []

    def rename(*arguments: str, **options: int) -> None:
        real(*arguments, **options)
        if not made:  # at this very moment another process copies the file again
            made.append(1)
            os.unlink(top / JOURNAL)
            (top / JOURNAL).write_bytes(encode_header(MARK))
            os.chmod(top / JOURNAL, 0o600)

    monkeypatch.setattr(os, "rename", rename)
    sink.finish(entry())
    assert names(top) == sorted(["f", JOURNAL])


# ---- another session takes over -------------------------------------------------------------------------


def test_an_idle_sink_gives_way_and_is_over(root: Root, top: Path) -> None:
    old = sink_of(root, idle=True)
    put(old, 0, 1)
    new = sink_of(root)
    assert new.recover().held == span(0, 1)
    for call in (lambda: put(old, 2), lambda: old.finish(entry()), old.recover, old.adopt):
        with pytest.raises(ClosedError, match="another session continues this file: f"):
            call()
    old.abort()  # touches nothing any more
    put(new, 2, 3, 4, 5)
    assert names(top) == sorted([PART, JOURNAL])
    new.finish(entry())
    old.abort(keep=True)
    assert names(top) == ["f"]
    assert (top / "f").read_bytes() == DATA


def test_a_busy_sink_is_not_disturbed(root: Root, top: Path) -> None:
    old = sink_of(root)
    put(old, 0, 1)
    complete(root, top, others=(PART, JOURNAL))
    put(old, 2, 3, 4, 5)
    old.finish(entry())
    assert names(top) == ["f"]


def test_a_sink_that_nobody_asked_about_counts_as_busy(root: Root, top: Path) -> None:
    old = root.open_sink(b"f", size=SIZE, source=MARK)
    put(old, 0)
    complete(root, top, others=(PART, JOURNAL))
    old.abort()


def test_giving_way_does_not_need_recover(root: Root, top: Path) -> None:
    old = sink_of(root, idle=True)
    put(old, 0)
    new = sink_of(root)
    put(new, 1)
    assert names(top) == sorted([PART, JOURNAL])
    new.abort(keep=True)
    assert held_now(top).held == span(1)


def test_files_in_different_directories_are_different(root: Root, top: Path) -> None:
    sinks = [root.open_sink(path, size=SIZE, source=MARK, is_idle=lambda: True) for path in (b"a/f", b"b/f")]
    for sink in sinks:
        put(sink, 0)
    for sink in sinks:
        put(sink, *range(6))
        sink.finish(entry())
    assert (names(top / "a"), names(top / "b")) == (["f"], ["f"])


@contextmanager
def stuck_write(sink: FileSink, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A thread that hangs in writing this chunk until the event is set."""
    inside, leave = threading.Event(), threading.Event()
    real = os.pwrite

    def write(fd: int, view: memoryview, at: int) -> int:
        if threading.current_thread() is thread:
            inside.set()
            assert leave.wait(30)
        return real(fd, view, at)

    thread = threading.Thread(target=put, args=(sink, number))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write)
        thread.start()
        assert inside.wait(30)
        try:
            yield leave
        finally:
            leave.set()
            thread.join(30)


def test_writes_in_progress_are_waited_for_and_count(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = sink_of(root, idle=True), sink_of(root)
    put(old, 0)
    with stuck_write(old, 1, monkeypatch) as leave, ThreadPoolExecutor(1) as pool:
        recovering = pool.submit(new.recover)
        deadline(lambda: old._state is sink_module._State.SUPERSEDED)
        assert not recovering.done()
        leave.set()
        assert recovering.result(30).held == span(0, 1)
    new.abort()
    assert names(top) == []


def test_a_write_that_hangs_is_not_waited_for_for_ever(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink_module, "GIVE_WAY_S", 0.01)
    old = sink_of(root, idle=True)
    put(old, 0)
    with stuck_write(old, 1, monkeypatch):
        complete(root, top, others=(PART, JOURNAL))
        with pytest.raises(ClosedError):
            put(old, 2)
    os.unlink(top / "f")
    assert complete(root, top).held == span(0, 1)


def test_a_sink_that_recovers_gives_way_at_once(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, *range(6))
    old, new = sink_of(root, idle=True), sink_of(root)
    real, found = os.preadv, []

    def read(fd: int, views: list[memoryview], at: int) -> int:
        if threading.current_thread() is not threading.main_thread() or found:
            return real(fd, views, at)
        found.append(pool.submit(new.recover))
        deadline(lambda: old._state is sink_module._State.SUPERSEDED)
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", read)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ClosedError, match="another session"):
            old.recover()
        assert found[0].result(30).held == ((0, SIZE),)
    new.abort()


def test_the_same_session_can_try_again_while_a_write_is_in_progress(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = sink_of(root), sink_of(root)
    put(old, 0)
    with stuck_write(old, 1, monkeypatch) as leave, ThreadPoolExecutor(1) as pool:
        old.abort(keep=True)  # does not wait
        recovering = pool.submit(new.recover)
        leave.set()
        assert recovering.result(30).held == span(0, 1)
    new.abort()


def test_many_that_want_one_file_get_in_each_others_way_in_no_way(root: Root, top: Path) -> None:
    def copy(_: int) -> None:
        sink = sink_of(root, idle=True)
        try:
            held = sink.recover()
            if held.digest:
                sink.adopt()
            else:
                put(sink, *(n for n in range(6) if not any(s <= n * SPAN < e for s, e in held.held)))
            sink.finish(entry())
        except (ClosedError, StorageError):
            sink.abort(keep=True)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, range(64)))
    complete(root, top)


# ---- the disk ---------------------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_made_is_gone_without(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == JOURNAL.encode():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING, "amst.files"):
        complete(root, top)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("short", [False, True])
def test_a_header_that_cannot_be_written_leaves_no_journal(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, short: bool
) -> None:
    def write(fd: int, data: bytes) -> int:
        if short:
            return os.pwrite(fd, data[:9], 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    sink = sink_of(root)
    with caplog.at_level(logging.WARNING, "amst.files"):
        put(sink, *range(6))
    assert names(top) == [PART]
    assert len(caplog.records) == 1
    sink.finish(entry())
    assert (top / "f").read_bytes() == DATA


def test_a_journal_that_is_full_fails_nothing_and_keeps_what_it_has(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = sink_of(root)
    put(sink, 0, 1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "amst.files"):

        def full(fd: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", full)
        put(sink, 2, 3)
    assert len(caplog.records) == 1
    put(sink, 4)
    sink.abort(keep=True)
    assert complete(root, top).held == span(0, 1)


def test_bytes_that_could_not_be_written_are_not_recorded(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = sink_of(root)
    put(sink, 0)
    real = os.pwrite

    def half(fd: int, view: memoryview, at: int) -> int:
        if at % SPAN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, view[:1000], at)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(StorageError):
        put(sink, 1)
    assert (top / JOURNAL).stat().st_size == HEADER_SIZE + RECORD_SIZE
    sink.abort()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * SPAN + 64 * KIB}", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode()}")
    try:
        with Root(small) as root:
            sink = sink_of(root)
            with pytest.raises(StorageError, match="cannot write f"):
                put(sink, *range(6))
            sink.abort(keep=True)
            subprocess.run(["mount", "-o", f"remount,size={2 * SIZE}", small], check=True)
            assert complete(root, small).held == span(0, 1, 2, 3)
    finally:
        subprocess.run(["umount", small], check=True)


def traced(monkeypatch: pytest.MonkeyPatch, top: Path) -> list[str]:
    """What is forced to the disk, and when files get their names."""
    events: list[str] = []

    def note(name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(fd: int, *arguments: object, **options: int) -> None:
            if name == "rename":
                events.append("rename")
            else:
                status = os.fstat(fd)
                kind = "directory" if stat.S_ISDIR(status.st_mode) else "journal"
                same = [n for n in (PART, "f") if (top / n).exists() and os.path.samestat((top / n).stat(), status)]
                events.append(f"{name} {same[0] if same else kind}".replace(PART, "part"))
            real(fd, *arguments, **options)

        return call

    for name in ("fsync", "fdatasync", "rename"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    return events


@pytest.mark.parametrize("mode", [0o644, 0o664])
def test_what_is_forced_to_the_disk(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    events = traced(monkeypatch, top)
    for fsync, expected in (
        (Fsync.NEVER, ["rename"]),
        (Fsync.END, ["fsync part", "rename", "fsync f", "fsync directory"]),
        (
            Fsync.ALWAYS,
            [
                "fsync directory", *["fdatasync part", "fdatasync journal"] * 6,
                "fsync part", "rename", "fsync f", "fsync directory",
            ],
        ),
    ):  # fmt: skip
        sink = sink_of(root, fsync=fsync)
        put(sink, *range(6))
        sink.finish(entry(mode=mode))
        assert events == expected
        events.clear()
        os.unlink(top / "f")


def test_an_adopted_file_is_forced_to_the_disk(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(top)
    events = traced(monkeypatch, top)
    sink = sink_of(root, fsync=Fsync.END)
    sink.recover()
    sink.adopt()
    sink.finish(entry())
    assert events == ["fsync f", "fsync directory"]


@pytest.mark.parametrize("failing", ["part", "directory"])
def test_a_sync_that_fails_is_an_error_and_leaves_no_part(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    real = os.fsync

    def sync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (failing == "directory"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    sink = sink_of(root, fsync=Fsync.END)
    put(sink, *range(6))
    with pytest.raises(StorageError, match="cannot finish f"):
        sink.finish(entry())
    sink.abort()
    assert names(top) == ([] if failing == "part" else ["f"])


# ---- kill -9 ------------------------------------------------------------------------------------------------

COPY = """
import os, random, signal, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from amst_core.files.entries import Entry, EntryType
from amst_core.files.journal import Fsync, SourceMark
from amst_core.files.root import Root

size, mtime_ns, span, seed, fsync = *map(int, sys.argv[2:6]), Fsync(sys.argv[6])
chance = random.Random(seed)
data = sys.stdin.buffer.read()
sink = Root(sys.argv[1]).open_sink(b"f", size=size, source=SourceMark(b"source", size, mtime_ns), fsync=fsync)
held = sink.recover().held
delay = chance.uniform(0, 0.02)
threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()
missing = [at for at in range(0, size, span) if not any(start <= at < end for start, end in held)]
chance.shuffle(missing)
with ThreadPoolExecutor(3) as pool:
    list(pool.map(lambda at: sink.write(at, memoryview(data)[at : at + span]), missing))
sink.finish(Entry(b"", EntryType.FILE, 0o644, mtime_ns, size))
"""


@pytest.mark.parametrize("fsync", [Fsync.NEVER, Fsync.ALWAYS])
def test_kill_9_at_any_moment_loses_nothing_that_was_recorded(root: Root, top: Path, fsync: Fsync) -> None:
    small = 4 * KIB
    done = 0
    for seed in range(8):
        with other_process(top, COPY, SIZE, MTIME_NS, small, seed, fsync) as process:
            process.communicate(DATA, timeout=60)
        assert process.returncode in (-signal.SIGKILL, 0)
        if (top / "f").exists():
            assert (top / "f").read_bytes() == DATA
            break
        if not (top / JOURNAL).exists() or (top / JOURNAL).stat().st_size < HEADER_SIZE:
            assert not done
            continue
        records = ((top / JOURNAL).stat().st_size - HEADER_SIZE) // RECORD_SIZE
        held = sum(end - start for start, end in held_now(top).held)
        assert held == records * small >= done
        done = held
    sink = sink_of(root)
    found = sink.recover()
    if found.digest:
        sink.adopt()
    else:
        for at in range(0, SIZE, small):
            if not any(start <= at < end for start, end in found.held):
                sink.write(at, memoryview(DATA)[at : at + small])
    sink.finish(entry())
    assert (top / "f").read_bytes() == DATA
    assert names(top) == ["f"]


FINISH = """
import os, sys
from amst_core.files.entries import Entry, EntryType
from amst_core.files.journal import Fsync, SourceMark
from amst_core.files.root import Root

size, mtime_ns, mode, steps, fsync = *map(int, sys.argv[2:6]), Fsync(sys.argv[6])
data = sys.stdin.buffer.read()
sink = Root(sys.argv[1]).open_sink(b"f", size=size, source=SourceMark(b"source", size, mtime_ns), fsync=fsync)
sink.write(0, memoryview(data))

def dying(real):
    def call(*arguments, **options):
        global steps
        if not steps:
            os._exit(9)
        steps -= 1
        return real(*arguments, **options)
    return call

for name in ("ftruncate", "fchmod", "utime", "fsync", "dup", "close", "rename", "unlink", "open", "stat"):
    setattr(os, name, dying(getattr(os, name)))
sink.finish(Entry(b"", EntryType.FILE, mode, mtime_ns, size))
print(steps)
os._exit(0)
"""


@pytest.mark.parametrize(("mode", "fsync"), [(0o644, Fsync.NEVER), (0o664, Fsync.END), (0o444, Fsync.NEVER)])
def test_a_process_that_dies_at_any_step_of_finish(root: Root, top: Path, mode: int, fsync: Fsync) -> None:
    outcomes = []
    for steps in range(30):
        with other_process(top, FINISH, SIZE, MTIME_NS, mode, steps, fsync) as process:
            process.communicate(DATA, timeout=60)
        if (top / "f").exists():
            assert (top / "f").read_bytes() == DATA  # never partial under its name
            assert (top / "f").stat().st_mtime_ns == MTIME_NS
        sink = sink_of(root)
        found = sink.recover()
        outcomes.append("resumed" if found.held else "finished")
        if (top / "f").exists():
            assert found.digest == hashlib.sha256(DATA).digest()
            sink.adopt()
        else:
            assert found.held == ((0, SIZE),)
        sink.finish(entry(mode=mode))
        assert names(top) == ["f"]
        assert (top / "f").read_bytes() == DATA
        assert (top / "f").stat().st_mode & 0o7777 == mode
        os.unlink(top / "f")
        if process.returncode == 0:
            break
        assert process.returncode == 9
    else:
        pytest.fail("it never finished")
    # from some step on the file is finished: what comes after leaves no more than a journal
    assert outcomes == sorted(outcomes, reverse=True)
    assert outcomes.count("resumed") >= 5
    assert outcomes.count("finished") >= 3


# ---- leftovers ------------------------------------------------------------------------------------------------


def at(top: Path, *, later_s: float, keep_s: float = 7200.0) -> Root:
    return Root(top, partials=PartialPolicy(keep_s=keep_s, now=lambda: time.time() + later_s))


def touch_directory(root: Root) -> None:
    """The first sink that makes something in the directory of a root."""
    sink = root.open_sink(b"new", size=1)
    sink.write(0, memoryview(b"x"))
    sink.abort()


def test_old_leftovers_are_removed_by_kind(top: Path) -> None:
    leave(top, 0)
    alone, orphan, odd = (name.decode() for name in (*partial_names(b"g"), partial_module.temporary_name()))
    for name in (alone, odd):
        (top / name).write_bytes(b"x")
    orphan = partial_names(b"h")[1].decode()
    (top / orphan).write_bytes(b"x")
    everything = sorted([PART, JOURNAL, alone, odd, orphan])
    for name in everything:
        os.utime(top / name, ns=(0, 0))  # modification times say nothing: finishing a file sets them
    for later_s, left in (
        (3500.0, everything),
        (3700.0, sorted([PART, JOURNAL])),
        (7100.0, sorted([PART, JOURNAL])),
        (7300.0, []),
    ):
        with at(top, later_s=later_s) as root:
            touch_directory(root)
        assert names(top) == left


def test_a_resumable_part_is_as_old_as_the_younger_of_the_two(top: Path) -> None:
    leave(top, 0)
    real = partial_module.look

    def look(name: bytes, *, dir_fd: int) -> os.stat_result | None:
        status = real(name, dir_fd=dir_fd)
        if status is None or name != PART.encode():
            return status
        return os.stat_result((*status[:10], *([0] * 6), {"st_ctime": 0.0}))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, at(top, later_s=100.0) as root:
        patch.setattr(partial_module, "look", look)
        touch_directory(root)
    assert names(top) == sorted([PART, JOURNAL])


def test_leftovers_in_use_or_not_ours_stay(top: Path, outside: Path) -> None:
    with Root(top) as live:
        sink = sink_of(live)
        put(sink, 0)
        planted = [partial_names(b"%d" % number)[number % 2].decode() for number in range(4)]
        for name in planted[:2]:
            (top / name).symlink_to(outside / "precious")
        for name in planted[2:]:
            (top / name).write_bytes(b"x")
            os.chmod(top / name, 0o666)
        others = [".amst-dir", ".amst-0123.other", ".amst-xyz.part", "a.part", ".amst", ".amst-00.partial"]
        for name in others:
            (top / name).write_bytes(b"x")
        before = names(top)
        with at(top, later_s=1e9) as root:
            touch_directory(root)
        assert names(top) == before
        sink.abort()


def test_a_directory_is_listed_once(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[int] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda fd: listed.append(fd) or real(fd))
    with Root(top) as root:
        for number in range(20):
            sink = root.open_sink(b"%d/f" % (number % 2), size=1)
            sink.write(0, memoryview(b"x"))
            sink.finish(entry(1))
    assert len(listed) == 2


def test_what_is_remembered_of_directories_has_a_limit(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "_SWEPT_MAX", 3)
    with Root(top) as root:
        for number in range(10):
            root.open_sink(b"%d/f" % number, size=0).finish(entry(0))
        assert len(root._partials._swept) <= 3


def test_a_directory_that_cannot_be_listed_fails_no_copy(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "scandir", refuse)
    complete(root, top)


def test_a_leftover_that_was_taken_up_meanwhile_stays(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(top, 0)
    real = fcntl.flock

    def lock(fd: int, how: int) -> None:
        if os.path.samestat(os.fstat(fd), (top / PART).stat()):
            clock.append(0.0)  # its owner had come back just before, and has ended again
        real(fd, how)

    clock = [1e9]
    monkeypatch.setattr(fcntl, "flock", lock)
    with Root(top, partials=PartialPolicy(now=lambda: time.time() + clock[-1])) as root:
        touch_directory(root)
    assert clock == [1e9, 0.0]
    assert names(top) == sorted([PART, JOURNAL])


# ---- asking for partial files -----------------------------------------------------------------------------------


def test_has_partial(root: Root, top: Path) -> None:
    assert not root.has_partial(b"f")
    assert not root.has_partial(b"no/where")
    leave(top, 0)
    assert root.has_partial(b"f")
    assert not root.has_partial(b"g")
    (top / JOURNAL).unlink()
    assert not root.has_partial(b"f")
