"""What every contender can do: say what it is, serve, and move what a job asks for."""

from __future__ import annotations

import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .processes import Server, clean_environment

ARRIVED = "arrived"
"""The name below a job's target that the file, tree or stream arrives under."""


class Work(StrEnum):
    """What is moved from where to where."""

    MEMORY = "memory"
    FILE = "file"
    TREE = "tree"
    PIPE = "pipe"  # what `tar` writes, into a file
    UNPACK = "unpack"  # a tar file, into a `tar` that unpacks it


@dataclass(frozen=True, slots=True)
class Job:
    """One run's task.

    ``size``: bytes of payload; ``streams``: 0 leaves them to the contender. ``target`` and ``scratch`` are directories
    of this run's own; ``source`` is a file or directory outside, or unused (memory).
    """

    work: Work
    size: int
    streams: int
    source: Path
    target: Path
    scratch: Path

    @property
    def arrived(self) -> Path:
        return self.target / ARRIVED


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a contender says that it moved, and in which time by its own clock."""

    size: int
    seconds: float


class Servers:
    """The server processes of one run; all are ended with the block."""

    def __init__(self, scratch: Path) -> None:
        self.all: list[Server] = []
        self.ports: list[int] = []
        self.address = ""
        self._scratch = scratch
        self._stack = ExitStack()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, user: str | None = None) -> Server:
        server = Server(argv, log=self._scratch / f"server-{len(self.all)}.log", env=env, user=user)
        self._stack.callback(server.stop)
        self.all.append(server)
        return server

    def start_listening(
        self, argv: Sequence[str], port: int, *, env: Mapping[str, str] | None = None, user: str | None = None
    ) -> Server:
        """Start it and wait until it listens on ``port``, which is noted in ``ports``."""
        server = self.start(argv, env=env, user=user)
        server.wait_listening(port)
        self.ports.append(port)
        return server


class Contender(ABC):
    """Subclasses fill in the class attributes and the methods below.

    ``programs`` must be on the path (or in an sbin directory); ``how_to_get`` says how they come there.
    """

    name: str
    programs: tuple[str, ...]
    how_to_get: str
    ours = False

    @abstractmethod
    def version(self) -> str:
        """What its program calls itself."""

    @abstractmethod
    def serve(self, job: Job, servers: Servers) -> None:
        """Start what the job needs on loopback, ready to be used; nothing if it needs no server."""

    @abstractmethod
    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        """The client commands, run at once, whose ends are the job's end."""

    def environment(self, job: Job) -> Mapping[str, str] | None:
        """Variables that the commands need besides the user's."""
        return None

    def settle(self, job: Job, servers: Servers) -> None:
        """Wait for what is still under way when the commands have ended; still part of the time."""

    def outcome(self, job: Job, printed: Sequence[str], wall_s: float) -> Outcome:
        """Read what the commands printed; by default the whole job within their time.

        Raises:
            RunError: it says that something went wrong.
        """
        return Outcome(job.size, wall_s)

    def missing(self) -> str | None:
        """The first program that is not installed."""
        return next((program for program in self.programs if find(program) is None), None)


def find(program: str) -> str | None:
    """Where a program is; servers may lie where only root looks."""
    return shutil.which(program) or shutil.which(program, path="/usr/local/sbin:/usr/sbin:/sbin")


def path_of(program: str) -> str:
    """`find` for what is known to be there."""
    return find(program) or program


def first_line(*argv: str) -> str:
    """The first line that a command prints, on either output."""
    try:
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=20, check=False,
            stdin=subprocess.DEVNULL, env=clean_environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as err:
        return f"unknown ({err})"
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), "unknown")
