"""``amst cp``: which source gets which name, then one upload or download."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..errors import AmstError, NotFoundError, UsageError, error_from_kind, error_from_os
from ..files.entries import EntryType, display_path
from . import exits, local, output, plan
from .client import load_settings, session_to, session_within
from .locations import Local, Remote, Standard, final_names, parse_location
from .output import Failure, Report
from .progress import shown
from .serve import CLOSE_TIMEOUT_S
from .signals import Terminated

if TYPE_CHECKING:
    from .. import Session
    from ..session.copying import CopyResult, Stop
    from ..settings.values import Settings

_Sources: TypeAlias = Sequence[Local | Remote]


def run(options: argparse.Namespace, report: Report) -> int:
    """Copy as the command line says; the exit code. ``report`` is filled, also when this raises."""
    if len(options.operands) < 2:
        raise UsageError("cp needs at least one source and a target: amst cp SRC... DST (see: amst cp --help)")
    locations = [parse_location(text) for text in options.operands]
    if any(isinstance(location, Standard) for location in locations):
        from . import redirect

        return redirect.run(locations, options, report)
    *sources, target = [location for location in locations if not isinstance(location, Standard)]
    settings = load_settings(options)
    remotes = [source for source in sources if isinstance(source, Remote)]
    if isinstance(target, Remote):
        if remotes:
            raise UsageError("copying from server to server is not built yet; copy to this machine in between")
        _upload(sources, target, options, settings, report)
    else:
        if 0 < len(remotes) < len(sources):
            raise UsageError("sources are on this machine and on a server; copy them in two commands")
        if len({remote.endpoint for remote in remotes}) > 1:
            raise UsageError("the sources are on several servers; copy from one at a time")
        if remotes:
            _download(remotes, target, options, settings, report)
        else:
            _copy_here([source for source in sources if isinstance(source, Local)], target, options, settings, report)
    return conclude(options, report)


def _upload(sources: _Sources, target: Remote, options: argparse.Namespace, settings: Settings, report: Report) -> None:
    present = [source for source in sources if _is_there(source, report)]
    if not present:
        return
    with session_to(target, options, settings, report) as session:
        entry = session.stat(target.path) if target.path else None
        is_dir = not target.path or (entry is not None and entry.type is EntryType.DIRECTORY)
        # All of the sources count, so that the names do not depend on what happens to be missing.
        named = final_names(sources, target, exists=is_dir or entry is not None, is_dir=is_dir)
        names = dict(zip(sources, named, strict=True))
        _send(session, [(source.path, names[source]) for source in present], options, report, target)


def _copy_here(
    sources: Sequence[Local], target: Local, options: argparse.Namespace, settings: Settings, report: Report
) -> None:
    target, is_dir = local.resolved(target)
    root, names = local.placed(sources, target, is_dir=is_dir)
    present = [source for source in sources if _is_there(source, report) and _is_apart(source, root, names, report)]
    if not present:
        return
    if options.dry_run:
        from ..session.planning import plan_here

        items = [item for source in present for item in _below_root(source.path, names[source])]
        here = [(path, local.below(root, name)) for path, name in items]
        steps = plan_here(here, to_make=target.path if target.slash else None)
        plan.tell(steps, options, report, source=None, target=None)
        return
    if target.slash and not is_dir:
        _make_directory(target)
    with session_within(root, options, settings, report) as session:
        _send(session, [(source.path, names[source]) for source in present], options, report)


def _is_there(source: Local | Remote, report: Report) -> bool:
    path = display_path(source.path)
    if not os.path.lexists(source.path):
        report.failed.append(Failure(path, NotFoundError.kind, f"{path} does not exist"))
        return False
    return True


def _is_apart(source: Local, root: bytes, names: Mapping[Local, bytes], report: Report) -> bool:
    try:
        local.refuse_itself(source, local.below(root, names[source]))
    except AmstError as err:
        report.failed.append(Failure(display_path(source.path), err.kind, err.message))
        return False
    return True


def _send(
    session: Session,
    named: Sequence[tuple[bytes, bytes]],
    options: argparse.Namespace,
    report: Report,
    server: Remote | None = None,
) -> None:
    """Send each local source to its name below the peer's root; the peer is ``server``, or this process itself."""
    from ..session.copying import upload
    from ..session.planning import plan_upload

    items = [item for source, name in named for item in _below_root(source, name)]
    if options.dry_run:
        plan.tell(plan_upload(session, items), options, report, source=None, target=server)
        return
    with shown(session, quiet=options.quiet or options.json) as display:
        stop = stop_on_sigterm(options, session)
        try:
            result = upload(session, items, progress=display.update if display else None, stop=stop)
        except AmstError as err:
            take_partial(err, report)
            raise
    take(result, report)
    if stop.asked:
        raise Terminated


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
    from ..session.planning import plan_download

    target, is_dir = local.resolved(target)
    names = final_names(sources, target, exists=os.path.lexists(target.path), is_dir=is_dir)
    with session_to(sources[0], options, settings, report) as session:
        items = [(source.path, name) for source, name in zip(sources, names, strict=True)]
        if options.dry_run:
            steps = plan_download(session, items, to_make=target.path if target.slash else None)
            plan.tell(steps, options, report, source=sources[0], target=None)
            return
        if target.slash and not is_dir:
            _make_directory(target)
        with shown(session, quiet=options.quiet or options.json) as display:
            stop = stop_on_sigterm(options, session)
            try:
                result = download(session, items, progress=display.update if display else None, stop=stop)
            except AmstError as err:
                take_partial(err, report)
                raise
        take(result, report)
    if stop.asked:
        raise Terminated


def _make_directory(target: Local) -> None:
    try:
        os.mkdir(target.path)
    except OSError as err:
        raise error_from_os(err, "cannot make the directory", path=display_path(target.path)) from err


def stop_on_sigterm(options: argparse.Namespace, session: Session) -> Stop:
    """Have the first SIGTERM let finish what is under way, for half a minute at most."""
    from ..session.copying import Stop

    stop = Stop()

    def ask() -> None:
        output.complain(f"SIGTERM: no new files; what is under way has {CLOSE_TIMEOUT_S:g} s")
        stop.ask()
        limit = threading.Timer(CLOSE_TIMEOUT_S, session.abort)
        limit.daemon = True
        limit.start()

    options.signals.once(signal.SIGTERM, ask)
    return stop


def take(result: CopyResult, report: Report) -> None:
    """Note what a copy did."""
    report.take_amount(
        result.bytes, files=result.files, seconds=result.seconds, resumed_bytes=result.resumed_bytes
    )
    report.failed += [Failure(failed.path, failed.kind, failed.message) for failed in result.failed]


def take_partial(err: AmstError, report: Report) -> None:
    """What had arrived when the session ended."""
    partial: CopyResult | None = getattr(err, "partial", None)
    if partial is not None:
        take(partial, report)


def conclude(options: argparse.Namespace, report: Report) -> int:
    """Say what came of the copy; the exit code."""
    code = exits.for_failures(failure.kind for failure in report.failed)
    report.ok = code == exits.OK
    if report.failed:
        worst = next(f for f in report.failed if exits.for_failures([f.kind]) == code)
        what = "files would not arrive" if options.dry_run else "files did not arrive"
        number = output.count(len(report.failed), f"{what}; the gravest")
        message = worst.message if len(report.failed) == 1 else f"{number}: {worst.message}"
        report.error = output.describe_error(error_from_kind(worst.kind, message))
    output.complain_about(report.failed)
    if report.transport is not None and not (options.dry_run or options.quiet or options.json):
        output.say(output.summary(report, "copied", count_files=True))
    return code
