"""What a command says at its end: the JSON object for scripts, the summary and the errors for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..errors import AmstError

if TYPE_CHECKING:
    from .. import Session
    from ..interfaces import StreamHealth

_SHOWN_FAILURES: Final = 20
_EXTRA: Final = ("dry_run", "arrived_bytes", "advice")
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(slots=True)
class Failure:
    """A file that did not arrive, and why."""

    path: str
    kind: str
    message: str


@dataclass(slots=True)
class Report:
    """The result of cp or bench, filled as it goes; but for the last three, its fields are the keys of --json in order.

    What is not (yet) known is None, or 0 where it is a count. ``seconds`` run from the first payload byte
    offered to the last one acknowledged as verified. ``dry_run``, a key only of a copy that was only planned: what it
    would do. ``arrived_bytes``: so many had, whole files or not; ``advice``: how to go on when it is cut short.
    """

    ok: bool = False
    bytes: int = 0
    files: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    throughput_bytes_per_s: float = 0.0
    transport: str | None = None
    mode: str | None = None
    streams: int = 0
    congestion: str | None = None
    congestion_backend: str | None = None
    encrypted: bool | None = None
    verified: bool | None = None
    retransmitted_bytes: int = 0
    resumed_bytes: int = 0
    lane_failures: int = 0
    switches: int = 0
    reason: str | None = None
    failed: list[Failure] = field(default_factory=list)
    error: Mapping[str, object] | None = None
    congestion_reason: str | None = None
    streams_reason: str | None = None
    mode_reason: str | None = None
    lanes: list[Mapping[str, object]] = field(default_factory=list)
    dry_run: Mapping[str, object] | None = None
    arrived_bytes: int = 0
    advice: str = "run the same command again and it goes on from there"

    def take_session(self, session: Session) -> None:
        """Note what the session knows about itself, while it lives or after."""
        about, metrics = session.report, session.metrics()
        self.setup_seconds = about.setup_seconds
        self.transport = metrics.transport_type
        self.mode = metrics.mode
        self.mode_reason = metrics.mode_reason
        self.switches = metrics.switches
        self.streams = about.most_streams
        self.congestion = metrics.congestion
        self.congestion_backend = metrics.congestion_backend
        self.congestion_reason = metrics.congestion_reason
        self.streams_reason = metrics.streams_reason
        self.lanes = [_lane(stream) for stream in metrics.streams]
        self.encrypted = about.encrypted
        self.verified = about.verified
        self.retransmitted_bytes = metrics.retransmitted_bytes
        self.resumed_bytes = about.resumed_bytes
        self.lane_failures = metrics.lane_failures
        self.reason = about.transport_reason or None
        self.arrived_bytes = max(about.acknowledged_bytes, about.verified_bytes) + about.resumed_bytes

    def take_amount(self, moved_bytes: int, *, files: int = 0, seconds: float, resumed_bytes: int = 0) -> None:
        """Note how much arrived, and in which time; what was there from an earlier try did not travel."""
        self.bytes, self.files, self.seconds = moved_bytes, files, seconds
        travelled = max(0, moved_bytes - resumed_bytes)
        self.throughput_bytes_per_s = travelled / seconds if seconds > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        """Every key, always."""
        values: dict[str, object] = {name: getattr(self, name) for name in self.__slots__ if name not in _EXTRA}
        values["failed"] = [{"path": f.path, "kind": f.kind, "message": f.message} for f in self.failed]
        if self.dry_run is not None:
            values["dry_run"] = self.dry_run
        return values


def _lane(stream: StreamHealth) -> dict[str, object]:
    """What --json tells of one stream: what it moved, its path, and what limits it."""
    path, congestion = stream.path, stream.congestion
    return {
        "id": stream.id,
        "transport": stream.transport,
        "bytes_sent": stream.bytes_sent,
        "bytes_received": stream.bytes_received,
        "reconnects": stream.reconnects,
        "rtt_s": path.rtt_s,
        "min_rtt_s": path.min_rtt_s,
        "segments_sent": path.segments_sent,
        "segments_retransmitted": path.segments_retransmitted,
        "cwnd": path.cwnd,
        "pacing_rate": path.pacing_rate,
        "chunk_size": stream.chunk_size,
        "congestion": path.congestion,
        "congestion_backend": None if congestion is None else congestion.backend,
        "congestion_controller": None if congestion is None else congestion.controller,
        "congestion_asked": None if congestion is None else congestion.asked,
        "congestion_reason": None if congestion is None else congestion.reason,
    }


def describe_error(error: AmstError, message: str | None = None) -> dict[str, object]:
    """The ``error`` object of --json."""
    return {"kind": error.kind, "message": message or error.message, "retryable": error.retryable}


def print_json(value: Mapping[str, object], *, aside: bool = False) -> None:
    """One object on one line of standard output; ``aside``: of standard error, where that carries data."""
    print(json.dumps(value), file=sys.stderr if aside else sys.stdout, flush=True)


def say(line: str) -> None:
    """One line for people, on standard error, where it does not get between a script and its data."""
    print(line, file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """One error or note."""
    say(f"amst: {message}")


def complain_about(failed: list[Failure]) -> None:
    """What did not arrive, a few lines of it at most."""
    for failure in failed[:_SHOWN_FAILURES]:
        # Most messages name their file already.
        named = failure.path in failure.message
        complain(failure.message if named else f"{failure.path}: {failure.message}")
    if len(failed) > _SHOWN_FAILURES:
        complain(f"... and {count(len(failed) - _SHOWN_FAILURES, 'more')} (--json lists all)")


def summary(report: Report, verb: str, *, count_files: bool) -> str:
    """One line for people: how much, how fast, over what."""
    what = size(report.bytes)
    if count_files:
        what = f"{count(report.files, 'file' if report.files == 1 else 'files')}, {what}"
    if report.resumed_bytes:
        what += f", {size(report.resumed_bytes)} of it there already,"
    parts = [f"{verb} {what} in {report.seconds:.2f} s ({rate(report.throughput_bytes_per_s)})"]
    plural = "stream" if report.streams == 1 else "streams"
    parts.append(f" over {report.streams} {report.transport} {plural}")
    parts.append(", encrypted" if report.encrypted else ", in plaintext")
    parts.append(", verified" if report.verified else ", not verified")
    return "".join(parts)


def count(number: int, noun: str) -> str:
    """``4 321 files``."""
    return f"{number:,} {noun}".replace(",", " ")


def size(amount: float) -> str:
    """Bytes with the largest binary unit below it and three digits or so: ``1.2 GiB``."""
    power = 0
    while round(amount, 1 if amount < 10 else 0) >= 1024 and power < len(_UNITS) - 1:
        amount /= 1024
        power += 1
    if not power:
        return f"{amount:.0f} {'byte' if round(amount) == 1 else 'bytes'}"
    return f"{amount:.{1 if amount < 99.95 else 0}f} {_UNITS[power]}"


def rate(bytes_per_s: float) -> str:
    """``1.4 GiB/s``."""
    return size(bytes_per_s) + "/s"


def clock(seconds: float) -> str:
    """``0:42``, ``1:02:03``."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
