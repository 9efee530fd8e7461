"""Sizes, durations and the constants that other modules count in.

Owns: parsing and printing of "4MiB", "15m". Leaves to others: where such a value stood (config names file and key).
"""

from __future__ import annotations

import math
import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": TIB,
}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# Larger than any disk or object we can address; keeps sizes inside a signed 64-bit integer.
SIZE_LIMIT_BYTES = 1 << 60
DURATION_LIMIT_S = 100 * 365 * 86400.0
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*\Z")


def parse_size_bytes(text: str | int) -> int:
    """Return the bytes that `text` names: "10GiB" is 2**30 based, "10GB" is 10**9 based, "10G" means GiB.

    Raises ValueError with a sentence that says what is allowed.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise ValueError(f"expected a size such as 10GiB, got {text!r}")
    match = _NUMBER_AND_UNIT.match(str(text))
    if match is None:
        raise ValueError(f"expected a size such as 10GiB, got {text!r}")
    factor = _SIZE_UNITS.get(match[2].lower())
    if factor is None:
        raise ValueError(f"unknown unit {match[2]!r} in size {text!r} (use B, KiB, MiB, GiB, TiB, kB, MB, GB, TB)")
    size = float(match[1]) * factor if "." in match[1] else int(match[1]) * factor
    if not 0 <= size <= SIZE_LIMIT_BYTES:
        raise ValueError(f"size {text!r} is out of range (0 to 1024 PiB)")
    return int(size)


def parse_duration_s(text: str | int | float) -> float:
    """Return the seconds that `text` names ("500ms", "60s", "15m", "2h", "1d"; a bare number is seconds).

    Raises ValueError with a sentence that says what is allowed.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(f"expected a duration such as 60s, got {text!r}")
    match = _NUMBER_AND_UNIT.match(str(text))
    if match is None:
        raise ValueError(f"expected a duration such as 60s, got {text!r}")
    factor = _DURATION_UNITS.get(match[2].lower() or "s")
    if factor is None:
        raise ValueError(f"unknown unit {match[2]!r} in duration {text!r} (use ms, s, m, h, d)")
    seconds = float(match[1]) * factor
    if not math.isfinite(seconds) or seconds > DURATION_LIMIT_S:
        raise ValueError(f"duration {text!r} is out of range (0 to 100 years)")
    return seconds


def format_size(size_bytes: int | float) -> str:
    """Return `size_bytes` for people: 0 B, 999 B, 1.5 KiB, 12.3 GiB."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: the loop ends at TiB")


def format_duration(seconds: float) -> str:
    """Return `seconds` for people: 850ms, 12.3s, 4m05s, 2h07m."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
