"""``amst doctor``: what of this machine matters to AMST, and what to do about it; leftovers of broken copies."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import AmstError, UsageError
from ..files.entries import display_path
from ..units import format_duration
from . import logs, output
from .client import load_settings
from .exits import OK, OTHER
from .output import Report

if TYPE_CHECKING:
    from ..api.diagnosis import Finding
    from ..files.leftovers import Leftover


def run(options: argparse.Namespace, report: Report) -> int:
    """Look and tell; the exit code: 0 unless AMST cannot be used here."""
    if options.operands:
        raise UsageError(f"doctor takes no {options.operands[0]!r} (see: amst doctor --help)")
    logs.configure(options.verbose)
    settings = load_settings(options)
    if options.leftovers is not None:
        from ..api.assembly import partial_policy
        from ..files.leftovers import find_leftovers

        _tell_leftovers(list(find_leftovers(options.leftovers, policy=partial_policy(settings))), options)
        return OK
    from ..api.diagnosis import State, gather, judge

    findings = judge(gather(settings))
    usable = all(finding.state is not State.PROBLEM for finding in findings)
    if options.json:
        output.print_json({"ok": usable, "findings": [_as_dict(finding) for finding in findings], "error": None})
    else:
        for finding in findings:
            print(f"{finding.state.value:<8}{finding.area:<12}{finding.text}")
            if finding.advice:
                print(f"{'':<20}{finding.advice}")
        if not usable:
            output.complain("there are problems: AMST cannot be used here as it is")
    return OK if usable else OTHER


def _as_dict(finding: Finding) -> dict[str, object]:
    return {"area": finding.area, "state": finding.state.value, "text": finding.text, "advice": finding.advice}


def _tell_leftovers(found: list[Leftover | AmstError], options: argparse.Namespace) -> None:
    errors = [item for item in found if isinstance(item, AmstError)]
    leftovers = [item for item in found if not isinstance(item, AmstError)]
    if options.json:
        described = [output.describe_error(err) for err in errors]
        rows = [_leftover_as_dict(item) for item in leftovers]
        output.print_json({"ok": not errors, "leftovers": rows, "errors": described, "error": None})
        return
    for item in leftovers:
        print(f"{display_path(item.path)}: {output.size(item.size)}, {_span(item.age_s)} old{_belongs(item)}")
        print(f"    {_becomes(item)}")
    for err in errors:
        output.complain(str(err))
    total = sum(item.size for item in leftovers)
    output.say(f"{output.count(len(leftovers), 'leftovers')}, {output.size(total)}")


def _belongs(item: Leftover) -> str:
    text = f", to replace {display_path(item.target)}" if item.target is not None else ""
    return text + (f", of a source of {output.size(item.source.size)}" if item.source is not None else "")


def _becomes(item: Leftover) -> str:
    if item.in_use:
        return "a copy that runs is using it"
    if not item.ours:
        return "another user's, or others can write to it: no copy of yours touches it"
    when = f"in {_span(item.left_s)} or later" if item.left_s else "now"
    use = "the same copy goes on from it" if item.resumable else "no copy can go on from it"
    return f"{use}; the next copy into its directory removes it {when}; or delete it"


def _leftover_as_dict(item: Leftover) -> dict[str, object]:
    return {
        "path": display_path(item.path),
        "size": item.size,
        "age_s": round(item.age_s, 3),
        "in_use": item.in_use,
        "resumable": item.resumable,
        "ours": item.ours,
        "target": display_path(item.target) if item.target is not None else None,
        "source_size": item.source.size if item.source is not None else None,
        "source_mtime_ns": item.source.mtime_ns if item.source is not None else None,
        "left_s": round(item.left_s, 3),
    }


def _span(seconds: float) -> str:
    """Rounded to what people look at."""
    for unit in (86400.0, 3600.0, 60.0):
        if seconds >= 2 * unit:
            return format_duration(seconds // unit * unit)
    return format_duration(float(round(seconds)))
