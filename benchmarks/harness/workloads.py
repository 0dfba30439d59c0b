"""The table as data: what is moved, by whom, and which ratios are asked for, with floors and goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .amst import Amst
from .contender import Contender, Work
from .peers import Cp, GridFtp, Iperf2, Iperf3, Mbuffer, Nuttcp, Rclone, Rsync, Scp, Ucx, XRootD
from .peers.generators import NUTTCP_MOST_STREAMS

STREAMS = (1, 4, 32, 128, 512)
SMALL_FILE = 10 << 10
SMALL_FILES = 10_000
LARGE = 4 << 30

_IPERF3 = (Iperf3(), Iperf3("1M"))
_GRIDFTP = (GridFtp(1), GridFtp(4), GridFtp(8))
_ENCRYPTED = Amst("amst")
_PLAINTEXT = Amst("amst --plaintext", "--plaintext")
_UNVERIFIED = Amst("amst --plaintext --verify none", "--plaintext", "--verify", "none")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table: the rate of ``ours`` over that of the best of ``against`` in the same round.

    ``floor``: what a release must reach; ``goal``: what is aimed at; None where nothing is set.
    """

    ours: str
    against: tuple[str, ...]
    floor: float | None = None
    goal: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """What is moved each round by each of ``contenders``. ``files``: how many of `SMALL_FILE` bytes, for a tree."""

    name: str
    group: str
    title: str
    work: Work
    size: int
    streams: int
    files: int
    contenders: tuple[Contender, ...]
    lines: tuple[Line, ...]


def workloads(*, size: int = LARGE, files: int = SMALL_FILES, streams: Sequence[int] = STREAMS) -> list[Workload]:
    """All of them, in the order of the table."""
    return [
        *(_memory(size, count) for count in streams),
        _file(size),
        _tree(files),
        _pipe(size),
        _unpack(size),
    ]


def _memory(size: int, streams: int) -> Workload:
    iperf3 = tuple(contender.name for contender in _IPERF3)
    others = (Iperf2(), *((Nuttcp(),) if streams <= NUTTCP_MOST_STREAMS else ()), *((Ucx(),) if streams == 1 else ()))
    return Workload(
        f"memory-{streams}",
        "memory",
        f"memory → memory, {streams} stream{'s' if streams > 1 else ''}",
        Work.MEMORY,
        size,
        streams,
        0,
        (*_IPERF3, _PLAINTEXT, _ENCRYPTED, *others),
        (Line(_PLAINTEXT.name, iperf3, 1.0, 1.3), Line(_ENCRYPTED.name, iperf3, 0.55, 0.75)),
    )


def _file(size: int) -> Workload:
    gridftp = tuple(contender.name for contender in _GRIDFTP)
    return Workload(
        "file",
        "file",
        "file → file",
        Work.FILE,
        size,
        0,
        0,
        (Cp(), _PLAINTEXT, _UNVERIFIED, _ENCRYPTED, *_GRIDFTP, Mbuffer(), Rclone(), Rsync(), XRootD(), Scp()),
        (
            Line(_PLAINTEXT.name, ("cp",), 0.6, 0.8),
            Line(_UNVERIFIED.name, ("cp",), 0.8, 0.9),
            Line(_ENCRYPTED.name, ("cp",), 0.4, 0.5),
            Line(_ENCRYPTED.name, gridftp, 1.0, 1.3),
        ),
    )


def _tree(files: int) -> Workload:
    return Workload(
        "tree",
        "tree",
        f"{files:,} files of {SMALL_FILE >> 10} KiB".replace(",", " "),
        Work.TREE,
        files * SMALL_FILE,
        0,
        files,
        (Rsync(), _ENCRYPTED, _PLAINTEXT, Cp(), GridFtp(1), Rclone(), Scp()),
        (Line(_ENCRYPTED.name, ("rsync daemon",), 1.0, 1.5), Line(_PLAINTEXT.name, ("rsync daemon",))),
    )


def _pipe(size: int) -> Workload:
    return Workload(
        "pipe",
        "pipe",
        "tar through a pipe → file",
        Work.PIPE,
        size,
        0,
        0,
        (Mbuffer(), _ENCRYPTED, _PLAINTEXT),
        (Line(_ENCRYPTED.name, ("mbuffer",), 0.6), Line(_PLAINTEXT.name, ("mbuffer",))),
    )


def _unpack(size: int) -> Workload:
    return Workload(
        "unpack",
        "pipe",
        "file → tar through a pipe",
        Work.UNPACK,
        size,
        0,
        0,
        (Mbuffer(), _ENCRYPTED, _PLAINTEXT),
        (Line(_ENCRYPTED.name, ("mbuffer",), 0.6), Line(_PLAINTEXT.name, ("mbuffer",))),
    )
