"""``amst config check FILE``: is a settings file right, and if not, everything that is wrong with it."""

from __future__ import annotations

import argparse

from ..errors import UsageError
from ..units import shown
from . import output
from .exits import OK, USAGE
from .output import Report


def run(options: argparse.Namespace, report: Report) -> int:
    """Check the file; the exit code."""
    if len(options.operands) != 2 or options.operands[0] != "check":
        raise UsageError("config takes check and a file: amst config check FILE (see: amst config --help)")
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
