"""Lists below a root: the same order and the same entries, however they are cut into pages and names come in turns."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from amst_core.errors import AmstError, NotFoundError, RefusedError
from amst_core.files import listing
from amst_core.files.entries import Entry, EntryType, WalkError
from amst_core.files.listing import Listing
from amst_core.files.root import Root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "top"
    (top / "a" / "deep").mkdir(parents=True)
    (top / "a" / "deep" / "leaf").write_bytes(b"12345")
    (top / "a.b").touch()
    (top / "a" / "z").touch()
    (top / "empty").mkdir()
    (top / "link").symlink_to("a")
    (top / ".amst-0123.part").touch()
    Path(os.fsdecode(os.fsencode(top) + b"/\xff\n")).touch()
    for number in range(20):
        (top / "a" / f"n{number:02}").touch()
    return top


def in_pages(lists: Listing, path: bytes, size: int, *, recursive: bool) -> list[Entry | WalkError]:
    """All of it, asked for ``size`` entries at a time: 2 at least, for the first has no path to go on after."""
    found: list[Entry | WalkError] = []
    after = b""
    while True:
        entries = lists.entries(path, after=after, recursive=recursive)
        page = list(itertools.islice(entries, size))
        entries.close()
        found += page
        if len(page) < size:
            return found
        after = page[-1].path


EXPECTED = [
    b"", b"a", b"a/deep", b"a/deep/leaf", *[b"a/n%02d" % number for number in range(20)], b"a/z", b"a.b", b"empty",
    b"link", b"\xff\n",
]  # fmt: skip


@pytest.mark.parametrize("names", [1, 3, 4096])
@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_pages_make_the_whole_whatever_their_size(
    tree: Path, size: int, names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "NAMES_KEPT", names)
    monkeypatch.setattr(listing, "_NAMES_HELD", 2 * names)
    with Root(tree) as root:
        lists = Listing(root)
        assert [found.path for found in in_pages(lists, b"", size, recursive=True)] == EXPECTED
        flat = [path for path in EXPECTED if b"/" not in path]
        assert [found.path for found in in_pages(lists, b"", size, recursive=False)] == flat
        assert [found.path for found in in_pages(lists, b"a/deep", size, recursive=True)] == [b"", b"leaf"]


def test_a_directory_of_any_size_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "NAMES_KEPT", 50)
    held = []
    read_names = Listing._read_names

    def reading(self: Listing, level: listing._Level, base: bytes) -> None:
        read_names(self, level, base)
        held.append(len(level.names))

    monkeypatch.setattr(Listing, "_read_names", reading)
    for number in range(1000):
        (tmp_path / f"{number:04}").touch()
    with Root(tmp_path) as root:
        found = in_pages(Listing(root), b"", 30, recursive=False)
    assert len(found) == 1001
    assert max(held) == 50
    assert len(held) == 21, "what a page does not get to is kept for the next one"


def test_what_an_entry_tells(tree: Path) -> None:
    (tree / "a.b").write_bytes(b"123")
    (tree / "a.b").chmod(0o640)
    os.utime(tree / "a.b", ns=(0, 5))
    with Root(tree) as root:
        found = {entry.path: entry for entry in Listing(root).entries(b"")}
    assert found[b"a.b"] == Entry(b"a.b", EntryType.FILE, 0o640, 5, 3)
    link = found[b"link"]
    assert isinstance(link, Entry) and (link.type, link.target) == (EntryType.SYMLINK, b"a")


@pytest.mark.parametrize("after", [b"a", b"a/deep", b"a/deep/leaf", b"a/n07", b"gone", b"gone/too", b"link/x"])
def test_what_the_last_page_ended_with_may_be_gone(tree: Path, after: bytes) -> None:
    with Root(tree) as root:
        lists = Listing(root)
        found = [entry.path for entry in lists.entries(b"", after=after, recursive=True)]
        assert found == [path for path in EXPECTED if path.split(b"/") > after.split(b"/") and path]


def test_special_files_and_what_cannot_be_entered_come_as_errors_once(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with Root(tree, forbidden=[]) as root:
        found = in_pages(Listing(root), b"", 2, recursive=True)
    errors = [item for item in found if isinstance(item, WalkError)]
    assert [(item.path, type(item.error)) for item in errors] == [(b"pipe", RefusedError)]
    assert sorted(item.path.split(b"/") for item in found) == [item.path.split(b"/") for item in found]


def test_forbidden_directories_do_not_come(tree: Path) -> None:
    about = (tree / "empty").stat()
    with Root(tree, forbidden=[(about.st_dev, about.st_ino)]) as root:
        lists = Listing(root)
        assert b"empty" not in [found.path for found in lists.entries(b"", recursive=True)]
        with pytest.raises(RefusedError):
            list(lists.entries(b"empty"))


@pytest.mark.parametrize(
    ("path", "error"),
    [(b"nothing", NotFoundError), (b"link/deep", RefusedError), (b"../top", RefusedError), (b"a/../a", RefusedError)],
)
def test_a_path_out_of_reach(tree: Path, path: bytes, error: type[AmstError]) -> None:
    with Root(tree) as root, pytest.raises(error):
        next(Listing(root).entries(path))


def test_a_file_and_a_link_are_a_list_of_one(tree: Path) -> None:
    with Root(tree) as root:
        for path in (b"a.b", b"link"):
            assert [found.path for found in Listing(root).entries(path, recursive=True)] == [b""]
            assert list(Listing(root).entries(path, after=b"x")) == []
