from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amst_core.errors import BusyError, ClosedError, NotFoundError, RefusedError, SourceChangedError, StorageError
from amst_core.files.root import Root
from amst_core.files.source import Descriptor


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
