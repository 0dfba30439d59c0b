"""Disks and sources that fail: one file fails for its reason, with its exit code, and the others arrive."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_until

from .conftest import (
    MIB,
    Copy,
    Lab,
    Watch,
    assert_arrived,
    digest,
    journaled,
    kept,
    leftovers,
    listing,
    make_big,
)
from .disks import read_only, require_mounts, small
from .proxy import LANE, UP, proxied

pytestmark = pytest.mark.needs_transport

FINE = ("--set", "transport.amst.chunk_size_kb=256")
WAYS = ("up", "down")


def failed_files(report: dict[str, object]) -> dict[str, str]:
    """Kinds of what failed, by the last component of the name."""
    failed = report["failed"]
    assert isinstance(failed, list)
    return {item["path"].rpartition("/")[2]: item["kind"] for item in failed}


def small_files(top: Path, number: int = 20) -> list[Path]:
    return [make_big(top / f"small{n:02}", 10_000 + n) for n in range(number)]


# ---- the target -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_fails_the_file_that_does_not_fit(way: str, lab: Lab) -> None:
    """The others go first here: what comes while the disk is full fails as well."""
    require_mounts()
    tree = lab.home / "served" / "tree"
    files = small_files(tree)
    big = make_big(tree / "zbig", 12 * MIB)
    target = lab.home / "target"
    target.mkdir()
    with small(target, 8 * MIB):
        server = lab.serve(target if way == "up" else tree.parent, *FINE)
        names = (tree, f"{server.url}/") if way == "up" else (f"{server.url}/tree", target)
        with Watch(tree, target / "tree"):
            copy = lab.cp(*FINE, "--bwlimit", "20MB/s", *names)
            report = copy.fails(1, "storage")
        assert failed_files(report) == {"zbig": "storage"}
        assert "zbig" in copy.err and os.strerror(errno.ENOSPC) in copy.err
        assert sorted(path.name for path in (target / "tree").iterdir()) == [path.name for path in files]
        for path in files:
            assert digest(target / "tree" / path.name) == digest(path)
        assert leftovers(target) == []
        big.unlink()  # what fits can still be copied there
        lab.cp(*FINE, *names).succeeds()
        server.kill()


@pytest.mark.parametrize("way", WAYS)
def test_a_target_that_cannot_be_written_is_6_and_nothing_is_made(way: str, lab: Lab) -> None:
    require_mounts()
    source = make_big(lab.home / "served" / "file", 3 * MIB)
    target = lab.home / "target"
    target.mkdir()
    with read_only(target):
        server = lab.serve(target if way == "up" else source.parent)
        copy = lab.cp(*((source, f"{server.url}/") if way == "up" else (f"{server.url}/file", target)))
        copy.fails(6, "refused")
        assert os.strerror(errno.EROFS) in copy.err
        server.kill()
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_target_directory_that_is_deleted_meanwhile(way: str, lab: Lab) -> None:
    tree = lab.home / "served" / "tree"
    make_big(tree / "big", 12 * MIB)
    target = lab.home / "target"
    server = lab.serve(target if way == "up" else tree.parent, *FINE)
    target.mkdir(exist_ok=True)
    names = (tree, f"{server.url}/") if way == "up" else (f"{server.url}/tree", target)
    copy = lab.cp(*FINE, "--bwlimit", "10MB/s", *names)
    wait_until(lambda: journaled(target), "some of it")
    shutil.rmtree(target / "tree")
    report = copy.fails(1, "storage")
    assert failed_files(report)["big"] == "storage"
    assert "removed meanwhile" in copy.err
    lab.cp(*FINE, *names).succeeds()
    assert_arrived(tree, target / "tree")


# ---- the source -----------------------------------------------------------------------------------


def shrink(path: Path) -> None:
    os.truncate(path, 5 * MIB)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more" * 1000)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


@pytest.mark.parametrize("change", [shrink, grow, rewrite])
@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_changes_while_it_is_read(way: str, change: Callable[[Path], None], lab: Lab) -> None:
    tree = lab.home / "served" / "tree"
    files = small_files(tree)
    big = make_big(tree / "zbig", 12 * MIB)
    target = lab.home / "target"
    target.mkdir()
    server = lab.serve(target if way == "up" else tree.parent, *FINE)
    names = (tree, f"{server.url}/") if way == "up" else (f"{server.url}/tree", target)
    copy = lab.cp(*FINE, "--bwlimit", "10MB/s", *names)
    wait_until(lambda: journaled(target), "some of it")
    change(big)
    report = copy.fails(1, "source_changed")
    assert failed_files(report) == {"zbig": "source_changed"}
    assert {path.name for path in files} <= set(os.listdir(target / "tree"))
    assert not (target / "tree" / "zbig").exists()
    again = lab.cp(*FINE, *names).succeeds()  # nothing of the old state is taken for the new one
    assert again["resumed_bytes"] == sum(path.stat().st_size for path in files)
    assert_arrived(tree, target / "tree")


def test_a_source_that_is_replaced_while_it_is_read_arrives_as_it_was(lab: Lab) -> None:
    """What was opened is what is sent; the new file of that name is the next copy's."""
    source = make_big(lab.home / "here" / "big", 12 * MIB)
    old = digest(source)
    server = lab.serve(lab.home / "root", *FINE)
    target = server.root / "big"
    copy = lab.cp(*FINE, "--bwlimit", "10MB/s", source, f"{server.url}/")
    wait_until(lambda: journaled(server.root), "some of it")
    os.replace(make_big(lab.home / "here" / "new", 7 * MIB), source)
    copy.end()
    report = copy.report
    if report["ok"]:
        assert digest(target) == old
    else:  # it may also say that the source has changed
        assert failed_files(report) == {"big": "source_changed"} and not target.exists()
    assert lab.cp(*FINE, source, f"{server.url}/").succeeds()["resumed_bytes"] == 0
    assert_arrived(source, target)


