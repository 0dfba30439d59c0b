"""``amst config``: is a settings file right, and if not, all that is wrong with it; what is in force, and by whom."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from ..units import shown
from . import output
from .client import settings_files
from .exits import OK, USAGE
from .output import Report


def run(options: argparse.Namespace, report: Report) -> int:
    """Check the file, or explain what is in force; the exit code."""
    if options.explain:
        if options.operands:
            raise UsageError(f"config --explain takes no {options.operands[0]!r}; name a file by --config")
        return _explain(options)
    if options.config or options.set:
        raise UsageError("config check takes its file alone; --config and --set belong to config --explain")
    if len(options.operands) != 2 or options.operands[0] != "check":
        raise UsageError("config takes check and a file: amst config check FILE; or --explain (see: amst config -h)")
    from ..settings.load import SettingsError, check_file

    path = options.operands[1]
    try:
        check_file(path)
    except SettingsError as err:
        if not options.json:
            raise
        faults = [
            {
                "key": fault.key,
                "value": None if fault.value is None else shown(fault.value),
                "source": fault.source,
                "message": fault.message,
            }
            for fault in err.faults
        ]
        output.print_json({"ok": False, "file": path, "faults": faults, "error": output.describe_error(err)})
        return USAGE
    if options.json:
        output.print_json({"ok": True, "file": path, "faults": [], "error": None})
    else:
        print(f"{path}: ok")
    return OK


def _explain(options: argparse.Namespace) -> int:
    from ..settings.explain import explain_settings

    found = explain_settings(files=settings_files(options), overrides=dict(options.set))
    if options.json:
        rows = [
            {"key": e.name, "value": e.value, "text": e.text, "source": e.source, "follows": e.follows or None}
            for e in found
        ]
        output.print_json({"ok": True, "settings": rows, "error": None})
        return OK
    widths = [max(len(text) for text in texts) for texts in zip(*((e.name, e.text) for e in found), strict=True)]
    for each in found:
        follows = f", follows {each.follows}" if each.follows else ""
        print(f"{each.name:<{widths[0]}}  {each.text:<{widths[1]}}  {each.source}{follows}")
    return OK
