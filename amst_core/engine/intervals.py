"""Sets of half-open integer intervals, kept sorted, disjoint and merged."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from ..wire.fields import Span


class IntervalSet:
    """Which offsets of a transfer are held. O(log n) lookups, n being the number of separate spans."""

    __slots__ = ("_ends", "_starts", "_total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._total = 0

    @property
    def total(self) -> int:
        """How many offsets are held."""
        return self._total

    @property
    def prefix(self) -> int:
        """End of the span that starts at 0; 0 when offset 0 is missing."""
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    @property
    def end(self) -> int:
        """One past the highest offset held; 0 when empty."""
        return self._ends[-1] if self._ends else 0

    def add(self, start: int, end: int) -> int:
        """Hold ``[start, end)``; returns how many of its offsets were new."""
        if start >= end:
            return 0
        # every span that touches [start, end] melts into one
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            had = sum(self._ends[i] - self._starts[i] for i in range(first, last))
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        else:
            had = 0
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]
        new = end - start - had
        self._total += new
        return new

    def remove(self, start: int, end: int) -> None:
        """Hold ``[start, end)`` no more."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if start >= end or first >= last:
            return
        left = (self._starts[first], start) if self._starts[first] < start else None
        right = (end, self._ends[last - 1]) if self._ends[last - 1] > end else None
        kept = [span for span in (left, right) if span is not None]
        self._total -= sum(self._ends[i] - self._starts[i] for i in range(first, last))
        self._total += sum(e - s for s, e in kept)
        self._starts[first:last] = [s for s, _ in kept]
        self._ends[first:last] = [e for _, e in kept]

    def clear(self) -> None:
        """Hold nothing."""
        self._starts.clear()
        self._ends.clear()
        self._total = 0

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[Span]:
        return zip(self._starts, self._ends, strict=True)

    def covers(self, start: int, end: int) -> bool:
        """Whether every offset of ``[start, end)`` is held."""
        i = bisect_right(self._starts, start) - 1
        return start >= end or (i >= 0 and self._ends[i] >= end)

    def end_of_span(self, offset: int) -> int:
        """The end of the span that holds ``offset``; ``offset`` itself when none does."""
        i = bisect_right(self._starts, offset) - 1
        return max(offset, self._ends[i]) if i >= 0 else offset

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any offset of ``[start, end)`` is held."""
        i = bisect_right(self._ends, start)
        return start < end and i < len(self._starts) and self._starts[i] < end

    def gaps(self, start: int, end: int) -> Iterator[Span]:
        """The maximal spans inside ``[start, end)`` that are not held, in order."""
        i = bisect_right(self._ends, start)
        while start < end:
            if i == len(self._starts) or self._starts[i] >= end:
                yield start, end
                return
            if start < self._starts[i]:
                yield start, self._starts[i]
            start = self._ends[i]
            i += 1

    def spans(self, after: int = 0, limit: int | None = None) -> tuple[Span, ...]:
        """The held spans that start at or after ``after``, at most ``limit`` of them."""
        i = bisect_left(self._starts, after)
        stop = None if limit is None else i + limit
        return tuple(zip(self._starts[i:stop], self._ends[i:stop], strict=True))
