"""How much a load may have in flight while readers wait. Pure.

It has what readers leave of the store's link. How much that is follows from how long answers take, readers' and its
own: one that takes t, and b without a queue, has waited for t - b, so of n requests in flight n b/t fill the link, and
that many, and a little more, are what may be in flight together (as FAST TCP has it); readers' own are taken off.

What b is shows when the load has nothing in flight: it looks when it first meets a queue, and once a minute. What
passes for a queue then is none of its own: the path is long, or readers are what fills it, and where they do it has a
piece in flight now and then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from orchestra.prefetch.squeeze import LIMIT_AT_FIRST, Answers, Tick

# While it is doubled, this part of what is in flight may queue, and a piece in any case.
_RISING_RATIO = 0.1
# Answers in the running mean: with latencies as uneven as S3's (sigma 0.6) it is within 20 %. More are calmer, and
# follow later: with 24 a load swings between too much and nothing.
_ANSWERS_IN_MEAN = 12
# Deviations of the mean that are taken for chance.
_CHANCE_DEVIATIONS = 2.0
# Half of the way to what the link says, each tick.
_GAIN = 0.5
# What may queue: with four readers on a link that six requests fill, two of a load's cost them nothing, and three make
# each a sixth slower. Of much in flight, a part of that.
_QUEUED_PIECES = 0.3
_QUEUED_RATIO = 0.05
# Where nothing queues at all, it grows by half of this part a tick.
_GROWTH = 0.2
# Of a piece, each tick in which nobody says anything and nothing of ours is in flight.
_UNHEARD_PIECES = 0.25
# A look lasts until a tick brought answers to readers only, at most so many ticks.
_LOOK_TICKS_MAX = 8
_LOOK_EVERY_TICKS = 400


@dataclass(slots=True)
class _Latency:
    """The running mean of one kind of answers."""

    mean_s: float = 0.0
    variance: float = 0.0
    unqueued_s: float = 0.0

    def note(self, answers: Answers, *, at_least: float = 0.0) -> None:
        if not answers.count:
            return
        weight = max(at_least, min(1.0, answers.count / _ANSWERS_IN_MEAN)) if self.mean_s else 1.0
        self.mean_s += weight * (answers.mean_s - self.mean_s)
        self.variance += weight * (answers.deviation_s**2 - self.variance)
        self.unqueued_s = min(self.mean_s, self.unqueued_s or self.mean_s)

    def unqueued_ratio(self) -> float:
        """Which part of what is in flight is on its way and does not queue, as far as that is more than chance."""
        if not self.mean_s:
            return 1.0
        chance = _CHANCE_DEVIATIONS * math.sqrt(self.variance / _ANSWERS_IN_MEAN) / self.mean_s
        return min(1.0, self.unqueued_s / self.mean_s + chance)


@dataclass(slots=True)
class Yielding:
    """The limit of one load, in pieces. `limit_max` is what its store takes at most."""

    limit_max: int
    limit: int = LIMIT_AT_FIRST
    _total: float = 0.0  # what may be in flight together with what readers asked for; 0: nothing was seen yet
    _readers: float = 0.0  # what of it is theirs
    _latency: _Latency = field(default_factory=_Latency)
    _is_rising: bool = True
    _answers: int = 0  # to its own pieces since the limit was doubled
    _looking: int = 0  # ticks that are left
    _ticks: int = 0  # since it looked
    _before: float = 0.0  # what might be in flight then
    _slowest_s: float = 0.0  # how long it made answers

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.limit_max)

    def tick(self, seen: Tick) -> int:
        """Note what was seen; return the new limit."""
        answers = seen.own.with_others(seen.readers)
        if not seen.readers_wait:
            self.limit, self._looking = self.limit_max, 0  # what was learnt stays
            return self.limit
        if not answers.count:  # there was nothing to ask for, or the store does not answer
            return self._wait()
        if not self._total:  # the first answers say how long one takes, and not yet what more in flight does
            self._readers = seen.readers_in_flight
            self._total = LIMIT_AT_FIRST + self._readers  # also if it had the link for itself until now
            self._latency.note(answers)
        else:
            self._readers += _GAIN * (seen.readers_in_flight - self._readers)
            self._ticks += 1
            if self._looking:
                self._look(seen)
            else:
                self._adapt(seen, answers)
        self.limit = self._limit()
        return self.limit

    def _wait(self) -> int:
        """Nobody says anything. With nothing in flight it must be one of ours that asks, after a while."""
        self._looking = max(0, self._looking - 1)
        if not self.limit:
            self._total += _UNHEARD_PIECES
            self.limit = self._limit()
        return self.limit

    def _look(self, seen: Tick) -> None:
        """Nothing of ours is asked for."""
        self._looking -= 1
        self._latency.note(seen.readers, at_least=1.0)
        self._slowest_s = max(self._slowest_s, self._latency.mean_s)
        if _is_alone(seen):
            self._latency.unqueued_s = self._latency.mean_s
            self._total = self._before * self._latency.unqueued_s / self._slowest_s
            self._looking = 0

    def _adapt(self, seen: Tick, answers: Answers) -> None:
        self._latency.note(answers, at_least=0.7 if self._is_rising else 0.0)
        self._answers += seen.own.count
        if not self.limit and _is_alone(seen):
            self._latency.unqueued_s = self._latency.mean_s
        ratio, total = self._latency.unqueued_ratio(), self._total
        ours = max(0.0, total - self._readers)
        is_used = seen.in_flight >= 0.75 * self.limit  # else there is not that much to ask for
        if self._is_rising and (1 - ratio) * total <= max(1.0, _RISING_RATIO * total):
            if is_used and self._answers >= ours:  # what was asked for since the last time has been answered
                self._total, self._answers = self._readers + 2 * max(1.0, ours), 0
            return
        wanted = ratio * total + max(_QUEUED_PIECES, _QUEUED_RATIO * ours)
        wanted = max(wanted, total + _GROWTH * ours) if ratio >= 1 else wanted
        if wanted < total or is_used:
            self._total += _GAIN * (wanted - total)
        if self._is_rising or self._ticks > _LOOK_EVERY_TICKS:
            self._is_rising, self._ticks = False, 0
            if self._readers >= 1:  # else nobody's answers would come
                self._before, self._slowest_s = total, self._latency.mean_s
                self._looking = _LOOK_TICKS_MAX

    def _limit(self) -> int:
        self._total = min(max(1.0, self._total), self.limit_max + self._readers)
        least = int(self._readers < 0.5)
        if self._looking:
            return least
        return min(self.limit_max, max(least, round(self._total - self._readers)))


def _is_alone(seen: Tick) -> bool:
    """Whether these answers say how long readers wait without the load."""
    return seen.readers.count > 0 and not seen.in_flight and not seen.own.count
