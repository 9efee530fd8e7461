"""How much plans may have in flight for bytes that nobody waits for yet. Pure. (Of loads: yielding.)

As much as fills the store's link and hardly more, since a reader's request waits behind whatever is queued there: on a
link of 50 MB/s, 16 MB in flight make each read of 500 kB last 330 ms instead of 60. How much queues follows from how
long answers take (as TCP Vegas has it): of n requests in flight, n (1 - b/t) queue when an answer takes t, and b
without a queue. More is asked for while little queues, less when more than that does; b is the shortest mean that was
seen, and asking for less is how it is found. Rates would say it too, but a busy machine counts a third more or less in
one tick than in the next.

Latency differs from request to request, so what is taken for a queue must be more than chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Doubled each tick as long as nothing queues: a wide link is taken within a second.
LIMIT_AT_FIRST = 2
# ... of a plan: a batch. Its first batch is all that its reader waits for, in any order; on a link of 50 MB/s that is
# 160 ms of 500 kB files.
_LIMIT_AT_FIRST_OF_PLANS = 16
# While it is doubled, this part of what is in flight may queue, and a piece in any case.
_RISING_RATIO = 0.1
# Afterwards it grows by a tenth and shrinks by a seventh a tick.
_GROWTH = 1.1
_DECLINE = 0.85
# Answers in the running mean: with latencies as uneven as S3's (sigma 0.6) it is within 13 %.
_ANSWERS_IN_MEAN = 24
# Deviations of the mean that are taken for chance.
_CHANCE_DEVIATIONS = 2.5
# A queue is half as long with half as much in flight. An answer that takes as long as before did not queue: the path
# has become longer.
_SAME = 0.9
# With next to nothing in flight that cannot be tried: then each look that finds a queue believes a little less in it.
_DOUBT = 1.02


# So many pieces may queue, or that part of what is in flight if it is more: between few and many the limit stays. A
# plan reads what its readers would; two pieces that wait hide the time between an answer and the next request.
_FEW, _MANY = 1.5, 3.0
_FEW_RATIO, _MANY_RATIO = 0.15, 0.30


@dataclass(frozen=True, slots=True)
class Answers:
    """How long answers took that came since the last tick."""

    count: int = 0
    mean_s: float = 0.0
    deviation_s: float = 0.0

    @classmethod
    def of(cls, latencies_s: Sequence[float]) -> Answers:
        """Return what is to be known of them."""
        if not latencies_s:
            return cls()
        return cls(len(latencies_s), statistics.fmean(latencies_s), statistics.pstdev(latencies_s))

    def with_others(self, others: Answers) -> Answers:
        """Return what is to be known of both together."""
        count = self.count + others.count
        if not count:
            return self
        mean_s = (self.count * self.mean_s + others.count * others.mean_s) / count
        squares = sum(one.count * (one.deviation_s**2 + (one.mean_s - mean_s) ** 2) for one in (self, others))
        return Answers(count, mean_s, math.sqrt(squares / count))


@dataclass(frozen=True, slots=True)
class Tick:
    """What was measured since the last tick."""

    own: Answers
    readers: Answers  # to what readers asked for, if it is about as large as ours
    in_flight: int  # pieces, now
    readers_in_flight: float  # on average, in pieces of that size
    readers_wait: bool


@dataclass(slots=True)
class Squeeze:
    """The limit of what plans fetch, in pieces. `limit_max` is what its store takes at most."""

    limit_max: int
    limit: int = _LIMIT_AT_FIRST_OF_PLANS
    _latency_s: float = 0.0
    _variance: float = 0.0
    _unqueued_s: float = 0.0
    _is_rising: bool = True
    _is_warm: bool = False
    _declining_from: tuple[float, float] | None = None  # what was in flight, and how long an answer took

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.limit_max)

    def tick(self, seen: Tick) -> int:
        """Note what was seen; return the new limit."""
        if seen.own.count:  # else there was nothing to ask for, or the store does not answer
            self._note(seen.own)
            if self._is_warm:
                self._adapt(seen)
            self._is_warm = True  # the first answers say how long one takes, and not yet what more in flight does
        return self.limit

    def _note(self, answers: Answers) -> None:
        weight = min(1.0, answers.count / _ANSWERS_IN_MEAN) if self._latency_s else 1.0
        weight = max(weight, 0.7) if self._is_rising else weight
        self._latency_s += weight * (answers.mean_s - self._latency_s)
        self._variance += weight * (answers.deviation_s**2 - self._variance)
        self._unqueued_s = min(self._latency_s, self._unqueued_s or self._latency_s)

    def _adapt(self, seen: Tick) -> None:
        count = self.limit + seen.readers_in_flight
        queued = count * (1 - self._unqueued_s / self._latency_s)
        in_mean = seen.own.count if self._is_rising else max(_ANSWERS_IN_MEAN, seen.own.count)
        deviation = math.sqrt(self._variance / in_mean) / self._latency_s
        chance = _CHANCE_DEVIATIONS * deviation
        if self._is_rising and queued <= max(1.0, (_RISING_RATIO + chance) * count):
            if seen.in_flight >= self.limit / 2:  # else there is not that much to ask for
                self.limit = min(self.limit_max, self.limit * 2)
            return
        self._is_rising = False
        if queued > max(_MANY, (_MANY_RATIO + chance) * count):
            self._decline(count, seen.own.mean_s)
        elif queued < max(_FEW, (_FEW_RATIO + chance) * count) and seen.in_flight >= 0.75 * self.limit:
            self.limit = min(self.limit_max, max(self.limit + 1, int(self.limit * _GROWTH)))
            self._declining_from = None

    def _decline(self, count: float, latency_s: float) -> None:
        before_count, before_s = self._declining_from or (count, 0.0)
        before_s = max(before_s, latency_s)  # what was in flight at first may arrive some ticks later
        self._declining_from = before_count, before_s
        if count <= before_count / 2 and min(latency_s, self._latency_s) > before_s * _SAME:
            self._unqueued_s, self._declining_from = self._latency_s, None
        elif self.limit > 1:
            self.limit = max(1, min(self.limit - 1, int(self.limit * _DECLINE)))
        else:
            self._unqueued_s *= _DOUBT
