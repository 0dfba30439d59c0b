"""Small files travel in packs: as they were, each with its own fate, and never more than was agreed on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from amst_core.engine.outgoing import Outgoing
from amst_core.errors import AmstError, BusyError, ClosedError, ProtocolError, RefusedError, StorageError
from amst_core.files import root as files_root
from amst_core.files.entries import MAX_ROWS, Entry, EntryType, encode_row
from amst_core.files.journal import Fsync
from amst_core.files.root import Root
from amst_core.session import packs
from amst_core.session.copying import CopyFailure, CopyResult, download, upload
from amst_core.session.core import SessionCore
from amst_core.session.endpoints import MemorySource
from amst_core.session.sending import TreeSender
from amst_core.wire import requests as ops
from amst_core.wire.messages import PACK

from .test_files import described, here, make_tree, no_leftovers, there

__all__ = ["here", "no_leftovers", "there"]  # fixtures

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kinds of transfers that are opened, whoever does."""
    kinds: list[int] = []
    open_ = SessionCore.open

    def counting(core: SessionCore, kind: int, *args: Any, **named: Any) -> Any:
        kinds.append(kind)
        return open_(core, kind, *args, **named)

    monkeypatch.setattr(SessionCore, "open", counting)
    return kinds


def make_many(top: Path, *, count: int = 600, size: int = 3000) -> None:
    for number in range(count):
        directory = top / f"{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number}").write_bytes(os.urandom(number % size))


def copy(pair: Any, direction: str, here: Path, there: Path) -> CopyResult:
    """Copy ``tree`` to ``copy``, up or down."""
    if direction == "up":
        return upload(pair.near, [(here / "tree", b"copy")])
    return download(pair.near, [(b"tree", here / "copy")])


