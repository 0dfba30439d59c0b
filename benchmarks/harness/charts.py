"""Plots as SVG that stands in an HTML page: no script, no font, no library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10
from typing import Final

_LABELS: Final = 250
_PLOT: Final = 560
_VALUES: Final = 90
_ROW: Final = 24
_TOP: Final = 8
_AXIS: Final = 26


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a plot: a bar to ``value``, a dot for each of ``points``, ticks at ``marks`` (text to value)."""

    label: str
    value: float
    points: Sequence[float] = ()
    ours: bool = False
    marks: Sequence[tuple[str, float]] = ()


def bars(rows: Sequence[Row], *, unit: str, title: str) -> str:
    """Horizontal bars from zero with the single measurements as dots."""
    largest = max((max(row.value, *row.points, *(at for _, at in row.marks), 0.0) for row in rows), default=0.0)
    step = tick_step(largest)
    end = step * max(1, ceil(largest / step - 1e-9))
    width, bottom = _LABELS + _PLOT + _VALUES, _TOP + _ROW * len(rows)
    parts = [
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {bottom + _AXIS}" width="{width}">',
        f"<title>{escape(title)}</title>",
    ]

    def x(value: float) -> str:
        return f"{_LABELS + value / end * _PLOT:.1f}"

    for number in range(round(end / step) + 1):
        at = number * step
        parts.append(f'<line class="grid" x1="{x(at)}" x2="{x(at)}" y1="{_TOP}" y2="{bottom}"/>')
        text = f"{at:g}" + (f" {unit}" if at == end or not number else "")
        parts.append(f'<text class="tick" x="{x(at)}" y="{bottom + 16}">{escape(text)}</text>')
    for number, row in enumerate(rows):
        top, middle = _TOP + number * _ROW, _TOP + number * _ROW + _ROW / 2
        kind = "ours" if row.ours else "peer"
        parts.append(f'<text class="label {kind}" x="{_LABELS - 8}" y="{middle + 4}">{escape(row.label)}</text>')
        length = row.value / end * _PLOT
        parts.append(f'<rect class="{kind}" x="{_LABELS}" y="{top + 5}" width="{length:.1f}" height="{_ROW - 10}"/>')
        parts += [f'<circle class="{kind}" cx="{x(point)}" cy="{middle}" r="2.5"/>' for point in row.points]
        for text, at in row.marks:
            parts.append(
                f'<line class="mark" x1="{x(at)}" x2="{x(at)}" y1="{top + 1}" y2="{top + _ROW - 1}">'
                f"<title>{escape(text)} {at:g}</title></line>"
            )
        parts.append(f'<text class="value" x="{_LABELS + _PLOT + 8}" y="{middle + 4}">{row.value:.2f}</text>')
    return "".join([*parts, "</svg>"])


def tick_step(largest: float) -> float:
    """A round step, 1, 2 or 5 times a power of ten, that gives four to ten steps up to ``largest``."""
    if largest <= 0:
        return 1.0
    base: float = 10.0 ** floor(log10(largest / 4))
    return next((base * factor for factor in (5, 2) if base * factor <= largest / 4), base)


# ---- lines ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, and where it goes, in the order in which it does."""

    label: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Band:
    """A stretch of the x axis that is shaded and named."""

    label: str
    start: float
    end: float


_COLOURS: Final = ("#0b6bcb", "#d9730d", "#1a7f37", "#8250df", "#cf222e", "#67707b")
_LINES_STYLE: Final = (
    "svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#1b1f24}.t{text-anchor:middle;fill:#67707b}"
    ".y{text-anchor:end;fill:#67707b}.g{stroke:#d8dee4}.band{fill:#67707b;opacity:.12}.l{fill:none;stroke-width:1.5}"
)
_LEFT: Final = 64
_WIDE: Final = 760
_KEY: Final = 22


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    bands: Sequence[Band] = (),
    log_x: bool = False,
    high: int = 240,
) -> str:
    """Lines over one x axis, from zero on the y axis; a picture that stands alone. ``log_x`` needs x above zero."""
    every = [point for one in series for point in one.points]
    low_x, high_x = min(x for x, _ in every), max(x for x, _ in every)
    largest = max(y for _, y in every)
    step = tick_step(largest)
    top_y = step * max(1, ceil(largest / step - 1e-9))
    top, bottom = 2 * _KEY + 8, 2 * _KEY + 8 + high
    right, height = _LEFT + _WIDE, bottom + 44

    def x(value: float) -> float:
        if log_x:
            return _LEFT + (log10(value) - log10(low_x)) / (log10(high_x) - log10(low_x)) * _WIDE
        return _LEFT + (value - low_x) / (high_x - low_x) * _WIDE

    def y(value: float) -> float:
        return bottom - value / top_y * high

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {right + 24} {height}" width="{right + 24}">',
        f"<title>{escape(title)}</title><style>{_LINES_STYLE}</style>",
        f'<text x="{_LEFT}" y="16" style="font-weight:600">{escape(title)}</text>',
    ]
    for band in bands:
        start, end = x(max(band.start, low_x)), x(min(band.end, high_x))
        width = max(0.5, end - start)
        parts.append(f'<rect class="band" x="{start:.1f}" y="{top}" width="{width:.1f}" height="{high}"/>')
        if end - start > 6 * len(band.label):
            parts.append(f'<text class="t" x="{(start + end) / 2:.1f}" y="{top + 14}">{escape(band.label)}</text>')
    for number in range(round(top_y / step) + 1):
        at = number * step
        parts.append(f'<line class="g" x1="{_LEFT}" x2="{right}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y(at) + 4:.1f}">{at:g}</text>')
    for at, text in _x_ticks(low_x, high_x, log_x=log_x):
        parts.append(f'<line class="g" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="t" x="{x(at):.1f}" y="{bottom + 16}">{escape(text)}</text>')
    parts.append(f'<text class="t" x="{(_LEFT + right) / 2}" y="{bottom + 36}">{escape(x_label)}</text>')
    key_x = float(_LEFT)
    parts.append(f'<text x="{_LEFT - 56}" y="{top - 8}" style="fill:#67707b">{escape(y_label)}</text>')
    key_x += 8 * len(y_label) - 30
    for number, one in enumerate(series):
        colour, dash = _COLOURS[number % len(_COLOURS)], ' stroke-dasharray="5 4"' if one.dashed else ""
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in one.points)
        parts.append(f'<polyline class="l" stroke="{colour}"{dash} points="{path}"/>')
        parts.append(f'<line x1="{key_x:.0f}" x2="{key_x + 22:.0f}" y1="{top - 12}" y2="{top - 12}" stroke="{colour}"'
                     f' stroke-width="2"{dash}/>')  # fmt: skip
        parts.append(f'<text x="{key_x + 28:.0f}" y="{top - 8}">{escape(one.label)}</text>')
        key_x += 44 + 7 * len(one.label)
    return "".join([*parts, "</svg>\n"])


def _x_ticks(low: float, high: float, *, log_x: bool) -> list[tuple[float, str]]:
    if log_x:
        powers = range(ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9) + 1)
        return [(10.0**power, f"{10.0**power:g}") for power in powers]
    step = tick_step(high - low)
    first = ceil(low / step - 1e-9)
    return [(number * step, f"{number * step:g}") for number in range(first, floor(high / step + 1e-9) + 1)]
