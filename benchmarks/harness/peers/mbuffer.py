"""mbuffer: one stream, from a file or a pipe into a file or a pipe."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ..contender import Contender, Job, Servers, Work, first_line
from ..processes import free_port


class Mbuffer(Contender):
    name = "mbuffer"
    programs = ("mbuffer",)
    how_to_get = "apt-get install mbuffer"
    _BUFFER = ("-q", "-m", "256M", "-s", "1M")

    def version(self) -> str:
        return first_line("mbuffer", "--version")

    def serve(self, job: Job, servers: Servers) -> None:
        if job.work is Work.UNPACK:
            return  # who receives listens, and that is the client
        port = free_port()
        receiver = ["mbuffer", *self._BUFFER, "-I", f"127.0.0.1:{port}", "-o", str(job.arrived)]
        servers.start_listening(receiver, port)

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        if job.work is Work.UNPACK:
            port = free_port()
            receiver = ["mbuffer", *self._BUFFER, "-I", f"127.0.0.1:{port}"]
            sender = ["mbuffer", *self._BUFFER, "-i", str(job.source), "-O", f"127.0.0.1:{port}"]
            again = f"until {shlex.join(sender)} 2>/dev/null; do sleep 0.01; done"  # until the receiver listens
            return [["sh", "-c", f"{shlex.join(receiver)} | {shlex.join(untar(job))}"], ["sh", "-c", again]]
        sender = ["mbuffer", *self._BUFFER, "-O", f"127.0.0.1:{servers.ports[0]}"]
        if job.work is Work.FILE:
            return [[*sender, "-i", str(job.source)]]
        return [["sh", "-c", f"{shlex.join(tar(job))} | {shlex.join(sender)}"]]

    def settle(self, job: Job, servers: Servers) -> None:
        for server in servers.all:
            server.wait_end()


def tar(job: Job) -> list[str]:
    """What writes the source of a pipe: the same bytes each time."""
    return ["tar", "-C", str(job.source), "--sort=name", "-cf", "-", "."]


def untar(job: Job) -> list[str]:
    """What reads a tar file and unpacks it to where the job's result belongs."""
    return ["tar", "-C", str(job.target), "-xf", "-"]
