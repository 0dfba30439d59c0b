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

_MODULES: Final = {"serve": "serve", "cp": "copy", "bench": "bench", "plugins": "plugins", "config": "config"}

_REPORTING: Final = ("cp", "bench")
"""Commands whose --json is the `output.Report`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's own); the exit code. Main thread only."""
    try:
        code = _main(sys.argv[1:] if argv is None else list(argv))
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
        # serve waits for signals in a way of its own.
        with contextlib.nullcontext() if parsed.command == "serve" else signals.raising():
            code: int = command.run(parsed, report)
    except SystemExit:  # help or the version
        return exits.OK
    except BrokenPipeError:
        raise
    except AmstError as err:
        code = _failed(err, report)
    except KeyboardInterrupt:
        code = _stopped("SIGINT", report, exits.SIGINT)
    except signals.Terminated:
        code = _stopped("SIGTERM", report, exits.SIGTERM)
    except Exception as err:
        code = _unexpected(err, report, verbose=parsed is not None and parsed.verbose > 0)
    if options.wants_json(argv) and (report.error is not None or (parsed and parsed.command in _REPORTING)):
        output.print_json(report.as_dict())
    return code


def _allow_descriptors() -> None:
    """Use all the file descriptors this process may have: a stream needs one, an open file up to two."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _failed(err: AmstError, report: output.Report) -> int:
    code = exits.for_error(err, acknowledged=report.arrived)
    message = str(err)
    if code == exits.INTERRUPTED:
        message += "; run the same command again: it starts over"
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


def _stopped(name: str, report: output.Report, code: int) -> int:
    message = f"stopped by {name}; what has not arrived whole is not there"
    report.ok = False
    report.error = output.describe_error(CancelledError(message, retryable=True))
    output.complain(message)
    return code
