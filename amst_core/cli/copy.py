"""``amst cp``: which source gets which name, then one upload or download."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..errors import AmstError, NotFoundError, UsageError, error_from_kind, error_from_os
from ..files.entries import EntryType, display_path
from . import exits, output
from .client import load_settings, session_to
from .locations import Local, Remote, final_names, parse_location
from .output import Failure, Report
from .progress import shown

if TYPE_CHECKING:
    from ..session.copying import CopyResult
    from ..settings.values import Settings

_Sources: TypeAlias = Sequence[Local | Remote]


def run(options: argparse.Namespace, report: Report) -> int:
    """Copy as the command line says; the exit code. ``report`` is filled, also when this raises."""
    if len(options.operands) < 2:
        raise UsageError("cp needs at least one source and a target: amst cp SRC... DST (see: amst cp --help)")
    *sources, target = [parse_location(text) for text in options.operands]
    settings = load_settings(options)
    remotes = [source for source in sources if isinstance(source, Remote)]
    if isinstance(target, Remote):
        if remotes:
            raise UsageError("copying from server to server is not built yet; copy to this machine in between")
        _upload(sources, target, options, settings, report)
    else:
        if not remotes:
            raise UsageError("neither source nor target is on a server; write it as amst://HOST[:PORT]/PATH")
        if len(remotes) < len(sources):
            raise UsageError("sources are on this machine and on a server; copy them in two commands")
        if len({remote.endpoint for remote in remotes}) > 1:
            raise UsageError("the sources are on several servers; copy from one at a time")
        _download(remotes, target, options, settings, report)
    return _conclude(options, report)


def _upload(sources: _Sources, target: Remote, options: argparse.Namespace, settings: Settings, report: Report) -> None:
    present: list[Local | Remote] = []
    for source in sources:
        if os.path.lexists(source.path):
            present.append(source)
        else:
            path = display_path(source.path)
            report.failed.append(Failure(path, NotFoundError.kind, f"{path} does not exist"))
    if not present:
        return
    from ..session.copying import upload

    with session_to(target, options, settings, report) as session:
        entry = session.stat(target.path) if target.path else None
        is_dir = not target.path or (entry is not None and entry.type is EntryType.DIRECTORY)
        # All of the sources count, so that the names do not depend on what happens to be missing.
        named = final_names(sources, target, exists=is_dir or entry is not None, is_dir=is_dir)
        names = dict(zip(sources, named, strict=True))
        items = [item for source in present for item in _below_root(source.path, names[source])]
        with shown(session, quiet=options.quiet or options.json) as display:
            try:
                result = upload(session, items, progress=display.update if display else None)
            except AmstError as err:
                _take_partial(err, report)
                raise
        _take(result, report)


def _below_root(source: bytes, name: bytes) -> list[tuple[bytes, bytes]]:
    """One copy as it is, unless to the server's root itself, which only its operator makes: all that it is to hold."""
    if name:
        return [(source, name)]
    try:
        return [(os.path.join(source, inner), inner) for inner in sorted(os.listdir(source))]
    except OSError as err:
        raise error_from_os(err, "cannot list", path=display_path(source)) from err


def _download(
    sources: Sequence[Remote], target: Local, options: argparse.Namespace, settings: Settings, report: Report
) -> None:
    from ..session.copying import download

    is_dir = os.path.isdir(target.path)
    if is_dir:
        # What the user names is resolved as usual; only below it is no link followed.
        target = Local(target.text, os.path.realpath(target.path), target.slash)
    names = final_names(sources, target, exists=os.path.lexists(target.path), is_dir=is_dir)
    with session_to(sources[0], options, settings, report) as session:
        if target.slash and not is_dir:
            _make_directory(target)
        items = [(source.path, name) for source, name in zip(sources, names, strict=True)]
        with shown(session, quiet=options.quiet or options.json) as display:
            try:
                result = download(session, items, progress=display.update if display else None)
            except AmstError as err:
                _take_partial(err, report)
                raise
        _take(result, report)


def _make_directory(target: Local) -> None:
    try:
        os.mkdir(target.path)
    except OSError as err:
        raise error_from_os(err, "cannot make the directory", path=display_path(target.path)) from err


def _take(result: CopyResult, report: Report) -> None:
    report.take_amount(result.bytes, files=result.files, seconds=result.seconds)
    report.failed += [Failure(failed.path, failed.kind, failed.message) for failed in result.failed]


def _take_partial(err: AmstError, report: Report) -> None:
    """What had arrived when the session ended."""
    partial: CopyResult | None = getattr(err, "partial", None)
    if partial is not None:
        _take(partial, report)


def _conclude(options: argparse.Namespace, report: Report) -> int:
    code = exits.for_failures(failure.kind for failure in report.failed)
    report.ok = code == exits.OK
    if report.failed:
        worst = next(f for f in report.failed if exits.for_failures([f.kind]) == code)
        number = output.count(len(report.failed), "files did not arrive; the gravest")
        message = worst.message if len(report.failed) == 1 else f"{number}: {worst.message}"
        report.error = output.describe_error(error_from_kind(worst.kind, message))
    output.complain_about(report.failed)
    if report.transport is not None and not (options.quiet or options.json):
        output.say(output.summary(report, "copied", count_files=True))
    return code
