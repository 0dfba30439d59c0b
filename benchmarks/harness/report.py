"""The report: one HTML page that needs nothing else, from `Results` alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from .charts import Row, bars
from .results import ENOUGH_ROUNDS, GIB, Comparison, Results, Summary, summarise

_VERDICTS: Final = {
    "goal": "goal reached",
    "floor": "floor reached",
    "short": "SHORT",
    "measured": "no floor set",
    "none": "not measured",
}

_STYLE: Final = Path(__file__).with_name("report.css")


@dataclass(frozen=True, slots=True)
class Units:
    """How the figures of a workload are written: by the GiB, or small files by the file."""

    scale: float
    rate_name: str
    cpu_name: str
    cpu_factor: float

    def rate(self, value: float) -> str:
        """Of bytes/s."""
        return f"{value / self.scale:.2f}"

    def cpu(self, cpu_s_per_gib: float) -> str:
        return f"{cpu_s_per_gib * self.cpu_factor:.2f}"


def units(size: int, files: int) -> Units:
    """For ``size`` bytes in so many small files, 0 for none."""
    if files:
        return Units(1e6, "MB/s", "ms/file", size / GIB / files * 1000)
    return Units(1e9, "GB/s", "s/GiB", 1.0)


_METHOD: Final = """\
rounds per workload; in each, every contender runs once, one after the other, with a server started for that run. A
round before them is a warm-up and is dropped. What arrived is compared byte by byte after each run (files: cmp,
trees: diff -r, pipes: tar | cmp); for memory the tool's own count must be whole. Rates are by the contender's own
clock where it has one (AMST: first payload byte offered to last byte acknowledged); “with start-up” is the client's
whole time. CPU is user and system time of both sides with their child processes, the client's start included, the
server's not. Memory is the largest VmHWM seen, client and server; processes of one side are added up. A run is marked
as loaded when other processes or the hypervisor took more than a quarter of a core, in the moment before it or while
it went on."""


def render(results: Results) -> str:
    """The page."""
    sections = [
        _head(results),
        _summary(results),
        *(_workload(results, str(workload["name"])) for workload in results.workloads),
        _absent(results),
        _machine(results),
        _method(results),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>AMST beside its peers</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE.read_text()}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def text_table(results: Results) -> str:
    """The lines of the table as Markdown, for a terminal or a page of documentation."""
    rows = ["| work | ours | peer | ratio (spread) | floor | goal | |", "|---|---|---|---|---|---|---|"]
    for name, line in results.lines:
        title, peer = _title(results, name), line.best or " / ".join(line.against)
        cells = (title, line.ours, peer, _ratio(line), _asked(line.floor), _asked(line.goal), _VERDICTS[line.verdict])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _head(results: Results) -> str:
    notes = []
    if results.rounds < ENOUGH_ROUNDS:
        few = f"Only {results.rounds} round{'s' if results.rounds > 1 else ''} after the warm-up: "
        notes.append(f"{few}a look, not a result ({ENOUGH_ROUNDS} are the least for one).")
    loaded = sum(run.loaded for run in results.runs if not run.warmup)
    if loaded:
        notes.append(
            f"{loaded} of {sum(not run.warmup for run in results.runs)} runs began or went on beside other work."
        )
    failed = sum(not run.ok for run in results.runs)
    if failed:
        notes.append(f"{failed} runs failed.")
    machine = results.machine
    about = f"{results.started} · {machine['cpu']} · {machine['cores']} cores · Linux {machine['kernel']}"
    warning = f'<p class="loaded">{escape(" ".join(notes))}</p>' if notes else ""
    return f'<h1>AMST beside its peers</h1><p class="soft">{escape(about)}</p>{warning}'


def _summary(results: Results) -> str:
    columns = (
        "work", "ours", "peer", "rate: ours, peer", "ratio", "spread", "floor", "goal", "", "with start-up",
        "CPU: ours, peer", "MiB: ours, peer",
    )  # fmt: skip
    rows, chart = [], []
    for name, line in results.lines:
        summaries = {summary.contender: summary for summary in summarise(results.runs_of(name))}
        both = [summaries[one] for one in (line.ours, line.best) if one in summaries]
        written = _units(results, name)
        cells = [
            f'<td class="text">{escape(_title(results, name))}</td><td class="text">{escape(line.ours)}</td>'
            f'<td class="text">{escape(line.best or " / ".join(line.against))}</td>',
            _cell(_pair([written.rate(one.rate) for one in both], written.rate_name)),
            _cell(f"<b>{line.median:.2f}</b>" if line.median is not None else "–"),
            _cell(f"{line.low:.2f}–{line.high:.2f}" if line.low is not None and line.high is not None else "–"),
            _cell(_asked(line.floor)), _cell(_asked(line.goal)),
            f'<td class="text"><span class="{line.verdict}">{_VERDICTS[line.verdict]}</span>{_loaded(line)}</td>',
            _cell(f"{line.wall_median:.2f}" if line.wall_median is not None else "–"),
            _cell(_pair([written.cpu(one.cpu_s_per_gib) for one in both], written.cpu_name)),
            _cell(_pair([_memory(one) for one in both], "")),
        ]  # fmt: skip
        rows.append(f"<tr>{''.join(cells)}</tr>")
        if line.median is not None:
            marks = [(text, at) for text, at in (("floor", line.floor), ("goal", line.goal)) if at is not None]
            label = (
                f"{name.replace('-', ' ')}: {line.ours.removeprefix('amst --') if ' ' in line.ours else 'encrypted'}"
            )
            if len(line.against) > 1 and "GridFTP" in line.against[0]:
                label += " / GridFTP"
            chart.append(Row(label, line.median, line.ratios, True, marks))
    plot = bars(chart, unit="× peer", title="Ratios to the peer, with floor and goal") if chart else ""
    return (
        "<h2>The table</h2><p>The rate of ours over that of the better peer, computed in each round; the median of the "
        "rounds decides. Red ticks in the plot: floor and goal. Dots: single rounds.</p>"
        f'{plot}<div class="wide"><table class="summary"><tr>{_headers(columns, texts=3)}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _workload(results: Results, name: str) -> str:
    runs = results.runs_of(name)
    summaries = summarise(runs)
    workload = next(one for one in results.workloads if one["name"] == name)
    written = _units(results, name)
    rows = []
    for one in summaries:
        cells = (
            written.rate(one.rate), f"{written.rate(min(one.rates))}–{written.rate(max(one.rates))}",
            written.rate(one.wall_rate), written.cpu(one.cpu_s_per_gib),
            _mib(one.client_peak_bytes), _mib(one.server_peak_bytes),
        )  # fmt: skip
        own = ' class="own"' if _is_ours(one.contender) else ""
        rows.append(f"<tr{own}><td>{escape(one.contender)}</td>{''.join(map(_cell, cells))}</tr>")
    rate_name, cpu_name = written.rate_name, f"CPU {written.cpu_name}, both sides"
    columns = ("", rate_name, "spread", f"{rate_name} with start-up", cpu_name, "client, MiB", "server, MiB")
    scale = written.scale
    chart = [
        Row(one.contender, one.rate / scale, [rate / scale for rate in one.rates], _is_ours(one.contender))
        for one in sorted(summaries, key=lambda one: -one.rate)
    ]
    failures = sorted({f"{run.contender}, round {run.round}: {run.error}" for run in runs if not run.ok})
    failed = "".join(f'<p class="failed">{escape(text)}</p>' for text in failures)
    size = f"{workload['bytes'] / GIB:.3g} GiB a run"
    plot = bars(chart, unit=rate_name, title=f"Rates: {workload['title']}") if chart else ""
    return (
        f'<h2>{escape(workload["title"])} <span class="soft">· {size}</span></h2>{failed}{plot}'
        f'<div class="wide"><table><tr>{_headers(columns)}</tr>{"".join(rows)}</table></div>'
    )


def _absent(results: Results) -> str:
    """Not run, each with its reason; the same reason in several workloads is one line."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for one in results.absent:
        grouped.setdefault((one.contender, one.reason, one.how_to_get), []).append(one.workload)
    rows = [
        f'<tr><td>{escape(name)}</td><td class="text">{escape(", ".join(filter(None, where)) or "all")}</td>'
        f'<td class="text">{escape(reason)}</td><td class="text"><code>{escape(how)}</code></td></tr>'
        for (name, reason, how), where in grouped.items()
    ]
    versions = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in results.versions.items()]
    table = f"<table><tr>{_headers(('who', 'where', 'why', 'how to get it'), texts=4)}</tr>{''.join(rows)}</table>"
    return (
        f'<h2>Who took part</h2><dl>{"".join(versions)}</dl><h2>Who did not</h2><div class="wide">'
        f"{table if rows else '<p>Everybody did.</p>'}</div>"
    )


