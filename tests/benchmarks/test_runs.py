"""Processes and runs: what is watched, what is refused, and who is named as absent. Real processes, no clock."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from harness import rounds
from harness.contender import Contender, Job, Servers, Work
from harness.errors import RunError
from harness.peers import Cp
from harness.processes import Server, free_port, listening_ports, run_clients
from harness.rounds import Bench, check_arrived, write_file, write_tree
from harness.usage import Meter, Tree
from harness.workloads import Line, Workload
from waiting import wait_until

MIB = 1 << 20
HOLDING = textwrap.dedent("""
    import subprocess, sys
    held = b"x" * (64 << 20)
    child = subprocess.Popen([sys.executable, "-c", "held = b'x' * (64 << 20); print('held', flush=True); input()"],
                             stdin=subprocess.PIPE)
    child.wait()
""")


class Copying(Cp):
    """`cp` under another name, or another program in its place."""

    def __init__(self, name: str, *command: str, programs: tuple[str, ...] = ("cp",)) -> None:
        self.name = name
        self.programs = programs
        self._command = command

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        return [self._command] if self._command else super().commands(job, servers)


def workload(work: Work, *contenders: Contender) -> Workload:
    files = 5 if work is Work.TREE else 0
    return Workload(work, work, work, work, 51200 if files else MIB, 0, files, contenders, (Line("a", ("b",)),))


# ---- processes ------------------------------------------------------------------------------


def test_a_server_is_ready_when_it_listens_and_is_gone_with_the_block(tmp_path: Path) -> None:
    port = free_port()
    code = f"import socket; s = socket.create_server(('127.0.0.1', {port})); print('up', flush=True); s.accept()"
    with Servers(tmp_path) as servers:
        server = servers.start_listening([sys.executable, "-c", code], port)
        assert servers.ports == [port] and port in listening_ports()
        assert server.wait_line("up") == "up"
        assert server.process.poll() is None
    assert server.process.returncode is not None and port not in listening_ports()


def test_a_server_that_fails_to_start_says_why(tmp_path: Path) -> None:
    with Servers(tmp_path) as servers, pytest.raises(RunError, match=r"ended with 3 .* no such device"):
        servers.start_listening(["sh", "-c", "echo no such device >&2; exit 3"], free_port())


def test_a_one_shot_server_that_fails_is_noticed(tmp_path: Path) -> None:
    with Servers(tmp_path) as servers:
        servers.start(["sh", "-c", "exit 0"]).wait_end()
        with pytest.raises(RunError, match="ended with 4: oh"):
            servers.start(["sh", "-c", "echo oh; exit 4"]).wait_end()


def test_the_memory_of_descendants_counts(tmp_path: Path) -> None:
    server = Server([sys.executable, "-c", HOLDING], log=tmp_path / "log")
    try:
        wait_until(lambda: "held" in server.said(), "the grandchild to hold its memory")
        with Meter([server]) as meter:
            pass
        assert meter.server_peak_bytes > 2 * 64 * MIB
        alone = Tree(server.process.pid)
        alone.look()
        assert 64 * MIB < alone.peak_bytes < 2 * 64 * MIB
        assert alone.cpu_s > 0
    finally:
        server.stop()


def test_clients_are_run_at_once_and_add_up(tmp_path: Path) -> None:
    # Each waits for the other through a named pipe: one after the other they would never end.
    pipe = tmp_path / "pipe"
    subprocess.run(["mkfifo", str(pipe)], check=True)
    commands = [["sh", "-c", f"echo hello > {pipe}; echo sent"], ["cat", str(pipe)]]
    finished = run_clients(commands, scratch=tmp_path, env=None, limit_s=60, started=lambda _: None)
    assert finished.printed == ["sent\n", "hello\n"]


def test_a_client_that_fails_shows_its_complaint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"ended with 7: refused$"):
        run_clients(
            [["sh", "-c", "echo some json; echo refused >&2; exit 7"]],
            scratch=tmp_path,
            env=None,
            limit_s=60,
            started=lambda _: None,
        )


def test_a_client_that_hangs_is_killed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="longer than"):
        run_clients([["sleep", "1000"]], scratch=tmp_path, env=None, limit_s=0.01, started=lambda _: None)


def test_sigterm_stops_the_servers_too(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(rounds.__file__).parents[1])!r})
        from harness.contender import Servers
        from harness.processes import unwind_on_sigterm
        unwind_on_sigterm()
        with Servers(Path({str(tmp_path)!r})) as servers:
            print(servers.start(["sleep", "1000"]).process.pid, flush=True)
            time.sleep(1000)
    """)
    bench = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    server = int(bench.stdout.readline())
    bench.terminate()
    assert bench.wait() == 143
    bench.stdout.close()
    wait_until(lambda: not Path(f"/proc/{server}").exists(), "the server to be gone")


