"""``amst plugins``: what is installed, read from metadata; with --check, whether it works."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import logs, output
from .exits import OK, OTHER
from .output import Report

if TYPE_CHECKING:
    from ..errors import AmstError
    from ..plugins import Installed

_HEADINGS = ("GROUP", "NAME", "DISTRIBUTION", "VERSION", "TARGET")


def run(options: argparse.Namespace, report: Report) -> int:
    """List or check the plugins; the exit code."""
    if options.operands not in ([], ["list"]):
        raise UsageError(f"plugins takes list, not {' '.join(options.operands)!r} (see: amst plugins --help)")
    from ..plugins import Plugins, installed

    logs.configure(options.verbose)
    rows: list[tuple[Installed, AmstError | None]]
    if options.check:
        rows = [(checked.plugin, checked.error) for checked in Plugins.check()]
    else:
        rows = [(plugin, None) for plugin in installed()]
    failed = any(error is not None for _, error in rows)
    if options.json:
        output.print_json({"ok": not failed, "plugins": [_as_dict(*row, checked=options.check) for row in rows]})
    elif rows:
        print("\n".join(_table(rows, checked=options.check)))
    else:
        print("no plugins are installed; to move data, run: pip install amst-tcp")
    return OTHER if failed else OK


def _as_dict(plugin: Installed, error: AmstError | None, *, checked: bool) -> dict[str, object]:
    row: dict[str, object] = {
        "group": plugin.group,
        "name": plugin.name,
        "distribution": plugin.dist,
        "version": plugin.version,
        "target": plugin.target,
        "conflict": plugin.conflict,
    }
    if checked:
        row |= {"ok": error is None, "error": output.describe_error(error) if error else None}
    return row


def _table(rows: Sequence[tuple[Installed, AmstError | None]], *, checked: bool) -> list[str]:
    cells = [_HEADINGS + (("CHECK",) if checked else ())]
    for plugin, error in rows:
        state = ("ok" if error is None else "FAILED",) if checked else ()
        cells.append((plugin.group, plugin.name, plugin.dist, plugin.version, plugin.target, *state))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += [str(error) for _, error in rows if error is not None]
    if not checked:
        clashing = sorted({f"{plugin.group} {plugin.name}" for plugin, _ in rows if plugin.conflict})
        lines += [f"conflict: {name} is claimed more than once, so neither is used" for name in clashing]
    return lines
