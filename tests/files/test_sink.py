from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from amst_core.errors import AmstError, BusyError, ClosedError, ProtocolError, RefusedError, StorageError
from amst_core.files.entries import Entry, EntryType
from amst_core.files.root import Root
from amst_core.files.sink import FileSink


def file_entry(size: int, *, mode: int = 0o644, mtime_ns: int = 1_000_000_007) -> Entry:
    return Entry(b"", EntryType.FILE, mode, mtime_ns, size)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_the_disk_is_not_touched_before_the_first_write(root: Root, top: Path) -> None:
    sink = root.open_sink(b"d/f", size=3)
    assert names(top) == []
    sink.write(0, memoryview(b"abc"))
    (part,) = names(top / "d")
    assert part.startswith(".amst-")
    assert part.endswith(".part")
    assert os.stat(top / "d" / part).st_mode & 0o7777 == 0o600
    sink.finish(file_entry(3))
    assert names(top / "d") == ["f"]


def test_content_mode_and_time_arrive(root: Root, top: Path) -> None:
    sink = root.open_sink(b"\xff\n", size=None)
    sink.write(3, memoryview(b"def"))
    sink.write(0, memoryview(b"abc"))
    sink.finish(file_entry(6, mode=0o4751, mtime_ns=-86_400_000_000_001))
    found = os.stat(os.path.join(os.fsencode(top), b"\xff\n"))
    assert found.st_mode & 0o7777 == 0o751  # no setuid from a peer
    assert found.st_mtime_ns == -86_400_000_000_001
    with open(os.path.join(os.fsencode(top), b"\xff\n"), "rb") as file:
        assert file.read() == b"abcdef"


def test_an_empty_file_appears_at_finish(root: Root, top: Path) -> None:
    root.open_sink(b"a/b/empty", size=0).finish(file_entry(0, mode=0o400))
    found = os.stat(top / "a" / "b" / "empty")
    assert (found.st_size, found.st_mode & 0o777, found.st_mtime_ns) == (0, 0o400, 1_000_000_007)


def test_finish_cuts_to_the_exact_size(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=None)
    sink.write(0, memoryview(b"0123456789"))
    sink.finish(file_entry(4))
    assert (top / "f").read_bytes() == b"0123"


def test_the_target_stays_whole_until_finish(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"before")
    sink = root.open_sink(b"f", size=5)
    sink.write(0, memoryview(b"after"))
    assert (top / "f").read_bytes() == b"before"
    sink.finish(file_entry(5))
    assert (top / "f").read_bytes() == b"after"


def test_abort_leaves_everything_as_it_was(root: Root, top: Path) -> None:
    (top / "f").write_bytes(b"before")
    sink = root.open_sink(b"f", size=5)
    sink.write(0, memoryview(b"after"))
    sink.abort()
    sink.abort()
    assert names(top) == ["f"]
    assert (top / "f").read_bytes() == b"before"
    with pytest.raises(ClosedError):
        sink.write(0, memoryview(b"after"))
    with pytest.raises(ClosedError):
        sink.finish(file_entry(5))
    assert names(top) == ["f"]


def test_abort_before_the_first_write(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=1)
    sink.abort()
    with pytest.raises(ClosedError):
        sink.write(0, memoryview(b"x"))
    with pytest.raises(ClosedError):
        sink.finish(file_entry(1))
    assert names(top) == []


def test_finish_is_idempotent_and_final(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=1)
    sink.write(0, memoryview(b"x"))
    sink.finish(file_entry(1))
    sink.finish(file_entry(1))
    sink.abort()
    with pytest.raises(ClosedError):
        sink.write(0, memoryview(b"y"))
    assert names(top) == ["f"]
    assert (top / "f").read_bytes() == b"x"


def test_sizes_are_held_to_what_was_announced(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=4)
    for offset, data in ((2, b"xyz"), (4, b"x"), (-1, b"x")):
        with pytest.raises(ProtocolError):
            sink.write(offset, memoryview(data))
    with pytest.raises(ProtocolError):
        sink.finish(file_entry(5))
    assert names(top) == []


