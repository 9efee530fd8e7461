"""The one place that asks what time it is, so that tests can answer instead.

`now_ns` counts from the machine's boot (CLOCK_BOOTTIME): it is the same for every process of this boot, never goes
back, and is not moved by ntp. What is written to disk is stamped with it and with the boot's id.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """Gives the time. Implementations: SystemClock, and ManualClock in tests."""

    def now_ns(self) -> int:
        """Nanoseconds since boot, comparable between processes of one boot."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, for people's eyes only; never compared."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves only when told to; for tests and simulations."""

    def __init__(self, start_s: float = 1_000_000.0) -> None:
        self._now_ns = int(start_s * 1e9)

    def now_ns(self) -> int:
        return self._now_ns

    def wall_s(self) -> float:
        return self._now_ns / 1e9

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        assert seconds >= 0, "time does not go back"
        self._now_ns += int(seconds * 1e9)


@lru_cache(maxsize=1)
def boot_id() -> bytes:
    """Sixteen bytes that differ for every boot of this machine (Linux `/proc/sys/kernel/random/boot_id`)."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
