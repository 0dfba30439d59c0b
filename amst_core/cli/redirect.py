"""``amst cp`` with ``-``: standard input to a file of the server, or a file of the server to standard output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from ..errors import AmstError, CancelledError, UsageError
from ..files.entries import EntryType
from . import exits, output
from .client import load_settings, session_to
from .copy import conclude, stop_on_sigterm, take, take_partial
from .locations import FORM, Local, Remote, Standard
from .output import Report
from .progress import shown
from .signals import Terminated

if TYPE_CHECKING:
    from .. import Session
    from ..session.copying import CopyResult, ProgressCallback

_UPLOAD_ADVICE: Final = "nothing of it is kept, for what came from standard input cannot be read again"
_DOWNLOAD_ADVICE: Final = "what was written to standard output is not all of it; a copy to - begins anew each time"


class _ReaderGone(Exception):
    """Nobody reads standard output any more."""


def run(locations: Sequence[Local | Remote | Standard], options: argparse.Namespace, report: Report) -> int:
    """Copy as the command line says, one of whose locations is ``-``; the exit code. See `copy.run`."""
    try:
        _copy(locations, options, report)
    except _ReaderGone:
        message = "nobody reads standard output any more; the rest was not fetched"
        report.error = output.describe_error(CancelledError(message))
        output.complain(message)
        return exits.SIGPIPE
    return conclude(options, report)


def _copy(locations: Sequence[Local | Remote | Standard], options: argparse.Namespace, report: Report) -> None:
    *sources, target = locations
    if options.dry_run:
        raise UsageError("--dry-run has nothing to tell of a copy from or to -")
    if isinstance(target, Standard):
        if any(isinstance(source, Standard) for source in sources):
            raise UsageError("from - to - nothing goes through a server; one of them must be amst://HOST[:PORT]/PATH")
        if len(sources) > 1:
            raise UsageError("only one file can go to standard output; copy the others one by one")
        if not isinstance(sources[0], Remote):
            raise UsageError(f"the other side of - is on a server; {FORM}")
        _download(sources[0], options, report)
        return
    if len(sources) > 1:
        raise UsageError("standard input (-) cannot be one of several sources; a file called - is ./-")
    if not isinstance(target, Remote):
        raise UsageError(f"the other side of - is on a server; {FORM}")
    if target.slash:
        raise _nameless(target)
    _upload(target, options, report)


def _nameless(target: Remote) -> UsageError:
    name = target.text.rstrip("/")
    return UsageError(f"{target.text} is a directory, and standard input has no name; write {name}/NAME")


def _upload(target: Remote, options: argparse.Namespace, report: Report) -> None:
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    from ..session.redirect import upload_from

    report.advice = _UPLOAD_ADVICE
    descriptor = sys.stdin.fileno()
    umask = os.umask(0o077)
    os.umask(umask)

    def copy(session: Session, progress: ProgressCallback | None) -> CopyResult:
        entry = session.stat(target.path)
        if entry is not None and entry.type is EntryType.DIRECTORY:
            raise _nameless(target)
        return upload_from(session, descriptor, target.path, mode=0o666 & ~umask, progress=progress)

    _run(target, copy, options, report)


def _download(source: Remote, options: argparse.Namespace, report: Report) -> None:
    if sys.stdout is None:
        raise UsageError("standard output is closed")
    if not source.path:
        raise UsageError(f"{source.text} is a directory; only a file can go to standard output")
    from ..session.redirect import download_to

    report.advice = _DOWNLOAD_ADVICE
    descriptor = sys.stdout.fileno()

    def copy(session: Session, progress: ProgressCallback | None) -> CopyResult:
        try:
            return download_to(session, source.path, descriptor, progress=progress)
        except BrokenPipeError as err:
            raise _ReaderGone from err

    _run(source, copy, options, report)


def _run(
    server: Remote,
    copy: Callable[[Session, ProgressCallback | None], CopyResult],
    options: argparse.Namespace,
    report: Report,
) -> None:
    settings = load_settings(options)
    with session_to(server, options, settings, report) as session:
        with shown(session, quiet=options.quiet or options.json) as display:
            stop = stop_on_sigterm(options, session)
            try:
                result = copy(session, display.update if display else None)
            except AmstError as err:
                take_partial(err, report)
                raise
        take(result, report)
    if stop.asked:
        raise Terminated
