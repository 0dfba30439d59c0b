"""What can be typed: the commands, their options and their help. Imports nothing that costs time.

Each command has a parser of its own, made when that command is used. Options and operands may be mixed;
after ``--`` there are operands only.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn, TypeVar

from ..errors import UsageError
from ..units import MIN_RATE, parse_duration, parse_rate, parse_share, parse_size

_T = TypeVar("_T")

MAX_STREAMS: Final = 512
DEFAULT_LISTEN: Final = "[::]:9000"
DEFAULT_BENCH_S: Final = 10.0

_HELP: Final = """\
usage: amst COMMAND [OPTION...] [ARGUMENT...]

Moves files fast over many streams, encrypted and verified.

commands:
  serve                       serve a directory to those who know this machine's token
  cp SRC... DST               copy files and directories to, from or without a server; --dry-run only tells
  ls URL                      list what is at or in a path of a server
  bench URL                   measure memory to memory, through the same path as cp
  plugins [list] [--check]    list the installed plugins; --check tries each
  config check FILE           check a settings file; config --explain shows what is in force, and by whom
  doctor                      what of this machine matters, and what to do about it
  lab [OPTION...] -- COMMAND  run a command whose network is a path of a given rate, delay and loss (root only)

options:
  -h, --help                  this text; amst COMMAND --help says more
  -V, --version               the version

examples:
  amst serve --root /srv/data
  amst cp ./dataset amst://host/incoming/
"""

_LOCATIONS: Final = """\
A location is a local path or amst://HOST[:9000]/PATH, relative to the server's root and percent-encoded where
needed. The names are cp's: into an existing directory or one written with a trailing /, else under the target's
name. Directories are copied whole, links as links; modes and modification times are kept. For one file, - as SRC
is standard input, and as DST standard output.
"""

_EXITS: Final = """\
exit codes: 0 all arrived, verified as asked; 1 other; 2 usage or settings; 3 source not found; 4 cannot connect;
5 interrupted after a part had arrived; 6 refused: token, permission, path; 7 damaged data; 8 --require cannot be
met; 130 SIGINT; 141 nobody reads standard output; 143 SIGTERM
"""

_CREDENTIALS: Final = """\
A client must know the server's token: it finds it by --token-file FILE, in AMST_TOKEN, or in the state directory
(AMST_STATE_DIR, by default ~/.local/state/amst), which is where a server on the same account keeps it.
"""


_LAB: Final = """\
COMMAND finds the far host's address in AMST_LAB_FAR and its own in AMST_LAB_HERE (IPv6: AMST_LAB_FAR6,
AMST_LAB_HERE6). The far host runs amst serve on port 9000, with the same state directory and so the same token, or
what --far says; COMMAND starts once that listens. Values for one direction beat those for both.
"""

_LAB_EXITS: Final = """\
The exit code is COMMAND's own (128 + N when signal N ended it, 127 and 126 when it is not found or not executable).
Without a lab: 1 other; 2 usage; 6 no root or no TUN device. SIGTERM, SIGHUP and SIGINT are passed on to COMMAND.

example:
  amst lab --rate 100Mbit/s --rtt 100ms --loss 1% -- sh -c 'amst bench amst://$AMST_LAB_FAR --time 5s'
"""


class _Parser(argparse.ArgumentParser):
    """Complains with a `UsageError`, so that --json can report it too."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        print(version_line())
        parser.exit()


def version_line() -> str:
    """``amst`` and the version of the installed distribution."""
    from importlib.metadata import version

    return f"amst {version('amst-core')}"


def wants_json(argv: Sequence[str]) -> bool:
    """Whether --json was asked for, also on a command line that does not parse."""
    return "--json" in _before_dashes(argv)


