"""What cp and bench share: settings, and a session as the options have it."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

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

    named = os.environ.get("AMST_CONFIG")
    return load(files=options.config or ([named] if named else []), overrides=dict(options.set))


@contextlib.contextmanager
def session_to(server: Remote, options: argparse.Namespace, settings: Settings, report: Report) -> Iterator[Session]:
    """A session with ``server`` as the options have it, closed after the block, aborted when that raises.

    ``report`` gets to know what the session knows about itself, however the block ends.

    Raises:
        UsageError: the token file cannot be read or holds no token.
        AmstError: as `amst_core.connect`.
    """
    import amst_core

    from ..security.identity import find_token

    logs.configure(options.verbose)
    session = amst_core.connect(
        server.address,
        settings=settings,
        token=find_token(options.token_file) if options.token_file is not None else None,
        streams=options.streams,
        transport=options.transport,
        require=options.require,
        plaintext=True if options.plaintext else None,
    )
    try:
        with session:
            yield session
    finally:
        report.take_session(session)
        if report.reason and not options.quiet:
            complain(f"note: {report.reason}")
