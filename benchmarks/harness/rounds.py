"""Runs: sources that do not compress, interleaved rounds, and a check of every byte that arrived."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from . import machine
from .contender import ARRIVED, Contender, Job, Servers, Work
from .errors import RunError
from .peers.mbuffer import tar
from .processes import run_clients
from .results import Absent, Run
from .usage import Meter
from .workloads import SMALL_FILE, Workload

_BLOCK: Final = 4 << 20
_SLOWEST_BYTES_PER_S: Final = 20_000_000
_LEAST_LIMIT_S: Final = 60.0
_SPARE: Final = 512 << 20
_FILES_A_FOLDER: Final = 100
_TRIAL_SIZE: Final = 16 << 20
_TRIAL_FILES: Final = 5

SHARED_MEMORY: Final = Path("/dev/shm")


def choose_directory(need: int) -> Path:
    """A tmpfs if ``need`` bytes fit there twice, else the directory for temporary files, on its disk."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * need + _SPARE:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


class Bench:
    """Does runs below ``directory``, which everybody may enter: some servers refuse to run as root."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._directory.chmod(0o755)
        self._in_memory = machine.file_system(directory) == "tmpfs"

    def try_out(self, workload: Workload) -> tuple[list[Contender], list[Absent]]:
        """Who can do the workload, proved by a small one, and who cannot, and why."""
        able, absent = [], []
        small = replace(
            workload,
            size=min(workload.size, max(_TRIAL_SIZE, workload.streams << 20)),
            files=min(workload.files, _TRIAL_FILES),
        )
        small = replace(small, size=small.files * SMALL_FILE) if small.files else small
        with self.source(small) as source:
            for contender in workload.contenders:
                reason = self._why_not(contender, small, source)
                if reason is None:
                    able.append(contender)
                else:
                    absent.append(Absent(workload.name, contender.name, reason, contender.how_to_get))
        return able, absent

    def _why_not(self, contender: Contender, workload: Workload, source: Path) -> str | None:
        if program := contender.missing():
            return f"{program} is not installed"
        run = self.run(contender, workload, source, number=0)
        return None if run.ok else f"a trial failed: {run.error}"

    def round(
        self, contenders: list[Contender], workload: Workload, source: Path, number: int, done: Callable[[Run], None]
    ) -> None:
        """One run of each, in order. Round 0 is the warm-up."""
        for contender in contenders:
            done(self.run(contender, workload, source, number=number))

    def run(self, contender: Contender, workload: Workload, source: Path, *, number: int) -> Run:
        """One run; what fails is in it."""
        run = Run(workload.name, contender.name, number, warmup=number == 0)
        with tempfile.TemporaryDirectory(prefix="run-", dir=self._directory) as name:
            place = Path(name)
            place.chmod(0o755)
            job = Job(workload.work, workload.size, workload.streams, source, place / "target", place / "scratch")
            job.scratch.mkdir()
            job.target.mkdir()
            if os.geteuid() == 0:
                job.target.chmod(0o777)
            try:
                self._measure(contender, job, run)
                check_arrived(job)
                run.ok = True
            except (RunError, OSError, ValueError, LookupError, ArithmeticError) as err:
                run.error = f"{type(err).__name__}: {err}" if not isinstance(err, RunError) else str(err)
        if not self._in_memory:
            os.sync()  # what is written back later would slow down the next one
        return run

    def _measure(self, contender: Contender, job: Job, run: Run) -> None:
        limit_s = max(_LEAST_LIMIT_S, job.size / _SLOWEST_BYTES_PER_S)
        with Servers(job.scratch) as servers:
            contender.serve(job, servers)
            commands = contender.commands(job, servers)
            run.load_1m = os.getloadavg()[0]
            run.busy_cores = machine.busy_cores()
            before = machine.cpu_times()
            with Meter(servers.all) as meter:
                began = time.monotonic()
                finished = run_clients(
                    commands,
                    scratch=job.scratch,
                    env=contender.environment(job),
                    limit_s=limit_s,
                    started=meter.watch_client,
                )
                contender.settle(job, servers)
                run.wall_seconds = time.monotonic() - began
            after = machine.cpu_times()
            outcome = contender.outcome(job, finished.printed, run.wall_seconds)
            run.bytes, run.seconds = outcome.size, outcome.seconds
            run.client_cpu_s, run.server_cpu_s = finished.cpu_s, meter.server_cpu_s
            run.client_peak_bytes, run.server_peak_bytes = meter.client_peak_bytes, meter.server_peak_bytes
            used = run.client_cpu_s + run.server_cpu_s
            run.others_cpu_s = max(0.0, after.busy_s - before.busy_s - used)
            run.steal_s = after.steal_s - before.steal_s

    @contextmanager
    def source(self, workload: Workload) -> Iterator[Path]:
        """What the workload copies: a file, or a directory."""
        with tempfile.TemporaryDirectory(prefix="source-", dir=self._directory) as name:
            place = Path(name)
            place.chmod(0o755)
            if workload.work is Work.FILE:
                write_file(place / "source.bin", workload.size)
                yield place / "source.bin"
            elif workload.work is Work.TREE:
                write_tree(place / "tree", workload.files)
                yield place / "tree"
            elif workload.work is Work.PIPE:
                (place / "tree").mkdir()
                write_file(place / "tree" / "source.bin", workload.size)
                yield place / "tree"
            elif workload.work is Work.UNPACK:
                # what is unpacked is named as anything that arrives
                write_file(place / ARRIVED, workload.size)
                subprocess.run(["tar", "-C", str(place), "-cf", str(place / "source.tar"), ARRIVED], check=True)
                yield place / "source.tar"
            else:
                yield place


def write_file(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        for offset in range(0, size, _BLOCK):
            file.write(os.urandom(min(_BLOCK, size - offset)))


def write_tree(path: Path, files: int) -> None:
    """``files`` files of `SMALL_FILE` bytes, 100 in a directory."""
    for number in range(files):
        folder = path / f"{number // _FILES_A_FOLDER:04}"
        if number % _FILES_A_FOLDER == 0:
            folder.mkdir(parents=True)
        (folder / f"{number % _FILES_A_FOLDER:02}").write_bytes(os.urandom(SMALL_FILE))


def check_arrived(job: Job) -> None:
    """Every byte of what arrived against its source. In memory there is nothing to see: the tool's count was checked.

    Raises:
        RunError: it differs or is not there.
    """
    if job.work is Work.FILE:
        command = ["cmp", str(job.source), str(job.arrived)]
    elif job.work is Work.UNPACK:
        command = ["cmp", str(job.source.parent / ARRIVED), str(job.arrived)]
    elif job.work is Work.TREE:
        command = ["diff", "--recursive", "--brief", "--no-dereference", str(job.source), str(job.arrived)]
    elif job.work is Work.PIPE:
        command = ["sh", "-c", f"{shlex.join(tar(job))} | cmp - {shlex.quote(str(job.arrived))}"]
    else:
        return
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RunError(f"what arrived is not what was sent: {' '.join(done.stdout.split())[:300]}")