@pytest.mark.parametrize("direction", ["up", "down"])
def test_many_small_files_are_few_transfers(
    net: Any, here: Path, there: Path, opened: list[int], no_leftovers: Any, direction: str
) -> None:
    source, target = (here, there) if direction == "up" else (there, here)
    make_many(source / "tree")
    result = copy(net.pair(root=there), direction, here, there)
    assert described(target / "copy") == described(source / "tree")
    assert (result.files, result.failed) == (600, ())
    assert result.bytes == sum(path.stat().st_size for path in (source / "tree").rglob("*") if path.is_file())
    assert set(opened) == {PACK} and len(opened) < 10
    no_leftovers()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_pack_that_comes_in_pieces(
    net: Any, here: Path, there: Path, no_leftovers: Any, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    """So short that files begin and end in the middle of chunks, and some take several."""
    take = Outgoing.take
    monkeypatch.setattr(Outgoing, "take", lambda out, most: take(out, min(most, 4999)))
    source, target = (here, there) if direction == "up" else (there, here)
    make_many(source / "tree", count=100, size=20_000)
    make_tree(source / "tree" / "everything")
    result = copy(net.pair(streams=3, root=there), direction, here, there)
    assert result.failed == ()
    assert described(target / "copy") == described(source / "tree")
    no_leftovers()


def test_a_file_alone_is_no_pack(net: Any, here: Path, there: Path, opened: list[int]) -> None:
    (here / "tree").mkdir()
    (here / "tree" / "file").write_bytes(b"x")
    net.pair(root=there).near.send_file(here / "tree" / "file", "copy")
    assert PACK not in opened


def test_where_something_is_there_already_each_file_is_asked_for(
    net: Any, here: Path, there: Path, opened: list[int]
) -> None:
    make_many(here / "tree", count=50)
    pair = net.pair(root=there)
    copy(pair, "up", here, there)
    before = opened.count(PACK)
    size = sum(path.stat().st_size for path in (here / "tree").rglob("*") if path.is_file())
    result = copy(pair, "up", here, there)
    assert (result.resumed_bytes, result.files) == (size, 50)
    assert opened.count(PACK) == before


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_cannot_be_kept_tells_its_own_reason_and_the_rest_arrives(
    net: Any, here: Path, there: Path, direction: str
) -> None:
    """A path that is short enough where it comes from, and too long where it goes."""
    source, target = (here, there) if direction == "up" else (there, here)
    deep = b"/".join([b"d" * 250] * 16)
    make_many(source / "tree", count=20)
    fd = os.open(source / "tree", os.O_PATH)
    for name in deep.split(b"/"):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    name = "n" * 100
    pair = net.pair(root=there)
    if direction == "up":
        result = upload(pair.near, [(here / "tree", os.fsencode(name))])
    else:
        result = download(pair.near, [(b"tree", here / name)])
    assert {failure.kind for failure in result.failed} == {StorageError.kind}
    assert any(failure.path.endswith("/file") for failure in result.failed)
    assert (result.files, len(list((target / name).glob("?/*")))) == (20, 20)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_file_that_changes_while_it_is_read_fails_alone(
    net: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    source, target = (here, there) if direction == "up" else (there, here)
    make_many(source / "tree", count=20)
    victim = source / "tree" / "3" / "10"
    readv = os.readv

    def changing(fd: int, buffers: Any) -> int:
        if os.path.samestat(os.fstat(fd), victim.stat()):
            victim.write_bytes(b"changed")
        return readv(fd, buffers)

    monkeypatch.setattr(files_root.os, "readv", changing)
    result = copy(net.pair(root=there), direction, here, there)
    (failure,) = result.failed
    assert (failure.kind, failure.path[-4:]) == ("source_changed", "3/10")
    assert result.files == 19
    assert not (target / "copy" / "3" / "10").exists()


def test_the_memory_of_packs_is_counted_and_comes_back(net: Any, here: Path, there: Path) -> None:
    make_many(here / "tree", count=3000)
    pair = net.pair(root=there)
    memory = pair.near.core.memory
    most = 0

    def look(core: Any, *args: Any) -> None:
        nonlocal most
        most = max(most, memory.copied)

    with Root(here) as root:
        sender = TreeSender(pair.near.core, root, b"tree")
        sender.on_done = look
        assert sender.send(b"copy") == []
    assert packs.PACK_BYTES <= most <= packs.PACKS_AT_ONCE * packs.PACK_BYTES + packs.PACK_BYTES
    net.wait_until(lambda: not memory.copied, "the memory to come back")


def test_without_memory_for_packs_files_go_one_by_one(
    net: Any, here: Path, there: Path, opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_many(here / "tree", count=50)
    pair = net.pair(root=there)
    monkeypatch.setattr(pair.near.core.memory, "reserve_pipe", lambda size, own: False)
    assert copy(pair, "up", here, there).failed == ()
    assert described(there / "copy") == described(here / "tree")
    assert PACK not in opened


def test_a_small_file_with_holes_keeps_them(net: Any, here: Path, there: Path) -> None:
    (here / "tree").mkdir()
    for name in ("a", "b"):
        with open(here / "tree" / name, "wb") as file:
            file.seek(200 << 10)
            file.write(b"end")
    assert copy(net.pair(root=there), "up", here, there).failed == ()
    for name in ("a", "b"):
        source, target = ((top / name).stat() for top in (here / "tree", there / "copy"))
        assert target.st_blocks <= source.st_blocks < 200 * 2


@pytest.mark.parametrize("unnamed", [False, True])
def test_what_has_the_name_of_a_file_is_replaced_whole_or_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.setattr(files_root, "_UNNAMED", os.O_WRONLY | os.O_DIRECTORY)  # EISDIR, as old kernels answer
    entry = Entry(b"", EntryType.FILE, 0o640, 7, 3)
    (tmp_path / "file").write_bytes(b"older")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "directory").mkdir()
    with Root(tmp_path) as root, files_root.Parents(root, create=True) as parents:
        for name in (b"link", b"new", b"below/new"):
            root.put_file(name, entry, memoryview(b"abc"), parents=parents)
        with pytest.raises(RefusedError):
            root.put_file(b"directory", entry, memoryview(b"abc"), parents=parents)
    assert (tmp_path / "file").read_bytes() == b"older"
    for name in ("link", "new", "below/new"):
        status = (tmp_path / name).lstat()
        assert (tmp_path / name).read_bytes() == b"abc"
        assert (status.st_mode & 0o7777, status.st_mtime_ns, status.st_nlink) == (0o640, 7, 1)
    assert not list(tmp_path.rglob(".amst-*"))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_where_each_file_is_synced_nothing_is_packed(
    net: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch, opened: list[int], direction: str
) -> None:
    """Hundreds of syncs in a row would hold up the lane that brought the pack."""
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(files_root.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd))[1])
    source, target = (here, there) if direction == "up" else (there, here)
    make_many(source / "tree", count=20)
    pair = net.pair(root=there)
    (pair.far if direction == "up" else pair.near).core.fsync = Fsync.END
    assert copy(pair, direction, here, there).failed == ()
    assert described(target / "copy") == described(source / "tree")
    for path in (target / "copy").rglob("*"):
        assert path.stat().st_ino in synced
    assert opened.count(PACK) <= 1, "once refused, no other is tried"


