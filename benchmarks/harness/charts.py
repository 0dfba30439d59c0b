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
