"""What of this machine matters to AMST: facts, gathered without changing anything, and what is to be said of each.

`gather` asks the system, `judge` knows no system: the same facts always give the same findings.
"""

from __future__ import annotations

import enum
import os
import platform
import resource
import socket
import ssl
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

from ..errors import AmstError
from ..plugins import Plugins
from ..security.identity import CERTIFICATE_FILE, KEY_FILE, TOKEN_FILE, state_dir
from ..settings.load import load_settings
from ..settings.values import Settings
from ..units import format_size
from .choice import TRANSPORT_GROUP

LEAST_PYTHON: Final = (3, 11)
_SYSCTLS: Final = (
    "net.core.rmem_max", "net.core.wmem_max", "net.core.somaxconn", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
    "net.ipv4.tcp_congestion_control", "net.ipv4.tcp_available_congestion_control", "net.ipv4.ip_local_port_range",
)  # fmt: skip
_LEAST_TCP_BUFFER: Final = 4 << 20
_LEAST_BACKLOG: Final = 512
_LEAST_PORTS: Final = 2048
_LEAST_FILES: Final = 256
_GOOD_FILES: Final = 4096


class State(enum.StrEnum):
    """How a finding is meant: nothing to do, worth knowing, AMST cannot be used."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; ``advice`` is empty where there is nothing to do."""

    area: str
    state: State
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class PluginFact:
    """An installed plugin; ``error`` and ``unusable`` say why it cannot be used, here or at all."""

    group: str
    name: str
    version: str
    error: str = ""
    unusable: str = ""


