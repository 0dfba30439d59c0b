from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import amst_core
from amst_core.errors import ClosedError, NotFoundError, RefusedError, StorageError
from amst_core.files.entries import Entry, EntryType, WalkError, join_path
from amst_core.files.root import Root


def identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def paths(root: Root, base: bytes = b"") -> list[bytes]:
    return [found.path for found in root.walk(base) if isinstance(found, Entry)]


def errors(root: Root, base: bytes = b"") -> dict[bytes, str]:
    return {found.path: found.error.kind for found in root.walk(base) if isinstance(found, WalkError)}


# ---- the root itself --------------------------------------------------------------------------


def test_the_root_may_be_reached_through_links(top: Path, tmp_path: Path) -> None:
    (top / "f").write_bytes(b"x")
    (tmp_path / "l").symlink_to(top)
    with Root(tmp_path / "l") as root, root.open_source(b"f") as source:
        assert source.size == 1


def test_the_root_is_resolved_once(top: Path, outside: Path, tmp_path: Path) -> None:
    with Root(top) as root:
        os.rename(top, tmp_path / "moved")
        top.symlink_to(outside)
        root.put_directory(b"d", Entry(b"", EntryType.DIRECTORY, 0o755, 0))
        assert os.listdir(tmp_path / "moved") == ["d"]


def test_roots_that_cannot_be(top: Path) -> None:
    with pytest.raises(NotFoundError):
        Root(top / "nowhere")
    (top / "f").touch()
    with pytest.raises(RefusedError):
        Root(top / "f")


def test_a_root_in_the_state_directory_is_refused(top: Path) -> None:
    (top / "state" / "sub").mkdir(parents=True)
    forbidden = [identity(top / "state")]
    for path in (top / "state", top / "state" / "sub"):
        with pytest.raises(RefusedError):
            Root(path, forbidden=forbidden)
    Root(top, forbidden=forbidden).close()


def test_a_closed_root_says_so(top: Path) -> None:
    root = Root(top)
    root.close()
    for call in (root.stat, root.open_source, root.walk):
        with pytest.raises(ClosedError):
            call(b"f")


# ---- stat, parent --------------------------------------------------------------------------------


def test_stat(root: Root, top: Path) -> None:
    (top / "d").mkdir(mode=0o711)
    os.utime(top / "d", ns=(0, -3))
    (top / "f").write_bytes(b"abc")
    os.chmod(top / "f", 0o4640)
    os.utime(top / "f", ns=(0, 77))
    (top / "l").symlink_to("nowhere")
    os.utime(top / "l", ns=(0, 99), follow_symlinks=False)
    assert root.stat(b"d") == Entry(b"d", EntryType.DIRECTORY, 0o711, -3)
    assert root.stat(b"f") == Entry(b"f", EntryType.FILE, 0o4640, 77, 3)
    assert root.stat(b"l") == Entry(b"l", EntryType.SYMLINK, 0o777, 99, 0, b"nowhere")
    assert root.stat(b"nothing") is None
    assert root.stat(b"no/thing") is None
    itself = root.stat(b"")
    assert itself is not None
    assert itself.type is EntryType.DIRECTORY


def test_stat_refuses_links_on_the_way_and_special_files(root: Root, top: Path, outside: Path) -> None:
    (top / "l").symlink_to(outside)
    with pytest.raises(RefusedError, match="l is a symbolic link"):
        root.stat(b"l/precious")
    os.mkfifo(top / "p")
    with pytest.raises(RefusedError, match="FIFO"):
        root.stat(b"p")
    with pytest.raises(RefusedError):
        root.stat(b"../outside")


def test_parent_makes_directories_only_when_asked(root: Root, top: Path) -> None:
    with pytest.raises(NotFoundError), root.parent(b"a/b/c"):
        pass
    assert os.listdir(top) == []
    with root.parent(b"a/b/c", create=True) as (fd, leaf):
        assert leaf == b"c"
        assert identity(top / "a" / "b") == (os.fstat(fd).st_dev, os.fstat(fd).st_ino)
    assert os.listdir(top / "a" / "b") == []


