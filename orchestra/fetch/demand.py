"""What readers wait for, or soon will: how much of it is in flight from the stores, and how long answers take.

Owns: those figures, for whoever fetches ahead of readers and is to leave the link to them. Leaves to others: what
follows from them (prefetch/squeeze).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

# More than come between two looks at them.
_ANSWERS_MAX = 1000


@dataclass(frozen=True, slots=True)
class DemandMark:
    """A moment, as DemandMeter knows it."""

    at_ns: int
    bytes_ns: int
    answered: int


@dataclass(slots=True)
class DemandMeter:
    """One event loop. Two additions for a request; nothing is ever reset, so any number may look."""

    _in_flight_bytes: int = 0
    _bytes_ns: int = 0  # bytes in flight, summed over time
    _at_ns: int = 0
    _answered: int = 0
    _answers: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_ANSWERS_MAX))

    def begin(self, size_bytes: int, now_ns: int) -> None:
        """A reader's request for so many bytes was sent."""
        self._add_up(now_ns)
        self._in_flight_bytes += size_bytes

    def end(self, size_bytes: int, now_ns: int) -> None:
        """It was answered, or given up."""
        self._add_up(now_ns)
        self._in_flight_bytes -= size_bytes

    def answered(self, took_ns: int, size_bytes: int) -> None:
        """It was answered with its bytes."""
        self._answered += 1
        self._answers.append((took_ns, size_bytes))

    def mark(self, now_ns: int) -> DemandMark:
        """Return this moment."""
        self._add_up(now_ns)
        return DemandMark(now_ns, self._bytes_ns, self._answered)

    def mean_bytes(self, since: DemandMark, until: DemandMark) -> float:
        """How much was in flight between two moments, on average."""
        return (until.bytes_ns - since.bytes_ns) / max(1, until.at_ns - since.at_ns)

    def answers(self, since: DemandMark) -> list[tuple[int, int]]:
        """How long each request took that was answered since then, in nanoseconds, and its bytes; the last of them
        where there were very many."""
        count = min(self._answered - since.answered, len(self._answers))
        return list(islice(reversed(self._answers), count))

    def _add_up(self, now_ns: int) -> None:
        self._bytes_ns += self._in_flight_bytes * (now_ns - self._at_ns)
        self._at_ns = now_ns
