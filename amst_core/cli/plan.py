"""``amst cp --dry-run``: what would be copied where, as lines for people and as part of --json."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

from ..files.entries import EntryType, display_path
from ..session.planning import Action, Step
from . import output
from .output import Failure, Report

if TYPE_CHECKING:
    from .locations import Remote

_COUNTED = (Action.COPY, Action.REPLACE, Action.COMPARE)


def tell(
    steps: Iterable[Step], options: argparse.Namespace, report: Report, *, source: Remote | None, target: Remote | None
) -> None:
    """Show each step and count it; ``source`` and ``target`` are the servers they are on, None: this machine."""
    totals = {action: [0, 0] for action in _COUNTED}
    entries: list[dict[str, object]] = []
    for step in steps:
        names = _named(step.source, source), _named(step.target, target)
        if step.error is not None:
            report.failed.append(Failure(names[0], step.error.kind, step.error.message))
        elif step.action in totals and step.type is not EntryType.DIRECTORY:
            totals[step.action][0] += 1
            totals[step.action][1] += step.size
        if options.json:
            kind = step.type.value if step.type is not None else None
            entries.append(
                {"action": step.action.value, "source": names[0], "target": names[1], "type": kind, "size": step.size}
            )
        elif step.error is None:
            print(f"{step.action.value:<8}{names[0]} -> {names[1]}")
    would = [totals[Action.COPY], totals[Action.REPLACE]]
    report.files, report.bytes = (sum(amounts) for amounts in zip(*would, strict=True))
    report.dry_run = {
        **{action.value: {"files": files, "bytes": size} for action, (files, size) in totals.items()},
        "entries": entries,
    }
    if not (options.quiet or options.json):
        parts = [f"{_amount(*amounts)} to {action.value}" for action, amounts in totals.items()]
        output.say(f"dry run, nothing was changed: {', '.join(parts)}")


def _named(path: bytes, server: Remote | None) -> str:
    return display_path(path) if server is None else f"{server.address}/{quote_from_bytes(path)}"


def _amount(files: int, size: int) -> str:
    return f"{output.count(files, 'file' if files == 1 else 'files')} ({output.size(size)})"
