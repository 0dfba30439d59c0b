"""Files, trees and links between two sessions: as they were, or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from amst_core.errors import (
    AmstError,
    BusyError,
    CancelledError,
    ClosedError,
    NotFoundError,
    RefusedError,
    SourceChangedError,
    StorageError,
)
from amst_core.files import journal
from amst_core.files.entries import Entry, EntryType, to_attributes
from amst_core.files.source import FileSource
from amst_core.session.copying import CopyResult, download, upload
from amst_core.session.core import SessionCore
from amst_core.session.endpoints import MemorySource
from amst_core.session.packs import PACKED_UP_TO
from amst_core.wire import requests as ops
from amst_core.wire.messages import FILE, Reply

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """What the server serves."""
    path = tmp_path / "there"
    path.mkdir()
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Where the client works."""
    path = tmp_path / "here"
    path.mkdir()
    return path


@pytest.fixture
def no_leftovers(tmp_path: Path, net: Any) -> Any:
    """Says whether a temporary file of ours is left anywhere; a failed transfer removes its own soon."""

    def check() -> None:
        net.wait_until(lambda: not list(tmp_path.rglob(".amst-*")), "temporary files removed")

    return check


def make_tree(top: Path) -> None:
    """Everything that a tree may hold: links, empty directories, any byte names, modes, times."""
    (top / "empty dir").mkdir(parents=True)
    deep = top / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "large").write_bytes(os.urandom(5 * MIB + 3))
    (deep / "nothing").touch()
    (top / "a" / "tool").write_bytes(b"#!/bin/sh\n")
    (top / "a" / "tool").chmod(0o751)
    (top / "secret").write_bytes(b"secret")
    (top / "secret").chmod(0o400)
    for i in range(150):
        (top / "a" / f"{i:03}").write_bytes(os.urandom(i * 37))
    name = os.path.join(os.fsencode(top), b"not utf-8 \xff\xfe and\nnewline")
    with open(name, "wb") as file:
        file.write(b"odd")
    os.symlink("a/tool", top / "link")
    os.symlink("/nowhere/at all", top / "dangling")
    os.symlink("a", top / "link to dir")
    os.symlink(b"\xff", os.fsencode(top) + b"/odd link")
    for number, path in enumerate(sorted(top.rglob("*"))):
        when = 1_000_000_000_123_456_789 + number * 1_000_000_007
        os.utime(path, ns=(when, when), follow_symlinks=False)
    (top / "a" / "b").chmod(0o750)
    os.utime(top / "a" / "b", ns=(7, -5_000_000_001))  # before 1970
    (top / "empty dir").chmod(0o700)
    os.utime(top, ns=(1, 987_654_321_000_000_001))


def described(top: Path) -> list[tuple[object, ...]]:
    """Type, mode, modification time and content of everything at and below ``top``."""
    found: list[tuple[object, ...]] = []
    base = os.fsencode(top)
    paths = [base]
    for directory, names, files in os.walk(base):
        paths += [os.path.join(directory, name) for name in names + files]
    for path in sorted(paths):
        status = os.lstat(path)
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = Path(os.fsdecode(path)).read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        found.append((path[len(base) :], status.st_mode, status.st_mtime_ns, content))
    return found


@pytest.mark.parametrize("plaintext", [False, True], ids=["encrypted", "plaintext"])
def test_a_tree_arrives_as_it_is_up_and_down(net: Any, here: Path, there: Path, plaintext: bool) -> None:
    make_tree(here / "tree")
    pair = net.pair(streams=4, plaintext=plaintext, root=there)
    pair.near.send_file(here / "tree", "copy")
    pair.near.recv_file("copy", here / "back")
    assert described(there / "copy") == described(here / "tree")
    assert described(here / "back") == described(here / "tree")
    compared = subprocess.run(
        ["diff", "-r", "--no-dereference", here / "tree", here / "back"], capture_output=True, check=False
    )
    assert (compared.returncode, compared.stdout) == (0, b"")