# ---- the state directory --------------------------------------------------------------------------


@pytest.fixture
def guarded(top: Path) -> Path:
    (top / "a" / "state" / "deep").mkdir(parents=True)
    (top / "a" / "state" / "token").write_bytes(b"secret")
    (top / "a" / "f").write_bytes(b"x")
    return top / "a" / "state"


def test_the_state_directory_is_hidden_from_walks(top: Path, guarded: Path) -> None:
    with Root(top, forbidden=[identity(guarded)]) as root:
        assert list(root.walk(b""))
        assert paths(root) == [b"a/f", b"a", b""]
        assert errors(root) == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda root: root.stat(b"a/state"),
        lambda root: root.stat(b"a/state/token"),
        lambda root: root.stat(b"a/state/deep/x"),
        lambda root: root.open_source(b"a/state/token"),
        lambda root: root.walk(b"a/state"),
        lambda root: root.walk(b"a/state/deep"),
        lambda root: root.open_sink(b"a/state/f", size=1).write(0, memoryview(b"x")),
        lambda root: root.open_sink(b"a/state/new/f", size=1).write(0, memoryview(b"x")),
        lambda root: root.open_sink(b"a/state", size=1).write(0, memoryview(b"x")),
        lambda root: root.put_directory(b"a/state", Entry(b"", EntryType.DIRECTORY, 0o777, 0)),
        lambda root: root.put_directory(b"a/state/x", Entry(b"", EntryType.DIRECTORY, 0o777, 0)),
        lambda root: root.put_symlink(b"a/state/token", Entry(b"", EntryType.SYMLINK, 0, 0, 0, b"x")),
        lambda root: root.put_symlink(b"a/state", Entry(b"", EntryType.SYMLINK, 0, 0, 0, b"x")),
    ],
)
def test_the_state_directory_is_out_of_reach(top: Path, guarded: Path, call: Callable[[Root], object]) -> None:
    mode = guarded.stat().st_mode
    with Root(top, forbidden=[identity(guarded)]) as root, pytest.raises(RefusedError):
        call(root)
    assert sorted(os.listdir(guarded)) == ["deep", "token"]
    assert (guarded / "token").read_bytes() == b"secret"
    assert guarded.stat().st_mode == mode


# ---- walk --------------------------------------------------------------------------------------------


def test_walk_gives_each_directory_after_its_content_in_order(root: Root, top: Path) -> None:
    (top / "t" / "b" / "empty").mkdir(parents=True)
    (top / "t" / "b" / "z").touch()
    (top / "t" / "a").touch()
    (top / "t" / "c").symlink_to("b")
    (top / "t" / "B").touch()
    with open(os.path.join(os.fsencode(top), b"t/\xff\n"), "wb") as file:
        file.write(b"odd")
    assert paths(root, b"t") == [b"B", b"a", b"b/empty", b"b/z", b"b", b"c", b"\xff\n", b""]
    assert paths(root, b"t/b") == [b"empty", b"z", b""]


def test_walk_gives_attributes(root: Root, top: Path) -> None:
    (top / "d").mkdir()
    (top / "d" / "f").write_bytes(b"abc")
    os.chmod(top / "d" / "f", 0o604)
    os.utime(top / "d" / "f", ns=(0, -1))
    (top / "d" / "l").symlink_to("/etc")
    os.utime(top / "d" / "l", ns=(0, 8), follow_symlinks=False)
    os.chmod(top / "d", 0o710)
    os.utime(top / "d", ns=(0, 9))
    assert list(root.walk(b"d")) == [
        Entry(b"f", EntryType.FILE, 0o604, -1, 3),
        Entry(b"l", EntryType.SYMLINK, 0o777, 8, 0, b"/etc"),
        Entry(b"", EntryType.DIRECTORY, 0o710, 9),
    ]


