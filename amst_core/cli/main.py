"""``amst``: run a command, and turn however it ends into messages, JSON and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from ..errors import AmstError, CancelledError
from . import exits, options, output, signals

_MODULES: Final = {
    "serve": "serve", "cp": "copy", "ls": "ls", "bench": "bench", "plugins": "plugins", "config": "config",
    "doctor": "doctor", "lab": "lab",
}  # fmt: skip

_OWN_SIGNALS: Final = ("serve", "lab")

_REPORTING: Final = ("cp", "bench")
"""Commands whose --json is the `output.Report`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's own); the exit code. Main thread only."""
    try:
        code = _main(sys.argv[1:] if argv is None else list(argv))
        if sys.stdout is not None:  # it is when the descriptor is closed
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has left; do not let the interpreter complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.OTHER


def _main(argv: list[str]) -> int:
    report = output.Report()
    parsed = None
    try:
        parsed = options.parse(argv)
        _allow_descriptors()
        command = importlib.import_module(f".{_MODULES[parsed.command]}", __package__)
        # serve waits for signals in a way of its own, lab passes them on.
        with contextlib.nullcontext() if parsed.command in _OWN_SIGNALS else signals.raising() as actions:
            parsed.signals = actions
            code: int = command.run(parsed, report)
    except SystemExit:  # help or the version
        return exits.OK
    except BrokenPipeError:
        raise
    except AmstError as err:
        code = _failed(err, report, resumes=parsed is not None and parsed.command == "cp")
    except KeyboardInterrupt:
        code = _stopped("SIGINT", report, exits.SIGINT)
    except signals.Terminated:
        code = _stopped("SIGTERM", report, exits.SIGTERM)
    except Exception as err:
        code = _unexpected(err, report, verbose=getattr(parsed, "verbose", 0) > 0)
    begun = parsed is not None and getattr(parsed, "json_begun", False)  # the command writes an object of its own
    if options.wants_json(argv) and not begun and (report.error or (parsed and parsed.command in _REPORTING)):
        output.print_json(report.as_dict(), aside=options.writes_data(argv))
    return code


def _allow_descriptors() -> None:
    """Use all the file descriptors this process may have: a stream needs one, an open file up to two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _failed(err: AmstError, report: output.Report, *, resumes: bool = False) -> int:
    code = exits.for_error(err, acknowledged=report.arrived_bytes > 0)
    message = str(err)
    if code == exits.INTERRUPTED:
        message += f"; {_how_to_go_on(report)}" if resumes else "; run it again"
    report.ok = False
    report.error = output.describe_error(err, message)
    output.complain_about(report.failed)
    output.complain(message)
    return code


def _unexpected(err: Exception, report: output.Report, *, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(err)
    advice = "" if verbose else " with what -v shows"
    what = f"unexpected {type(err).__name__}: {err}"
    return _failed(AmstError(f"{what}; this is a bug in AMST, please report it{advice}"), report)


def _how_to_go_on(report: output.Report) -> str:
    arrived = output.size(report.arrived_bytes)
    return f"{arrived} had arrived; {report.advice}"


def _stopped(name: str, report: output.Report, code: int) -> int:
    message = f"stopped by {name}; {_how_to_go_on(report)}" if report.arrived_bytes else f"stopped by {name}"
    report.ok = False
    output.complain_about(report.failed)
    report.error = output.describe_error(CancelledError(message, retryable=True))
    output.complain(message)
    return code
