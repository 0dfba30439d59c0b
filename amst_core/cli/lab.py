"""``amst lab``: run a command on a host whose only network is a path of a given kind to a far host."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Final, cast

from ..errors import AmstError, UsageError, error_from_os
from ..units import format_duration
from . import output, signals
from .options import DEFAULT_LISTEN
from .output import Report

if TYPE_CHECKING:
    from ..testing.netlab import Host, Lab, LabReport, Path, Way

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
"""As of a shell, which is what the exit code of a command that runs commands is compared with."""

_VALUES: Final = ("rate", "delay", "jitter", "loss", "burst", "buffer")
_PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LISTENING_TIMEOUT_S: Final = 2.0
_LOOK_EVERY_S: Final = 0.02


def run(options: argparse.Namespace, report: Report) -> int:
    """Run the command in a lab and report; its exit code.

    Raises:
        UsageError: no command, or a path that makes no sense.
        LabUnavailableError: no lab can be made here.
        AmstError: the lab or the far host's command failed.
    """
    if not options.operands:
        raise UsageError("lab runs a command: amst lab --rate 100Mbit/s --rtt 100ms -- COMMAND (see: amst lab --help)")
    from ..testing.netlab import Lab

    path = _path(options)
    lab = Lab(path, seed=options.seed, congestion=options.congestion, tcp_memory=options.tcp_memory)
    with _passing_on() as passing, tempfile.TemporaryDirectory(prefix="amst-lab-") as root:
        with lab:
            here, far = lab.hosts
            environment = _environment(here, far)
            _start_far(far, options.far, root, environment)
            code = passing.run(here, options.operands, environment)
    _tell(options, path, lab, code)
    return code


def _path(options: argparse.Namespace) -> Path:
    from ..testing.netlab import Path

    def given(prefix: str) -> dict[str, Any]:
        values = {name: getattr(options, prefix + name, None) for name in _VALUES}
        return {name: value for name, value in values.items() if value is not None}

    both = given("")
    if options.rtt is not None:
        both["rtt"] = options.rtt
    return Path(up=given("up_"), down=given("down_"), **both)


def _environment(here: Host, far: Host) -> dict[str, str]:
    found = dict(os.environ, AMST_LAB_HERE=here.address, AMST_LAB_FAR=far.address)
    if here.addresses6:
        found.update(AMST_LAB_HERE6=here.address6, AMST_LAB_FAR6=far.address6)
    # So that a command finds the amst that started it, where none is on the path.
    found["PATH"] = os.pathsep.join(filter(None, (found.get("PATH", os.defpath), os.path.dirname(sys.executable))))
    return found


# ---- the far host -------------------------------------------------------------------------


def _start_far(far: Host, command: str | None, root: str, environment: dict[str, str]) -> None:
    """Start what the far host runs, and wait until it listens."""
    if command is None:
        argv = [sys.executable, "-m", "amst_core", "serve", "--listen", DEFAULT_LISTEN, "--root", root, "-q"]
        process = far.popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        with cast(IO[bytes], process.stdout) as out:
            if not out.readline():
                raise AmstError(f"the far host's amst serve ended with exit code {process.wait()}")
        return
    if not command.strip():
        return
    process = far.popen(["sh", "-c", command], env=environment, stdin=subprocess.DEVNULL, stdout=2)
    until = time.monotonic() + _LISTENING_TIMEOUT_S  # it may be one that does not listen to TCP
    while time.monotonic() < until and not far.listening():
        if process.poll():
            raise AmstError(f"the far host's command ended with exit code {process.returncode}: {command}")
        time.sleep(_LOOK_EVERY_S)


# ---- the command --------------------------------------------------------------------------


class _Passing:
    """Hands signals on to the command; before it runs, they end the lab."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[Any] | None = None
        self._starting = False
        self._early: list[int] = []

    def handle(self, number: int, frame: FrameType | None) -> None:
        """As a signal handler."""
        if self._starting:  # it may run already, but has no name here yet
            self._early.append(number)
            return
        if self._process is None:
            raise KeyboardInterrupt if number == signal.SIGINT else signals.Terminated
        if number != signal.SIGINT or not _in_foreground():
            self._process.send_signal(number)

    def run(self, here: Host, argv: list[str], environment: dict[str, str]) -> int:
        """Run the command to its end; the exit code a shell would give it."""
        self._starting = True
        try:
            self._process = here.popen(argv, env=environment)
        except FileNotFoundError:
            output.complain(f"{argv[0]}: command not found")
            return NOT_FOUND
        except OSError as err:
            output.complain(f"cannot run {argv[0]}: {err.strerror}")
            return NOT_EXECUTABLE
        finally:
            self._starting = False
        for number in self._early:
            self.handle(number, None)
        code = int(self._process.wait())
        return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _passing_on() -> Iterator[_Passing]:
    passing = _Passing()
    numbers = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, passing.handle) for number in numbers}
    try:
        yield passing
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether a terminal's Ctrl-C goes to this process's group, and so to the command as well."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


# ---- the report ---------------------------------------------------------------------------


def _tell(options: argparse.Namespace, path: Path, lab: Lab, code: int) -> None:
    counted = lab.report()
    if options.report is not None or options.json:
        value = {
            "ok": code == 0,
            "exit_code": code,
            "command": options.operands,
            "path": {name: _as_dict(path, way) for name, way in (("up", path.up), ("down", path.down))},
            **counted.as_dict(),
            "error": None,
        }
        if options.json:
            output.print_json(value, aside=True)
        if options.report is not None:
            try:
                with open(options.report, "w") as file:
                    file.write(json.dumps(value) + "\n")
            except OSError as err:
                raise error_from_os(err, "cannot write the report", path=options.report) from err
    if not options.json and (not options.quiet or counted.faults):
        _say(path, counted)


def _as_dict(path: Path, way: Way) -> dict[str, object]:
    return {**way.as_dict(), "buffer": path.buffer(way) if way.rate is not None else None}


def _say(path: Path, counted: LabReport) -> None:
    for name, way in (("up", path.up), ("down", path.down)):
        shown = dataclasses.replace(way, buffer=path.buffer(way)) if way.rate is not None else way
        counts = counted.way(name)
        output.say(
            f"lab: {name:4} {shown}: {output.count(counts.packets, 'packet' if counts.packets == 1 else 'packets')},"
            f" {output.size(counts.bytes)}; {output.count(counts.dropped_by_loss, 'lost')},"
            f" {output.count(counts.dropped_by_queue, 'found the buffer full')}"
        )
    verdict = f"NOT to be trusted: {'; '.join(counted.faults)}" if counted.faults else "to be trusted"
    mean, most, worst = (_milliseconds(value) for value in (counted.late_mean, counted.late_p99, counted.late_max))
    output.say(
        f"lab: seed {counted.seed}, {format_duration(round(counted.seconds, 1))}; packets late by {mean} in the mean,"
        f" {most} (99 %), {worst} at most: {verdict}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
