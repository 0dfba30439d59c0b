"""AMST as the benchmarks run it: ``amst serve`` in a process of its own, and its clients."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .contender import ARRIVED, Contender, Job, Outcome, Servers, Work, first_line
from .errors import RunError
from .peers.mbuffer import tar, untar

AMST = [sys.executable, "-m", "amst_core"]

_MANY_STREAMS = 256
_FOR_MANY = ("--set", "limits.memory=2GiB", "--set", "transport.amst.max_streams=512")


@contextmanager
def amst_server(root: str, state: str, *options: str) -> Iterator[str]:
    """``amst serve`` below ``root`` with its credentials in ``state``; yields its address.

    Raises:
        RunError: it does not start; says what it printed.
    """
    with tempfile.TemporaryDirectory() as scratch, Servers(Path(scratch)) as servers:
        yield _serve(AMST, servers, root, {"AMST_STATE_DIR": state}, options)


def _serve(
    command: Sequence[str], servers: Servers, root: str, variables: Mapping[str, str], options: Sequence[str]
) -> str:
    argv = [*command, "serve", "--listen", "127.0.0.1:0", "--root", root, *options]
    return servers.start(argv, env=variables).wait_line("listening on ").split()[-1]


class Amst(Contender):
    """One way of running it.

    ``flags`` are those of ``amst cp`` and ``amst bench``; ``command`` starts it on both sides, with ``variables``.
    """

    ours = True
    programs = ()
    how_to_get = "make install"

    def __init__(
        self, name: str, *flags: str, command: Sequence[str] = AMST, variables: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._flags = flags
        self._command = command
        self._variables = variables or {}

    def version(self) -> str:
        return first_line(*AMST, "--version")

    def environment(self, job: Job) -> Mapping[str, str]:
        return {**self._variables, "AMST_STATE_DIR": str(job.scratch / "state")}

    def serve(self, job: Job, servers: Servers) -> None:
        environment = self.environment(job)
        root = job.source.parent if job.work is Work.UNPACK else job.target
        servers.address = _serve(self._command, servers, str(root), environment, _settings(job))

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        url = f"amst://{servers.address}"
        options = [*self._flags, *_settings(job), "--json"]
        if job.streams:
            options += ["--streams", str(job.streams)]
        if job.work is Work.MEMORY:
            return [[*self._command, "bench", url, "--size", str(job.size), *options]]
        if job.work is Work.UNPACK:  # its result comes on stderr, for the data take stdout
            copy = [*self._command, "cp", *options, f"{url}/{job.source.name}", "-"]
            return [["sh", "-c", f"{{ {shlex.join(copy)} 2>&3 | {shlex.join(untar(job))}; }} 3>&1"]]
        copy = [*self._command, "cp", *options, "-" if job.work is Work.PIPE else str(job.source), f"{url}/{ARRIVED}"]
        if job.work is Work.PIPE:
            return [["sh", "-c", f"{shlex.join(tar(job))} | {shlex.join(copy)}"]]
        return [copy]

    def outcome(self, job: Job, printed: Sequence[str], wall_s: float) -> Outcome:
        """From --json: first payload byte offered to last byte acknowledged."""
        result = json.loads(printed[0])
        checked = "none" not in self._flags
        if (
            not result["ok"]
            or result["verified"] is not checked
            or result["encrypted"] is ("--plaintext" in self._flags)
        ):
            raise RunError(f"amst reports {printed[0].strip()[:300]}")
        # a tar is longer than what is in it
        if job.work not in (Work.PIPE, Work.UNPACK) and result["bytes"] != job.size:
            raise RunError(f"amst moved {result['bytes']} of {job.size} bytes")
        return Outcome(result["bytes"], result["seconds"])


def _settings(job: Job) -> tuple[str, ...]:
    """Defaults, as long as they allow so many streams."""
    return _FOR_MANY if job.streams > _MANY_STREAMS else ()
