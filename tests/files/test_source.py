from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amst_core.errors import (
    BusyError,
    CancelledError,
    ClosedError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    StorageError,
)
from amst_core.files.root import Root
from amst_core.files.source import MIN_HOLE, PIECE, Descriptor
from amst_core.wire.messages import MAX_HOLES


def test_reads_any_span(root: Root, top: Path) -> None:
    (top / "f").write_bytes(bytes(range(256)) * 16)
    os.chmod(top / "f", 0o640)
    os.utime(top / "f", ns=(0, -1_500_000_001))
    with root.open_source(b"f") as source:
        assert (source.size, source.mode, source.mtime_ns) == (4096, 0o640, -1_500_000_001)
        buffer = bytearray(6)
        source.read_into(254, memoryview(buffer))
        assert bytes(buffer) == b"\xfe\xff\x00\x01\x02\x03"
        source.verify()


def test_an_empty_file_is_a_source(root: Root, top: Path) -> None:
    (top / "f").touch()
    with root.open_source(b"f") as source:
        assert source.size == 0
        source.read_into(0, memoryview(b"").cast("B"))
        source.verify()


def test_concurrent_reads_agree(root: Root, top: Path) -> None:
    data = os.urandom(1 << 20)
    (top / "f").write_bytes(data)
    span = 4096
    with root.open_source(b"f") as source, ThreadPoolExecutor(8) as pool:

        def read(at: int) -> bytes:
            buffer = bytearray(span)
            source.read_into(at, memoryview(buffer))
            return bytes(buffer)

        assert b"".join(pool.map(read, range(0, len(data), span))) == data


def test_short_reads_are_continued(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "f").write_bytes(b"0123456789")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:3]], at))
    with root.open_source(b"f") as source:
        buffer = bytearray(8)
        source.read_into(1, memoryview(buffer))
        assert bytes(buffer) == b"12345678"


def test_a_file_that_shrinks_is_reported(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x" * 100)
    with root.open_source(b"f") as source:
        os.truncate(top / "f", 50)
        with pytest.raises(SourceChangedError) as caught:
            source.read_into(0, memoryview(bytearray(100)))
        assert caught.value.path == "f"
        assert caught.value.retryable
        with pytest.raises(SourceChangedError):
            source.verify()


def test_a_write_of_the_same_length_is_noticed_by_its_time(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x" * 100)
    os.utime(top / "f", ns=(0, 1000))
    with root.open_source(b"f") as source:
        with open(top / "f", "r+b") as file:
            file.write(b"y")
        with pytest.raises(SourceChangedError):
            source.verify()


def test_a_growing_file_is_noticed_by_its_size(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x")
    os.utime(top / "f", ns=(0, 1000))
    with root.open_source(b"f") as source:
        with open(top / "f", "ab") as file:
            file.write(b"y")
        os.utime(top / "f", ns=(0, 1000))
        with pytest.raises(SourceChangedError):
            source.verify()


def test_a_replaced_file_is_still_the_old_one(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"old")
    with root.open_source(b"f") as source:
        (top / "g").write_bytes(b"new")
        os.rename(top / "g", top / "f")
        buffer = bytearray(3)
        source.read_into(0, memoryview(buffer))
        source.verify()
        assert bytes(buffer) == b"old"


# ---- identity and digest ---------------------------------------------------------------------


def identity(root: Root, path: bytes = b"f") -> bytes:
    with root.open_source(path) as source:
        return source.identity


def until_it_differs(root: Root, change: Callable[[], object]) -> None:
    """Change the file, over again while the file system's clock has not ticked, until its identity is another."""
    before, end = identity(root), time.monotonic() + 30
    while identity(root) == before:
        assert time.monotonic() < end
        change()


def test_an_unchanged_file_keeps_its_identity(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x")
    before = identity(root)
    assert len(before) == 32
    (top / "f").read_bytes()
    assert identity(root) == before


def test_a_write_gives_another_identity_even_when_size_and_time_are_set_back(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x")
    os.utime(top / "f", ns=(0, 1000))

    def write() -> None:
        (top / "f").write_bytes(b"y")
        os.utime(top / "f", ns=(0, 1000))

    until_it_differs(root, write)
    assert ((top / "f").stat().st_size, (top / "f").stat().st_mtime_ns) == (1, 1000)


def test_two_files_have_two_identities(root: Root, top: Path) -> None:
    for name in ("f", "g"):
        (top / name).write_bytes(b"x")
    assert identity(root, b"f") != identity(root, b"g")


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, 2 * PIECE + 77])
def test_the_digest_is_that_of_the_content(root: Root, top: Path, size: int) -> None:
    data = os.urandom(size)
    (top / "f").write_bytes(data)
    with root.open_source(b"f") as source:
        assert source.digest() == hashlib.sha256(data).digest()


def test_digest_continues_short_reads(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "f").write_bytes(b"0123456789")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:3]], at))
    with root.open_source(b"f") as source:
        assert source.digest() == hashlib.sha256(b"0123456789").digest()


