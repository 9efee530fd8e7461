"""How much may be in flight for bytes that nobody waits for yet. Pure.

While no reader misses anything: all that is allowed. While readers do, the least that loses no throughput: a request of
a reader waits behind whatever fills the store's link, and half as much in flight often fills it just as well. Latency
is not looked at, as it differs tenfold between two requests of one store anyway; what is looked at is the rate of all
bytes together, once per tick. A step down that costs more than a tenth of it is taken back and not tried again soon.

A load that begins while readers wait begins small and doubles as long as that brings something: 62 MB asked for at once
would keep the first batches of an epoch waiting for a second on a link of 50 MB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

# Below this the rate cannot be told from noise, and one request more or less is a quarter of it.
LIMIT_MIN = 4
LIMIT_AT_FIRST = 16
# What twice as much in flight must bring at the beginning.
_GAIN_MIN = 0.25
# What a step down may cost.
_LOSS_MAX = 0.1
# Ticks before a step that was taken back is tried again: at 0.25 s a tick a trial that halves the rate costs 3 %.
_PATIENCE_TICKS = 16
# Ticks that a step down is given to show: what was in flight before it still arrives.
_SETTLING_TICKS = 1
# The best rate fades by this a tick: a store that has become slower is believed after some seconds.
_FADING = 0.98


@dataclass(slots=True)
class Squeeze:
    """The limit of one loader. `limit_max` is what its store takes at most."""

    limit_max: int
    limit: int = 0
    _is_rising: bool = True
    _best_rate: float = 0.0
    _ticks_left: int = 0

    def __post_init__(self) -> None:
        self.limit = min(LIMIT_AT_FIRST, self.limit_max)

    def tick(self, rate: float, *, readers_wait: bool) -> int:
        """Note the rate (bytes per second, of all that was fetched) since the last tick; return the new limit."""
        has_gained = rate > self._best_rate * (1 + _GAIN_MIN)
        self._best_rate = max(rate, self._best_rate * _FADING)
        if not readers_wait:
            self.limit, self._ticks_left, self._is_rising = self.limit_max, 0, False
        elif self._is_rising and has_gained:
            self.limit = min(self.limit_max, self.limit * 2)
        elif self._is_rising:
            self._is_rising = False
        elif rate < self._best_rate * (1 - _LOSS_MAX):
            self.limit, self._ticks_left = min(self.limit_max, self.limit * 2), _PATIENCE_TICKS
        elif self._ticks_left:
            self._ticks_left -= 1
        elif self.limit > LIMIT_MIN:
            self.limit, self._ticks_left = max(LIMIT_MIN, self.limit // 2), _SETTLING_TICKS
        return self.limit