def _machine(results: Results) -> str:
    facts = {**results.machine, "files": f"{results.directory['path']} ({results.directory['file_system']})"}
    return f"<h2>Machine</h2><dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"


def _method(results: Results) -> str:
    return f"<h2>Method</h2><p>{results.rounds} {_METHOD}</p>"


# ---- cells --------------------------------------------------------------------------------


def _title(results: Results, name: str) -> str:
    return next((str(one["title"]) for one in results.workloads if one["name"] == name), name)


def _units(results: Results, name: str) -> Units:
    workload = next(one for one in results.workloads if one["name"] == name)
    return units(workload["bytes"], workload["files"])


def _is_ours(contender: str) -> bool:
    return contender.split()[0] == "amst"


def _headers(columns: Sequence[str], texts: int = 1) -> str:
    return "".join(f'<th class="text">{c}</th>' if n < texts else f"<th>{c}</th>" for n, c in enumerate(columns))


def _cell(text: str) -> str:
    return f"<td>{text}</td>"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}" if size else "–"


def _memory(summary: Summary) -> str:
    """Client and server, in MiB."""
    return f"{_mib(summary.client_peak_bytes)} + {_mib(summary.server_peak_bytes)}"


def _pair(texts: Sequence[str], unit: str) -> str:
    """Ours and the peer's, if there are both."""
    return f"{', '.join(texts)} {unit}".rstrip() if len(texts) == 2 else "–"


def _asked(value: float | None) -> str:
    return f"{value:.2f}" if value is not None else "–"


def _ratio(line: Comparison) -> str:
    return "–" if line.median is None else f"{line.median:.2f} ({line.low:.2f}–{line.high:.2f})"


def _loaded(line: Comparison) -> str:
    return f'<br><span class="loaded">{line.loaded_rounds} loaded</span>' if line.loaded_rounds else ""


def failures(results: Results) -> Iterable[str]:
    """Runs of ours that failed, as lines: these make the command fail."""
    return (
        f"{run.workload}, {run.contender}, round {run.round}: {run.error}"
        for run in results.runs
        if not run.ok and _is_ours(run.contender)
    )