@pytest.mark.parametrize("change", ["shrink", "grow", "write"])
def test_the_digest_of_a_file_that_changes_is_refused(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    (top / "f").write_bytes(b"x" * 100)
    os.utime(top / "f", ns=(0, 1000))
    real = os.preadv

    def read(fd: int, views: list[memoryview], at: int) -> int:
        if change == "write":
            (top / "f").write_bytes(b"y" * 100)
        else:
            os.truncate(top / "f", 50 if change == "shrink" else 150)
            os.utime(top / "f", ns=(0, 1000))
        return real(fd, views, at)

    monkeypatch.setattr(os, "preadv", read)
    with root.open_source(b"f") as source, pytest.raises(SourceChangedError, match="f changed"):
        source.digest()


def test_a_digest_can_be_cancelled(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "f").write_bytes(b"x" * 100)
    reads: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: reads.append(at) or real(fd, [views[0][:10]], at))
    with root.open_source(b"f") as source, pytest.raises(CancelledError):
        source.digest(lambda: len(reads) == 3)
    assert len(reads) == 3


def test_a_digest_that_cannot_be_read_says_so(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "f").write_bytes(b"x")

    def fail(*_: object) -> int:
        raise OSError(5, "sick disk")

    monkeypatch.setattr(os, "preadv", fail)
    with root.open_source(b"f") as source, pytest.raises(StorageError, match="cannot read f: sick disk"):
        source.digest()


# ---- the end ---------------------------------------------------------------------------------


