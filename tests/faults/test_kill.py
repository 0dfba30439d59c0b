"""kill -9 of either side, or both, at random moments: the same command sends what is missing, and nothing else."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import wait_until

from .conftest import (
    HIDDEN,
    MIB,
    Copy,
    Lab,
    Serving,
    Watch,
    assert_arrived,
    common,
    journaled,
    kept,
    laboratory,
    make_big,
    make_tree,
    size_of,
    total,
)
from .proxy import DOWN, UP, proxied

pytestmark = pytest.mark.needs_transport

SEED = int(os.environ.get("AMST_TEST_SEED") or time.time_ns() % 1_000_000)
AT_ONCE = 5
"""Rounds that run side by side: each mostly waits for its --bwlimit."""

FINE = ("--set", "transport.amst.chunk_size_kb=256")


@dataclass(frozen=True, slots=True)
class Sources:
    """What is copied, below the root of a server that lives on."""

    root: Path
    big: Path
    tree: Path
    server: Serving


@dataclass(slots=True)
class Outcome:
    """Bytes: of the whole, that were kept by the try that was killed, resumed, and sent by the second."""

    size: int
    kept: int
    resumed: int
    sent: int
    retransmitted: int


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    root = tmp_path_factory.mktemp("sources")
    with laboratory(root) as lab:
        yield Sources(root, make_big(root / "big", 32 * MIB), make_tree(root / "tree"), lab.serve(root, *FINE))


def arrived(directory: Path) -> int:
    """Bytes that have come into ``directory``, under whatever name."""
    found = 0
    for path in directory.rglob("*"):
        try:
            found += path.lstat().st_blocks * 512 if not path.is_dir() else 0
        except FileNotFoundError:
            continue
    return found


def play(
    home: Path, source: Path, shared: Serving, victims: tuple[str, ...], way: str, plaintext: bool, seed: int
) -> Outcome:
    """One round: a copy, the kill, the same command again, and what that sent. ``shared`` is not to be killed."""
    rng = random.Random(seed)
    root = shared.root
    with laboratory(home, state=root / "state") as lab:
        target = home / source.name
        server = lab.serve(root, *FINE) if "server" in victims else shared
        with Watch(source, target):
            options = [*FINE, "--streams", "4", *["--plaintext"] * plaintext]

            def copy(url: str, *more: object) -> Copy:
                # into a directory that is there: a tree named anew would, the second time, go into the first one
                names = (source, f"{url}/{home.relative_to(root)}/") if way == UP else (f"{url}/{source.name}", home)
                return lab.cp(*options, *more, *names)

            first = copy(server.url, "--bwlimit", "40MB/s")
            _wait_a_while(rng, first, target.parent, size_of(source))
            for victim in rng.sample(victims, len(victims)):
                (server if victim == "server" else first).kill()
            has_kept, spans = kept(source, target), journaled(target.parent)
            if "server" in victims:
                if rng.random() < 0.5:  # else the client finds nobody there, and gives up
                    server = lab.again(server, *FINE)
                if "client" not in victims:
                    assert first.end() in (0, 4, 5), first.err
                    has_kept, spans = kept(source, target), journaled(target.parent)
                if not server.alive:
                    server = lab.again(server, *FINE)
            with proxied(server.address) as proxy:
                report = copy(proxy.url).succeeds()
                sent = proxy.spans(way)
        assert_arrived(source, target)
    outcome = Outcome(
        size=size_of(source),
        kept=has_kept,
        resumed=report["resumed_bytes"],
        sent=sum(end - start for _, start, end in sent),
        retransmitted=report["retransmitted_bytes"],
    )
    assert outcome.resumed >= outcome.kept, outcome
    if source.is_file():
        again = common([span[1:] for span in sent], next(iter(spans.values()), []))
        assert again == 0, f"{again} bytes that were in the journal were sent again"
        assert total([span[1:] for span in sent]) == outcome.size - outcome.resumed, outcome
    if way == UP:
        assert outcome.sent <= outcome.size - outcome.resumed + outcome.retransmitted, outcome
    return outcome


def _wait_a_while(rng: random.Random, copy: Copy, directory: Path, size: int) -> None:
    """Until somewhere in the copy, or before it has begun."""
    moment = rng.uniform(-0.2, 1.1)
    if moment < 0:
        time.sleep(-moment * 2)
        return
    wait_until(lambda: arrived(directory) >= moment * size or not copy.alive or (moment > 1 and _whole(directory)),
             "the copy to come so far")  # fmt: skip


def _whole(directory: Path) -> bool:
    return any(not path.name.startswith(HIDDEN) for path in directory.iterdir())


def play_all(
    sources: Sources, source: Path, victims: tuple[str, ...], rounds: int, figures: Callable[[str], None]
) -> None:
    """That many rounds, up and down, encrypted and in plaintext in turn; the seed of one that fails is in its name."""

    name = f"{'+'.join(victims)}-{source.name}"

    def one(number: int) -> Outcome:
        way, plaintext = (UP, DOWN)[number % 2], bool(number // 2 % 2)
        seed = SEED + number
        try:
            return play(sources.root / name / str(number), source, sources.server, victims, way, plaintext, seed)
        except BaseException as err:
            err.add_note(f"round {number}, {way}, {'plaintext' if plaintext else 'encrypted'}: AMST_TEST_SEED={SEED}")
            raise

    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = list(pool.map(one, range(rounds)))
    missing = sum(o.size - o.kept for o in outcomes)
    cut = sum(0 < o.kept < o.size for o in outcomes)
    assert cut >= rounds // 5, f"only {cut} of {rounds} rounds were cut in the middle"
    figures(
        f"kill -9 of {name}: {rounds} rounds (seed {SEED}), {cut} cut in the middle; missing {missing}, "
        f"sent {sum(o.sent for o in outcomes)}, of that twice {sum(o.retransmitted for o in outcomes)}; "
        f"kept {sum(o.kept for o in outcomes)}, resumed {sum(o.resumed for o in outcomes)}"
    )


VICTIMS = [("client",), ("server",), ("client", "server")]


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
def test_a_killed_copy_of_a_file_goes_on_where_it_was(
    victims: tuple[str, ...], sources: Sources, figures: Callable[[str], None]
) -> None:
    play_all(sources, sources.big, victims, 20, figures)


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
def test_a_killed_copy_of_a_tree_goes_on_where_it_was(
    victims: tuple[str, ...], sources: Sources, figures: Callable[[str], None]
) -> None:
    play_all(sources, sources.tree, victims, 4, figures)


def test_a_copy_that_is_killed_over_and_over_ends_as_one_that_was_not(lab: Lab, sources: Sources) -> None:
    rng = random.Random(SEED)
    server = lab.serve(lab.home / "root", *FINE)
    target = server.root / "big"
    reached = 0
    with Watch(sources.big, target):
        for _ in range(5):
            copy = lab.cp(*FINE, "--bwlimit", "40MB/s", sources.big, f"{server.url}/")
            least = reached + rng.randrange(2 * MIB, 5 * MIB)
            wait_until(lambda least=least: kept(sources.big, target) >= least, "more of it")
            copy.kill()
            reached = kept(sources.big, target)
        report = lab.cp(*FINE, sources.big, f"{server.url}/").succeeds()
    assert report["resumed_bytes"] >= reached
    assert_arrived(sources.big, target)