@dataclass(frozen=True, slots=True)
class StateFact:
    """The state directory: modes of what is in it by name, ``error`` when it could not be looked at."""

    path: str
    mode: int | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What `gather` found. A number that the system does not tell is None, a limit that it has not is -1."""

    python: tuple[int, int, int]
    system: str
    kernel: str
    machine: str
    versions: Mapping[str, str]
    cpu_has_aes: bool | None
    open_files: int
    locked_memory: int
    sysctls: Mapping[str, str | None]
    bbr: str
    """Why a socket does not take bbr, empty when it does."""
    is_root: bool
    has_tun: bool
    plugins: tuple[PluginFact, ...]
    state: StateFact


# ---- facts --------------------------------------------------------------------------------


def gather(settings: Settings | None = None, *, environ: Mapping[str, str] = os.environ) -> Facts:
    """Look at this process and this machine."""
    settings = load_settings() if settings is None else settings
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        kernel=platform.release(),
        machine=platform.machine(),
        versions=_versions(),
        cpu_has_aes=_cpu_has_aes(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        locked_memory=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        sysctls={name: _sysctl(name) for name in _SYSCTLS},
        bbr=_try_congestion("bbr"),
        is_root=os.geteuid() == 0,
        has_tun=os.access("/dev/net/tun", os.R_OK | os.W_OK),
        plugins=_plugins(settings),
        state=_state(environ),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("amst-core", "cryptography", "crc32c", "dynaconf", "pluggy", "stevedore"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    from cryptography.hazmat.backends.openssl.backend import backend

    found["OpenSSL of cryptography"] = backend.openssl_version_text()
    found["OpenSSL of Python"] = ssl.OPENSSL_VERSION
    return found


def _cpu_has_aes() -> bool | None:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return None
    flags = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return any("aes" in line.split() for line in flags) if flags else None


def _sysctl(name: str) -> str | None:
    try:
        return " ".join(Path("/proc/sys", *name.split(".")).read_text("ascii").split())
    except OSError:
        return None


def _try_congestion(name: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as err:
            return err.strerror or str(err)
    return ""


def _plugins(settings: Settings) -> tuple[PluginFact, ...]:
    scratch = Plugins()
    found = []
    for report in Plugins.check():
        plugin = report.plugin
        error, unusable = str(report.error) if report.error is not None else "", ""
        if not error and plugin.group == TRANSPORT_GROUP:
            try:
                transport = scratch.transport(plugin.name, settings.plugins.get(plugin.name, {}))
                candidate = transport.probe(None)
                transport.close()
                unusable = "" if candidate.usable else candidate.reason or "it says no reason"
            except AmstError as err:
                unusable = str(err)
        found.append(PluginFact(plugin.group, plugin.name, f"{plugin.dist} {plugin.version}", error, unusable))
    return tuple(found)


def _state(environ: Mapping[str, str]) -> StateFact:
    try:
        directory = state_dir(environ)
    except AmstError as err:
        return StateFact("", error=str(err))
    files = {}
    try:
        mode = stat.S_IMODE(directory.stat().st_mode)
        for name in (TOKEN_FILE, KEY_FILE, CERTIFICATE_FILE):
            if (directory / name).exists():
                files[name] = stat.S_IMODE((directory / name).stat().st_mode)
    except FileNotFoundError:
        return StateFact(str(directory))
    except OSError as err:
        return StateFact(str(directory), error=err.strerror or str(err))
    return StateFact(str(directory), mode, files)


# ---- findings -----------------------------------------------------------------------------


def judge(facts: Facts) -> list[Finding]:
    """What is to be said of the facts, in the order of a report."""
    return [
        *_judge_system(facts), *_judge_kernel(facts), *_judge_congestion(facts), *_judge_labs(facts),
        *_judge_plugins(facts.plugins), *_judge_state(facts.state),
    ]  # fmt: skip


def _judge_system(facts: Facts) -> list[Finding]:
    version = ".".join(map(str, facts.python))
    old = facts.python[:2] < LEAST_PYTHON
    found = [
        Finding("python", State.PROBLEM, version, "AMST needs Python 3.11 or newer") if old
        else Finding("python", State.OK, version)
    ]  # fmt: skip
    if facts.system == "Linux":
        found.append(Finding("kernel", State.OK, f"Linux {facts.kernel}, {facts.machine}"))
    else:
        found.append(Finding("kernel", State.PROBLEM, f"{facts.system} {facts.kernel}", "AMST runs on Linux only"))
    found += [Finding("version", State.OK, f"{name} {text}") for name, text in facts.versions.items()]
    match facts.cpu_has_aes:
        case True:
            found.append(Finding("encryption", State.OK, "the processor has AES instructions"))
        case False:
            advice = "on a network of your own, security.plaintext sends checked data without encryption"
            found.append(Finding("encryption", State.NOTE, "the processor has no AES instructions: it is slow", advice))
        case None:
            found.append(Finding("encryption", State.NOTE, "whether the processor has AES instructions is not known"))
    return found


def _judge_kernel(facts: Facts) -> list[Finding]:
    files = facts.open_files
    text = f"open files: {'no limit' if files < 0 else files}; each stream takes one, each open file up to two"
    if 0 <= files < _LEAST_FILES:
        advice = f"raise it to {_GOOD_FILES} (ulimit -Hn, limits.conf, LimitNOFILE=)"
        found = [Finding("limit", State.PROBLEM, text, advice)]
    elif 0 <= files < _GOOD_FILES:
        advice = "for many streams or sessions raise it (ulimit -Hn, limits.conf, LimitNOFILE=)"
        found = [Finding("limit", State.NOTE, text, advice)]
    else:
        found = [Finding("limit", State.OK, text)]
    memory = "no limit" if facts.locked_memory < 0 else format_size(facts.locked_memory)
    found.append(Finding("limit", State.OK, f"locked memory: {memory}; only transports that register memory need it"))
    for name, direction in (("net.ipv4.tcp_wmem", "send"), ("net.ipv4.tcp_rmem", "receive")):
        found.append(_judge_buffer(name, facts.sysctls.get(name), direction))
    for name in ("net.core.wmem_max", "net.core.rmem_max"):
        value = facts.sysctls.get(name)
        if value is not None:
            found.append(
                Finding("kernel", State.OK, f"{name} {value}: matters only where plugins.tcp sets buffer sizes")
            )
    backlog = facts.sysctls.get("net.core.somaxconn")
    if backlog is not None:
        few = int(backlog) < _LEAST_BACKLOG
        advice = f"a server's streams come at once: sysctl -w net.core.somaxconn={_LEAST_BACKLOG}" if few else ""
        found.append(Finding("kernel", State.NOTE if few else State.OK, f"net.core.somaxconn {backlog}", advice))
    ports = facts.sysctls.get("net.ipv4.ip_local_port_range")
    if ports is not None:
        low, high = map(int, ports.split())
        few = high - low + 1 < _LEAST_PORTS
        advice = f"a client takes one for each stream; have {_LEAST_PORTS} at least" if few else ""
        text = f"net.ipv4.ip_local_port_range {ports}: {high - low + 1} ports"
        found.append(Finding("kernel", State.NOTE if few else State.OK, text, advice))
    return found


def _judge_buffer(name: str, value: str | None, direction: str) -> Finding:
    if value is None:
        return Finding("kernel", State.NOTE, f"{name} is not to be seen here (a container without /proc/sys?)")
    most = int(value.split()[-1])
    text = f"{name} {value}: a stream has at most {format_size(most)} to {direction} under way"
    if most >= _LEAST_TCP_BUFFER:
        return Finding("kernel", State.OK, text)
    first, default, _ = value.split()
    advice = f'for long paths: sysctl -w {name}="{first} {default} {16 << 20}", or use more streams'
    return Finding("kernel", State.NOTE, text, advice)


def _judge_congestion(facts: Facts) -> list[Finding]:
    current = facts.sysctls.get("net.ipv4.tcp_congestion_control")
    available = facts.sysctls.get("net.ipv4.tcp_available_congestion_control")
    found = []
    if current is not None:
        found.append(
            Finding("congestion", State.OK, f"the kernel's default is {current}, available are {available or current}")
        )
    if facts.bbr:
        advice = "as root: modprobe tcp_bbr, and name it in net.ipv4.tcp_allowed_congestion_control"
        found.append(Finding("congestion", State.NOTE, f"a socket does not take bbr here: {facts.bbr}", advice))
    else:
        found.append(Finding("congestion", State.OK, "a socket takes bbr here"))
    return found


def _judge_labs(facts: Facts) -> list[Finding]:
    if facts.is_root and facts.has_tun:
        return [Finding("labs", State.OK, "root and /dev/net/tun are there")]
    missing = [name for name, there in (("root", facts.is_root), ("/dev/net/tun", facts.has_tun)) if not there]
    advice = "only simulated networks need them, copies do not"
    return [Finding("labs", State.NOTE, f"without {' and '.join(missing)} there are no network labs", advice)]


def _judge_plugins(plugins: tuple[PluginFact, ...]) -> list[Finding]:
    found = []
    for plugin in plugins:
        label = f"{plugin.group} {plugin.name} ({plugin.version})"
        if plugin.error or plugin.unusable:
            why = plugin.error or plugin.unusable
            found.append(Finding("plugin", State.NOTE, f"{label} cannot be used: {why}", "" if plugin.error else
                                 "what it needs is missing here; other transports are used instead"))  # fmt: skip
        else:
            found.append(Finding("plugin", State.OK, label))
    if not any(p.group == TRANSPORT_GROUP and not p.error and not p.unusable for p in plugins):
        found.append(Finding("plugin", State.PROBLEM, "no transport can be used", "run: pip install amst-tcp"))
    return found


def _judge_state(state: StateFact) -> list[Finding]:
    if state.error:
        advice = "give it to this user, or choose another with AMST_STATE_DIR"
        return [Finding("state", State.PROBLEM, f"{state.path or 'the state directory'}: {state.error}", advice)]
    if state.mode is None:
        return [Finding("state", State.OK, f"{state.path} does not exist; the first amst serve makes it")]
    found = []
    if state.mode & 0o022:
        found.append(
            Finding("state", State.PROBLEM, f"others can write to {state.path} (mode {state.mode:04o})",
                    f"use: chmod 700 {state.path}")
        )  # fmt: skip
    for name in (TOKEN_FILE, KEY_FILE):
        mode = state.files.get(name, 0o600)
        if mode & 0o077:
            found.append(
                Finding("state", State.PROBLEM, f"others can read {state.path}/{name} (mode {mode:04o})",
                        "delete it to have a new one made, or trust it: chmod 600 on it")
            )  # fmt: skip
    held = ", ".join(state.files) or "nothing yet"
    return found or [Finding("state", State.OK, f"{state.path} (mode {state.mode:04o}) holds {held}")]
