"""A server for this process alone: what copies from here to here go through, the same way as all others."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Final

from ..errors import error_from_os
from ..files.entries import HIDDEN_PREFIX
from ..settings.values import Settings
from .server import Server, listen

_ADDRESS: Final = "127.0.0.1:0"


@contextlib.contextmanager
def private_server(root: str | bytes | os.PathLike[str], *, settings: Settings | None = None) -> Iterator[Server]:
    """A server of ``root`` on a free port of the loopback interface, closed after the block.

    Token, key and certificate are its own, made for it and known to this process only: `Server.token` opens it.
    Nothing of them is left, not even by a process that is killed.

    Raises:
        StorageError: there is no room for them in the directory for temporary files.
        AmstError: as `listen`.
    """
    try:
        # A name that no copy takes along, should that directory be below a source.
        directory = tempfile.mkdtemp(prefix=HIDDEN_PREFIX.decode())
        held = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise error_from_os(err, "cannot make a directory for the server's key", path=tempfile.gettempdir()) from err
    try:
        try:
            server = listen(
                _ADDRESS, root=os.fsdecode(root), settings=settings, state_dir=directory, on_session=_ignore
            )
        finally:
            # Read by now. The server keeps the directory from its peers by its number, so none may get that again.
            shutil.rmtree(directory, ignore_errors=True)
        with server:
            yield server
    finally:
        os.close(held)


def _ignore(session: object) -> None:
    """The server's end of the session serves files by itself."""
