"""Sizes and durations: what is read, what is refused, what is printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.units import (
    GIB,
    KIB,
    MIB,
    SIZE_LIMIT_BYTES,
    TIB,
    format_duration,
    format_size,
    parse_duration_s,
    parse_size_bytes,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("10GiB", 10 * GIB),
        ("10GB", 10**10),
        ("10G", 10 * GIB),
        ("10 gib", 10 * GIB),
        ("1.5MiB", 3 * MIB // 2),
        ("4k", 4 * KIB),
        ("2TiB", 2 * TIB),
        ("512", 512),
        (512, 512),
        ("0", 0),
        (SIZE_LIMIT_BYTES, SIZE_LIMIT_BYTES),
    ],
)
def test_a_size_is_its_number_times_its_unit(text: str | int, size_bytes: int) -> None:
    """KiB, MiB ... and K, M ... count in 1,024s, kB, MB ... in 1,000s, and case does not matter."""
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ten", "expected a size such as 10GiB, got 'ten'"),
        ("", "expected a size"),
        ("-1", "expected a size"),
        ("1e9", "expected a size"),
        ("10 parsecs", "unknown unit 'parsecs'"),
        ("1025PiB", "unknown unit 'PiB'"),
        (SIZE_LIMIT_BYTES + 1, "out of range"),
        (True, "expected a size"),
        ("١GiB", "expected a size"),
    ],
)
def test_what_is_no_size_is_refused_in_words(text: str | int, words: str) -> None:
    """A text that is no size raises ValueError that says what is."""
    with pytest.raises(ValueError, match=words):
        parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("60s", 60), ("15m", 900), ("2h", 7200), ("1d", 86400), ("1.5h", 5400), (30, 30), ("30", 30)],
)
def test_a_duration_is_its_number_times_its_unit(text: str | int, seconds: float) -> None:
    """ms, s, m, h and d are known; a bare number is seconds."""
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5 parsecs", r"unknown unit 'parsecs' in duration '5 parsecs' \(use ms, s, m, h, d\)"),
        ("-5", "expected a duration"),
        (float("nan"), "expected a duration"),
        (float("inf"), "expected a duration"),
        ("200000d", "out of range"),
        (True, "expected a duration"),
    ],
)
def test_what_is_no_duration_is_refused_in_words(text: str | float, words: str) -> None:
    """A text that is no duration raises ValueError that says what is."""
    with pytest.raises(ValueError, match=words):
        parse_duration_s(text)


@given(st.integers(min_value=0, max_value=SIZE_LIMIT_BYTES))
def test_a_printed_size_reads_back_to_within_its_last_digit(size_bytes: int) -> None:
    """What format_size prints is read again as nearly the same size."""
    again = parse_size_bytes(format_size(size_bytes).replace(" ", ""))
    assert abs(again - size_bytes) <= max(0.05 * 1024**0, size_bytes * 0.05)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.85, "850ms"), (12.34, "12.3s"), (245, "4m05s"), (7620, "2h07m"), (59.99, "60.0s")]
)
def test_a_duration_is_printed_for_people(seconds: float, text: str) -> None:
    """Two units at most."""
    assert format_duration(seconds) == text
