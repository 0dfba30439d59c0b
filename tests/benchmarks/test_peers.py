"""What peers print, as they were seen to print it on Debian 12, and what is read from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.amst import Amst
from harness.contender import Contender, Job, Servers, Work
from harness.errors import RunError
from harness.peers import Iperf2, Iperf3, Nuttcp, Ucx

MIB = 1 << 20

IPERF3 = """\
{"end": {
  "sum_sent": {"start": 0, "end": 0.164442, "seconds": 0.164442, "bytes": 268435456,
    "bits_per_second": 13059216307.269432, "retransmits": 1, "sender": true},
  "sum_received": {"start": 0, "end": 0.164559, "seconds": 0.164559, "bytes": 259522560,
    "bits_per_second": 12616632818.624323, "sender": true},
  "sender_tcp_congestion": "bbr", "receiver_tcp_congestion": "bbr"
}}
"""
IPERF2 = """\
19700101000000,127.0.0.1,34684,127.0.0.1,5411,4,0.0-0.5,67108864,1190298204
19700101000000,127.0.0.1,34648,127.0.0.1,5411,1,0.0-0.5,67108864,1152791009
19700101000000,127.0.0.1,34670,127.0.0.1,5411,3,0.0-0.5,67108864,1131803335
19700101000000,127.0.0.1,34656,127.0.0.1,5411,2,0.0-0.5,67108864,1149673135
"""
NUTTCP = "megabytes=256.0000 real_seconds=0.21 rate_Mbps=9994.6647 tx_cpu=45 rx_cpu=85 rtt_ms=0.10\n"
UCX = """\
iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr
  64,8.112,5767.874,5767.874,693.50,693.50,173,173
"""
AMST = (
    '{"ok": true, "bytes": 268435456, "files": 0, "seconds": 0.39520538900001156, "setup_seconds": 0.052100762,'
    ' "throughput_bytes_per_s": 849037815.1194446, "transport": "tcp", "mode": "datacenter", "streams": 4,'
    ' "congestion": "bbr", "congestion_backend": "kernel", "encrypted": false, "verified": true,'
    ' "retransmitted_bytes": 0, "resumed_bytes": 0, "lane_failures": 0, "switches": 0, "reason": null, "failed": [],'
    ' "error": null}\n'
)


def job(size: int = 256 * MIB, *, streams: int = 4, work: Work = Work.MEMORY) -> Job:
    place = Path("/nowhere")
    return Job(work, size, streams, place / "source", place / "target", place / "scratch")


@pytest.mark.parametrize(
    "contender, printed, size, seconds",
    [
        (Iperf3(), IPERF3, 259522560, 0.164559),
        (Iperf2(), IPERF2, 256 * MIB, 67108864 * 8 / 1131803335),
        (Nuttcp(), NUTTCP, 256 * MIB, 0.21),
        (Ucx(), UCX, 256 * MIB, 256 / 693.5),
        (Amst("amst --plaintext", "--plaintext"), AMST, 256 * MIB, 0.39520538900001156),
    ],
    ids=lambda value: value.name if isinstance(value, Contender) else "",
)
def test_bytes_and_seconds_are_read(contender: Contender, printed: str, size: int, seconds: float) -> None:
    outcome = contender.outcome(job(), [printed], 9.0)
    assert outcome.size == size
    assert outcome.seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    "contender, printed",
    [
        (Iperf3(), IPERF3),
        (Iperf2(), IPERF2),
        (Nuttcp(), NUTTCP),
        (Ucx(), UCX),
        (Amst("amst --plaintext", "--plaintext"), AMST),
    ],
    ids=lambda value: value.name if isinstance(value, Contender) else "",
)
def test_less_than_the_whole_is_refused(contender: Contender, printed: str) -> None:
    with pytest.raises(RunError, match=r"268435456|of 536870912 bytes"):
        contender.outcome(job(512 * MIB), [printed], 9.0)


@pytest.mark.parametrize("contender", [Nuttcp(), Ucx()], ids=lambda contender: contender.name)
def test_what_cannot_be_read_is_shown(contender: Contender) -> None:
    with pytest.raises(RunError, match="connection refused"):
        contender.outcome(job(), ["connection refused\n"], 9.0)


@pytest.mark.parametrize("flags", [(), ("--plaintext", "--verify", "none")], ids=["encrypted", "unverified"])
def test_amst_must_have_done_what_its_flags_say(flags: tuple[str, ...]) -> None:
    with pytest.raises(RunError, match="amst reports"):
        Amst("amst", *flags).outcome(job(), [AMST], 9.0)


def test_many_streams_are_spread_over_several_iperf3() -> None:
    servers = Servers(Path("/nowhere"))
    servers.ports = [1, 2, 3, 4]
    commands = Iperf3("1M").commands(job(4096 * MIB, streams=512), servers)
    assert len(commands) == 4
    for port, command in zip("1234", commands, strict=True):
        options = dict(zip(command[1::2], command[2::2], strict=False))
        assert (options["-p"], options["-P"], options["-n"]) == (port, "128", str(1024 * MIB))
        assert command[-2:] == ["-l", "1M"]
    outcome = Iperf3().outcome(job(4 * 256 * MIB, streams=512), [IPERF3] * 4, 9.0)
    assert (outcome.size, outcome.seconds) == (4 * 259522560, 0.164559)
