"""Progress on standard error: a bar on a terminal, a line now and then elsewhere.

A transfer only notes how far it is; a thread of the display's own draws it. Whatever goes wrong with drawing
thus never reaches the transfer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from .output import clock, count, rate, size

if TYPE_CHECKING:
    from rich.progress import Progress

    from .. import Session
    from ..session.copying import CopyProgress

LINE_EVERY_S: Final = 5.0
BAR_EVERY_S: Final = 0.2
_RATE_WINDOW_S: Final = 5.0
_NEWS_S: Final = 10.0
"""How long a change of the mode is shown."""


class Meter:
    """The rate over the last seconds. ``now`` is passed in, in seconds."""

    def __init__(self, *, now: float) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, 0)])

    def update(self, bytes_done: int, *, now: float) -> float:
        """Note that ``bytes_done`` had arrived by ``now``; the rate in bytes/s."""
        self._samples.append((now, bytes_done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _RATE_WINDOW_S:
            self._samples.popleft()
        first_at, first = self._samples[0]
        return max(0, bytes_done - first) / (now - first_at) if now > first_at else 0.0


def words(progress: CopyProgress, bytes_per_s: float, streams: str, *, percent: bool = True) -> str:
    """How far, how fast, how long yet, over what."""
    done, total = progress.bytes_done, progress.bytes_total
    parts = []
    if total is None:
        parts.append(size(done))
    else:
        if percent:
            parts.append(f"{100 * done // total if total else 100} %")
        parts.append(f"{size(done)} of {size(total)}")
    if progress.files_total is not None and progress.files_total > 1:
        parts.append(f"{progress.files_done:,} of {count(progress.files_total, 'files')}".replace(",", " "))
    parts.append(rate(bytes_per_s))
    if total is not None and bytes_per_s > 0:
        parts.append(f"ETA {clock((total - done) / bytes_per_s)}")
    return ", ".join([*parts, streams] if streams else parts)


class _View(Protocol):
    every_s: float

    def draw(self, progress: CopyProgress, bytes_per_s: float, streams: str) -> None: ...

    def close(self) -> None: ...


class _Lines:
    every_s = LINE_EVERY_S

    def draw(self, progress: CopyProgress, bytes_per_s: float, streams: str) -> None:
        print(f"amst: {words(progress, bytes_per_s, streams)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    every_s = BAR_EVERY_S

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, words="", percent="")
        bar.start()

    def draw(self, progress: CopyProgress, bytes_per_s: float, streams: str) -> None:
        done, total = progress.bytes_done, progress.bytes_total
        self._bar.update(
            self._task,
            completed=done,
            total=total,
            percent="" if total is None else f"{100 * done // total if total else 100:3} %",
            words=words(progress, bytes_per_s, streams, percent=False),
        )

    def close(self) -> None:
        self._bar.stop()


def _bar() -> _Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.fields[percent]}", markup=False),
        TextColumn("{task.fields[words]}", markup=False),
    )
    return _Bar(Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=5))


class Display:
    """Shows how far a transfer is. `update` may be called from any thread and costs nothing."""

    def __init__(self, view: _View, session: Session) -> None:
        self._view = view
        self._session = session
        self._latest: CopyProgress | None = None
        self._stop = threading.Event()
        self._meter = Meter(now=time.monotonic())
        self._thread = threading.Thread(target=self._run, name="amst-progress", daemon=True)
        self._thread.start()

    def update(self, progress: CopyProgress) -> None:
        """Note how far it is."""
        self._latest = progress

    def close(self) -> None:
        """Take the display away."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._view.close()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._view.every_s):
                progress = self._latest
                if progress is not None:
                    bytes_per_s = self._meter.update(progress.bytes_done, now=time.monotonic())
                    self._view.draw(progress, bytes_per_s, self._streams())
        except OSError:
            pass  # standard error is gone: there is nobody to show anything to

    def _streams(self) -> str:
        metrics, mode = self._session.metrics(), self._session.mode
        note = f", now {mode.mode.value}" if mode.switches and time.monotonic() - mode.since < _NEWS_S else ""
        return f"{metrics.active_streams} {metrics.transport_type} streams{note}"


@contextlib.contextmanager
def shown(session: Session, *, quiet: bool) -> Iterator[Display | None]:
    """Show progress while the block runs: a bar on a terminal, lines elsewhere; ``quiet``: nothing, None."""
    if quiet:
        yield None
        return
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    display = Display(_bar() if terminal else _Lines(), session)
    try:
        yield display
    finally:
        display.close()
