"""Real processes to break: `amst serve` and `amst cp` as users start them, and what can be told from outside."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c
from waiting import wait_until

AMST = (sys.executable, "-W", "error", "-m", "amst_core")
HOOKED = (sys.executable, "-W", "error", str(Path(__file__).parent / "hooked.py"))
TIMEOUT_S = 90.0  # more than limits.session_timeout, for which a client waits for a killed server
HIDDEN = ".amst-"
MIB = 1 << 20


def port_to_return_to() -> int:
    """A free port that a server can have again after its end: none that the system gives to outgoing connections."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ---- processes ----------------------------------------------------------------------------


class Running:
    """A process whose output goes to files, so that it never waits for a reader."""

    def __init__(self, argv: list[str | bytes], *, home: Path, env: dict[str, str], name: str) -> None:
        self._out, self._err = home / f"{name}.out", home / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(argv, cwd=home, env=env, stdout=out, stderr=err, stdin=subprocess.DEVNULL)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def out(self) -> str:
        return self._out.read_text(errors="surrogateescape")

    @property
    def err(self) -> str:
        """What it has said so far."""
        return self._err.read_text(errors="surrogateescape")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(TIMEOUT_S)

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s; it said: {self.err}") from None


class Copy(Running):
    """An `amst cp --json`."""

    @property
    def report(self) -> dict[str, Any]:
        """What it says that it did."""
        lines = self.out.splitlines()
        assert len(lines) == 1, (self.out, self.err)
        value = json.loads(lines[0])
        assert isinstance(value, dict)
        return value

    def succeeds(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Its report, when it ends with 0."""
        code = self.end(timeout_s)
        assert code == 0, f"exit {code}: {self.err}"
        assert self.report["ok"] is True and self.report["error"] is None
        return self.report

    def fails(self, code: int, kind: str | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Its report, when it ends with ``code`` and an error of that kind."""
        got = self.end(timeout_s)
        assert got == code, f"exit {got}, not {code}: {self.err}"
        assert "Traceback" not in self.err
        assert self.report["ok"] is False
        if kind is not None:
            assert self.report["error"]["kind"] == kind, self.report
        return self.report


class Serving(Running):
    """An `amst serve` that is ready."""

    root: Path
    address: str

    @property
    def url(self) -> str:
        return f"amst://{self.address}"


@dataclass
class Lab:
    """A place to run amst in; ``prefix`` comes before every command (`ip netns exec`)."""

    home: Path
    stack: contextlib.ExitStack
    prefix: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def serve(
        self, root: Path, *options: object, listen: str = "", hook: tuple[str, Path] | None = None
    ) -> Serving:
        """Start a server of ``root`` and wait until it listens."""
        root.mkdir(parents=True, exist_ok=True)
        listen = listen or f"127.0.0.1:{port_to_return_to()}"
        serving = self._start(Serving, "serve", "--listen", listen, "--root", root, *options, hook=hook)
        wait_until(lambda: "\n" in serving.out or not serving.alive, "the server")
        assert serving.out.startswith("listening on "), serving.err
        serving.root, serving.address = root, serving.out.split()[2]
        return serving

    def again(self, server: Serving, *options: object) -> Serving:
        """The server of that address and root once more, after its end."""
        return self.serve(server.root, *options, listen=server.address)

    def cp(self, *args: object, hook: tuple[str, Path] | None = None) -> Copy:
        """Start a copy."""
        return self._start(Copy, "cp", "--json", *args, hook=hook)

    def within(self, *prefix: str) -> Lab:
        """The same place, with commands run by ``prefix``."""
        return Lab(self.home, self.stack, prefix, self.env, self.numbers)

    def _start(self, kind: type[Any], command: str, *args: object, hook: tuple[str, Path] | None) -> Any:
        program = AMST if hook is None else (*HOOKED, hook[0], str(hook[1]))
        argv = [a if isinstance(a, bytes) else str(a) for a in (*self.prefix, *program, command, *args)]
        running = kind(argv, home=self.home, env=self.env, name=f"{command}-{next(self.numbers)}")
        self.stack.callback(_end, running)
        return running


def _end(running: Running) -> None:
    if running.alive:
        running.kill()


@contextlib.contextmanager
def laboratory(home: Path, *, state: Path | None = None) -> Iterator[Lab]:
    """A lab in the directory ``home``, whose processes all end with the block; with the credentials in ``state``."""
    home.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AMST_")}
    env = {**kept, "HOME": str(home), "AMST_STATE_DIR": str(state or home / "state")}
    with contextlib.ExitStack() as stack:
        yield Lab(home, stack, env=env)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as place:
        yield place


# ---- what is copied, and whether it arrived -----------------------------------------------


def make_big(path: Path, size: int) -> Path:
    """A file of ``size`` bytes that no compression or hole can shorten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def make_tree(top: Path, *, files: int = 300) -> Path:
    """Files of mixed sizes, a few with a journal, links and empty directories."""
    rng = random.Random(files)
    for number in range(files):
        size = rng.choice((0, 1, 700, 4096, 20_000, 60_000))
        size = (2 << 20) + 5 if number % 60 == 7 else size
        path = top / f"d{number % 7}" / f"e{number % 3}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
        path.chmod(0o640 if number % 5 else 0o444)
        os.utime(path, ns=(1, 1_500_000_000_000_000_000 + number * 1_000_000_007))
    for number in range(5):
        (top / f"d{number}" / "link").symlink_to(f"e0/f{number}")
        (top / f"empty{number}" / "deep").mkdir(parents=True)
    (top / "dangling").symlink_to("/nowhere")
    return top


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(top: Path) -> dict[str, tuple[object, ...]]:
    """Everything in and about a file or tree that a copy keeps; content as a digest."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (top, *top.rglob("*")):
        about = path.lstat()
        key = str(path.relative_to(top))
        if path.is_symlink():
            found[key] = ("link", os.readlink(path))
        else:
            content = digest(path) if path.is_file() else ""
            found[key] = (stat.S_IFMT(about.st_mode), stat.S_IMODE(about.st_mode), about.st_mtime_ns, content)
    return found


def leftovers(*directories: Path) -> list[str]:
    """What is there under names kept for temporary files."""
    return sorted(str(path) for top in directories for path in top.rglob(f"{HIDDEN}*"))


def assert_arrived(source: Path, target: Path) -> None:
    """``target`` is byte for byte what ``source`` is, and nothing half-done is left beside or below it."""
    wait_until(lambda: not leftovers(target.parent), f"no leftovers in {target.parent}", timeout_s=5)
    assert listing(target) == listing(source)


class Watch(threading.Thread):
    """Looks all the time below ``target`` (where ``source`` is copied to): what has a final name must be whole.

    As a context manager; ``others`` are contents that a name may have as well (an older version).
    """

    def __init__(self, source: Path, target: Path, *, others: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__(name="watch", daemon=True)
        self._target = target
        self._others = others
        self._expected = {
            str(path.relative_to(source)): digest(path)
            for path in ([source] if source.is_file() else source.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }
        self._seen: set[tuple[str, int]] = set()
        self._done = threading.Event()
        self.looks = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self._done.wait(0.01):
            self._look()

    def _look(self) -> None:
        self.looks += 1
        paths = [str(self._target)] if not self._target.is_dir() else _files_below(str(self._target))
        for path in paths:
            try:
                about = os.lstat(path)
                key = path, about.st_ino
                if key in self._seen or not stat.S_ISREG(about.st_mode):
                    continue
                self._seen.add(key)
                content = digest(Path(path))
            except FileNotFoundError:
                continue
            name = os.path.relpath(path, self._target)
            if content != self._expected.get(name) and content not in self._others:
                self.wrong.append(f"{name} had its final name with {about.st_size} bytes that are not the source's")

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self.join()
        self._look()
        assert self.wrong == [] or kind is not None, self.wrong
        assert self.looks > 0


def _files_below(top: str) -> list[str]:
    return [
        os.path.join(directory, name)
        for directory, _, names in os.walk(top)
        for name in names
        if not name.startswith(HIDDEN)
    ]


# ---- journals, read by somebody else ------------------------------------------------------


def journaled(directory: Path) -> dict[str, list[tuple[int, int]]]:
    """Per partial file below ``directory`` the spans that its journal has and whose bytes are there: sorted, apart.

    Knows the layout of a journal by itself. A record whose bytes are not there breaks the promise that they are
    written first.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for journal in directory.rglob(f"{HIDDEN}*.journal"):
        part = journal.with_suffix(".part")
        try:
            raw, content = journal.read_bytes(), part.read_bytes()
        except FileNotFoundError:  # finished just now
            continue
        if len(raw) < 96:
            continue
        assert raw[:8] == b"AMSTJRNL" and struct.unpack_from("!I", raw, 92)[0] == crc32c(raw[:92])
        spans = []
        for at in range(96, len(raw) - 31, 32):
            offset, length, crc = struct.unpack_from("!QII", raw, at)
            assert struct.unpack_from("!I", raw, at + 28)[0] == crc32c(raw[at : at + 28]), f"a damaged record at {at}"
            assert crc32c(content[offset : offset + length]) == crc, "the journal is ahead of the file"
            spans.append((offset, offset + length))
        found[str(part)] = merged(spans)
    return found


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def total(spans: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in merged(spans))


def common(ones: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
    """Bytes that are in both."""
    return total(ones) + total(others) - total([*ones, *others])


def kept(source: Path, target: Path) -> int:
    """Bytes that a try has left so that the next one need not send them: whole files and journaled spans."""
    names = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    arrived = 0
    for path in names:
        there = target / path.relative_to(source) if path != source else target
        if not path.is_symlink() and there.is_file() and not there.is_symlink():
            arrived += path.stat().st_size
    return arrived + sum(total(spans) for spans in journaled(target.parent).values())


def size_of(source: Path) -> int:
    return sum(
        path.stat().st_size
        for path in ([source] if source.is_file() else source.rglob("*"))
        if path.is_file() and not path.is_symlink()
    )


# ---- what waits for a minute ---------------------------------------------------------------

Play = Callable[[Path], list[str]]
"""Does everything in a directory of its own, checks it, and returns lines of figures."""


def ahead(play: Play) -> Callable[[Any], Any]:
    """Have ``play`` begin with the first test of this folder: it waits much and works little. See `outcomes`."""

    def mark(test: Any) -> Any:
        test.ahead = play
        return test

    return mark


@pytest.fixture(scope="session", autouse=True)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Play, Future[list[str]]]]:
    """What became of each play that a test of this run is `ahead` of."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    plays = {item.obj.ahead for item in items if hasattr(item.obj, "ahead")}
    with ThreadPoolExecutor(len(plays) or 1) as pool:
        yield {play: pool.submit(play, tmp_path_factory.mktemp("ahead")) for play in plays}


# ---- figures ------------------------------------------------------------------------------

_figures: list[str] = []


@pytest.fixture(scope="session")
def figures() -> Callable[[str], None]:
    """Notes a line that the run shows at its end."""
    return _figures.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _figures:
        terminalreporter.section("what was sent again, beside what was missing")
        for line in sorted(_figures):
            terminalreporter.write_line(line)


def stop(running: Running) -> None:
    """SIGSTOP, and wait until it has stopped."""
    running.send(signal.SIGSTOP)
    state = Path(f"/proc/{running.process.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", "the process to stop")
