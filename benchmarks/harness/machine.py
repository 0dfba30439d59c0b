"""The machine that a result belongs to, and how busy it was."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

BUSY_CORES: Final = 0.25
"""More than so many cores busy with something else: the run is marked."""

_LOOK_S: Final = 0.2
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, str]:
    """What a reader must know to judge the figures; what cannot be read says so."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "virtual": "yes (the CPU says hypervisor)"
        if "hypervisor" in _field("/proc/cpuinfo", "flags").split()
        else "no",
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory": f"{int((_field('/proc/meminfo', 'MemTotal') or '0').split()[0]) / 2**20:.1f} GiB",
        "kernel": platform.release(),
        "congestion control": _text("/proc/sys/net/ipv4/tcp_congestion_control"),
        "tcp_rmem": _text("/proc/sys/net/ipv4/tcp_rmem"),
        "tcp_wmem": _text("/proc/sys/net/ipv4/tcp_wmem"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds over all cores since the machine started; without interrupts, whose work is nobody's in particular."""

    busy_s: float
    steal_s: float


def cpu_times() -> CpuTimes:
    with open("/proc/stat") as file:
        user, nice, system, _, _, _, _, steal = (int(field) / _TICKS for field in file.readline().split()[1:9])
    return CpuTimes(user + nice + system, steal)


def busy_cores() -> float:
    """How many cores others keep busy, looked at for 0.2 s in which we do nothing."""
    before, began = cpu_times(), time.monotonic()
    time.sleep(_LOOK_S)
    after = cpu_times()
    return (after.busy_s - before.busy_s + after.steal_s - before.steal_s) / (time.monotonic() - began)


def file_system(path: Path) -> str:
    """The type of the file system that ``path`` lies on."""
    best, kind = "", "unknown"
    resolved = str(path.resolve())
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, name = line.split()[:3]
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind


def _text(path: str) -> str:
    try:
        return " ".join(Path(path).read_text().split())
    except OSError:
        return "not readable"


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
