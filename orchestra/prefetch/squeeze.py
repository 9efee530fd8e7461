"""How much may be in flight for bytes that nobody waits for yet. Pure.

While no reader misses anything: all that is allowed. While readers do, as much as fills the store's link and hardly
more, since a reader's request waits behind whatever is queued there: on a link of 50 MB/s, 16 MB in flight make each
read of 500 kB last 330 ms instead of 60. How much queues follows from how long answers take (as TCP Vegas has it): of n
requests in flight, n (1 - b/t) queue when an answer takes t, and b without a queue. More is asked for while less than
a piece queues, less when more than that does; b is the shortest mean that was seen, and asking for less is how it is
found. Rates would say it too, but a busy machine counts a third more or less in one tick than in the next.

Latency differs from request to request, so what is taken for a queue must be more than chance. And readers may fill a
link by themselves: then a load pauses, and looks again after a while.
"""

from __future__ import annotations

import math
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
# Ticks that a load pauses when readers fill the link, six tenths of a second; then one piece looks again.
_PAUSE_TICKS = 4
# A queue is half as long with half as much in flight. An answer that takes as long as before did not queue: the path
# has become longer.
_SAME = 0.9
# With next to nothing in flight that cannot be tried: then each look that finds a queue believes a little less in it.
_DOUBT = 1.02


@dataclass(frozen=True, slots=True)
class Manner:
    """How much may queue: in pieces, or as parts of what is in flight if that is more."""

    few: float
    many: float
    few_ratio: float
    many_ratio: float
    may_pause: bool


# With four readers on a link that six requests fill, two of a load's cost them nothing, and three make each a sixth
# slower: hardly half a piece may queue.
OF_LOADS = Manner(0.25, 0.6, 0.03, 0.08, may_pause=True)
# A plan reads what its readers would. Two pieces that wait hide the time between an answer and the next request.
OF_PLANS = Manner(1.5, 3.0, 0.15, 0.30, may_pause=False)


@dataclass(frozen=True, slots=True)
class Tick:
    """What was measured since the last tick: the answers to its requests, and what is in flight now."""

    answers: int
    latency_s: float  # their mean
    deviation_s: float
    in_flight: int  # pieces
    readers_in_flight: float  # in pieces of that size
    readers_wait: bool


@dataclass(slots=True)
class Squeeze:
    """The limit of one loader, in pieces. `limit_max` is what its store takes at most."""

    limit_max: int
    manner: Manner = OF_LOADS
    limit: int = LIMIT_AT_FIRST
    _latency_s: float = 0.0
    _variance: float = 0.0
    _unqueued_s: float = 0.0
    _is_rising: bool = True
    _is_warm: bool = False
    _pause: int = 0
    _declining_from: tuple[float, float] | None = None  # what was in flight, and how long an answer took

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.limit_max)

    def tick(self, seen: Tick) -> int:
        """Note what was seen; return the new limit."""
        if not seen.readers_wait:
            self.limit, self._is_rising, self._pause = self.limit_max, False, 0
        elif self._pause:
            self._pause -= 1
            if not self._pause:
                self.limit, self._latency_s = 1, 0.0
        elif seen.answers:  # else there was nothing to ask for, or the store does not answer
            self._note(seen)
            if self._is_warm:
                self._adapt(seen)
            self._is_warm = True  # the first answers say how long one takes, and not yet what more in flight does
        return self.limit

    def _note(self, seen: Tick) -> None:
        weight = min(1.0, seen.answers / _ANSWERS_IN_MEAN) if self._latency_s else 1.0
        weight = max(weight, 0.7) if self._is_rising else weight
        self._latency_s += weight * (seen.latency_s - self._latency_s)
        self._variance += weight * (seen.deviation_s**2 - self._variance)
        self._unqueued_s = min(self._latency_s, self._unqueued_s or self._latency_s)

    def _adapt(self, seen: Tick) -> None:
        count = self.limit + seen.readers_in_flight
        queued = count * (1 - self._unqueued_s / self._latency_s)
        in_mean = seen.answers if self._is_rising else max(_ANSWERS_IN_MEAN, seen.answers)
        deviation = math.sqrt(self._variance / in_mean) / self._latency_s
        chance = _CHANCE_DEVIATIONS * deviation
        manner = self.manner
        if self._is_rising and queued <= max(1.0, (_RISING_RATIO + chance) * count):
            if seen.in_flight >= self.limit / 2:  # else there is not that much to ask for
                self.limit = min(self.limit_max, self.limit * 2)
            return
        self._is_rising = False
        if queued > max(manner.many, (manner.many_ratio + chance) * count):
            self._decline(count, seen.latency_s)
        elif queued < max(manner.few, (manner.few_ratio + chance) * count) and seen.in_flight >= 0.75 * self.limit:
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
            if self.manner.may_pause:
                self.limit, self._pause = 0, _PAUSE_TICKS


def squeeze_of_plans(limit_max: int) -> Squeeze:
    """Return the limit of what plans fetch."""
    return Squeeze(limit_max, OF_PLANS, _LIMIT_AT_FIRST_OF_PLANS)
