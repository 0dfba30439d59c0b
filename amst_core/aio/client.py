"""Opening a session from a coroutine."""

from __future__ import annotations

import os
from functools import partial

from ..api import client
from ..api.attempt import Attempt
from ..interfaces import Mode
from ..plugins import Plugins
from ..session.session import Session as BlockingSession
from ..settings.values import Settings
from .opening import Opening
from .session import Session
from .threads import in_thread, own_thread


def connect(
    address: str,
    *,
    settings: Settings | None = None,
    token: bytes | None = None,
    streams: int | None = None,
    max_streams: int | None = None,
    transport: str | None = None,
    require: str | None = None,
    plaintext: bool | None = None,
    verify: bool = True,
    congestion: str | None = None,
    polite: bool = False,
    mode: Mode | str | None = None,
    root: str | os.PathLike[str] | None = None,
    plugins: Plugins | None = None,
) -> Opening[Session]:
    """Open a session with the server at ``address``, as `amst_core.connect` does, which tells what the rest means.

    ``session = await connect(...)``, or ``async with connect(...) as session``, which closes it. When the coroutine is
    cancelled no connection, thread or descriptor is left; only looking up a name cannot be interrupted, and nothing is
    opened behind it.

    Raises:
        AmstError: as `amst_core.connect`.
    """
    dial = partial(
        client.connect,
        address,
        settings=settings,
        token=token,
        streams=streams,
        max_streams=max_streams,
        transport=transport,
        require=require,
        plaintext=plaintext,
        verify=verify,
        congestion=congestion,
        polite=polite,
        mode=mode,
        root=root,
        plugins=plugins,
    )
    return Opening(partial(_open, dial))


async def _open(dial: partial[BlockingSession]) -> Session:
    attempt = Attempt()
    session = await in_thread(
        partial(dial, attempt=attempt), own_thread("connect"), stop=attempt.give_up, drop=BlockingSession.abort
    )
    return Session(session)
