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
LIMIT_MIN = 2
LIMIT_AT_FIRST = 4
# In flight over what fills the link: a quarter more hides the time between an answer and the next request.
_FACTOR_MIN = 1.25
_FACTOR_MAX = 8.0
_FACTOR_UP = 1.5
_FACTOR_DOWN = 0.95
# What the rate may be below the best of late.
_LOSS_MAX = 0.1
# What twice as much in flight must bring at the beginning, to be doubled once more.
_GAIN_MIN = 0.25
# The best rate fades by this a tick: a store that has become slower is believed after some seconds.
_FADING = 0.98
# Ticks between two looks at the latency, each of which costs a wide link two ticks' worth: 3 %. In the first of them
# what was in flight before arrives, the second counts.
_LOOK_EVERY_TICKS = 60
_LOOK_TICKS = 2


@dataclass(frozen=True, slots=True)
class Tick:
    """What was measured since the last tick."""

    rate_bytes_per_s: float  # of all that was fetched
    latency_s: float  # the quicker answers': their lower quartile; 0 if none came
    piece_bytes: float  # of the load's answers, on average; 0 if none came
    readers_in_flight_bytes: int
    readers_wait: bool


@dataclass(slots=True)
class Squeeze:
    """The limit of one loader, in pieces. `limit_max` is what its store takes at most."""

    limit_max: int
    limit: int = 0
    factor: float = _FACTOR_MIN
    _is_rising: bool = True
    _best_rate: float = 0.0
    _latency_s: float = 0.0
    _ticks_left: int = _LOOK_EVERY_TICKS

    def __post_init__(self) -> None:
        self.limit = min(LIMIT_AT_FIRST, self.limit_max)

    def tick(self, seen: Tick) -> int:
        """Note what was seen; return the new limit."""
        has_gained = seen.rate_bytes_per_s > self._best_rate * (1 + _GAIN_MIN)
        self._best_rate = max(seen.rate_bytes_per_s, self._best_rate * _FADING)
        self._ticks_left -= 1
        if seen.latency_s and (not self._latency_s or seen.latency_s < self._latency_s or not self._ticks_left):
            self._latency_s = seen.latency_s
        if self._ticks_left <= 0:
            self._ticks_left = _LOOK_EVERY_TICKS
        if not seen.readers_wait:
            self.limit, self._is_rising = self.limit_max, False
        elif self._ticks_left <= _LOOK_TICKS:
            self.limit = min(LIMIT_MIN, self.limit_max)
        elif self._is_rising and has_gained:
            self.limit = min(self.limit_max, self.limit * 2)
        elif seen.piece_bytes:
            self._is_rising = False
            self._follow(seen)
        return self.limit

    def _follow(self, seen: Tick) -> None:
        has_looked = self._ticks_left == _LOOK_EVERY_TICKS  # what that cost says nothing
        has_lost = seen.rate_bytes_per_s < self._best_rate * (1 - _LOSS_MAX) and not has_looked
        factor = self.factor * (_FACTOR_UP if has_lost else _FACTOR_DOWN)
        self.factor = min(_FACTOR_MAX, max(_FACTOR_MIN, factor))
        filling_bytes = self._best_rate * self._latency_s * self.factor
        limit = round((filling_bytes - seen.readers_in_flight_bytes) / seen.piece_bytes)
        self.limit = min(self.limit_max, max(min(LIMIT_MIN, self.limit_max), limit))
