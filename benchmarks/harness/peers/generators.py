"""Peers that move memory to memory: they check nothing and encrypt nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..contender import Contender, Job, Outcome, Servers, first_line, path_of
from ..errors import RunError
from ..processes import free_port

IPERF3_MOST_STREAMS = 128
NUTTCP_MOST_STREAMS = 128


class Iperf3(Contender):
    """At its default block size, or ``block``. More streams than one iperf3 can are spread over several at once."""

    programs = ("iperf3",)
    how_to_get = "apt-get install iperf3"

    def __init__(self, block: str = "") -> None:
        self._block = ("-l", block) if block else ()
        self.name = " ".join(("iperf3", *self._block))

    def version(self) -> str:
        return first_line("iperf3", "--version")

    def serve(self, job: Job, servers: Servers) -> None:
        for _ in range(-(-job.streams // IPERF3_MOST_STREAMS)):
            port = free_port()
            servers.start_listening(["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port)], port)

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        share, streams = job.size // len(servers.ports), job.streams // len(servers.ports)
        return [
            ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-n", str(share), "-P", str(streams), "-J", *self._block]
            for port in servers.ports
        ]

    def outcome(self, job: Job, printed: Sequence[str], wall_s: float) -> Outcome:
        """Bytes received; it stops counting when the sender is done, so that what was then under way is missing."""
        ends = [json.loads(text)["end"] for text in printed]
        sent = sum(int(end["sum_sent"]["bytes"]) for end in ends)
        if sent < job.size // len(ends) * len(ends):
            raise RunError(f"iperf3 sent {sent} of {job.size} bytes")
        received = [end["sum_received"] for end in ends]
        return Outcome(sum(int(one["bytes"]) for one in received), max(float(one["seconds"]) for one in received))


class Iperf2(Contender):
    """Its figures are the sender's."""

    name = "iperf2"
    programs = ("iperf",)
    how_to_get = "apt-get install iperf"

    def version(self) -> str:
        return first_line("iperf", "-v")

    def serve(self, job: Job, servers: Servers) -> None:
        port = free_port()
        servers.start_listening(["iperf", "-s", "-B", "127.0.0.1", "-p", str(port)], port)

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        share = str(job.size // job.streams)  # its -n is for each stream
        port = str(servers.ports[0])
        return [["iperf", "-c", "127.0.0.1", "-p", port, "-n", share, "-P", str(job.streams), "-y", "C"]]

    def outcome(self, job: Job, printed: Sequence[str], wall_s: float) -> Outcome:
        """From its CSV: a line a stream, with bytes and bits/s; a sum, which has a negative id, is left out."""
        total, longest = 0, 0.0
        for line in printed[0].split():
            fields = line.split(",")
            if int(fields[5]) > 0:
                size, rate = int(fields[7]), float(fields[8])
                total += size
                longest = max(longest, size * 8 / rate if rate else 0.0)
        if total < job.size // job.streams * job.streams or not longest:
            raise RunError(f"iperf2 says that it sent {total} of {job.size} bytes in {longest:g} s")
        return Outcome(total, longest)


class Nuttcp(Contender):
    name = "nuttcp"
    programs = ("nuttcp",)
    how_to_get = "apt-get install nuttcp"

    def version(self) -> str:
        return first_line("nuttcp", "-V")

    def serve(self, job: Job, servers: Servers) -> None:
        port = free_port()
        servers.start_listening(["nuttcp", "-S", "--nofork", "-P", str(port)], port)

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        mebibytes = f"-n{job.size >> 20}m"
        data, control = str(free_port()), str(servers.ports[0])
        return [
            ["nuttcp", "-fparse", "-P", control, "-p", data, f"-N{job.streams}", "-l1m", mebibytes, "127.0.0.1"]
        ]  # fmt: skip

    def outcome(self, job: Job, printed: Sequence[str], wall_s: float) -> Outcome:
        """From its ``name=value`` pairs; the megabytes are of 2^20 bytes."""
        values = dict(pair.split("=", 1) for pair in printed[0].split() if "=" in pair)
        if "megabytes" not in values or "real_seconds" not in values:
            raise RunError(f"nuttcp printed {printed[0].strip()[:200]!r}")
        size = round(float(values["megabytes"]) * 2**20)
        if size < job.size >> 20 << 20:
            raise RunError(f"nuttcp moved {size} of {job.size} bytes")
        return Outcome(size, float(values["real_seconds"]))


class Ucx(Contender):
    """Tagged messages of 4 MiB over UCX's tcp transport; it decides how many connections it uses."""

    name = "UCX tcp"
    programs = ("ucx_perftest",)
    how_to_get = "apt-get install ucx-utils"
    _MESSAGE = 4 << 20

    def version(self) -> str:
        return first_line("ucx_info", "-v").lstrip("# ")

    def environment(self, job: Job) -> Mapping[str, str]:
        return {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}

    def serve(self, job: Job, servers: Servers) -> None:
        port = free_port()
        servers.start_listening(["ucx_perftest", "-p", str(port)], port, env=self.environment(job))

    def commands(self, job: Job, servers: Servers) -> Sequence[Sequence[str]]:
        count = str(-(-job.size // self._MESSAGE))
        return [
            [path_of("ucx_perftest"), "127.0.0.1", "-p", str(servers.ports[0]), "-t", "tag_bw",
             "-s", str(self._MESSAGE), "-n", count, "-w", "1", "-v", "-f"]
        ]  # fmt: skip

    def settle(self, job: Job, servers: Servers) -> None:
        servers.all[0].wait_end()

    def outcome(self, job: Job, printed: Sequence[str], wall_s: float) -> Outcome:
        """From its CSV, under a header; bandwidth is in MB/s of 2^20 bytes."""
        lines = [line.split(",") for line in printed[0].splitlines() if "," in line]
        if len(lines) < 2:
            raise RunError(f"ucx_perftest printed {printed[0].strip()[:200]!r}")
        values = dict(zip((name.strip() for name in lines[-2]), lines[-1], strict=True))
        size = int(values["iterations"]) * self._MESSAGE
        if size < job.size:
            raise RunError(f"ucx_perftest moved {size} of {job.size} bytes")
        return Outcome(size, size / (float(values["overall_bw"]) * 2**20))
