"""``amst serve``: a server in the foreground, until a signal."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Final

from ..errors import AmstError, UsageError
from . import exits, logs, output, traffic
from .client import load_settings
from .output import Report

CLOSE_TIMEOUT_S: Final = 30.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def run(options: argparse.Namespace, report: Report) -> int:
    """Serve until SIGINT or SIGTERM; the exit code."""
    if options.operands:
        raise UsageError(f"serve takes no {options.operands[0]!r}; name a directory by --root (see: amst serve --help)")
    if not os.path.isdir(options.root):
        raise UsageError(f"--root {options.root} is not a directory")
    settings = load_settings(options)
    logs.configure(options.verbose, lasting=True)
    import amst_core

    from ..security.identity import state_dir

    # Blocked before the server starts its threads, which inherit that: the signals wait for sigwait below.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        server = amst_core.listen(
            options.listen,
            root=Path(options.root),
            settings=settings,
            state_dir=state_dir(os.environ),
            mode=options.mode,
            on_session=traffic.offer,
        )
        try:
            print(f"listening on {server.address}", flush=True)
            signal.sigwait(_SIGNALS)
            if server.sessions:
                output.complain(f"stopping: nothing new is taken, what is under way has {CLOSE_TIMEOUT_S:g} s")
        finally:
            # From here on a second signal ends the process at once.
            handlers = [(number, signal.signal(number, signal.SIG_DFL)) for number in _SIGNALS]
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            server.close(timeout_s=CLOSE_TIMEOUT_S)
            for number, handler in handlers:
                signal.signal(number, handler)
    except AmstError as err:
        output.complain(str(err))
        code = exits.for_error(err, acknowledged=False)
        return exits.OTHER if code == exits.CONNECT else code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return exits.OK