def test_concurrent_writes(root: Root, top: Path) -> None:
    data = os.urandom(1 << 20)
    span = 4096
    sink = root.open_sink(b"d/f", size=len(data))
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(sink.write, at, memoryview(data)[at : at + span]) for at in range(0, len(data), span)]:
            done.result(30)
    assert len(names(top / "d")) == 1
    sink.finish(file_entry(len(data)))
    assert (top / "d" / "f").read_bytes() == data


def test_two_first_writes_make_one_file(root: Root, top: Path) -> None:
    second = threading.Event()

    class Lock:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def acquire(self) -> None:
            if threading.current_thread() is other:
                second.set()
            self.lock.acquire()

        def release(self) -> None:
            self.lock.release()

    def open_parent() -> tuple[int, bytes]:
        if not second.is_set():  # the other write comes while this one is still making the file
            other.start()
            assert second.wait(10)
        return os.open(top, os.O_RDONLY), b"f"

    sink = FileSink(open_parent, shown="f", size=2)
    sink._turn = Lock()  # type: ignore[assignment]
    other = threading.Thread(target=sink.write, args=(1, memoryview(b"y")))
    sink.write(0, memoryview(b"x"))
    other.join(10)
    assert len(names(top)) == 1
    sink.finish(file_entry(2))
    assert (top / "f").read_bytes() == b"xy"


def test_many_sinks_make_one_directory(root: Root, top: Path) -> None:
    def put(number: int) -> None:
        sink = root.open_sink(b"a/b/c/%d" % number, size=1)
        sink.write(0, memoryview(b"x"))
        sink.finish(file_entry(1))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(64)))
    assert len(names(top / "a" / "b" / "c")) == 64


def test_short_writes_are_continued(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, at: real(fd, view[:3], at))
    sink = root.open_sink(b"f", size=8)
    sink.write(0, memoryview(b"01234567"))
    sink.finish(file_entry(8))
    assert (top / "f").read_bytes() == b"01234567"