def writes_data(argv: Sequence[str]) -> bool:
    """Whether standard output is for data, of a copy or of the lab's command; also where argv does not parse."""
    return bool(argv) and ((argv[0] == "cp" and argv[-1] == "-") or argv[0] == "lab")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace, ``command`` its command.

    Raises:
        UsageError: it makes no sense; says what does.
        SystemExit: help or the version was asked for and printed.
    """
    first = argv[0] if argv else ""
    if first in ("-h", "--help"):
        print(_HELP, end="")
        raise SystemExit(0)
    if first in ("-V", "--version"):
        print(version_line())
        raise SystemExit(0)
    make = _COMMANDS.get(first)
    if make is None:
        what = f"unknown command {first!r}" if first and not first.startswith("-") else "no command given"
        if first.startswith("-"):
            what = f"unknown option {first}"
        raise UsageError(f"{what}; the commands are {', '.join(_COMMANDS)} (see: amst --help)")
    # Cut at "--" here: in Python 3.11, parse_intermixed_args forgets it and takes what follows for options.
    options = _before_dashes(argv[1:])
    parser = make()
    namespace = parser.parse_intermixed_args(options)
    namespace.command = first
    namespace.operands += argv[2 + len(options) :]
    return namespace


def _before_dashes(argv: Sequence[str]) -> list[str]:
    return list(argv[: argv.index("--")] if "--" in argv else argv)


# ---- parsers ------------------------------------------------------------------------------


def _parser(command: str, usage: str, description: str, epilog: str = "") -> _Parser:
    parser = _Parser(
        prog=f"amst {command}",
        usage=textwrap.dedent(usage).strip(),
        description=description,
        epilog=epilog or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("operands", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="help", help="this text")
    parser.add_argument("-V", "--version", action=_Version, nargs=0, help="the version")
    return parser


def _add_settings(parser: _Parser) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE",
        help="settings file, YAML or TOML; may be repeated; replaces the one of AMST_CONFIG",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", type=_setting,
        help="one setting, e.g. limits.memory=2GiB; may be repeated",
    )  # fmt: skip


def _add_common(parser: _Parser) -> None:
    _add_settings(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="errors only: no progress, no summary")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; -vv logs all")


def _add_client(parser: _Parser) -> None:
    parser.add_argument(
        "--streams", type=_streams, metavar="N|auto", help=f"streams to use, 1 to {MAX_STREAMS} (default: auto)"
    )
    parser.add_argument(
        "--max-streams", type=_max_streams, metavar="N",
        help="most streams that auto may use (default: 16 on the internet, else transport.amst.max_streams)",
    )  # fmt: skip
    parser.add_argument("--transport", metavar="NAME", help="transport to prefer; another is used where it will not do")
    parser.add_argument("--require", metavar="NAME", help="transport that must be used, or nothing is done (exit 8)")
    parser.add_argument(
        "--plaintext", action="store_true",
        help="checked but not encrypted data; a server grants it on loopback or where its settings allow it",
    )  # fmt: skip
    parser.add_argument(
        "--verify", choices=("crc", "none"), default="crc",
        help="how --plaintext and copies on this machine are verified (default: crc); encrypted data always is",
    )  # fmt: skip
    parser.add_argument(
        "--bwlimit", type=_bwlimit, metavar="RATE",
        help="most payload per second over all streams, e.g. 10MB/s or 100Mbit/s; 0: no limit; SIGUSR2 lifts it and"
        " sets it again",
    )  # fmt: skip
    parser.add_argument(
        "-C", "--congestion", metavar="NAME|auto",
        help="congestion control on both sides, e.g. bbr or cubic (default: auto, as the path calls for)",
    )  # fmt: skip
    parser.add_argument(
        "--polite", action="store_true",
        help="take no more from others than one flow does: all streams are paced together, by cubic unless -C says",
    )  # fmt: skip
    _add_mode(parser, "the mode, whatever the path calls for; one that the server's settings have comes first")
    parser.add_argument("--token-file", metavar="FILE", help="file that holds the server's token")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on standard output")
    _add_common(parser)


def _add_mode(parser: _Parser, help: str) -> None:
    parser.add_argument(
        "--mode", choices=("auto", "datacenter", "internet", "hybrid"), help=f"{help} (default: transport.modes.mode)"
    )


def _serve() -> _Parser:
    parser = _parser(
        "serve",
        "amst serve [--listen HOST:PORT] [--root DIR] [OPTION...]",
        "Serve a directory: those who know the token of the state directory may read and write below it.",
        "Prints one line, 'listening on HOST:PORT', when ready. SIGTERM or SIGINT ends it after the transfers under\n"
        "way, at most 30 s; a second one ends it at once.\n",
    )
    parser.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT",
        help=f"where to listen (default: {DEFAULT_LISTEN}, IPv6 and IPv4); port 0 takes a free one",
    )  # fmt: skip
    parser.add_argument("--root", default=".", metavar="DIR", help="what to serve (default: the working directory)")
    _add_mode(parser, "the mode of all sessions, whatever their paths call for and their clients ask for")
    _add_common(parser)
    return parser


def _cp() -> _Parser:
    parser = _parser(
        "cp",
        "amst cp [OPTION...] SRC... DST",
        "Copy files and directories to or from a server.\n\n" + _LOCATIONS,
        f"{_CREDENTIALS}\n{_EXITS}",
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="accepted; directories are copied whole anyway")
    parser.add_argument("--dry-run", action="store_true", help="say what would be copied where, and change nothing")
    _add_client(parser)
    return parser


def _ls() -> _Parser:
    parser = _parser(
        "ls",
        "amst ls [-l] [-R] [OPTION...] amst://HOST[:PORT]/PATH",
        "List what is at a path of a server, in a directory what is in it, sorted, directories with a trailing /.",
        f"{_CREDENTIALS}\n{_EXITS}",
    )
    parser.add_argument("-l", "--long", action="store_true", help="mode, size in bytes and modification time too")
    parser.add_argument("-R", "--recursive", action="store_true", help="everything below it, one path a line")
    _add_client(parser)
    return parser


def _bench() -> _Parser:
    parser = _parser(
        "bench",
        "amst bench [OPTION...] amst://HOST[:PORT] [--size SIZE | --time TIME] [--reverse]",
        "Measure memory to memory: messages through a session with its checks and its encryption.",
        f"{_CREDENTIALS}\n{_EXITS}",
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--size", type=_bench_size, metavar="SIZE", help="how much to move, e.g. 4GiB")
    limit.add_argument(
        "--time", type=_bench_time, metavar="TIME", help=f"how long to send, e.g. 30s (default: {DEFAULT_BENCH_S:g}s)"
    )
    parser.add_argument("--reverse", action="store_true", help="the server sends")
    _add_client(parser)
    return parser


def _plugins() -> _Parser:
    parser = _parser(
        "plugins",
        "amst plugins [list] [--check] [--json]",
        "List the installed plugins, without importing any; --check tries each and exits 1 if one fails.",
    )
    parser.add_argument("--check", action="store_true", help="import and try each plugin")
    _add_plain(parser)
    return parser


def _config() -> _Parser:
    parser = _parser(
        "config",
        """\
        amst config check [--json] FILE
               amst config --explain [--config FILE] [--set KEY=VALUE] [--json]""",
        "Check a settings file and list all its faults, or show each setting in force with the file, variable or\n"
        "option that has set it.",
    )
    parser.add_argument("--explain", action="store_true", help="show what is in force, and where it comes from")
    _add_settings(parser)
    _add_plain(parser)
    return parser


def _doctor() -> _Parser:
    parser = _parser(
        "doctor",
        "amst doctor [--leftovers DIR] [OPTION...]",
        "Look at what of this machine matters to AMST: ok, a note, or a problem (exit 1), and what to do about it.\n"
        "Nothing is changed.",
    )
    parser.add_argument(
        "--leftovers", metavar="DIR", help="list instead what broken copies have left below DIR, and what becomes of it"
    )
    _add_settings(parser)
    _add_plain(parser)
    return parser


def _lab() -> _Parser:
    parser = _parser(
        "lab",
        "amst lab [--rate RATE] [--rtt TIME] [--loss SHARE] [OPTION...] -- COMMAND [ARGUMENT...]",
        "Run a command on a host of its own, whose only network is a path of that kind to a far host. Root only.\n\n"
        + _LAB,
        _LAB_EXITS,
    )
    both = parser.add_argument_group("the path, both directions")
    both.add_argument("--rtt", type=_as_given(parse_duration), metavar="TIME", help="round-trip time, half each way")
    ways = ("up", "from the command to the far host"), ("down", "back to the command")
    for prefix, group in (
        ("", both), *((f"{name}-", parser.add_argument_group(f"only {name}, {what}")) for name, what in ways)
    ):  # fmt: skip
        for name, read, value, text in _PATH:
            if prefix or name != "delay":
                shown = None if prefix else text
                group.add_argument(f"--{prefix}{name}", type=_as_given(read), metavar=value, help=shown)
    parser.add_argument("--seed", type=_whole, default=1, metavar="N", help="what losses and jitter are drawn from (1)")
    parser.add_argument(
        "-C", "--congestion", metavar="NAME", help="congestion control of both hosts (default: this machine's)"
    )
    parser.add_argument(
        "--tcp-memory", type=_as_given(parse_size), metavar="SIZE",
        help="most that a TCP socket buffers (default: this machine's limit)",
    )  # fmt: skip
    parser.add_argument(
        "--far", metavar="COMMAND", help="what the far host runs, by sh (default: amst serve of an empty directory)"
    )
    parser.add_argument("--report", metavar="FILE", help="write the report to FILE, as JSON")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object, on standard error")
    parser.add_argument("-q", "--quiet", action="store_true", help="no report on standard error unless it is bad")
    return parser


def _add_plain(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on standard output")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more; -vv logs all")


_COMMANDS: Final[Mapping[str, Callable[[], _Parser]]] = {
    "serve": _serve,
    "cp": _cp,
    "ls": _ls,
    "bench": _bench,
    "plugins": _plugins,
    "config": _config,
    "doctor": _doctor,
    "lab": _lab,
}


# ---- values -------------------------------------------------------------------------------


def _streams(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_STREAMS):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 1 to {MAX_STREAMS}")
    return int(text)


def _max_streams(text: str) -> int:
    count = _streams(text)
    if count is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {MAX_STREAMS}")
    return count


def _bwlimit(text: str) -> float:
    try:
        rate = parse_rate(text)
    except UsageError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    if rate and rate < MIN_RATE:
        raise argparse.ArgumentTypeError(f"{text!r} is less than {MIN_RATE >> 10} KiB/s; 0 means no limit")
    return rate


def _as_given(read: Callable[[str], _T]) -> Callable[[str], _T]:
    """A reader of `units` as argparse wants it."""

    def value(text: str) -> _T:
        try:
            return read(text)
        except UsageError as err:
            raise argparse.ArgumentTypeError(str(err)) from err

    return value


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _packets(text: str) -> float:
    try:
        return float(text) if text[:1].isdigit() else float("nan")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of packets") from None


_PATH: Final[tuple[tuple[str, Callable[[str], object], str, str], ...]] = (
    ("rate", parse_rate, "RATE", "such as 100Mbit/s, IP headers included (default: no limit)"),
    ("delay", parse_duration, "TIME", "the time a packet travels, such as 50ms"),
    ("jitter", parse_duration, "TIME", "how much longer it may travel, between 0 and this"),
    ("loss", parse_share, "SHARE", "packets lost at random, such as 1%%"),
    ("burst", _packets, "N", "how many are lost in a row in the mean (default: each for itself)"),
    ("buffer", parse_size, "SIZE", "what may wait at the bottleneck (default: rate times --rtt, 64KiB at least)"),
)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value, such as limits.memory=2GiB")
    return key.strip(), value


def _bench_size(text: str) -> int:
    try:
        size = parse_size(text)
    except UsageError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    if not size:
        raise argparse.ArgumentTypeError("nothing cannot be measured; give at least 1 byte")
    return size


def _bench_time(text: str) -> float:
    try:
        duration_s = parse_duration(text)
    except UsageError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    if not 0 < duration_s <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not within 0 and 24h")
    return duration_s
