"""What cp and bench share: settings, and a session as the options have it."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import AmstError
from . import logs
from .locations import Remote
from .output import Report, complain

if TYPE_CHECKING:
    from .. import Session
    from ..settings.values import Settings


def load_settings(options: argparse.Namespace) -> Settings:
    """The settings of a command line: AMST_CONFIG or --config, then ``AMST_*__*`` variables, then --set.

    Raises:
        SettingsError: lists every fault.
    """
    from ..settings.load import load_settings as load

    return load(files=settings_files(options), overrides=dict(options.set))


def settings_files(options: argparse.Namespace) -> list[str]:
    """The settings files of a command line, in their order."""
    named = os.environ.get("AMST_CONFIG")
    return options.config or ([named] if named else [])


@contextlib.contextmanager
def session_to(server: Remote, options: argparse.Namespace, settings: Settings, report: Report) -> Iterator[Session]:
    """A session with ``server`` as the options have it, closed after the block, aborted when that raises.

    ``report`` gets to know what the session knows about itself, however the block ends.

    Raises:
        UsageError: the token file cannot be read or holds no token.
        AmstError: as `amst_core.connect`.
    """
    from ..security.identity import find_token

    logs.configure(options.verbose)
    token = find_token(options.token_file) if options.token_file is not None else None
    with _session(server.address, options, settings, report, token=token, plaintext=options.plaintext) as session:
        yield session


@contextlib.contextmanager
def session_within(root: bytes, options: argparse.Namespace, settings: Settings, report: Report) -> Iterator[Session]:
    """A session of this process with itself, whose other end has ``root``; otherwise as `session_to`.

    In plaintext, for nothing leaves this machine.
    """
    from ..api.loopback import private_server

    logs.configure(options.verbose)
    with (
        private_server(root, settings=settings) as server,
        _session(server.address, options, settings, report, token=server.token, plaintext=True) as session,
    ):
        try:
            yield session
        except BaseException:
            for far in server.sessions:  # or it would complain of the other end, which is about to be cut off
                with contextlib.suppress(AmstError):
                    far.close(0.0)
            raise


@contextlib.contextmanager
def _session(
    address: str,
    options: argparse.Namespace,
    settings: Settings,
    report: Report,
    *,
    token: bytes | None,
    plaintext: bool,
) -> Iterator[Session]:
    import amst_core

    session = amst_core.connect(
        address,
        settings=settings,
        token=token,
        streams=options.streams,
        max_streams=options.max_streams,
        transport=options.transport,
        require=options.require,
        plaintext=True if plaintext else None,
        verify=options.verify == "crc",
        congestion=options.congestion,
        polite=options.polite,
        mode=options.mode,
    )
    try:
        with session:
            if options.bwlimit:
                _limit_rate(options, session)
            elif options.bwlimit is not None:
                session.limit_rate(None)  # whatever transport.amst.pacing_rate says
            yield session
    finally:
        report.take_session(session)
        if report.reason and not options.quiet:
            complain(f"note: {report.reason}")


def _limit_rate(options: argparse.Namespace, session: Session) -> None:
    """Hold the session to --bwlimit, either way; SIGUSR2 lifts the limit, and sets it again."""
    limited = True

    def toggle() -> None:
        nonlocal limited
        limited = not limited
        session.limit_rate(options.bwlimit if limited else None)
        session.limit_peer_rate(options.bwlimit if limited else None)

    session.limit_rate(options.bwlimit)
    session.limit_peer_rate(options.bwlimit)
    options.signals.always(signal.SIGUSR2, toggle)
