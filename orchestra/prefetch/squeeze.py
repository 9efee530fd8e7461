"""How much may be in flight for bytes that nobody waits for yet. Pure.

While no reader misses anything: all that is allowed. While readers do, as much as fills the store's link and hardly
more, since a reader's request waits behind whatever is queued there: on a link of 50 MB/s, 16 MB in flight make each
read of 500 kB last 330 ms instead of 60. What fills a link is its rate times the latency of an answer that did not
queue (Little's law, as TCP BBR has it): both are measured, once per tick, and what readers have in flight counts too.
A latency without a queue can only be seen without one: a load begins small, and now and then takes next to nothing for
two ticks.

Latency differs from request to request, and then that product is too small. So the factor above it is not fixed: when
the rate falls below nine tenths of the best of late, it grows; else it goes down again.
"""

from __future__ import annotations

from dataclasses import dataclass

# Something always goes on, or nothing would be measured.
LIMIT_MIN = 1
LIMIT_AT_FIRST = 2
# ... of a plan: a batch. Its first batch is all that its reader waits for, in any order; on a link of 50 MB/s that is
# 160 ms of 500 kB files.
LIMIT_AT_FIRST_OF_PLANS = 16
# In flight over what fills the link. A load takes what readers leave of it and no more: with four readers on a link
# that six requests fill, two of a load's cost them nothing, and three make each a sixth slower. A plan reads what its
# readers would; a quarter more hides the time between an answer and the next request.
_FACTOR_MIN = 1.0
FACTOR_MIN_OF_PLANS = 1.25
_FACTOR_MAX = 8.0
_FACTOR_UP = 1.5
_FACTOR_DOWN = 0.95
# What the rate may be below the best of late.
_LOSS_MAX = 0.1
# What twice as much in flight must bring at the beginning, to be doubled once more.
_GAIN_MIN = 0.25
# In flight over what fills the link, above which it is not doubled: most of it only queues.
_QUEUE_MAX = 1.75
# The best rate fades by this a tick: a store that has become slower is believed after some seconds.
_FADING = 0.98
# Ticks between two looks at the latency, a minute; each costs a wide link two ticks' worth, half a percent. In the
# first of them what was in flight before arrives, the second counts. A path that has become longer meanwhile costs no
# rate, as the factor grows; one that has become shorter has a queue for a minute.
_LOOK_EVERY_TICKS = 400
_LOOK_TICKS = 2


@dataclass(frozen=True, slots=True)
class Tick:
    """What was measured since the last tick."""

    rate_bytes_per_s: float  # of all that was fetched
    latency_s: float  # the quickest answers': their lowest decile; 0 if none came
    piece_bytes: float  # of the load's answers, on average; 0 if none came
    readers_in_flight_bytes: int
    readers_wait: bool


@dataclass(slots=True)
class Squeeze:
    """The limit of one loader, in pieces. `limit_max` is what its store takes at most."""

    limit_max: int
    limit: int = LIMIT_AT_FIRST
    factor_min: float = _FACTOR_MIN
    factor: float = 0.0
    _is_warm: bool = False  # answers have come for longer than a tick
    _is_rising: bool = True
    _best_rate: float = 0.0
    _latency_s: float = 0.0
    _ticks_left: int = _LOOK_EVERY_TICKS

    def __post_init__(self) -> None:
        self.limit = min(self.limit, self.limit_max)
        self.factor = self.factor_min

    def tick(self, seen: Tick) -> int:
        """Note what was seen; return the new limit."""
        self._ticks_left -= 1
        if seen.latency_s and (not self._latency_s or seen.latency_s < self._latency_s or not self._ticks_left):
            self._latency_s = seen.latency_s
        if self._ticks_left <= 0:
            self._ticks_left = _LOOK_EVERY_TICKS
        if not seen.readers_wait:
            self.limit, self._is_rising = self.limit_max, False
        elif self._ticks_left <= _LOOK_TICKS:
            self.limit = min(LIMIT_MIN, self.limit_max)
        elif not self._is_warm:
            self._is_warm = bool(seen.piece_bytes)
            return self.limit  # for part of the tick the first answers were still on their way
        elif self._is_rising and self._may_double(seen):
            self.limit = min(self.limit_max, self.limit * 2)
        elif seen.piece_bytes:
            self._is_rising = False
            self._follow(seen)
        # Without an answer there was nothing to fetch, and what the link gives is as unknown as before.
        self._best_rate = max(seen.rate_bytes_per_s, self._best_rate * (_FADING if seen.piece_bytes else 1.0))
        return self.limit

    def _may_double(self, seen: Tick) -> bool:
        in_flight_bytes = self.limit * seen.piece_bytes + seen.readers_in_flight_bytes
        filling_bytes = seen.rate_bytes_per_s * self._latency_s
        has_gained = seen.rate_bytes_per_s > self._best_rate * (1 + _GAIN_MIN)
        return has_gained and in_flight_bytes <= filling_bytes * _QUEUE_MAX

    def _follow(self, seen: Tick) -> None:
        has_looked = self._ticks_left == _LOOK_EVERY_TICKS  # what that cost says nothing
        has_lost = seen.rate_bytes_per_s < self._best_rate * (1 - _LOSS_MAX) and not has_looked
        factor = self.factor * (_FACTOR_UP if has_lost else _FACTOR_DOWN)
        self.factor = min(_FACTOR_MAX, max(self.factor_min, factor))
        self._best_rate = max(seen.rate_bytes_per_s, self._best_rate)
        filling_bytes = self._best_rate * self._latency_s * self.factor
        limit = round((filling_bytes - seen.readers_in_flight_bytes) / seen.piece_bytes)
        self.limit = min(self.limit_max, max(min(LIMIT_MIN, self.limit_max), limit))
