"""``amst ls``: what is at, in or below a path of a server."""

from __future__ import annotations

import argparse
import contextlib
import json
import stat
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final
from urllib.parse import quote_from_bytes

from ..errors import AmstError, CancelledError, UsageError
from ..files.entries import Entry, EntryType, WalkError, display_path, join_path
from . import exits, output
from .client import load_settings, session_to
from .locations import Remote, parse_location
from .output import Failure, Report

MAX_FAILED: Final = 10_000
"""Entries that a server may say it cannot tell about: they are kept to be told at the end."""

_FORMATS: Final = {EntryType.FILE: stat.S_IFREG, EntryType.DIRECTORY: stat.S_IFDIR, EntryType.SYMLINK: stat.S_IFLNK}


def run(options: argparse.Namespace, report: Report) -> int:
    """List as the command line says; the exit code."""
    if len(options.operands) != 1:
        raise UsageError("ls takes one URL: amst ls amst://HOST[:PORT]/PATH (see: amst ls --help)")
    location = parse_location(options.operands[0])
    if not isinstance(location, Remote):
        raise UsageError(f"{location.text} is on this machine, where ls lists; a URL is amst://HOST[:PORT]/PATH")
    settings = load_settings(options)
    if options.streams is None:
        options.streams = settings.transport.amst.min_streams  # it all goes by the control channel
    failed: list[Failure] = []
    with contextlib.ExitStack() as stack:
        if options.json:
            options.json_begun = True
            show = stack.enter_context(_as_json(location, failed))
        else:
            show = partial(_print, long=options.long, safe=sys.stdout.isatty())
        refusal: AmstError | None = None
        with session_to(location, options, settings, report) as session:
            try:
                for found in session.list(location.path, recursive=options.recursive):
                    if isinstance(found, WalkError):
                        path = display_path(join_path(location.path, found.path))
                        failed.append(Failure(path, found.error.kind, found.error.message))
                        if len(failed) >= MAX_FAILED:
                            raise found.error
                    elif found.path or found.type is not EntryType.DIRECTORY:
                        show(found.path or location.path.rpartition(b"/")[2], found)
            except AmstError as err:
                if session.error is not None:
                    raise
                refusal = err  # that is no reason to cut the connection
        if refusal is not None:
            raise refusal
    output.complain_about(failed)
    return exits.for_failures(failure.kind for failure in failed)


# ---- for people and pipes -------------------------------------------------------------------


def _print(path: bytes, entry: Entry, *, long: bool, safe: bool) -> None:
    """One line; ``safe``: it goes to a terminal, which no name may command. Else names are written as they are."""

    def name(raw: bytes) -> bytes:
        return display_path(raw).encode() if safe else raw

    line = name(path) + (b"/" if entry.type is EntryType.DIRECTORY else b"")
    if long:
        if entry.type is EntryType.SYMLINK:
            line += b" -> " + name(entry.target)
        mode = stat.filemode(_FORMATS[entry.type] | entry.mode)
        line = f"{mode} {entry.size:>15} {_local_time(entry.mtime_ns)} ".encode() + line
    sys.stdout.buffer.write(line + b"\n")


def _local_time(mtime_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(mtime_ns // 1_000_000_000))


# ---- for scripts ----------------------------------------------------------------------------


@contextlib.contextmanager
def _as_json(location: Remote, failed: list[Failure]) -> Iterator[Callable[[bytes, Entry], None]]:
    """Write one object, entry by entry, so that a list of any length costs no memory; whole also when this fails."""
    sys.stdout.write(f'{{"url": {json.dumps(location.text)}, "entries": [')
    comma = ""

    def show(path: bytes, entry: Entry) -> None:
        nonlocal comma
        sys.stdout.write(comma + json.dumps(_as_dict(path, entry, location)))
        comma = ", "

    error: AmstError | None = None
    try:
        yield show
    except AmstError as err:
        error = err
        raise
    except BaseException as err:
        error = CancelledError(f"not complete: {type(err).__name__}")
        raise
    finally:
        rest = {
            "failed": [{"path": f.path, "kind": f.kind, "message": f.message} for f in failed],
            "error": output.describe_error(error) if error is not None else None,
        }
        ok = error is None and not failed
        sys.stdout.write(f'], "ok": {json.dumps(ok)}, {json.dumps(rest)[1:]}\n')
        sys.stdout.flush()


def _as_dict(path: bytes, entry: Entry, location: Remote) -> dict[str, object]:
    full = join_path(location.path, entry.path)
    about: dict[str, object] = {
        "path": display_path(path),
        "url": f"{location.address}/{quote_from_bytes(full)}",
        "type": entry.type.value,
        "size": entry.size,
        "mtime_ns": entry.mtime_ns,
        "mode": f"{entry.mode:04o}",
    }
    if entry.type is EntryType.SYMLINK:
        about["target"] = display_path(entry.target)
    return about
