"""Stopping in good order: what is under way finishes, nothing new begins, and who is cut says what was not finished."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from waiting import wait_until

from .conftest import (
    HIDDEN,
    MIB,
    Lab,
    Play,
    Watch,
    ahead,
    assert_arrived,
    kept,
    laboratory,
    make_big,
)

pytestmark = pytest.mark.needs_transport

FINE = ("--set", "transport.amst.chunk_size_kb=256")
WAYS = ("up", "down")


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_asked_to_stop_lets_finish_and_takes_nothing_new(way: str, lab: Lab) -> None:
    source = make_big(lab.home / "served" / "big", 20 * MIB)
    target = lab.home / "target" / "big"
    target.parent.mkdir()
    server = lab.serve(target.parent if way == "up" else source.parent, *FINE)
    names = (source, f"{server.url}/") if way == "up" else (f"{server.url}/big", target.parent)
    with Watch(source, target):
        copy = lab.cp(*FINE, "--bwlimit", "4MB/s", *names)
        wait_until(lambda: kept(source, target) > MIB, "some of it")
        server.send(signal.SIGTERM)
        wait_until(lambda: "stopping" in server.err, "the server to begin to stop")
        refused = lab.cp(source, f"{server.url}/other")
        assert refused.fails(4, "connect")["error"]["retryable"] is True
        assert "stopping" in refused.err
        copy.succeeds()
    assert server.end() == 0
    assert_arrived(source, target)


def play_a_stop_that_takes_too_long(home: Path) -> list[str]:
    """The real 30 s, for an upload and a download at once."""
    lines = []
    source = make_big(home / "served" / "long", 40 * MIB)
    targets = {way: home / way / "long" for way in WAYS}
    for target in targets.values():
        target.parent.mkdir()
    with laboratory(home) as lab:
        server = lab.serve(home, *FINE)

        def names(way: str) -> tuple[object, object]:
            return (source, f"{server.url}/up/") if way == "up" else (f"{server.url}/served/long", targets[way].parent)

        copies = {way: lab.cp(*FINE, "--bwlimit", "1MB/s", *names(way)) for way in WAYS}
        for target in targets.values():
            wait_until(lambda target=target: kept(source, target) > MIB, "some of it")
        server.send(signal.SIGTERM)
        for copy in copies.values():
            failed = copy.fails(5)
            assert [item["path"].rpartition("/")[2] for item in failed["failed"]] == ["long"]
            assert "long: " in copy.err and "goes on from there" in copy.err
        assert server.end() == 1
        assert "up/long" in server.err and "bytes received" in server.err
        assert "served/long" in server.err and "bytes sent" in server.err
        server = lab.again(server, *FINE)
        for way, target in targets.items():
            there = kept(source, target)
            report = lab.cp(*FINE, *names(way)).succeeds()
            assert report["resumed_bytes"] >= there > 0
            assert_arrived(source, target)
            lines.append(
                f"a server stopped for good, {way}: missing {source.stat().st_size - there}, "
                f"resumed {report['resumed_bytes']}, retransmitted {report['retransmitted_bytes']}"
            )
    return lines


@ahead(play_a_stop_that_takes_too_long)
def test_a_server_that_cannot_wait_any_longer_says_what_was_not_finished(
    outcomes: dict[Play, Future[list[str]]], figures: Callable[[str], None]
) -> None:
    for line in outcomes[play_a_stop_that_takes_too_long].result():
        figures(line)


@pytest.mark.parametrize("way", WAYS)
def test_sigterm_lets_a_copy_finish_the_files_it_has_begun(way: str, lab: Lab) -> None:
    """Not the bytes: a file is finished or it is not there. More files than are ever under way at once."""
    tree = lab.home / "served" / "tree"
    for number in range(600):
        make_big(tree / f"f{number:03}", 40_000 + number)
    target = lab.home / "target"
    target.mkdir()
    server = lab.serve(target if way == "up" else tree.parent, *FINE)
    names = (tree, f"{server.url}/") if way == "up" else (f"{server.url}/tree", target)
    there = target / "tree"

    def arrived() -> list[str]:
        return [name for name in os.listdir(there) if not name.startswith(HIDDEN)] if there.is_dir() else []

    with Watch(tree, there):
        copy = lab.cp(*FINE, "--bwlimit", "6MB/s", *names)
        wait_until(arrived, "the first files")
        copy.send(signal.SIGTERM)
        report = copy.fails(143, "cancelled")
        assert "what is under way has 30 s" in copy.err and "goes on from there" in copy.err
        assert report["failed"] == []
        done = arrived()
        assert 0 < len(done) == report["files"] < 600
        wait_until(lambda: not list(there.glob(f"{HIDDEN}*")), "no leftovers", timeout_s=5)
        again = lab.cp(*FINE, *names).succeeds()
    assert again["resumed_bytes"] >= sum((tree / name).stat().st_size for name in done)
    assert_arrived(tree, there)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("signals", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM], 143)])
def test_sigint_and_a_second_sigterm_stop_at_once_and_say_how_to_go_on(
    signals: list[int], code: int, way: str, lab: Lab
) -> None:
    source = make_big(lab.home / "served" / "big", 40 * MIB)
    target = lab.home / "target" / "big"
    target.parent.mkdir()
    server = lab.serve(target.parent if way == "up" else source.parent, *FINE)
    names = (source, f"{server.url}/") if way == "up" else (f"{server.url}/big", target.parent)
    with Watch(source, target):
        copy = lab.cp(*FINE, "--bwlimit", "1MB/s", *names)
        wait_until(lambda: kept(source, target) > MIB, "some of it")
        for number in signals:
            copy.send(number)
            if number == signal.SIGTERM:
                wait_until(lambda: "SIGTERM" in copy.err, "the signal to be taken")
        copy.fails(code, "cancelled", timeout_s=20)  # it would take 39 s more
        assert "had arrived; run the same command again and it goes on from there" in copy.err
        there = kept(source, target)
        report = lab.cp(*FINE, *names).succeeds()
    assert report["resumed_bytes"] >= there > 0
    assert_arrived(source, target)


def test_a_second_sigterm_ends_a_server_at_once(lab: Lab) -> None:
    source = make_big(lab.home / "big", 40 * MIB)
    server = lab.serve(lab.home / "root", *FINE)
    target = server.root / "big"
    copy = lab.cp(*FINE, "--bwlimit", "1MB/s", source, f"{server.url}/")
    wait_until(lambda: kept(source, target) > MIB, "some of it")
    server.send(signal.SIGTERM)
    wait_until(lambda: "stopping" in server.err, "the server to begin to stop")
    server.send(signal.SIGTERM)
    assert server.end(10) == -signal.SIGTERM
    copy.fails(5)
    there = kept(source, target)
    server = lab.again(server, *FINE)
    assert lab.cp(*FINE, source, f"{server.url}/").succeeds()["resumed_bytes"] >= there > 0
    assert_arrived(source, target)