def test_close_is_idempotent_and_final(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x")
    source = root.open_source(b"f")
    source.close()
    source.close()
    with pytest.raises(ClosedError):
        source.read_into(0, memoryview(bytearray(1)))
    with pytest.raises(ClosedError):
        source.verify()


def test_a_read_error_is_mapped(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"x")
    with root.open_source(b"f") as source, pytest.raises(StorageError, match="cannot read f"):
        source.read_into(-5, memoryview(bytearray(1)))


def test_the_number_is_kept_while_somebody_reads() -> None:
    descriptor = Descriptor(os.open("/dev/zero", os.O_RDONLY), shown="zero")
    inside, leave = threading.Event(), threading.Event()
    held: list[int] = []

    def use() -> None:
        with descriptor as fd:
            inside.set()
            leave.wait(10)
            held.append(fd)
            os.read(fd, 1)

    thread = threading.Thread(target=use)
    thread.start()
    assert inside.wait(10)
    with pytest.raises(BusyError):
        descriptor.take()
    descriptor.close()
    with pytest.raises(ClosedError), descriptor:
        pass
    with pytest.raises(ClosedError):
        descriptor.take()
    other = os.open("/dev/null", os.O_RDONLY)
    leave.set()
    thread.join(10)
    try:
        assert held
        assert other not in held
        with pytest.raises(OSError):
            os.fstat(held[0])
    finally:
        os.close(other)


def test_whoever_leaves_last_says_that_the_number_was_given_back() -> None:
    said: list[bool] = []

    def is_free(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return True
        return False

    fd = os.open("/dev/null", os.O_RDONLY)
    descriptor = Descriptor(fd, shown="null", on_closed=lambda: said.append(is_free(fd)))
    with descriptor:
        descriptor.close()
        assert said == []
    assert said == [True]
    descriptor.close()
    assert said == [True]


@pytest.mark.parametrize("name", [b"link", b"dangling", b"dirlink"])
def test_a_link_is_no_source(root: Root, top: Path, outside: Path, name: bytes) -> None:
    (top / "link").symlink_to(outside / "precious")
    (top / "dangling").symlink_to("nowhere")
    (top / "dirlink").symlink_to(outside)
    with pytest.raises(RefusedError, match="symlink"):
        root.open_source(name)


def test_a_link_on_the_way_is_refused_by_name(root: Root, top: Path, outside: Path) -> None:
    (top / "d").mkdir()
    (top / "d" / "l").symlink_to(outside)
    with pytest.raises(RefusedError, match="d/l is a symbolic link"):
        root.open_source(b"d/l/precious")


def test_a_link_that_stays_inside_is_refused_too(root: Root, top: Path) -> None:
    (top / "d").mkdir()
    (top / "d" / "f").write_bytes(b"x")
    (top / "l").symlink_to("d")
    with pytest.raises(RefusedError, match="l is a symbolic link"):
        root.open_source(b"l/f")


def test_missing_and_wrong_sources(root: Root, top: Path) -> None:
    (top / "d").mkdir()
    (top / "f").touch()
    with pytest.raises(NotFoundError):
        root.open_source(b"nowhere")
    with pytest.raises(NotFoundError):
        root.open_source(b"no/where")
    with pytest.raises(RefusedError, match="directory"):
        root.open_source(b"d")
    with pytest.raises(RefusedError, match="f is not a directory"):
        root.open_source(b"f/x")
    with pytest.raises(RefusedError, match="root itself"):
        root.open_source(b"")


def test_a_special_file_is_not_even_opened(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(top)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        with pytest.raises(RefusedError, match="socket"):
            root.open_source(b"s")


@pytest.mark.timeout(20)
def test_a_fifo_neither_hangs_nor_opens(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(top / "p")
    with pytest.raises(RefusedError, match="FIFO"):
        root.open_source(b"p")
    # Swapped in after the look: what stat() answered was still a file.
    (top / "f").touch()
    file_status = os.stat(top / "f")
    monkeypatch.setattr(os, "stat", lambda *_args, **_kwargs: file_status)
    with pytest.raises(RefusedError, match="FIFO"):
        root.open_source(b"p")


def test_a_link_swapped_in_after_the_look_is_not_opened(
    root: Root, top: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "l").symlink_to(outside / "precious")
    status = os.stat(outside / "precious")
    monkeypatch.setattr(os, "stat", lambda *_args, **_kwargs: status)
    with pytest.raises(RefusedError):
        root.open_source(b"l")


def sparse(top: Path, size: int, *data: tuple[int, bytes]) -> None:
    with (top / "f").open("wb") as file:
        for offset, content in data:
            file.seek(offset)
            file.write(content)
        file.truncate(size)
    if size and (top / "f").stat().st_blocks * 512 >= size:
        pytest.skip("this file system keeps no holes")


def test_holes_are_found(root: Root, top: Path) -> None:
    sparse(top, 10 * PIECE + 3, (2 * PIECE, bytes(range(1, 101))), (7 * PIECE, b"x" * PIECE))
    with root.open_source(b"f") as source:
        holes = source.holes()
    assert holes[0] == (0, 2 * PIECE) and holes[-1] == (8 * PIECE, 10 * PIECE + 3) and len(holes) == 3
    assert 2 * PIECE < holes[1][0] <= 2 * PIECE + MIN_HOLE and holes[1][1] == 7 * PIECE


def test_a_file_that_is_one_hole(root: Root, top: Path) -> None:
    sparse(top, PIECE)
    with root.open_source(b"f") as source:
        assert source.holes() == ((0, PIECE),)


def test_of_many_holes_the_longest_are_told(root: Root, top: Path) -> None:
    step = 2 * MIN_HOLE
    islands = [(at * step + MIN_HOLE * (at >= 100), b"x") for at in range(1, MAX_HOLES + 100)]  # one gap is longer
    sparse(top, islands[-1][0] + 1, *islands)
    with root.open_source(b"f") as source:
        holes = source.holes()
    assert len(holes) == MAX_HOLES and holes == tuple(sorted(holes))
    assert max(end - start for start, end in holes) > step
    assert all(holes[i][1] < holes[i + 1][0] for i in range(len(holes) - 1))


@pytest.mark.parametrize("content", [b"", b"x" * PIECE, bytes(PIECE)], ids=["empty", "data", "zeros that are there"])
def test_no_holes(root: Root, top: Path, content: bytes) -> None:
    (top / "f").write_bytes(content)
    with root.open_source(b"f") as source:
        assert source.holes() == ()


def test_a_file_system_that_does_not_tell_has_no_holes(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(top, PIECE)

    def refuse(fd: int, position: int, how: int) -> int:
        raise OSError(errno.EINVAL, "no such whence")

    monkeypatch.setattr(os, "lseek", refuse)
    with root.open_source(b"f") as source:
        assert source.holes() == ()


def test_holes_of_a_sick_disk_are_an_error_that_names_the_file(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(top, PIECE)

    def fail(fd: int, position: int, how: int) -> int:
        raise OSError(errno.EIO, "sick")

    with root.open_source(b"f") as source:
        monkeypatch.setattr(os, "lseek", fail)
        with pytest.raises(StorageError, match="holes in f"):
            source.holes()
