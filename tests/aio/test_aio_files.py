"""Copies driven by coroutines: whole or not at all, many at once, told about on the loop, cancelled at any moment."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from amst_core.aio.session import _Reporter
from amst_core.errors import AmstError, ClosedError, DeadlineError, NotFoundError
from amst_core.files.entries import EntryType

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


def everything_below(root: Path) -> list[str]:
    """All there is, half-done files and their journals included."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def make_tree(at: Path, *, files: int = 20, size: int = 50_000) -> None:
    for n in range(files):
        path = at / f"d{n % 3}" / f"f{n}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))


def same(one: Path, other: Path) -> bool:
    names = everything_below(one)
    return names == everything_below(other) and all(
        (one / name).is_dir() or (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_trees_go_up_and_down_and_stat_tells_what_is_there(run: Any, net: Any, until: Any, own_threads: Any) -> None:
    async def main() -> None:
        make_tree(net.local / "tree")
        async with net.pair() as pair:
            await pair.near.send_file(net.local / "tree", "there/tree")
            assert same(net.local / "tree", net.root / "there/tree")
            await pair.near.recv_file("there/tree", net.local / "back")
            assert same(net.local / "tree", net.local / "back")
            entry = await pair.near.stat("there/tree/d0/f0")
            assert entry is not None and entry.type is EntryType.FILE and entry.size == 50_000
            assert await pair.near.stat("nothing") is None
            with pytest.raises(NotFoundError):
                await pair.near.recv_file("nothing", net.local / "nothing")
            with pytest.raises(NotFoundError):
                await pair.near.send_file(net.local / "nothing", "nothing")
            await until(lambda: not own_threads(), "the threads of copies to end")

    run(main())


def test_progress_is_told_on_the_loop_and_what_it_raises_harms_nobody(run: Any, net: Any, caplog: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(bytes(5 * MIB))
        seen: list[tuple[int, int | None]] = []
        threads = set()

        def progress(done: int, total: int | None) -> None:
            threads.add(threading.current_thread())
            seen.append((done, total))
            raise ValueError("a fault of the application")

        async with net.pair() as pair:
            await pair.near.send_file(net.local / "file", "file", progress=progress)
            up = len(seen)
            assert seen[-1] == (5 * MIB, 5 * MIB)
            await pair.near.recv_file("file", net.local / "back", progress=progress)
            assert len(seen) > up and seen[-1][0] == 5 * MIB
            assert [done for done, _ in seen[:up]] == sorted(done for done, _ in seen[:up])
        assert threads == {threading.current_thread()}
        assert "a progress callback of the application raised" in caplog.text

    run(main())


def test_nothing_is_told_any_more_once_a_copy_has_ended(run: Any, steps: Any) -> None:
    async def main() -> None:
        told: list[int] = []
        reporter = _Reporter(asyncio.get_running_loop(), lambda done, total: told.append(done))
        for done in (1, 2):
            reporter(done, None)
        await steps(3)
        assert told == [2], "of several that wait only the latest is told"
        reporter(3, None)
        reporter.close()
        await steps(3)
        assert told == [2]

    run(main())


def test_a_hundred_transfers_at_once_over_one_session(run: Any, net: Any, until: Any, own_threads: Any) -> None:
    async def main() -> None:
        contents = [os.urandom(30_000 + n) for n in range(100)]
        for n in range(0, 100, 2):
            (net.local / str(n)).write_bytes(contents[n])
        async with net.pair(streams=4) as pair:

            async def one(n: int) -> None:
                if n % 2:
                    await (await pair.near.send(contents[n], channel=f"c{n % 10}"))
                else:
                    await pair.near.send_file(net.local / str(n), f"in/{n}")

            async def receive(channel: int) -> list[bytes]:
                return [bytes(await pair.far.recv(f"c{channel}")) for _ in range(10)]

            receiving = [asyncio.create_task(receive(channel)) for channel in range(1, 10, 2)]
            await asyncio.gather(*(one(n) for n in range(100)))
            assert sorted(itertools.chain.from_iterable(await asyncio.gather(*receiving))) == sorted(contents[1::2])
            for n in range(0, 100, 2):
                assert (net.root / "in" / str(n)).read_bytes() == contents[n]
            await until(lambda: not own_threads(), "the threads of copies to end")

    run(main())


def test_lists_come_page_by_page_many_at_once(run: Any, net: Any) -> None:
    async def main() -> None:
        names = [f"{number:04}{'x' * 100}" for number in range(1500)]  # more than a page
        (net.root / "many").mkdir()
        (net.root / "empty").mkdir()
        for name in names:
            (net.root / "many" / name).touch()
        async with net.pair() as pair:

            async def listed(path: str, **how: bool) -> list[str]:
                return [os.fsdecode(entry.path) async for entry in pair.near.list(path, **how)]

            found = await asyncio.gather(*(listed("many") for _ in range(8)), listed("empty"))
            assert found == [["", *names]] * 8 + [[""]]
            assert await listed("", recursive=True) == ["", "empty", "many", *(f"many/{name}" for name in names)]
            with pytest.raises(NotFoundError):
                await listed("nothing")
            async for entry in pair.near.list("many"):
                if entry.path:
                    break  # the rest is never asked for
            asking = asyncio.create_task(listed("many"))
            await asyncio.sleep(0)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await listed("empty") == [""]

    run(main())


def test_draining_ends_what_is_under_way_and_takes_nothing_new(run: Any, net: Any, until: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(os.urandom(MIB))
        async with net.pair() as pair:
            pair.near.limit_rate(256 << 10)
            sending = asyncio.create_task(pair.near.send_file(net.local / "file", "file"))
            await until(lambda: pair.far._inner.core.engine.receiving, "it to begin")
            with pytest.raises(DeadlineError, match="not finished"):
                await pair.far.drain(0.05)
            draining = asyncio.create_task(pair.far.drain(20))
            with pytest.raises(AmstError, match="takes nothing new"):
                await (await pair.near.send(b"late"))
            assert not draining.done()
            pair.near.limit_rate(None)
            await draining
            await sending
        assert (net.root / "file").read_bytes() == (net.local / "file").read_bytes()

    run(main())


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 100, 1000, 10_000])
@pytest.mark.parametrize("what", ["file", "tree"])
def test_a_cancelled_upload_leaves_nothing_incomplete_and_the_session_goes_on(
    run: Any, net: Any, until: Any, steps: Any, own_threads: Any, what: str, turns: int
) -> None:
    async def main() -> None:
        make_tree(net.local / "tree", files=60)
        (net.local / "file").write_bytes(os.urandom(4 * MIB))
        async with net.pair() as pair:
            pair.near.limit_rate(64 << 10)  # it cannot arrive by then
            progress: list[int] = []
            sending = asyncio.create_task(
                pair.near.send_file(net.local / what, what, progress=lambda done, total: progress.append(done))
            )
            await steps(turns)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            told = len(progress)
            pair.near.limit_rate(None)
            await until(lambda: not own_threads(), "the threads of copies to end")
            await until(lambda: not pair.far._inner.core.engine.receiving, "the peer to drop it")

            def is_clean() -> bool:
                try:
                    return all(
                        (net.root / name).is_dir()
                        or (what == "tree" and (net.root / name).read_bytes() == (net.local / name).read_bytes())
                        for name in everything_below(net.root)
                    )
                except FileNotFoundError:  # it goes while one looks
                    return False

            await until(is_clean, "what is incomplete to go")
            await pair.near.send_file(net.local / what, what)
            if what == "tree":
                assert same(net.local / what, net.root / what)
            else:
                assert (net.root / what).read_bytes() == (net.local / what).read_bytes()
            assert len(progress) == told, "it was told of progress after it was cancelled"

    run(main())


@pytest.mark.parametrize("turns", [0, 1, 3, 10, 100, 1000, 10_000])
@pytest.mark.parametrize("what", ["file", "tree"])
def test_a_cancelled_download_leaves_nothing_incomplete_and_the_session_goes_on(
    run: Any, net: Any, until: Any, steps: Any, own_threads: Any, what: str, turns: int
) -> None:
    async def main() -> None:
        make_tree(net.root / "tree", files=60)
        (net.root / "file").write_bytes(os.urandom(4 * MIB))
        async with net.pair() as pair:
            pair.far.limit_rate(64 << 10)
            receiving = asyncio.create_task(
                pair.near.recv_file(what, net.local / what, progress=lambda done, total: None)
            )
            await steps(turns)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            pair.far.limit_rate(None)
            await until(lambda: not own_threads(), "the threads of copies to end")
            for name in everything_below(net.local):
                assert (net.local / name).is_dir() or (
                    what == "tree" and (net.local / name).read_bytes() == (net.root / name).read_bytes()
                ), name
            await pair.near.recv_file(what, net.local / what)
            if what == "tree":
                assert same(net.root / what, net.local / what)
            else:
                assert (net.root / what).read_bytes() == (net.local / what).read_bytes()

    run(main())


def test_a_timeout_cancels_a_copy(run: Any, net: Any, until: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(os.urandom(4 * MIB))
        async with net.pair() as pair:
            pair.near.limit_rate(64 << 10)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await pair.near.send_file(net.local / "file", "file")
            await until(lambda: everything_below(net.root) == [], "what is incomplete to go")
            pair.near.limit_rate(None)

    run(main())


def test_a_copy_that_waits_for_room_at_the_peer_can_be_cancelled(
    run: Any, net: Any, until: Any, own_threads: Any
) -> None:
    """The peer takes 8 transfers, and they take their time."""

    async def main() -> None:
        make_tree(net.local / "tree", files=40, size=300_000)
        async with net.pair(limits__open_transfers=8) as pair:
            pair.near.limit_rate(64 << 10)
            copying = asyncio.create_task(pair.near.send_file(net.local / "tree", "tree"))
            core = pair.near._inner.core
            while len(core.unfinished()) < 5:
                await asyncio.sleep(0)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying
            await until(lambda: not own_threads(), "the threads of copies to end")
            pair.near.limit_rate(None)

    run(main())


def test_a_copy_ends_with_the_session(run: Any, net: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(os.urandom(4 * MIB))
        async with net.pair() as pair:
            pair.near.limit_rate(64 << 10)
            copying = asyncio.create_task(pair.near.send_file(net.local / "file", "file"))
            while not pair.near._inner.core.unfinished():
                await asyncio.sleep(0)
            pair.far.abort()
            with pytest.raises(ClosedError):
                await copying

    run(main())


def test_cancelled_copies_are_no_fault(run: Any, net: Any, caplog: Any) -> None:
    async def main() -> None:
        (net.local / "file").write_bytes(os.urandom(MIB))
        async with net.pair() as pair:
            pair.near.limit_rate(16 << 10)
            copies = [asyncio.create_task(pair.near.send_file(net.local / "file", f"{n}")) for n in range(10)]
            await asyncio.sleep(0.1)
            for copy in copies:
                copy.cancel()
            await asyncio.wait(copies)
            pair.near.limit_rate(None)

    with caplog.at_level(logging.WARNING, "amst"):
        run(main())
    assert [record for record in caplog.records if record.name.startswith("amst")] == []