@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_changed_between_two_tries_is_sent_anew(way: str, lab: Lab) -> None:
    source = make_big(lab.home / "served" / "big", 12 * MIB)
    target_dir = lab.home / "target"
    target_dir.mkdir()
    server = lab.serve(target_dir if way == "up" else source.parent, *FINE)
    names = (source, f"{server.url}/") if way == "up" else (f"{server.url}/big", target_dir)
    first = lab.cp(*FINE, "--bwlimit", "10MB/s", *names)
    wait_until(lambda: kept(source, target_dir / "big") > 3 * MIB, "some of it")
    first.kill()
    before = source.stat()
    rewrite(source)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # not even size and time tell
    with Watch(source, target_dir / "big"):
        report = lab.cp(*FINE, *names).succeeds()
    assert report["resumed_bytes"] == 0
    assert_arrived(source, target_dir / "big")


# ---- leftovers, and two at once -------------------------------------------------------------------


def test_old_leftovers_go_and_young_ones_and_those_in_use_stay(lab: Lab) -> None:
    root = lab.home / "root"
    stems = [root / f".amst-{letter * 32}" for letter in "abc"]
    orphan, resumable, locked = (stem.with_suffix(".part") for stem in stems)
    journal = resumable.with_suffix(".journal")
    everything = {orphan, resumable, journal, locked}
    root.mkdir()
    for path in everything:
        path.write_bytes(b"left")
        path.chmod(0o600)
        os.utime(path, (1, 1))  # what the modification time says does not count
    small_file = make_big(lab.home / "small", 1000)
    with locked.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        server = lab.serve(root)
        lab.cp(small_file, f"{server.url}/now").succeeds()
        assert all(path.exists() for path in everything), "all are young"
        server.kill()
        server = lab.serve(root, hook=("later", lab.home))
        lab.cp(small_file, f"{server.url}/later").succeeds()
        assert {path for path in everything if path.exists()} == {locked}


def test_two_clients_with_the_same_target(lab: Lab) -> None:
    """Whoever comes second has a part of its own; both arrive whole, and the last rename stays."""
    sources = [make_big(lab.home / name / "big", size) for name, size in (("one", 10 * MIB), ("two", 11 * MIB))]
    server = lab.serve(lab.home / "root", *FINE)
    target = server.root / "big"
    with Watch(sources[0], target, others={digest(sources[1])}):
        first = lab.cp(*FINE, "--bwlimit", "10MB/s", sources[0], f"{server.url}/")
        wait_until(lambda: journaled(server.root), "the first to be under way")
        second = lab.cp(*FINE, "--bwlimit", "10MB/s", sources[1], f"{server.url}/")
        first.succeeds()
        second.succeeds()
    assert digest(target) in {digest(source) for source in sources}
    assert leftovers(server.root) == []


def test_two_clients_with_the_same_source_and_target(lab: Lab) -> None:
    source = make_big(lab.home / "big", 10 * MIB)
    server = lab.serve(lab.home / "root", *FINE)
    with Watch(source, server.root / "big"):
        copies: list[Copy] = [lab.cp(*FINE, "--bwlimit", "8MB/s", source, f"{server.url}/") for _ in range(2)]
        for copy in copies:
            copy.succeeds()
    assert_arrived(source, server.root / "big")


def test_the_server_lets_go_of_a_client_that_vanished_for_the_one_that_comes_again(lab: Lab) -> None:
    """Its host is gone: the server hears nothing, and still has the session when the same command comes."""
    source = make_big(lab.home / "big", 10 * MIB)
    server = lab.serve(lab.home / "root", *FINE)
    target = server.root / "big"
    with proxied(server.address) as vanishing, Watch(source, target):
        vanishing.hold(UP, 6 * MIB)
        first = lab.cp(*FINE, source, f"{vanishing.url}/")
        wait_until(lambda: vanishing.holding, "the middle")
        wait_until(lambda: kept(source, target) > 0, "some of it in the journal")
        first.kill()
        there = kept(source, target)
        assert vanishing.reset(LANE) > 0  # its control connection stays open
        began = time.monotonic()
        report = lab.cp(*FINE, source, f"{server.url}/").succeeds()
        assert time.monotonic() - began < 50, "it waited for the session's timeout"
    assert report["resumed_bytes"] >= there > 0
    assert_arrived(source, target)
    assert listing(target) == listing(source)