# ---- runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [Work.FILE, Work.TREE])
def test_a_run_of_cp_is_measured_and_checked(work: Work, tmp_path: Path) -> None:
    bench, task = Bench(tmp_path), workload(work)
    with bench.source(task) as source:
        run = bench.run(Cp(), task, source, number=1)
    assert run.ok, run.error
    assert (run.bytes, run.warmup, run.round) == (task.size, False, 1)
    assert 0 < run.seconds <= run.wall_seconds and run.client_cpu_s > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("work", [Work.FILE, Work.TREE, Work.PIPE, Work.UNPACK])
def test_one_wrong_byte_is_noticed(work: Work, tmp_path: Path) -> None:
    job = Job(work, MIB, 0, tmp_path / "source", tmp_path / "target", tmp_path)
    job.target.mkdir()
    if work is Work.FILE:
        write_file(job.source, MIB)
        victim = job.arrived
        copy = ["cp", str(job.source), str(job.arrived)]
    elif work is Work.TREE:
        write_tree(job.source, 150)
        victim = job.arrived / "0001" / "49"
        copy = ["cp", "-a", str(job.source), str(job.arrived)]
    elif work is Work.UNPACK:
        write_file(tmp_path / "arrived", MIB)
        victim = job.arrived
        copy = ["cp", str(tmp_path / "arrived"), str(job.arrived)]
    else:
        write_tree(job.source, 3)
        victim = job.arrived
        copy = ["sh", "-c", " ".join(rounds.tar(job)) + f" > {job.arrived}"]
    subprocess.run(copy, check=True)
    check_arrived(job)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RunError, match="not what was sent"):
        check_arrived(job)


def test_who_cannot_do_it_is_named_with_the_reason(tmp_path: Path) -> None:
    missing = Copying("missing", programs=("no-such-program",))
    failing = Copying("failing", "sh", "-c", "echo cannot >&2; exit 1")
    lying = Copying("lying", "true")
    able, absent = Bench(tmp_path).try_out(workload(Work.FILE, Cp(), missing, failing, lying))
    assert [one.name for one in able] == ["cp"]
    assert [(one.contender, one.how_to_get) for one in absent] == [
        (name, "apt-get install coreutils") for name in ("missing", "failing", "lying")
    ]
    reasons = [one.reason for one in absent]
    assert reasons[0] == "no-such-program is not installed"
    assert "cannot" in reasons[1] and "not what was sent" in reasons[2]


def test_rounds_interleave_the_contenders(tmp_path: Path) -> None:
    bench, contenders = Bench(tmp_path), [Copying("a"), Copying("b")]
    task, seen = workload(Work.FILE, *contenders), []
    with bench.source(task) as source:
        for number in range(3):
            bench.round(contenders, task, source, number, seen.append)
    assert [(run.contender, run.round, run.warmup) for run in seen] == [
        ("a", 0, True), ("b", 0, True), ("a", 1, False), ("b", 1, False), ("a", 2, False), ("b", 2, False),
    ]  # fmt: skip
    assert all(run.ok for run in seen)


def test_small_trials_keep_what_a_workload_needs(tmp_path: Path) -> None:
    task = replace(workload(Work.TREE, Cp()), files=2000, size=2000 * 10240)
    able, absent = Bench(tmp_path).try_out(task)
    assert (len(able), absent) == (1, [])
