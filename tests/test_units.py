"""Sizes, rates and durations: what is read, what is refused, and that what is written can be read again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amst_core.errors import UsageError
from amst_core.units import (
    DURATION_FORMS,
    RATE_FORMS,
    SHARE_FORMS,
    SIZE_FORMS,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_share,
    parse_size,
)

LIMIT = 2**63 - 1


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30), ("1KiB", 1024), ("1kiB", 1024), ("3MiB", 3 * 2**20), ("2TiB", 2**41),
        ("4k", 4000), ("4K", 4000), ("4kB", 4000), ("5M", 5 * 10**6), ("5MB", 5 * 10**6), ("6G", 6 * 10**9),
        ("7TB", 7 * 10**12), ("1.5GiB", 3 * 2**29), ("0.5k", 500), ("1.0001k", 1000), (" 10 MiB ", 10 * 2**20),
        ("0", 0), ("4096", 4096), ("4096B", 4096), ("2.0", 2), (4096, 4096), (0, 0), (LIMIT, LIMIT),
        (str(LIMIT), LIMIT),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    assert type(parse_size(text)) is int


@pytest.mark.parametrize(
    "bad",
    ["", " ", "GiB", "-1", "-4GiB", "+4", "4gib", "4gb", "4m", "4Mb", "4Gi", "4 Gi B", "1e3", "nan", "inf", "0x10",
     "1_000", "0.5", "1.2.3", "1,5G", "٤", "4GiB4", "9" * 5000, "9223372036854775808", "8388608TiB", -1, 2**63, True,
     1.5, None, [], b"4"],
)  # fmt: skip
def test_what_is_no_size_is_refused_with_the_text_and_the_forms(bad: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(bad)  # type: ignore[arg-type]
    assert SIZE_FORMS in str(caught.value)
    assert repr(bad)[:20] in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_number_that_cannot_even_be_printed_is_refused() -> None:
    for parse in (parse_size, parse_rate, parse_duration):
        with pytest.raises(UsageError, match="<int> is not a"):
            parse(10**5000)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100Mbit/s", 12.5e6), ("100Mbit", 12.5e6), ("8bit/s", 1.0), ("1Gbit/s", 125e6), ("8Kibit/s", 1024.0),
        ("100M", 100e6), ("100M/s", 100e6), ("10MiB/s", 10 * 2.0**20), ("10MiB", 10 * 2.0**20), ("5kB/s", 5e3),
        ("1.5MB/s", 1.5e6), ("0.25", 0.25), ("7/s", 7.0), ("0", 0.0), (12, 12.0), (0.5, 0.5),
    ],
)  # fmt: skip
def test_rates_are_read(text: str | int | float, rate: float) -> None:
    assert parse_rate(text) == rate
    assert type(parse_rate(text)) is float


@pytest.mark.parametrize(
    "bad",
    ["", "fast", "100Mb/s", "100Mbps", "100mbit", "10Mi", "10Mi/s", "-1M", "1M/min", "1M/s/s", "nan", "10000000TB/s",
     float("nan"), float("inf"), float("-inf"), -1, -0.5, 2.0**63, 10**400, True, None],
)  # fmt: skip
def test_what_is_no_rate_is_refused_with_the_forms(bad: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rate(bad)  # type: ignore[arg-type]
    assert RATE_FORMS in str(caught.value)
    assert repr(bad)[:20] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "duration"),
    [("30s", 30.0), ("1m", 60.0), ("2min", 120.0), ("500ms", 0.5), ("1.5h", 5400.0), ("7d", 604800.0), ("7", 7.0),
     ("0.25", 0.25),
     (" 3 s", 3.0), ("0", 0.0), (45, 45.0), (0.1, 0.1)],
)  # fmt: skip
def test_durations_are_read(text: str | int | float, duration: float) -> None:
    assert parse_duration(text) == duration
    assert type(parse_duration(text)) is float


@pytest.mark.parametrize(
    "bad",
    ["", "soon", "1D", "1M", "1S", "5 m s", "1m30s", "-1s", "nan", "inf", float("nan"), float("inf"), -1, 10**400,
     False, "9223372036854775808", "2562047788015216h"],
)  # fmt: skip
def test_what_is_no_duration_is_refused_with_the_forms(bad: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(bad)  # type: ignore[arg-type]
    assert DURATION_FORMS in str(caught.value)
    assert repr(bad)[:20] in str(caught.value)


def test_values_are_written_for_people() -> None:
    assert [format_size(size) for size in (0, 1, 1023, 1024, 1536, 192 * 2**20, 2**30 - 1, 2**40, 3000 * 2**40)] == [
        "0B", "1B", "1023B", "1KiB", "1.5KiB", "192MiB", "1GiB", "1TiB", "3000TiB",
    ]  # fmt: skip
    assert [format_rate(rate) for rate in (0.0, 0.25, 999.0, 1000.0, 1.25e9)] == [
        "0B/s", "0.25B/s", "999B/s", "1kB/s", "1.25GB/s",
    ]  # fmt: skip
    assert [format_duration(s) for s in (0, 0.5, 1, 1.25, 60, 90, 120, 300, 3600, 5400, 3725.126)] == [
        "0s", "500ms", "1s", "1.25s", "60s", "90s", "2m", "5m", "1h", "90m", "3725.13s",
    ]  # fmt: skip
    assert [format_duration(s) for s in (86400, 90000, 172800, 604800)] == ["24h", "25h", "2d", "7d"]


@given(st.integers(0, 2**60))
def test_a_written_size_reads_back_to_what_it_shows(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.006)


@given(st.integers(1, 1023), st.sampled_from([1, 2**10, 2**20, 2**30, 2**40]))
def test_a_whole_multiple_of_a_unit_is_written_exactly(count: int, unit: int) -> None:
    assert parse_size(format_size(count * unit)) == count * unit


@given(st.floats(1.0, 1e15))
def test_a_written_rate_reads_back_to_what_it_shows(rate: float) -> None:
    assert parse_rate(format_rate(rate)) == pytest.approx(rate, rel=0.006)


@given(st.floats(0.001, 1e9))
def test_a_written_duration_reads_back_to_what_it_shows(duration: float) -> None:
    assert parse_duration(format_duration(duration)) == pytest.approx(duration, rel=0.006)


@given(st.text())
def test_no_text_does_more_than_be_refused(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_duration):
        try:
            value = parse(text)
        except UsageError:
            continue
        assert 0 <= value <= LIMIT


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("0.5%", 0.005), ("100%", 1.0), ("0", 0.0), ("1", 1.0), ("0.02", 0.02), (" 3 %", 0.03), (0.25, 0.25),
     (1, 1.0)],
)  # fmt: skip
def test_shares_are_read(text: str | float, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize(
    "bad", ["", "%", "101%", "1.5", "-1%", "1%%", "nan", "1e-3", -0.1, 1.1, True, None, float("nan")]
)
def test_what_is_no_share_is_refused_with_the_forms(bad: object) -> None:
    with pytest.raises(UsageError, match=r"is not a share") as caught:
        parse_share(bad)  # type: ignore[arg-type]
    assert SHARE_FORMS in str(caught.value)
