"""Running amst as its users do: in processes of their own, with a state directory and a home of the test's."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

AMST = [sys.executable, "-W", "error", "-m", "amst_core"]
TIMEOUT_S = 60.0


@dataclass
class Shell:
    """A place to run amst in: working directory ``home``, environment ``env``."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        """Run ``amst ARGS`` to its end; output as text."""
        return subprocess.run(
            [*AMST, *map(as_argument, args)], cwd=self.home, env={**self.env, **env},
            capture_output=True, timeout=TIMEOUT_S, encoding="utf-8", errors="surrogateescape", check=False,
        )  # fmt: skip

    def start(self, *args: object, **options: Any) -> subprocess.Popen[str]:
        """Start ``amst ARGS``; whoever asks also ends it (`ended`)."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([*AMST, *map(as_argument, args)], cwd=self.home, env=self.env, text=True, **pipes)


@dataclass
class Serving:
    """An ``amst serve`` that is ready."""

    process: subprocess.Popen[str]
    address: str
    root: Path

    @property
    def url(self) -> str:
        return f"amst://{self.address}"


def as_argument(value: object) -> str | bytes:
    return value if isinstance(value, str | bytes) else str(value)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Leave no process behind, whatever the test finds."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(TIMEOUT_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextlib.contextmanager
def on_a_terminal(shell: Shell, *args: object) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``amst ARGS`` with a terminal as its standard error; the process, and the terminal's other side."""
    terminal, other = os.openpty()
    try:
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
        process = shell.start(*args, stderr=other)
        os.close(other)
        with ended(process):
            yield process, terminal
    finally:
        os.close(terminal)


def read_terminal(fd: int, until: bytes) -> bytes:
    """What is shown, up to ``until``; what is there, if that is empty."""
    seen = b""
    while not seen or until not in seen:
        assert select.select([fd], [], [], TIMEOUT_S)[0], f"no {until!r} in {seen!r}"
        try:
            seen += os.read(fd, 65536)
        except OSError as err:  # the process has ended, and the terminal with it
            raise AssertionError(f"no {until!r} in {seen!r}") from err
    return seen


@contextlib.contextmanager
def serving(
    shell: Shell, root: Path, *, listen: str = "127.0.0.1:0", options: tuple[str, ...] = ()
) -> Iterator[Serving]:
    root.mkdir(exist_ok=True)
    log = (shell.home / "serve.log").open("a+")
    with log, ended(shell.start("serve", "--listen", listen, "--root", root, *options, stderr=log)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        log.seek(0)
        assert line.startswith("listening on "), f"{line!r}; {log.read()}"
        yield Serving(process, line.split()[2], root)


def make_shell(home: Path) -> Shell:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AMST_")}
    return Shell(home, {**kept, "HOME": str(home), "AMST_STATE_DIR": str(home / "state")})


@pytest.fixture
def amst(tmp_path: Path) -> Shell:
    """amst in the test's own directory."""
    return make_shell(tmp_path)


@pytest.fixture
def server(amst: Shell) -> Iterator[Serving]:
    """A server of ``root`` in the test's directory, on IPv4 loopback."""
    with serving(amst, amst.home / "root") as running:
        yield running


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Commands run in this process configure logging; put it back."""
    logger = logging.getLogger("amst")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate, logger.level = before