def test_walk_of_one_file_or_link_is_that_alone(root: Root, top: Path, outside: Path) -> None:
    (top / "f").write_bytes(b"abc")
    (top / "l").symlink_to(outside)
    (found,) = root.walk(b"f")
    assert isinstance(found, Entry)
    assert (found.path, found.type, found.size) == (b"", EntryType.FILE, 3)
    (found,) = root.walk(b"l")
    assert isinstance(found, Entry)
    assert (found.path, found.type) == (b"", EntryType.SYMLINK)
    assert found.target == os.fsencode(outside)


def test_walk_of_nothing_is_an_error_at_once(root: Root, top: Path, outside: Path) -> None:
    with pytest.raises(NotFoundError):
        root.walk(b"nowhere")
    with pytest.raises(RefusedError):
        root.walk(b"../outside")
    (top / "l").symlink_to(outside)
    with pytest.raises(RefusedError, match="l is a symbolic link"):
        root.walk(b"l/x")


def test_walk_does_not_follow_links(root: Root, top: Path, outside: Path) -> None:
    (top / "out").symlink_to(outside)
    (top / "loop").symlink_to(".")
    (top / "file").symlink_to(outside / "precious")
    assert paths(root) == [b"file", b"loop", b"out", b""]


@pytest.mark.timeout(20)
def test_walk_reports_special_files_and_goes_on(root: Root, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top / "d").mkdir()
    os.mkfifo(top / "d" / "a-fifo")
    monkeypatch.chdir(top / "d")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("b-socket")
    (top / "d" / "c").touch()
    assert errors(root) == {b"d/a-fifo": "refused", b"d/b-socket": "refused"}
    assert paths(root) == [b"d/c", b"d", b""]


def test_walk_skips_temporary_files(root: Root, top: Path) -> None:
    sink = root.open_sink(b"f", size=None)
    sink.write(0, memoryview(b"x"))
    (top / ".amst-dir").mkdir()
    (top / ".amst").touch()
    assert paths(root) == [b".amst", b""]
    sink.abort()


def test_walk_does_not_enter_a_directory_swapped_for_a_link(
    root: Root, top: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "a").mkdir()
    (top / "b").touch()
    real = os.open

    def swap_first(path: bytes, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == b"a" and not (top / "a").is_symlink():
            (top / "a").rmdir()
            (top / "a").symlink_to(outside)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swap_first)
    found = list(root.walk(b""))
    assert [item.path for item in found] == [b"a", b"b", b""]
    assert isinstance(found[0], WalkError)
    assert found[0].error.kind == "refused"


def test_walk_survives_a_tree_that_vanishes(root: Root, top: Path) -> None:
    for name in "abc":
        (top / "d" / name).mkdir(parents=True)
    found = root.walk(b"")
    first = next(found)
    assert first.path == b"d/a"
    shutil.rmtree(top / "d")
    rest = list(found)
    assert [(item.path, type(item)) for item in rest] == [
        (b"d/b", WalkError), (b"d/c", WalkError), (b"d", Entry), (b"", Entry),
    ]  # fmt: skip