def test_the_result_counts_files_and_bytes(net: Any, here: Path, there: Path) -> None:
    make_tree(here / "tree")
    pair = net.pair(root=there)
    size = sum(p.stat().st_size for p in (here / "tree").rglob("*") if p.is_file() and not p.is_symlink())
    # files and links, not directories
    files = sum(1 for p in (here / "tree").rglob("*") if p.is_symlink() or not p.is_dir())
    up = upload(pair.near, [(here / "tree", b"copy")])
    down = download(pair.near, [(b"copy", here / "back")])
    for result in (up, down):
        assert (result.bytes, result.files, result.failed) == (size, files, ())
        assert result.seconds > 0


@pytest.mark.parametrize("size", [0, 1, 65536, 3 * MIB + 1])
def test_one_file_under_another_name(net: Any, here: Path, there: Path, size: int) -> None:
    data = os.urandom(size)
    (here / "original").write_bytes(data)
    pair = net.pair(root=there)
    pair.near.send_file(here / "original", "made/on/the way/renamed")
    assert (there / "made/on/the way/renamed").read_bytes() == data
    pair.near.recv_file("made/on/the way/renamed", here / "again")
    assert (here / "again").read_bytes() == data
    assert (here / "again").stat().st_mtime_ns == (here / "original").stat().st_mtime_ns


def test_an_existing_file_is_replaced_whole(net: Any, here: Path, there: Path) -> None:
    (here / "new").write_bytes(b"new")
    (there / "target").write_bytes(b"old content, longer")
    os.link(there / "target", there / "other name")
    pair = net.pair(root=there)
    pair.near.send_file(here / "new", "target")
    assert (there / "target").read_bytes() == b"new"
    assert (there / "other name").read_bytes() == b"old content, longer"


def test_stat_tells_what_is_there(net: Any, there: Path) -> None:
    (there / "file").write_bytes(b"12345")
    (there / "file").chmod(0o640)
    os.symlink("file", there / "link")
    pair = net.pair(root=there)
    file, link = pair.near.stat("file"), pair.near.stat("link")
    assert file is not None and (file.type, file.size, file.mode) == (EntryType.FILE, 5, 0o640)
    assert link is not None and (link.type, link.target) == (EntryType.SYMLINK, b"file")
    assert pair.near.stat("missing") is None
    assert pair.near.stat("") is not None


@pytest.mark.parametrize("recursive", [False, True])
def test_a_list_tells_what_is_there_page_by_page(
    net: Any, here: Path, there: Path, recursive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "PAGE_BYTES", 1000)
    make_tree(there / "tree")
    pair = net.pair(root=there)
    found = list(pair.near.list("tree", recursive=recursive))
    inside = (there / "tree").rglob("*") if recursive else (there / "tree").iterdir()
    paths = {os.path.relpath(path, there / "tree") for path in inside}
    assert found[0].path == b""
    assert {os.fsdecode(entry.path) for entry in found[1:]} == paths
    assert [e.path.split(b"/") for e in found[1:]] == sorted(e.path.split(b"/") for e in found[1:])
    for entry in found:
        about = os.lstat(os.path.join(os.fsencode(there / "tree"), entry.path) if entry.path else there / "tree")
        assert isinstance(entry, Entry)
        assert (entry.mtime_ns, entry.mode) == (about.st_mtime_ns, about.st_mode & 0o777)
        assert entry.size == (about.st_size if stat.S_ISREG(about.st_mode) else 0)
    assert [entry.path for entry in pair.near.list("tree/secret")] == [b""]
    with pytest.raises(NotFoundError):
        next(pair.near.list("missing"))
    assert pair.near.error is None


def test_many_lists_at_once_take_turns(net: Any, spawn: Any, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "PAGE_BYTES", 300)
    for number in range(60):
        (there / f"{number:02}").touch()
    pair = net.pair(root=there)
    tasks = [spawn(lambda: len(list(pair.near.list("")))) for _ in range(12)]
    assert [task.outcome() for task in tasks] == [61] * 12