def test_finish_during_a_write_is_refused_and_harmless(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = root.open_sink(b"f", size=1)
    real = os.pwrite
    refused: list[BusyError] = []

    def write_and_try_to_finish(fd: int, view: memoryview, at: int) -> int:
        with pytest.raises(BusyError) as caught:
            sink.finish(file_entry(1))
        refused.append(caught.value)
        return real(fd, view, at)

    monkeypatch.setattr(os, "pwrite", write_and_try_to_finish)
    sink.write(0, memoryview(b"x"))
    sink.finish(file_entry(1))
    assert len(refused) == 1
    assert (top / "f").read_bytes() == b"x"


def test_abort_during_a_write_waits_with_the_number(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = root.open_sink(b"f", size=1)
    real = os.pwrite

    def write_after_abort(fd: int, view: memoryview, at: int) -> int:
        sink.abort()
        return real(fd, view, at)  # EBADF, or another file's bytes, if abort had closed it

    monkeypatch.setattr(os, "pwrite", write_after_abort)
    sink.write(0, memoryview(b"x"))
    assert names(top) == []


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageError), (errno.EDQUOT, StorageError)])
def test_a_full_disk_names_the_file(
    root: Root, top: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[AmstError]
) -> None:
    def full(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    sink = root.open_sink(b"f", size=1)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(kind, match="cannot write f") as caught:
        sink.write(0, memoryview(b"x"))
    assert caught.value.path == "f"
    sink.abort()
    assert names(top) == []


def test_an_offset_no_file_can_have(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=None)
    with pytest.raises(StorageError):
        sink.write((1 << 63) - 1, memoryview(b"x"))
    sink.abort()
    assert names(top) == []


# ---- what must not be reached or replaced ----------------------------------------------------


@pytest.mark.parametrize(
    "path", [b"..", b"../f", b"a/../../f", b"/f", b"/", b"a\0b", b".amst-0.part", b"a/.amst-/f", b"", b"a//b", b"./f"]
)
def test_paths_are_refused_before_the_disk(root: Root, top: Path, outside: Path, path: bytes) -> None:
    with pytest.raises(RefusedError):
        root.open_sink(path, size=1)
    with pytest.raises(RefusedError):
        root.put_directory(path, Entry(b"", EntryType.DIRECTORY, 0o755, 0))
    with pytest.raises(RefusedError):
        root.put_symlink(path, Entry(b"", EntryType.SYMLINK, 0o777, 0, 0, b"x"))
    assert names(top) == []
    assert names(top.parent) == ["outside", "root"]


def test_a_planted_link_in_the_middle_is_refused(root: Root, top: Path, outside: Path) -> None:
    (top / "d").mkdir()
    (top / "d" / "l").symlink_to(outside)
    sink = root.open_sink(b"d/l/f", size=1)
    with pytest.raises(RefusedError, match="d/l is a symbolic link"):
        sink.write(0, memoryview(b"x"))
    with pytest.raises(RefusedError, match="d/l is a symbolic link"):
        sink.finish(file_entry(1))
    sink.abort()


def test_a_dangling_link_in_the_middle_makes_no_directory(root: Root, top: Path, outside: Path) -> None:
    (top / "l").symlink_to(outside / "made")
    with pytest.raises(RefusedError, match="l is a symbolic link"):
        root.open_sink(b"l/f", size=1).write(0, memoryview(b"x"))


@pytest.mark.parametrize("aim", ["precious", "made", "."])
def test_a_link_under_the_final_name_is_replaced_not_followed(root: Root, top: Path, outside: Path, aim: str) -> None:
    (top / "f").symlink_to(outside / aim)
    sink = root.open_sink(b"f", size=3)
    sink.write(0, memoryview(b"new"))
    sink.finish(file_entry(3))
    assert not (top / "f").is_symlink()
    assert (top / "f").read_bytes() == b"new"


def test_a_directory_under_the_final_name_is_refused_early(root: Root, top: Path) -> None:
    (top / "f").mkdir()
    sink = root.open_sink(b"f", size=1)
    with pytest.raises(RefusedError, match="directory"):
        sink.write(0, memoryview(b"x"))
    sink.abort()
    assert names(top) == ["f"]
    assert names(top / "f") == []


def test_a_directory_that_appears_under_the_final_name_is_refused(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=1)
    sink.write(0, memoryview(b"x"))
    (top / "f").mkdir()
    with pytest.raises(RefusedError):
        sink.finish(file_entry(1))
    assert names(top) == ["f"]
    with pytest.raises(ClosedError):
        sink.finish(file_entry(1))


def test_a_file_in_the_middle_is_refused(root: Root, top: Path) -> None:
    (top / "f").touch()
    with pytest.raises(RefusedError, match="f is not a directory"):
        root.open_sink(b"f/x", size=1).write(0, memoryview(b"x"))


def swap_for_link(top: Path, outside: Path) -> None:
    os.rename(top / "d", top / "aside")
    (top / "d").symlink_to(outside)


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_a_directory_swapped_for_a_link_during_the_write(root: Root, top: Path, outside: Path, end: str) -> None:
    (top / "d").mkdir()
    sink = root.open_sink(b"d/precious", size=2)
    sink.write(0, memoryview(b"x"))
    swap_for_link(top, outside)
    sink.write(1, memoryview(b"y"))
    if end == "finish":
        sink.finish(file_entry(2))
        assert (top / "aside" / "precious").read_bytes() == b"xy"
    else:
        sink.abort()
        assert names(top / "aside") == []
    # `outside` checks itself


def at_open_of(name: bytes, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``act`` just before the first open of a component called ``name``."""
    real = os.open
    done: list[bool] = []

    def open_after(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == name and not done:
            done.append(True)
            act()
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", open_after)


def test_a_directory_swapped_for_a_link_while_it_is_looked_up(
    root: Root, top: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "d" / "e").mkdir(parents=True)
    at_open_of(b"d", lambda: swap_for_link(top, outside), monkeypatch)
    with pytest.raises(RefusedError):
        root.open_sink(b"d/e/f", size=1).write(0, memoryview(b"x"))


def test_a_link_put_where_a_directory_was_just_made(
    root: Root, top: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir

    def make_and_swap(path: bytes, mode: int, *, dir_fd: int) -> None:
        real(path, mode, dir_fd=dir_fd)
        swap_for_link(top, outside)

    monkeypatch.setattr(os, "mkdir", make_and_swap)
    with pytest.raises(RefusedError):
        root.put_directory(b"d", Entry(b"", EntryType.DIRECTORY, 0o700, 0))


def test_a_directory_removed_during_the_write_is_a_clean_error(root: Root, top: Path) -> None:
    sink = root.open_sink(b"d/f", size=1)
    sink.write(0, memoryview(b"x"))
    shutil.rmtree(top / "d")
    with pytest.raises(StorageError, match="removed meanwhile"):
        sink.finish(file_entry(1))
    assert names(top) == []


def test_a_root_removed_before_the_first_write_is_a_clean_error(root: Root, top: Path) -> None:
    sink = root.open_sink(b"d/f", size=1)
    top.rmdir()
    with pytest.raises(StorageError, match="removed meanwhile"):
        sink.write(0, memoryview(b"x"))
    sink.abort()


def test_a_sink_outlives_its_root_once_it_has_begun(top: Path) -> None:
    root = Root(top)
    begun, waiting = root.open_sink(b"f", size=1), root.open_sink(b"g", size=1)
    begun.write(0, memoryview(b"x"))
    root.close()
    root.close()
    begun.finish(file_entry(1))
    with pytest.raises(ClosedError):
        waiting.write(0, memoryview(b"x"))
    assert names(top) == ["f"]


# ---- directories and links --------------------------------------------------------------------


def test_put_directory_makes_and_sets(root: Root, top: Path) -> None:
    root.put_directory(b"a/\xfe", Entry(b"", EntryType.DIRECTORY, 0o2750, -5))
    found = os.stat(os.path.join(os.fsencode(top), b"a/\xfe"))
    assert (found.st_mode & 0o7777, found.st_mtime_ns) == (0o750, -5)


def test_put_directory_keeps_an_existing_one(root: Root, top: Path) -> None:
    (top / "d").mkdir()
    (top / "d" / "f").write_bytes(b"x")
    os.chmod(top / "d", 0o3777)
    root.put_directory(b"d", Entry(b"", EntryType.DIRECTORY, 0o500, 12345))
    found = os.stat(top / "d")
    assert (found.st_mode & 0o7777, found.st_mtime_ns) == (0o3500, 12345)
    assert names(top / "d") == ["f"]


def test_put_directory_refuses_what_is_none(root: Root, top: Path, outside: Path) -> None:
    (top / "f").touch()
    (top / "l").symlink_to(outside)
    (top / "dangling").symlink_to(outside / "made")
    for name in (b"f", b"l", b"dangling", b"l/x"):
        with pytest.raises(RefusedError):
            root.put_directory(name, Entry(b"", EntryType.DIRECTORY, 0o700, 0))
    assert (top / "l").is_symlink()
    assert (top / "f").is_file()


@pytest.mark.parametrize("before", ["nothing", "file", "link"])
def test_put_symlink_replaces_and_keeps_bytes(root: Root, top: Path, outside: Path, before: str) -> None:
    if before == "file":
        (top / "l").write_bytes(b"x")
    elif before == "link":
        (top / "l").symlink_to(outside)
    root.put_symlink(b"l", Entry(b"", EntryType.SYMLINK, 0o777, -7, 0, b"../\xff\n"))
    assert os.readlink(os.fsencode(top / "l")) == b"../\xff\n"
    assert os.lstat(top / "l").st_mtime_ns == -7
    assert names(top) == ["l"]


def test_put_symlink_refuses_a_directory_and_leaves_nothing(root: Root, top: Path) -> None:
    (top / "d").mkdir()
    with pytest.raises(RefusedError):
        root.put_symlink(b"d", Entry(b"", EntryType.SYMLINK, 0o777, 0, 0, b"x"))
    assert names(top) == ["d"]
    assert not (top / "d").is_symlink()


def test_put_symlink_refuses_a_link_on_the_way(root: Root, top: Path, outside: Path) -> None:
    (top / "l").symlink_to(outside)
    with pytest.raises(RefusedError, match="l is a symbolic link"):
        root.put_symlink(b"l/x", Entry(b"", EntryType.SYMLINK, 0o777, 0, 0, b"y"))
