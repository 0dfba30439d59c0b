"""Where log records go: the library logs to ``amst.*`` and configures nothing; the command line shows it."""

from __future__ import annotations

import logging
import sys
from typing import Final

_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Lines(logging.Formatter):
    """structlog's console lines; structlog takes 0.2 s to import, so only once there is a line."""

    def __init__(self, *, colors: bool) -> None:
        super().__init__()
        self._colors = colors
        self._inner: logging.Formatter | None = None

    def format(self, record: logging.LogRecord) -> str:
        if self._inner is None:
            self._inner = _console(colors=self._colors)
        return self._inner.format(record)


def configure(verbose: int, *, lasting: bool = False) -> None:
    """Show warnings and worse on standard error; with ``verbose`` 1 also information, from 2 on everything.

    ``lasting``: the process will surely log, so what that needs is imported now and not in some busy thread.
    """
    colors = sys.stderr.isatty()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_console(colors=colors) if lasting else _Lines(colors=colors))
    logger = logging.getLogger("amst")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(_LEVELS[min(verbose, len(_LEVELS) - 1)])


def _console(*, colors: bool) -> logging.Formatter:
    import structlog

    # Plain tracebacks: rich would print the values of local variables, and those may be secrets.
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
        ],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
