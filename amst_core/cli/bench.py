"""``amst bench``: memory to memory, through a session like any other."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from . import output, traffic
from .client import load_settings, session_to
from .exits import OK
from .locations import parse_server
from .options import DEFAULT_BENCH_S
from .output import Report
from .progress import shown

if TYPE_CHECKING:
    from .. import Session
    from ..settings.values import Settings

_MESSAGE: Final = 16 << 20
_LEAST_OUTSTANDING: Final = 96 << 20
_CHUNKS_PER_STREAM: Final = 2


def run(options: argparse.Namespace, report: Report) -> int:
    """Measure as the command line says; the exit code. ``report`` is filled, also when this raises."""
    if len(options.operands) != 1:
        raise UsageError("bench takes one server: amst bench amst://HOST[:PORT] (see: amst bench --help)")
    server = parse_server(options.operands[0])
    settings = load_settings(options)
    tally = traffic.Tally()
    act = traffic.receive if options.reverse else traffic.send
    try:
        with session_to(server, options, settings, report) as session:
            load = _load(options, settings, session)
            with shown(session, quiet=options.quiet or options.json) as display:

                def progress() -> None:
                    if display is not None:
                        from ..session.copying import CopyProgress

                        display.update(CopyProgress(tally.bytes, load.size, 0, None))

                act(session, load, tally, progress=progress)
    finally:
        report.take_amount(tally.bytes, seconds=tally.seconds)
    report.ok = True
    if not (options.quiet or options.json):
        output.say(output.summary(report, "received" if options.reverse else "sent", count_files=False))
    return OK


def _load(options: argparse.Namespace, settings: Settings, session: Session) -> traffic.Load:
    """What to send: enough outstanding that no stream waits for the next message."""
    message = min(_MESSAGE, settings.limits.max_message)
    wanted = session.metrics().total_streams * _CHUNKS_PER_STREAM * settings.transport.amst.chunk_size
    window = min(traffic.MAX_WINDOW, max(2, -(-max(_LEAST_OUTSTANDING, wanted) // message)))
    seconds = options.time if options.time is not None else None if options.size is not None else DEFAULT_BENCH_S
    return traffic.Load(options.size, seconds, message, window)
