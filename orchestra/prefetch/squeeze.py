"""How much may be in flight for bytes that nobody waits for yet. Pure.

While no reader misses anything: all that is allowed. While readers do, as much as fills the store's link and hardly
more, since a reader's request waits behind whatever is queued there: on a link of 50 MB/s, 16 MB in flight make each
read of 500 kB last 330 ms instead of 60. How much queues follows from how long answers take, readers' and ours: an
answer that takes t, and b without a queue, has waited for t - b. So of n requests in flight n b/t fill the link, and
that many and a little more are what may be in flight together (as FAST TCP has it): readers' own are taken off. b is
the shortest mean that was seen of either kind. Rates would say it too, but a busy machine counts a third more or less
in one tick than in the next.

Latency differs from request to request, so what is taken for a queue must be more than chance. And readers may fill a
link by themselves: then a load has nothing in flight, and how long readers' answers take says when to look again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

# Doubled each tick as long as nothing queues: a wide link is taken within a second.
LIMIT_AT_FIRST = 2
# ... of a plan: a batch. Its first batch is all that its reader waits for, in any order; on a link of 50 MB/s that is
# 160 ms of 500 kB files.
_LIMIT_AT_FIRST_OF_PLANS = 16
# While it is doubled, this part of what is in flight may queue, and a piece in any case.
_RISING_RATIO = 0.1
# Answers in the running mean: with latencies as uneven as S3's (sigma 0.6) it is within 20 %. More are calmer, and
# follow later: with 24 a load swings between too much and nothing.
_ANSWERS_IN_MEAN = 12
# Deviations of the mean that are taken for chance.
_CHANCE_DEVIATIONS = 2.0
# Half of the way to what the link says, each tick.
_GAIN = 0.5
# Where nothing queues at all, it grows by half of this part a tick.
_GROWTH = 0.2
# What passes for a queue with nothing of ours in flight is none of ours. It is believed a little less each tick: the
# path has become longer, or readers are what fills it.
_DOUBT = 1.02
# A queue is half as long with half as much in flight. Answers that take as long as before did not queue: the path has
# become longer.
_SAME = 0.9


@dataclass(frozen=True, slots=True)
class Manner:
    """How much may queue: in pieces, or as a part of what is ours in flight if that is more."""

    pieces: float
    ratio: float
    may_pause: bool


# With four readers on a link that six requests fill, two of a load's cost them nothing, and three make each a sixth
# slower: hardly half a piece may queue.
OF_LOADS = Manner(0.3, 0.05, may_pause=True)
# A plan reads what its readers would. Some pieces that wait hide the time between an answer and the next request.
OF_PLANS = Manner(3.0, 0.2, may_pause=False)


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


@dataclass(frozen=True, slots=True)
class Tick:
    """What was measured since the last tick."""

    own: Answers
    readers: Answers  # to what readers asked for
    in_flight: int  # pieces, now
    readers_in_flight: float  # on average, in pieces of that size
    readers_wait: bool


@dataclass(slots=True)
class _Latency:
    """The running mean of one kind of answers. Kinds are apart, as they may differ in size."""

    mean_s: float = 0.0
    variance: float = 0.0
    unqueued_s: float = 0.0
    before_s: float = 0.0  # when there was twice as much in flight

    def note(self, answers: Answers, *, is_rising: bool) -> None:
        if not answers.count:
            return
        weight = min(1.0, answers.count / _ANSWERS_IN_MEAN) if self.mean_s else 1.0
        weight = max(weight, 0.7) if is_rising else weight
        self.mean_s += weight * (answers.mean_s - self.mean_s)
        self.variance += weight * (answers.deviation_s**2 - self.variance)
        self.unqueued_s = min(self.mean_s, self.unqueued_s or self.mean_s)

    def doubt(self) -> None:
        self.unqueued_s = min(self.mean_s, self.unqueued_s * _DOUBT)

    def believe_if_same(self) -> None:
        if self.mean_s > self.before_s * _SAME:
            self.unqueued_s = self.mean_s

    def unqueued_ratio(self) -> float:
        """Which part of what is in flight is on its way and does not queue, as far as that is more than chance."""
        if not self.mean_s:
            return 1.0
        chance = _CHANCE_DEVIATIONS * math.sqrt(self.variance / _ANSWERS_IN_MEAN) / self.mean_s
        return min(1.0, self.unqueued_s / self.mean_s + chance)


@dataclass(slots=True)
class Squeeze:
    """The limit of one loader, in pieces. `limit_max` is what its store takes at most."""

    limit_max: int
    manner: Manner = OF_LOADS
    limit: int = LIMIT_AT_FIRST
    _total: float = 0.0  # what may be in flight together with what readers asked for
    _readers: float = 0.0  # what of it is theirs
    _own_latency: _Latency = field(default_factory=_Latency)
    _readers_latency: _Latency = field(default_factory=_Latency)
    _is_rising: bool = True
    _is_warm: bool = False
    _declining_from: float = 0.0  # the total at which it began to decline; 0: it does not
    _declining_answers: int = 0

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.limit_max)
        self._total = float(self.limit)

    def tick(self, seen: Tick) -> int:
        """Note what was seen; return the new limit."""
        if not seen.readers_wait:
            self.limit, self._is_rising = self.limit_max, False
            return self.limit
        if seen.own.count or seen.readers.count:  # else there was nothing to ask for, or the store does not answer
            self._own_latency.note(seen.own, is_rising=self._is_rising)
            self._readers_latency.note(seen.readers, is_rising=self._is_rising)
            if self._is_warm:
                self._readers += _GAIN * (seen.readers_in_flight - self._readers)
                self._adapt(seen)
            else:  # the first answers say how long one takes, and not yet what more in flight does
                self._is_warm, self._readers = True, seen.readers_in_flight
                self._total = self.limit + self._readers
        self.limit = self._limit()
        return self.limit

    def _adapt(self, seen: Tick) -> None:
        own, readers = seen.own.count, seen.readers.count
        ratio = (own * self._own_latency.unqueued_ratio() + readers * self._readers_latency.unqueued_ratio()) / (
            own + readers
        )
        total = self._total
        is_used = seen.in_flight >= 0.75 * self.limit  # else there is not that much to ask for
        if self._is_rising and (1 - ratio) * total <= max(1.0, _RISING_RATIO * total):
            if is_used:
                self._total = self._readers + 2 * max(1.0, total - self._readers)
            return
        self._is_rising = False
        ours = max(0.0, total - self._readers)
        wanted = ratio * total + max(self.manner.pieces, self.manner.ratio * ours)
        wanted = max(wanted, total + _GROWTH * ours) if ratio >= 1 else wanted
        if wanted < total or is_used:
            self._total += _GAIN * (wanted - total)
        if wanted < total:
            self._decline(own + readers, total)
        else:
            self._declining_from = 0.0
        if not self._limit():
            for latency in (self._own_latency, self._readers_latency):
                latency.doubt()

    def _decline(self, answers: int, total: float) -> None:
        """Less and less is asked for; see whether it helps, once all that was in flight at first has been answered."""
        latencies = (self._own_latency, self._readers_latency)
        if not self._declining_from:
            self._declining_from, self._declining_answers = total, 0
        self._declining_answers += answers
        if self._declining_answers <= self._declining_from:
            for latency in latencies:
                latency.before_s = latency.mean_s
        elif total <= self._declining_from / 2:
            for latency in latencies:
                latency.believe_if_same()
            self._declining_from = 0.0

    def _limit(self) -> int:
        self._total = min(max(1.0, self._total), self.limit_max + self._readers)
        least = 0 if self.manner.may_pause and self._readers >= 0.5 else 1
        return min(self.limit_max, max(least, round(self._total - self._readers)))


def squeeze_of_plans(limit_max: int) -> Squeeze:
    """Return the limit of what plans fetch."""
    return Squeeze(limit_max, OF_PLANS, _LIMIT_AT_FIRST_OF_PLANS)
