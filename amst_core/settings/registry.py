"""The one list of settings: name, kind, default, bounds, help. Validation, defaults and documentation come from it.

``python -m amst_core.settings.registry`` prints the table of docs/configuration.md.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from ..congestion import AUTO, NAME, Backend
from ..errors import UsageError
from ..interfaces import Mode
from ..units import (
    MIN_RATE,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_share,
    parse_size,
)

Value: TypeAlias = int | float | bool | str

PREFIX: Final = "AMST_"
"""What the names of environment variables start with."""

THRESHOLD: Final = "threshold"
"""The name of the core's own mode detector."""

PLUGINS: Final = "plugins"
"""The section that is handed to plugins as it is: ``plugins.<name>.<option>``."""

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_GIB: Final = 1024 * _MIB
_TIB: Final = 1024 * _GIB
_MINUTE_S: Final = 60.0
_HOUR_S: Final = 3600.0
_DAY_S: Final = 24 * _HOUR_S

_WHOLE: Final = re.compile(r"\+?[0-9]{1,18}")
_WORDS: Final = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip


class Kind(enum.StrEnum):
    """How a value is written; the enum's value is the word the documentation uses."""

    COUNT = "integer"
    KIB = "integer (KiB)"
    SIZE = "size"
    RATE = "rate"
    DURATION = "duration"
    SHARE = "share"
    FLAG = "true or false"
    WORD = "word"
    NAME = "name"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. ``default``, ``low`` and ``high`` (inclusive) are in bytes, bytes/s, seconds or plain numbers.

    One with ``off`` also takes 0, which is none. A word has ``words`` to choose from instead of bounds; a name is one
    of them, or that of a plugin.
    """

    name: str
    kind: Kind
    default: Value
    help: str
    example: str
    low: int | float = False
    high: int | float = True
    words: tuple[str, ...] = ()
    off: bool = False

    @property
    def section(self) -> str:
        """The name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def field(self) -> str:
        """The attribute that holds the value in `values`."""
        return self.name.rpartition(".")[2].removesuffix("_kb")

    @property
    def allowed(self) -> str:
        """What may be written, as one phrase."""
        if self.kind is Kind.FLAG:
            return self.kind.value
        if self.kind in (Kind.WORD, Kind.NAME):
            return self.bounds
        unit = " KiB" if self.kind is Kind.KIB else ""
        whats = {Kind.SIZE: "a size", Kind.RATE: "a rate", Kind.DURATION: "a duration", Kind.SHARE: "a share"}
        what = whats.get(self.kind, "an integer")
        return f"{what} from {self.bounds}{unit}, such as {self.example}"

    @property
    def bounds(self) -> str:
        """What limits the value, as the documentation has it; empty for a truth value."""
        if self.kind is Kind.FLAG:
            return ""
        if self.kind is Kind.WORD:
            return ", ".join(self.words[:-1]) + " or " + self.words[-1]
        if self.kind is Kind.NAME:
            return ", ".join(self.words) + " or the name of a plugin"
        return f"{self.show(self.low)} to {self.show(self.high)}{', or 0' if self.off else ''}"

    def parse(self, value: object) -> Value:
        """Read a value from a file, a variable or an argument into this key's natural unit.

        Raises:
            UsageError: wrong type, not readable, or out of bounds; the message says what is allowed.
        """
        try:
            read = self._read(value)
        except UsageError:
            read = None
        if read is None or not (isinstance(read, str) or self.low <= read <= self.high or (self.off and read == 0)):
            raise UsageError(f"must be {self.allowed}")
        return read

    def show(self, value: Value) -> str:
        """Write a value of this key as a settings file has it."""
        if self.kind is Kind.FLAG:
            return "true" if value else "false"
        if isinstance(value, str):
            return value
        if self.kind is Kind.SIZE:
            return format_size(int(value))
        if self.kind is Kind.RATE:
            decimal = format_rate(value)
            return decimal if parse_rate(decimal) == value else f"{format_size(int(value))}/s"
        if self.kind is Kind.DURATION:
            return format_duration(value)
        if self.kind is Kind.SHARE:
            return f"{value * 100:g}%"
        return str(int(value) // _KIB if self.kind is Kind.KIB else value)

    def _read(self, value: object) -> Value | None:
        if self.kind is Kind.FLAG:
            if isinstance(value, str):
                return _WORDS.get(value.strip().lower())
            return value if isinstance(value, bool) else None
        if self.kind is Kind.WORD:
            word = value.strip().lower() if isinstance(value, str) else None
            return word if word in self.words else None
        if self.kind is Kind.NAME:
            word = value.strip() if isinstance(value, str) else ""
            return word if word in self.words or NAME.fullmatch(word) else None
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return None
        if self.kind is Kind.DURATION:
            return parse_duration(value)
        if self.kind is Kind.RATE:
            return parse_rate(value)
        if self.kind is Kind.SHARE:
            return parse_share(value)
        if isinstance(value, float):
            return None
        if self.kind is Kind.SIZE:
            return parse_size(value)
        if isinstance(value, str):
            if not _WHOLE.fullmatch(value.strip()):
                return None
            value = int(value)
        return value * _KIB if self.kind is Kind.KIB else value


@dataclass(frozen=True, slots=True)
class Relation:
    """``small`` may be at most ``large`` / ``share``.

    ``yields`` names the one of the two whose *default* moves to keep this true when only the other was set.
    """

    small: str
    large: str
    share: int = 1
    yields: str | None = None


KEYS: Final = (
    Key("transport.amst.chunk_size_kb", Kind.KIB, 1024 * _KIB, low=16 * _KIB, high=4096 * _KIB, example="1024",
        help="Bytes of a transfer that travel as one unit, in KiB; up to four times as many on a fast path."),
    Key("transport.amst.max_streams", Kind.COUNT, 256, low=1, high=512, example="64",
        help="Most streams (lanes) a session may have."),
    Key("transport.amst.min_streams", Kind.COUNT, 1, low=1, high=512, example="4",
        help="Fewest streams a session keeps; at most `transport.amst.max_streams`."),
    Key("transport.amst.auto_tune", Kind.FLAG, True, example="false",
        help="The number of streams follows the path, from that which the mode starts with and within what it allows."),
    Key("transport.amst.pacing_enabled", Kind.FLAG, True, example="false",
        help="Sessions are paced as a whole: by a congestion control in user space where the kernel has none that is"
             " asked for, and where their streams make a queue. When false each stream has what its kernel does,"
             " and only their number follows the path."),
    Key("transport.amst.pacing_rate", Kind.RATE, 0.0, low=MIN_RATE, high=125e9, example="100Mbit/s", off=True,
        help="Most payload per second that a session sends over all its streams; 0 for no limit. `--bwlimit` takes its"
             " place, also with 0."),
    Key("transport.amst.connect_timeout", Kind.DURATION, 30.0, low=1.0, high=5 * _MINUTE_S, example="10s",
        help="How long opening a session or a stream may take."),
    Key("transport.amst.read_timeout", Kind.DURATION, 60.0, low=1.0, high=_HOUR_S, example="60s",
        help="How long a stream may pause in the middle of a frame before it counts as broken."),
    Key("transport.amst.write_timeout", Kind.DURATION, 60.0, low=1.0, high=_HOUR_S, example="60s",
        help="How long sending on a stream may make no progress before it counts as broken."),
    Key("transport.amst.health_check_interval", Kind.DURATION, 10.0, low=0.1, high=_HOUR_S, example="5s",
        help="How often each stream is asked for a sign of life; after an error all are asked at once."),
    Key("transport.modes.mode", Kind.WORD, AUTO, words=(AUTO, *(mode.value for mode in Mode)), example="internet",
        help="The mode of a session, whatever its path calls for; a server's comes before what its clients ask for."
             " auto: the one that its path calls for."),
    Key("transport.modes.auto_mode", Kind.FLAG, True, example="false",
        help="The mode follows the path while a session lasts; when false it stays the one that the round trip called"
             " for at its beginning."),
    Key("transport.modes.mode_check_interval", Kind.DURATION, 5.0, low=1.0, high=_HOUR_S, example="10s",
        help="How often what the detector finds may change the mode."),
    Key("transport.modes.detector", Kind.NAME, AUTO, words=(AUTO, THRESHOLD), example="threshold",
        help="Who finds the mode that a path calls for: the detector of a plugin, where one is installed (auto), else"
             " the core's own, which goes by the four thresholds that follow."),
    Key("transport.modes.datacenter_latency", Kind.DURATION, 0.010, low=0.0001, high=1.0, example="5ms",
        help="A shorter round trip is a datacenter's, until it is longer by a fifth."),
    Key("transport.modes.internet_latency", Kind.DURATION, 0.050, low=0.0001, high=10.0, example="30ms",
        help="A longer round trip is the internet's, until it is shorter by a fifth; at least"
             " `transport.modes.datacenter_latency`."),
    Key("transport.modes.datacenter_bandwidth", Kind.RATE, 125e6, low=125e3, high=125e9, example="10Gbit/s",
        help="The least rate of a datacenter's link. What a session carries over it is less: below three quarters it is"
             " the internet's, from nine tenths on not."),
    Key("transport.modes.internet_loss", Kind.SHARE, 0.01, low=0.0001, high=0.5, example="2%",
        help="A path that loses more is the internet's, until it is half of that."),
    Key("transport.modes.datacenter_streams", Kind.COUNT, 16, low=1, high=512, example="32",
        help="Streams a session starts with in datacenter mode; from `transport.amst.min_streams` to"
             " `transport.amst.max_streams`, and the default moves into that range."),
    Key("transport.modes.internet_streams", Kind.COUNT, 8, low=1, high=512, example="16",
        help="Streams a session starts with in internet mode, which is that of a round trip above 50 ms; bounded as"
             " `transport.modes.datacenter_streams` is."),
    Key("congestion.algorithm", Kind.NAME, AUTO, words=(AUTO,), example="bbr",
        help="Congestion control of each stream; auto takes it from the path: cubic below a round trip of 10 ms, else"
             " bbr. What the system refuses is done in user space (congestion.backend), else by cubic, then by its"
             " own, and says so."),
    Key("congestion.backend", Kind.WORD, Backend.AUTO.value, words=tuple(backend.value for backend in Backend),
        example="userspace",
        help="Who runs it: the kernel, or user space, which paces all streams of a session together and takes as many"
             " as that needs; auto takes the kernel where it has the algorithm, else user space."),
    Key("congestion.base", Kind.NAME, AUTO, words=(AUTO,), example="cubic",
        help="What runs in the kernel under streams paced in user space; auto: the system's own, or where that is bbr"
             " cubic, else reno."),
    Key("security.plaintext", Kind.FLAG, False, example="true",
        help="This side asks for plaintext data (checked by CRC-32C) instead of encryption."),
    Key("security.allow_plaintext", Kind.FLAG, False, example="true",
        help="A server grants plaintext to peers that are not on its loopback interface."),
    Key("limits.memory", Kind.SIZE, 192 * _MIB, low=32 * _MIB, high=_TIB, example="2GiB",
        help="Memory for buffers: of a server, with all its sessions together; of a client, for each session."),
    Key("limits.max_message", Kind.SIZE, 64 * _MIB, low=_KIB, high=_GIB, example="16MiB",
        help="Largest message; larger data goes as a pipe or file. At most half of `limits.memory`, and the default"
             " shrinks to that."),
    Key("limits.open_transfers", Kind.COUNT, 256, low=1, high=4096, example="64",
        help="Transfers a session may have open at once, in each direction."),
    Key("limits.sessions", Kind.COUNT, 64, low=1, high=65536, example="256",
        help="Sessions a server holds at once."),
    Key("limits.lanes", Kind.COUNT, 2048, low=1, high=65536, example="4096",
        help="Streams a server holds at once, over all sessions."),
    Key("limits.unauthenticated", Kind.COUNT, 256, low=8, high=65536, example="512",
        help="Connections to a server that have not proven themselves yet; beyond it the oldest of them is closed for"
             " the newest."),
    Key("limits.handshake_timeout", Kind.DURATION, 10.0, low=1.0, high=5 * _MINUTE_S, example="5s",
        help="How long a new connection has to prove itself before it is closed."),
    Key("limits.session_timeout", Kind.DURATION, 60.0, low=1.0, high=_HOUR_S, example="5min",
        help="How long a session goes on without its control connection, or without any stream, before it is lost."),
    Key("files.fsync", Kind.WORD, "never", words=("never", "end", "always"), example="end",
        help="When received files are forced to the disk: never by AMST; each before it is confirmed; or also every"
             " part of it before it counts for resuming after a power cut."),
    Key("files.keep_partial", Kind.DURATION, 7 * _DAY_S, low=_MINUTE_S, high=365 * _DAY_S, example="2d",
        help="How long what a broken copy left stays beside its target to be continued."),
)  # fmt: skip

BY_NAME: Final[Mapping[str, Key]] = MappingProxyType({key.name: key for key in KEYS})

RELATIONS: Final = (
    Relation("transport.amst.min_streams", "transport.amst.max_streams"),
    Relation("transport.modes.datacenter_latency", "transport.modes.internet_latency"),
    Relation(
        "transport.amst.min_streams",
        "transport.modes.datacenter_streams",
        yields="transport.modes.datacenter_streams",
    ),
    Relation(
        "transport.modes.datacenter_streams",
        "transport.amst.max_streams",
        yields="transport.modes.datacenter_streams",
    ),
    Relation(
        "transport.amst.min_streams",
        "transport.modes.internet_streams",
        yields="transport.modes.internet_streams",
    ),
    Relation(
        "transport.modes.internet_streams",
        "transport.amst.max_streams",
        yields="transport.modes.internet_streams",
    ),
    Relation("limits.max_message", "limits.memory", share=2, yields="limits.max_message"),
)


def variable(name: str) -> str:
    """The environment variable of a key: ``limits.memory`` is ``AMST_LIMITS__MEMORY``."""
    return PREFIX + name.upper().replace(".", "__")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the documentation's table, all text."""

    name: str
    kind: str
    default: str
    bounds: str
    example: str
    help: str


def describe() -> tuple[Row, ...]:
    """The registry as text, in its order."""
    return tuple(
        Row(
            name=key.name,
            kind=key.kind.value,
            default=key.show(key.default),
            bounds=key.bounds,
            example=key.example,
            help=key.help,
        )
        for key in KEYS
    )


def table() -> str:
    """The registry as the Markdown table of docs/configuration.md, with a newline at its end."""
    lines = ["| Setting | Type | Default | Bounds | Example | What it does |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {row.kind} | `{row.default}` | {row.bounds} | `{row.example}` | {row.help} |"
        for row in describe()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