def test_who_has_a_page_of_a_list_may_ask_for_the_next_at_once(
    net: Any, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the thread that told it takes to end."""
    tell = SessionCore.tell

    def telling(core: SessionCore, *messages: Any) -> None:
        tell(core, *messages)
        if isinstance(messages[0], Reply):
            time.sleep(0.2)

    monkeypatch.setattr(SessionCore, "tell", telling)
    monkeypatch.setattr(ops, "PAGE_BYTES", 300)
    for number in range(60):
        (there / f"{number:02}").touch()
    pair = net.pair(root=there)
    assert len(list(pair.near.list(""))) == 61


def test_a_long_list_holds_up_neither_the_session_nor_its_control_channel(net: Any, there: Path) -> None:
    """So many pages that what waits to be confirmed would pass its bound if pages were larger or kept."""
    for number in range(4000):
        (there / f"{number:04}{'x' * 200}").touch()
    pair = net.pair(root=there)
    entries = pair.near.list("")
    first = next(entries)  # the others wait until they are wanted
    pair.near.send(b"between").wait(30)
    assert pair.near.health_check().healthy
    assert (first.path, len(list(entries))) == (b"", 4000)


def test_progress_reaches_the_total(net: Any, here: Path, there: Path) -> None:
    make_tree(here / "tree")
    pair = net.pair(root=there)
    size = sum(p.stat().st_size for p in (here / "tree").rglob("*") if p.is_file() and not p.is_symlink())
    up: list[tuple[int, int | None]] = []
    down: list[tuple[int, int | None]] = []
    pair.near.send_file(here / "tree", "copy", progress=lambda *state: up.append(state))
    pair.near.recv_file("copy", here / "back", progress=lambda *state: down.append(state))
    for seen in (up, down):
        done = [bytes_done for bytes_done, _ in seen]
        assert done == sorted(done)
        assert seen[-1] in ((size, size), (size, None))  # the counting may not have been done in time


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_progress_callback_that_raises_harms_nobody(net: Any, here: Path, there: Path, direction: str) -> None:
    data = os.urandom(4 * MIB)
    source, target = (here / "f", there / "g") if direction == "up" else (there / "g", here / "f")
    source.write_bytes(data)
    pair = net.pair(root=there)

    def bad(done: int, total: int | None) -> None:
        raise ValueError("a bug of the user's")

    if direction == "up":
        pair.near.send_file(here / "f", "g", progress=bad)
    else:
        pair.near.recv_file("g", here / "f", progress=bad)
    assert target.read_bytes() == data
    assert pair.near.error is None and pair.near.metrics().lane_failures == 0


def test_the_server_sends_to_and_fetches_from_a_client_with_a_root(net: Any, here: Path, there: Path) -> None:
    make_tree(there / "tree")
    pair = net.pair(root=there, client_root=here)
    pair.far.send_file(there / "tree", "pushed")
    pair.far.recv_file("pushed", there / "pulled")
    assert described(here / "pushed") == described(there / "tree") == described(there / "pulled")


def test_uploads_downloads_and_messages_share_a_session(net: Any, spawn: Any, here: Path, there: Path) -> None:
    for i in range(3):
        (here / f"up{i}").write_bytes(os.urandom(3 * MIB + i))
        (there / f"down{i}").write_bytes(os.urandom(3 * MIB + i))
    make_tree(here / "tree")
    pair = net.pair(streams=4, root=there)
    tasks = [spawn(pair.near.send_file, here / f"up{i}", f"up{i}") for i in range(3)]
    tasks += [spawn(pair.near.recv_file, f"down{i}", here / f"down{i}") for i in range(3)]
    tasks += [spawn(pair.near.send_file, here / "tree", "tree")]
    tasks += [spawn(pair.far.send, bytes([i]) * MIB) for i in range(10)]
    got = sorted(bytes(pair.near.recv(timeout=20))[:1] for _ in range(10))
    assert got == [bytes([i]) for i in range(10)]
    for task in tasks:
        task.outcome(30)
    for i in range(3):
        assert (there / f"up{i}").read_bytes() == (here / f"up{i}").read_bytes()
        assert (here / f"down{i}").read_bytes() == (there / f"down{i}").read_bytes()
    assert described(there / "tree") == described(here / "tree")


# ---- what fails, fails alone -----------------------------------------------------------------------


def test_a_missing_source(net: Any, here: Path, there: Path) -> None:
    pair = net.pair(root=there)
    with pytest.raises(NotFoundError, match="missing"):
        pair.near.send_file(here / "missing", "copy")
    for _ in range(20):  # the reply must not overtake what it speaks of
        with pytest.raises(NotFoundError):
            pair.near.recv_file("missing", here / "copy")
    with pytest.raises(NotFoundError):
        pair.near.recv_file("no/such/dir", here / "copy")
    assert os.listdir(here) == os.listdir(there) == []


def test_a_target_directory_that_is_missing_locally(net: Any, here: Path, there: Path) -> None:
    (there / "file").write_bytes(b"x")
    pair = net.pair(root=there)
    with pytest.raises(RefusedError, match="does not exist"):
        pair.near.recv_file("file", here / "no" / "such" / "copy")


def test_file_system_errors_concern_one_file(net: Any, here: Path, there: Path, no_leftovers: Any) -> None:
    (here / "file").write_bytes(os.urandom(2 * MIB))
    (here / "good").write_bytes(b"good")
    (there / "directory").mkdir()
    (there / "plain file").touch()
    pair = net.pair(root=there)
    result = upload(
        pair.near,
        [
            (here / "file", b"directory"),
            (here / "file", b"plain file/below"),
            (here / "file", b"n" * 256),
            (here / "missing", b"never"),
            (here / "good", b"good"),
        ],
    )
    kinds = [failure.kind for failure in result.failed]
    assert sorted(kinds) == ["not_found", "refused", "refused", "storage"]
    assert all(failure.path and failure.message for failure in result.failed)
    assert (result.files, result.bytes) == (1, 4)
    assert (there / "good").read_bytes() == b"good"
    assert sorted(os.listdir(there)) == ["directory", "good", "plain file"]
    no_leftovers()
    assert pair.near.error is None


def test_a_full_disk_fails_the_file_and_leaves_nothing(
    net: Any, here: Path, there: Path, no_leftovers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many lanes find out at once, while more chunks of the same file are on their way."""
    import errno

    import amst_core.files.sink as sink

    (here / "big").write_bytes(os.urandom(20 * MIB))
    (here / "small").write_bytes(b"small")
    pwrite = os.pwrite

    class FullOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def pwrite(self, fd: int, data: Any, offset: int) -> int:
            if offset >= 4 * MIB:
                raise OSError(errno.ENOSPC, "No space left on device")
            return pwrite(fd, data, offset)

    monkeypatch.setattr(sink, "os", FullOs())
    pair = net.pair(streams=4, root=there, server={"limits__open_transfers": 1})
    for _ in range(5):
        with pytest.raises(StorageError, match="No space left"):
            pair.near.send_file(here / "big", "big")
        pair.near.send_file(here / "small", "small")
    assert os.listdir(there) == ["small"]
    no_leftovers()
    assert pair.near.error is None and pair.far.error is None


class Held:
    """Makes every read of a file's content wait, once some of it has been read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        read_into = FileSource.read_into

        def holding(source: FileSource, offset: int, view: memoryview) -> None:
            if name in source.name and offset > 0:
                self.reached.set()
                assert self.go_on.wait(20)
            read_into(source, offset, view)

        monkeypatch.setattr(FileSource, "read_into", holding)


def _shrink(path: Path) -> None:
    os.truncate(path, MIB)


def _grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"changed")


@pytest.mark.parametrize("change", [_shrink, _grow, _rewrite])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_source_that_changes_while_it_is_sent_is_not_delivered(
    net: Any,
    spawn: Any,
    here: Path,
    there: Path,
    no_leftovers: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    direction: str,
) -> None:
    source, target = (here, there) if direction == "up" else (there, here)
    tree = source / "tree"
    tree.mkdir()
    (tree / "changing").write_bytes(os.urandom(4 * MIB))
    for i in range(5):
        (tree / f"good{i}").write_bytes(os.urandom(100_000))
    held = Held(monkeypatch, "changing")
    pair = net.pair(root=there)
    if direction == "up":
        task = spawn(upload, pair.near, [(tree, b"copy")])
    else:
        task = spawn(download, pair.near, [(b"tree", here / "copy")])
    assert held.reached.wait(20)
    change(tree / "changing")
    held.go_on.set()
    result = task.outcome()
    assert [(failure.kind, os.path.basename(failure.path)) for failure in result.failed] == [
        ("source_changed", "changing")
    ]
    assert result.files == 5
    no_leftovers()
    assert sorted(os.listdir(target / "copy")) == [f"good{i}" for i in range(5)]
    for i in range(5):
        assert (target / "copy" / f"good{i}").read_bytes() == (tree / f"good{i}").read_bytes()
    no_leftovers()


def test_a_source_that_is_replaced_while_it_is_sent_arrives_as_it_was(
    net: Any, spawn: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(4 * MIB)
    (here / "replaced").write_bytes(data)
    held = Held(monkeypatch, "replaced")
    pair = net.pair(root=there)
    task = spawn(pair.near.send_file, here / "replaced", "copy")
    assert held.reached.wait(20)
    (here / "new").write_bytes(b"new")
    os.rename(here / "new", here / "replaced")
    held.go_on.set()
    task.outcome()
    assert (there / "copy").read_bytes() == data


def test_a_source_that_vanishes_before_its_turn_is_reported(
    net: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amst_core.files.root import Root

    read_file = Root.read_file

    def vanishing(root: Root, path: bytes, *args: Any, **named: Any) -> os.stat_result | None:
        if path.endswith(b"gone"):
            (source / "tree" / "gone").unlink()
        return read_file(root, path, *args, **named)

    monkeypatch.setattr(Root, "read_file", vanishing)
    pair = net.pair(root=there)
    ways: list[tuple[Path, Callable[[], CopyResult], Path]] = [
        (here, lambda: upload(pair.near, [(here / "tree", b"up")]), there / "up"),
        (there, lambda: download(pair.near, [(b"tree", here / "down")]), here / "down"),
    ]
    for source, copy, where in ways:
        (source / "tree").mkdir()
        for name in ("a", "gone", "z"):
            (source / "tree" / name).write_bytes(name.encode())
        result = copy()
        assert [(f.kind, os.path.basename(f.path)) for f in result.failed] == [("not_found", "gone")]
        assert sorted(os.listdir(where)) == ["a", "z"]


def test_a_failed_download_is_in_the_result_however_late_it_is_noticed(
    net: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's reply arrives before this side has dealt with the failure of an entry."""
    from amst_core.session.endpoints import TreeEntrySink

    (there / "file").write_bytes(b"x")
    abort = TreeEntrySink.abort

    def changed(source: FileSource) -> None:
        raise SourceChangedError("it changed")

    def slow(sink: TreeEntrySink, reason: AmstError, *, keep: bool = False) -> None:
        threading.Event().wait(0.2)
        abort(sink, reason, keep=keep)

    monkeypatch.setattr(FileSource, "verify", changed)
    monkeypatch.setattr(TreeEntrySink, "abort", slow)
    pair = net.pair(root=there)
    with pytest.raises(SourceChangedError):
        pair.near.recv_file("file", here / "copy")
    assert os.listdir(here) == []


def test_what_is_neither_file_nor_directory_nor_link_is_refused(net: Any, here: Path, there: Path) -> None:
    os.mkfifo(here / "fifo")
    os.mkfifo(there / "fifo")
    pair = net.pair(root=there)
    with pytest.raises(RefusedError, match="FIFO"):
        pair.near.send_file(here / "fifo", "copy")
    with pytest.raises(RefusedError, match="FIFO"):
        pair.near.recv_file("fifo", here / "copy")


# ---- nothing leaves the root -----------------------------------------------------------------------


BAD_PATHS = [b"../evil", b"..", b"/tmp/evil", b"a/../../evil", b"a\0b", b"a//b", b".", b"a/./b", b".amst-evil", b""]


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
@pytest.mark.parametrize("kind", list(EntryType))
def test_a_path_that_leaves_the_root_is_refused_by_the_receiver(
    net: Any, tmp_path: Path, there: Path, path: bytes, kind: EntryType
) -> None:
    """Spoken directly: this side's own checks are passed by."""
    pair = net.pair(root=there, client_root=there)
    before = sorted(os.listdir(tmp_path))
    entry = Entry(path, kind, 0o644, 0, target=b"/etc/passwd" if kind is EntryType.SYMLINK else b"")
    size = 5 if kind is EntryType.FILE else 0
    for session in pair.ends:
        ticket = session.core.open(
            FILE, MemorySource(memoryview(b"12345"[:size])), size=size, flow="evil", attributes=to_attributes(entry)
        )
        with pytest.raises((RefusedError, StorageError)):
            ticket.wait(20)
    assert pair.near.error is None and pair.far.error is None
    assert os.listdir(there) == []
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("path", [path for path in BAD_PATHS if path], ids=repr)
@pytest.mark.parametrize("operation", ["stat", "fetch", "measure"])
def test_a_path_that_leaves_the_root_is_refused_to_a_reader(net: Any, there: Path, path: bytes, operation: str) -> None:
    pair = net.pair(root=there)
    with pytest.raises((RefusedError, StorageError)):
        pair.near.requests.ask(operation, {"path": path}).wait(20)
    assert pair.near.error is None


@pytest.mark.parametrize("remote", ["../evil", "a/../../evil", "a\0b"])
def test_such_paths_are_refused_before_anything_is_sent(net: Any, here: Path, there: Path, remote: str) -> None:
    (here / "f").touch()
    pair = net.pair(root=there)
    calls: list[Callable[[], object]] = [
        lambda: pair.near.send_file(here / "f", remote),
        lambda: pair.near.recv_file(remote, here / "g"),
        lambda: pair.near.stat(remote),
    ]
    for call in calls:
        with pytest.raises(RefusedError):
            call()
    assert os.listdir(here) == ["f"]


def test_a_link_inside_the_root_is_not_followed(net: Any, tmp_path: Path, here: Path, there: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    os.symlink(outside, there / "door")
    os.symlink(outside / "precious", there / "window")
    (here / "f").write_bytes(b"evil")
    pair = net.pair(root=there)
    calls: list[Callable[[], object]] = [
        lambda: pair.near.send_file(here / "f", "door/new"),
        lambda: pair.near.send_file(here / "f", "door/precious"),
        lambda: pair.near.recv_file("door/precious", here / "stolen"),
        lambda: pair.near.stat("door/precious"),
    ]
    for call in calls:
        with pytest.raises(RefusedError):
            call()
    pair.near.send_file(here / "f", "window")  # replaced, never written through
    assert (there / "window").read_bytes() == b"evil" and not (there / "window").is_symlink()
    assert os.listdir(outside) == ["precious"]
    assert (outside / "precious").read_bytes() == b"precious"
    assert not (here / "stolen").exists()
    pair.near.recv_file("door", here / "door")  # a link named as a source is copied as a link
    assert os.readlink(here / "door") == os.fspath(outside)


def test_a_link_that_a_peer_planted_is_not_followed_afterwards(
    net: Any, tmp_path: Path, here: Path, there: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    os.symlink(outside, here / "door")
    (here / "f").write_bytes(b"evil")
    pair = net.pair(root=there)
    pair.near.send_file(here / "door", "door")
    assert os.readlink(there / "door") == os.fspath(outside)
    with pytest.raises(RefusedError):
        pair.near.send_file(here / "f", "door/f")
    assert os.listdir(outside) == []


def test_the_state_directory_is_out_of_reach_even_below_the_root(net: Any, tmp_path: Path, here: Path) -> None:
    pair = net.pair(root=tmp_path)
    name = net.state_dir.name
    with pytest.raises(RefusedError):
        pair.near.recv_file(f"{name}/token", here / "token")
    (here / "token").write_bytes(b"mine")
    with pytest.raises(RefusedError):
        pair.near.send_file(here / "token", f"{name}/token")


def test_without_a_root_nothing_is_served(net: Any, here: Path) -> None:
    (here / "f").write_bytes(b"x")
    pair = net.pair()
    calls: list[Callable[[Any], object]] = [
        lambda session: session.send_file(here / "f", "f"),
        lambda session: session.recv_file("f", here / "g"),
        lambda session: session.stat("f"),
    ]
    for session in pair.ends:
        for call in calls:
            with pytest.raises(RefusedError, match="no files"):
                call(session)
    pair.near.send(b"messages still go").wait(20)


def test_a_file_that_was_not_asked_for_is_refused(net: Any, there: Path) -> None:
    pair = net.pair(root=there)
    ticket = pair.far.core.open(
        FILE,
        MemorySource(memoryview(b"12345")),
        size=5,
        flow="evil",
        request=77,
        attributes=to_attributes(Entry(b"x", EntryType.FILE, 0o644, 0)),
    )
    with pytest.raises(RefusedError, match="nobody"):
        ticket.wait(20)


def test_too_many_tree_operations_at_once_are_refused_and_counted_down(
    net: Any, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import amst_core.session.service as service

    go_on = threading.Event()
    measure = service.measure

    def waiting(*args: Any) -> Any:
        assert go_on.wait(20)
        return measure(*args)

    monkeypatch.setattr(service, "measure", waiting)
    pair = net.pair(root=there)
    asked = [pair.near.requests.ask("measure", {"path": b""}) for _ in range(service.MAX_LONG_RUNNING)]
    with pytest.raises(BusyError):
        pair.near.requests.ask("measure", {"path": b""}).wait(20)
    go_on.set()
    for request in asked:
        assert request.wait(20)["total_files"] == 0
    pair.near.requests.ask("measure", {"path": b""}).wait(20)


# ---- the session ends in the middle ----------------------------------------------------------------


@pytest.mark.parametrize("who", ["near", "far"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_file_goes_on_where_a_session_that_ended_left_it(
    net: Any,
    spawn: Any,
    here: Path,
    there: Path,
    no_leftovers: Any,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
    direction: str,
) -> None:
    source = here if direction == "up" else there
    (source / "tree").mkdir()
    done = os.urandom(PACKED_UP_TO + 1)  # what is packed may go after what comes behind it
    (source / "tree" / "done").write_bytes(done)
    (source / "tree" / "held").write_bytes(os.urandom(4 * MIB))
    held = Held(monkeypatch, "held")
    pair = net.pair(root=there)
    if direction == "up":
        task = spawn(upload, pair.near, [(here / "tree", b"copy")])
        target = there / "copy"
    else:
        task = spawn(download, pair.near, [(b"tree", here / "copy")])
        target = here / "copy"
    assert held.reached.wait(20)
    net.wait_until(lambda: (target / "done").exists(), "the first file")
    receiver = (pair.far if direction == "up" else pair.near).core.engine
    arrived = 64 * 1024 + len(done)  # what needs no credit, and the other file
    net.wait_until(lambda: receiver.bytes_verified >= arrived, "the beginning of the second")
    getattr(pair, who).abort()
    held.go_on.set()
    error = task.error()
    assert isinstance(error, ClosedError)
    assert isinstance(error.partial, CopyResult) and error.partial.files <= 1
    assert pair.near.wait_closed(10) and pair.far.wait_closed(10)
    assert [name for name in os.listdir(target) if not name.startswith(".amst-")] == ["done"]
    server = net.server(root=there)
    again = net.connect(server)
    if direction == "up":
        copy = upload(again, [(here / "tree", b"copy")])
    else:
        copy = download(again, [(b"tree", here / "copy")])
    assert (target / "held").read_bytes() == (source / "tree" / "held").read_bytes()
    assert (copy.files, copy.bytes) == (2, 4 * MIB + len(done))
    assert copy.resumed_bytes >= arrived
    no_leftovers()


def test_what_a_crc_has_verified_is_not_read_again_for_the_journal(
    net: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []

    def counting(data: memoryview, value: int = 0) -> int:
        computed.append(len(data))
        return crc32c(data, value)

    monkeypatch.setattr(journal, "crc32c", counting)
    (here / "file").write_bytes(os.urandom(8 * MIB))
    pair = net.pair(plaintext=True, root=there)
    assert upload(pair.near, [(here / "file", b"copy")]).failed == ()
    assert (there / "copy").read_bytes() == (here / "file").read_bytes()
    assert 0 < max(computed) < 128 << 10, "but for chunks that are shorter"


def test_cancelling_a_file_removes_what_had_arrived(
    net: Any, here: Path, there: Path, no_leftovers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "held").write_bytes(os.urandom(4 * MIB))
    held = Held(monkeypatch, "held")
    pair = net.pair(root=there)
    task_error: list[BaseException] = []

    def send() -> None:
        try:
            pair.near.send_file(here / "held", "copy")
        except AmstError as err:
            task_error.append(err)

    thread = threading.Thread(target=send)
    thread.start()
    assert held.reached.wait(20)
    net.wait_until(lambda: list(there.glob(".amst-*")), "the temporary file")
    (ticket,) = pair.near.core.unfinished()
    ticket.cancel()
    held.go_on.set()
    thread.join(20)
    assert isinstance(task_error[0], CancelledError)
    no_leftovers()
    assert os.listdir(there) == []
