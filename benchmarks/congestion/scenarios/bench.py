"""What all subcommands share: how often and how long, in which lab, and where the figures go."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

from harness.errors import RunError

from amst_core.testing.netlab import Lab, LabRejectedError, Path

from .transfers import Run, Sender

TCP_MEMORY: Final = 128 << 20
TRIES: Final = 3

T = TypeVar("T")
Measure = Callable[[Lab, Sender], Run]


@dataclass
class Bench:
    """One call of a subcommand.

    Attributes:
        seconds: how long a transfer is.
        seeds: what the labs' losses are drawn from, one run each.
        default: the hosts' own congestion control.
        cells, who: patterns of the cells and of the senders that are wanted; empty: all.
        smoke: only the first cell.
        about: what stands at the head of the JSON.
        file: where the figures go, after each row; None: nowhere.
    """

    seconds: float
    seeds: Sequence[int]
    default: str = "bbr"
    cells: Sequence[str] = ()
    who: Sequence[str] = ()
    smoke: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    file: FilePath | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def chosen(self, cells: Mapping[str, T]) -> Iterator[tuple[str, T]]:
        """The wanted ones of ``cells``.

        Raises:
            RunError: none is.
        """
        found = [item for item in cells.items() if wanted(item[0], self.cells)]
        if not found:
            raise RunError(f"no such cell; there are: {', '.join(map(repr, cells))}")
        yield from found[:1] if self.smoke else found

    def senders(self, senders: Sequence[Sender]) -> Sequence[Sender]:
        """The wanted ones of ``senders``; `RunError` when none is."""
        found = [sender for sender in senders if wanted(sender.name, self.who)]
        if not found:
            raise RunError(f"nobody of that name; there are: {', '.join(repr(sender.name) for sender in senders)}")
        return found

    def each(self, path: Path, senders: Sequence[Sender], measure: Measure) -> dict[str, list[Run]]:
        """The runs of each sender by its name: with one seed one sender after the other, then with the next."""
        found: dict[str, list[Run]] = {sender.name: [] for sender in senders}
        for seed in self.seeds:
            for sender in senders:
                found[sender.name].append(self.once(path, seed, sender, measure))
        return found

    def once(self, path: Path, seed: int, sender: Sender, measure: Measure) -> Run:
        """One run in a lab that kept its times, or the last of `TRIES`, marked as not to be trusted."""
        for left in reversed(range(TRIES)):
            with Lab(path, seed=seed, congestion=self.default, tcp_memory=TCP_MEMORY) as lab:
                run = measure(lab, sender)
                try:
                    lab.check()
                    return run
                except LabRejectedError as err:
                    print(f"again: {sender.name}, {path.up}, seed {seed}: {err}", file=sys.stderr, flush=True)
                    if not left:
                        return replace(run, trusted=False)
        raise AssertionError("not reached")

    def note(self, cell: str, found: Mapping[str, Sequence[Run]], **ratios: float) -> None:
        """Keep every run of a row, and the ratios that are printed."""
        runs = {who: [asdict(run) for run in runs] for who, runs in found.items()}
        self.rows.append({"cell": cell, "runs": runs, **ratios})
        if self.file is not None:
            text = json.dumps(finite({**self.about, "rows": self.rows}), indent=1, allow_nan=False)
            self.file.write_text(text + "\n")


def wanted(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of ``patterns``, as of a shell, is ``name``; all are wanted when there is no pattern."""
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def finite(value: Any) -> Any:
    """``value`` with None for what is infinite or no number, which JSON cannot say."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- figures ----------------------------------------------------------------------------------


def median(runs: Sequence[Run], seen: str | None = None) -> float:
    """Of their Mbit/s, or of what they have ``seen``."""
    return statistics.median(run.mbits if seen is None else run.seen[seen] for run in runs)


def shown(runs: Sequence[Run]) -> str:
    """The median in Mbit/s, with a mark when a run could not be trusted."""
    value = median(runs)
    return f"{value:.{0 if value >= 100 else 1}f}{mark(runs)}"


def mark(runs: Sequence[Run]) -> str:
    return "" if all(run.trusted for run in runs) else "!"


def of_best(ours: Sequence[Run], peers: Mapping[str, Sequence[Run]]) -> float:
    """The ratio of the medians, ours to that of the best peer."""
    return median(ours) / max(map(median, peers.values()))


def ran(runs: Sequence[Run]) -> str:
    """What congestion control the streams ran, and how many there were at the end."""
    names = "+".join(sorted({name for run in runs for name in run.congestion}))
    return f"{names}×{statistics.median(run.streams for run in runs):g}"


def head(*names: str) -> None:
    row(*names)
    print("|" + "---|" * len(names), flush=True)


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