def test_a_directory_that_must_go_again_comes_before_the_one_above_it(
    net: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its coming would change the time of that, or be forbidden by its mode."""
    monkeypatch.setattr(packs, "MAX_ROWS", 3)
    for number in range(12):
        (here / "tree" / f"{number:02}" / "below").mkdir(parents=True)
        (here / "tree" / f"{number:02}").chmod(0o555)
    for path in sorted((here / "tree").rglob("*"), reverse=True):
        os.utime(path, ns=(5, 5))
    finish, refused = packs.PackSink.finish, []

    def refusing(sink: packs.PackSink, total: int) -> None:
        if len(refused) < 2:
            refused.append(sink)
            raise StorageError("the first ones are not to be had")
        finish(sink, total)

    monkeypatch.setattr(packs.PackSink, "finish", refusing)
    assert copy(net.pair(root=there), "up", here, there).failed == ()
    assert len(refused) == 2
    assert described(there / "copy") == described(here / "tree")


def test_the_end_of_the_session_names_what_had_not_arrived(
    net: Any, spawn: Any, here: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_many(here / "tree", count=20)
    pair = net.pair(root=there)
    put_file = Root.put_file

    def cut(root: Root, *args: Any, **named: Any) -> None:
        pair.near.abort()
        put_file(root, *args, **named)

    monkeypatch.setattr(Root, "put_file", cut)
    error = spawn(copy, pair, "up", here, there).error()
    assert isinstance(error, ClosedError)
    assert isinstance(error.partial, CopyResult)
    failed = {failure for failure in error.partial.failed}
    assert len(failed) == 20 and all(isinstance(failure, CopyFailure) for failure in failed)
    assert {os.path.basename(failure.path) for failure in failed} == {str(number) for number in range(20)}


def test_stopping_gives_up_the_packs_under_way(net: Any, spawn: Any, here: Path, there: Path, monkeypatch: Any) -> None:
    from amst_core.session.copying import Stop

    make_many(here / "tree", count=20)
    pair = net.pair(root=there)
    stop = Stop()
    store = packs.PackSink.store

    def stopping(*args: Any) -> None:
        stop.cancel()
        store(*args)

    monkeypatch.setattr(packs.PackSink, "store", stopping)
    result = upload(pair.near, [(here / "tree", b"copy")], stop=stop)
    assert {failure.kind for failure in result.failed} <= {"cancelled"}
    assert result.files + len(result.failed) == 20
    assert pair.near.error is None


# ---- peers that say what makes no sense ------------------------------------------------------------


def table(*entries: Entry) -> bytes:
    return b"".join(encode_row(entry, entry.path) for entry in entries)


FILE_5 = Entry(b"x", EntryType.FILE, 0o644, 0, 5)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (None, ProtocolError),
        (b"", ProtocolError),
        (b"\0\0", ProtocolError),
        (b"\0" * (packs.MAX_TABLE + 1), ProtocolError),
        (table(FILE_5)[:-1], ProtocolError),
        (b"\3" + table(FILE_5)[1:], ProtocolError),
        (table(FILE_5, FILE_5), ProtocolError),  # twice as many bytes
        (table(), ProtocolError),
        (table(Entry(b"../x", EntryType.FILE, 0o644, 0, 5)), RefusedError),
        (table(Entry(b"/x", EntryType.FILE, 0o644, 0, 5)), RefusedError),
        (table(Entry(b"a", EntryType.SYMLINK, 0, 0, target=b"/etc"), Entry(b"a/x", EntryType.FILE, 0o644, 0, 5)),
         RefusedError),
    ],
    ids=["none", "empty", "garbage", "long", "cut", "type", "more", "nothing", "above", "absolute", "link"],
)  # fmt: skip
def test_a_pack_that_makes_no_sense_is_refused(
    net: Any, there: Path, tmp_path: Path, entries: bytes | None, expected: type[AmstError]
) -> None:
    """Nothing outside the root is written, and a session of files is not ended by it."""
    (there / "a").symlink_to(tmp_path)
    pair = net.pair(root=there)
    before = sorted(os.listdir(tmp_path))
    attributes = {} if entries is None else {ops.ENTRIES: entries}
    try:
        ticket = pair.near.core.open(
            PACK, MemorySource(memoryview(b"12345")), size=5, flow="evil", attributes=attributes
        )
        with pytest.raises(expected):
            ticket.wait(20)
    except ClosedError:
        assert entries is None
    assert sorted(os.listdir(tmp_path)) == before
    assert not (there / "x").exists()


def test_more_packs_than_a_session_may_have_are_refused(net: Any, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = net.pair(root=there)
    pair.near.limit_rate(16 << 10)  # none of them gets on
    tickets = [
        pair.near.core.open(
            PACK,
            MemorySource(memoryview(bytearray(1 << 20))),
            size=1 << 20,
            flow=number,
            attributes={ops.ENTRIES: table(Entry(b"%d" % number, EntryType.FILE, 0o644, 0, 1 << 20))},
        )
        for number in range(packs.MAX_PACKS + 1)
    ]
    with pytest.raises(BusyError):
        tickets[-1].wait(20)
    for ticket in tickets[:-1]:
        assert not ticket.done
        ticket.cancel()
    pair.near.limit_rate(None)

    def is_taken() -> bool:
        again = pair.near.core.open(
            PACK, MemorySource(memoryview(b"12345")), size=5, flow=0, attributes={ops.ENTRIES: table(FILE_5)}
        )
        with suppress(BusyError):
            again.wait(20)
            return True
        return False

    net.wait_until(is_taken, "room, once the others have ended")
    assert (there / "x").read_bytes() == b"12345"


def test_more_files_in_part_than_a_session_may_have_are_refused(
    net: Any, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs descriptors until the pack is whole."""
    monkeypatch.setattr(packs, "MAX_PARTS", 10)
    monkeypatch.setattr(Outgoing, "take", lambda out, most, take=Outgoing.take: take(out, 3))
    pair = net.pair(root=there)
    rows = table(*(Entry(b"%d" % number, EntryType.FILE, 0o644, 0, 2) for number in range(100)))
    ticket = pair.near.core.open(
        PACK, MemorySource(memoryview(bytearray(200))), size=200, flow=0, attributes={ops.ENTRIES: rows}
    )
    with pytest.raises(BusyError, match="part"):
        ticket.wait(20)

    def takes_another() -> bool:
        """Once the parts of the first are gone, which is soon after it was refused."""
        again = pair.near.core.open(
            PACK, MemorySource(memoryview(b"12345")), size=5, flow=0, attributes={ops.ENTRIES: table(FILE_5)}
        )
        try:
            again.wait(20)
        except BusyError:
            return False
        return True

    net.wait_until(takes_another, "room for another")
    assert not list(there.glob(".amst-*"))


def test_a_table_has_a_bounded_number_of_rows(net: Any, there: Path) -> None:
    rows = table(*(Entry(b"%d" % number, EntryType.FILE, 0o644, 0) for number in range(MAX_ROWS + 1)))
    ticket = net.pair(root=there).near.core.open(
        PACK, MemorySource(memoryview(b"")), size=0, flow=0, attributes={ops.ENTRIES: rows}
    )
    with pytest.raises(ProtocolError, match="more than"):
        ticket.wait(20)


def test_a_side_without_a_root_takes_no_packs(net: Any) -> None:
    ticket = net.pair().near.core.open(
        PACK, MemorySource(memoryview(b"12345")), size=5, flow=0, attributes={ops.ENTRIES: table(FILE_5)}
    )
    with pytest.raises(RefusedError):
        ticket.wait(20)