def test_an_abandoned_walk_keeps_no_descriptor(root: Root, top: Path) -> None:
    (top / "a" / "b" / "c").mkdir(parents=True)
    (top / "a" / "b" / "c" / "f").touch()
    before = len(os.listdir("/proc/self/fd"))
    found = root.walk(b"")
    assert next(found).path == b"a/b/c/f"
    assert len(os.listdir("/proc/self/fd")) == before + 4
    found.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before
    root.walk(b"")  # never begun
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tree_deeper_than_the_limit_is_reported(root: Root, top: Path) -> None:
    here = os.open(top, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    (top / "e").touch()
    assert errors(root) == {b"/".join([b"d"] * 257): "storage"}
    found = paths(root)
    assert found[0] == b"/".join([b"d"] * 256)
    assert found[-2:] == [b"e", b""]
    deep = b"/".join([b"d"] * 200)
    assert errors(root, deep) == {b"/".join([b"d"] * 57): "storage"}


def test_a_path_longer_than_the_limit_is_reported(root: Root, top: Path) -> None:
    name = b"n" * 250
    here = os.open(top, os.O_RDONLY)
    for _ in range(17):
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert errors(root) == {b"/".join([name] * 17): "storage"}


AS_NOBODY = """
import os, sys
from amst_core.errors import AmstError
from amst_core.files.entries import Entry, EntryType
from amst_core.files.root import Root

if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
root = Root(sys.argv[1].encode())

def attempt(name, call):
    try:
        call()
        print(name, "done")
    except AmstError as err:
        print(name, err.kind)

attempt("source", lambda: root.open_source(b"unreadable").close())
attempt("sink", lambda: root.open_sink(b"locked/f", size=1).write(0, memoryview(b"x")))
attempt("directory", lambda: root.put_directory(b"locked/d", Entry(b"", EntryType.DIRECTORY, 0o755, 0)))
attempt("symlink", lambda: root.put_symlink(b"locked/l", Entry(b"", EntryType.SYMLINK, 0, 0, 0, b"x")))
attempt("through", lambda: root.open_source(b"through/f").close())
for found in root.walk(b""):
    print(found.path.decode() or ".", found.type.value if isinstance(found, Entry) else found.error.kind)
"""


def test_what_permissions_forbid_is_refused_and_the_rest_goes_on(top: Path) -> None:
    (top / "unreadable").write_bytes(b"x")
    (top / "shut").mkdir()
    (top / "through").mkdir()
    (top / "through" / "f").touch()
    (top / "locked").mkdir()
    (top / "shut" / "inner").touch()
    os.chmod(top / "unreadable", 0)
    os.chmod(top / "shut", 0)
    os.chmod(top / "through", 0o111)
    os.chmod(top / "locked", 0o555)
    package = Path(amst_core.__path__[0]).parent
    above = [path for path in top.parents if os.getuid() == 0 and not path.stat().st_mode & 0o001]
    try:
        for path in above:  # pytest's own directories, which nobody else may enter
            os.chmod(path, path.stat().st_mode | 0o001)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(top)],
            cwd=package,
            capture_output=True,
            text=True,
            timeout=60,
        )
    finally:
        for path in above:
            os.chmod(path, path.stat().st_mode & ~0o001)
        for name in ("shut", "through", "locked"):
            os.chmod(top / name, 0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "source refused",
        "sink refused",
        "directory refused",
        "symlink refused",
        "through done",
        "locked directory",
        "shut refused",
        "through refused",
        "unreadable file",
        ". directory",
    ]


def test_names_too_long_for_the_file_system(root: Root) -> None:
    with pytest.raises(StorageError):
        root.open_sink(b"n" * 256, size=1)
    with pytest.raises(StorageError):
        root.stat(b"n" * 256)


def test_a_tree_survives_the_way_through_entries(root: Root, top: Path, tmp_path: Path) -> None:
    (top / "t" / "empty").mkdir(parents=True)
    (top / "t" / "d").mkdir()
    (top / "t" / "d" / "f").write_bytes(b"content")
    (top / "t" / "d" / "zero").touch()
    (top / "t" / "l").symlink_to("d/f")
    os.chmod(top / "t" / "d" / "f", 0o440)
    os.chmod(top / "t" / "d", 0o750)
    for path in (top / "t" / "d" / "f", top / "t" / "d", top / "t" / "empty", top / "t"):
        os.utime(path, ns=(0, -123_456_789))
    (tmp_path / "copy").mkdir()
    with Root(tmp_path / "copy") as copy:
        for found in root.walk(b"t"):
            assert isinstance(found, Entry)
            to = join_path(b"new", found.path)
            if found.type is EntryType.DIRECTORY:
                copy.put_directory(to, found)
            elif found.type is EntryType.SYMLINK:
                copy.put_symlink(to, found)
            else:
                sink = copy.open_sink(to, size=found.size)
                with root.open_source(b"t/" + found.path) as source:
                    buffer = bytearray(source.size)
                    source.read_into(0, memoryview(buffer))
                    sink.write(0, memoryview(buffer))
                    source.verify()
                sink.finish(found)
        assert list(copy.walk(b"new")) == list(root.walk(b"t"))
    assert (tmp_path / "copy" / "new" / "d" / "f").read_bytes() == b"content"
