"""The default: keeps what came first while a data set is read epoch by epoch, and is S3-FIFO otherwise.

Of a data set that is read whole in a new order each epoch, and is larger than the cache, no extent is worth more than
another: each is read once an epoch. Evicting then gains nothing, costs writes, and costs hits too: LRU keeps what was
just read, which is what will not be read for longest (c + (1-c) ln(1-c) hits where keeping anything gives c).

Owns: seeing such a scan, from the intervals after which extents are read again. Leaves to others: the order (s3fifo).
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Iterator

from orchestra.blocks.eviction.s3fifo import S3FifoPolicy

# Reads of a name that follow each other are one: an extent is read in many pieces, by several readers side by side.
# At most so many names count as "just now", and at most an eighth of what is held.
_JUST_NOW_MAX = 32
_JUST_NOW_RATIO = 0.125
# Names remembered with the time of their last read, held or not; 110 bytes each. Above, only a sample of all names is
# looked at, chosen by hash (Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015).
_REMEMBERED_MAX = 32_768
# A data set up to so many times larger than the cache is recognized; a larger one gains at most a 32nd of its reads.
_DATASET_RATIO_MAX = 32
# Weights of the newest read in the running means. A scan must be seen within a hundredth of an epoch, and one odd read
# must not undo it.
_KNOWN_WEIGHT = 1 / 8
_INTERVAL_WEIGHT = 1 / 64
# Squared coefficient of variation of the intervals (variance / mean^2). In an epoch scan they lie around the number of
# names: 0.17, up to 0.6 for a moment where one epoch ends and the next begins. Names drawn with replacement give 1,
# skewed (Zipf) reads more.
_VARIATION_MAX = 0.7
# What the first few intervals may be off, divided by their number: a scan of 1,000 names must be seen within ten.
_FEW_INTERVALS_DOUBT = 3.0
# Most reads must be of names seen before: else this is new data, which deserves a place.
_KNOWN_SHARE_MIN = 0.5
_INTERVALS_MIN = 6
# In an epoch scan a held name is read again after at most twice the number of names, which is at most 2.7 times the
# running mean. What is idle for longer than this many means belongs to a data set that is not read any more.
_DEAD_RATIO = 4.0
# After so many reads without one hit, and so large a part of the cache, what is held is taken for deserted: a new data
# set replaces it in order of use, in its first epoch. One that is still read in between is protected as S3-FIFO does.
_DESERTED_MIN = 64
_DESERTED_RATIO = 0.125

_HASH_RANGE = 1 << 32


class ScanDetector:
    """Tells an epoch scan from other reads. Give it every read, whether of a held name or not."""

    def __init__(self) -> None:
        self._just_now: OrderedDict[str, None] = OrderedDict()
        self._last_read: OrderedDict[int, int] = OrderedDict()  # by hash: a name's last read, the oldest first
        self.time = 0  # reads so far, those of one name that follow each other counted as one
        self._sampled = _HASH_RANGE  # names with a hash below are looked at
        self._known_share = 0.0
        self.interval_mean = 0.0  # after so many reads a name is read again, going by the last ones
        self._interval_square_mean = 0.0
        self._interval_count = 0

    @property
    def is_scan(self) -> bool:
        """Whether names are read again, and none much sooner than the others."""
        if self._interval_count < _INTERVALS_MIN or self._known_share <= _KNOWN_SHARE_MIN:
            return False
        variation_max = _VARIATION_MAX + _FEW_INTERVALS_DOUBT / self._interval_count
        return self._interval_square_mean < (1 + variation_max) * self.interval_mean**2

    @property
    def remembered_count(self) -> int:
        """How many names are remembered."""
        return len(self._last_read)

    def read(self, name: str, held_count: int) -> None:
        """`name` was read, while the cache holds so many names."""
        if self._is_just_now(name, held_count):
            return
        self.time += 1
        mark = zlib.crc32(name.encode() if "." in name else f"{name}.0".encode())
        if mark >= self._sampled:
            return
        last = self._last_read.pop(mark, None)
        self._last_read[mark] = self.time
        self._known_share += _KNOWN_WEIGHT * ((last is not None) - self._known_share)
        if last is not None:
            self._note_interval(self.time - last)
        self._trim(held_count)

    def _is_just_now(self, name: str, held_count: int) -> bool:
        just_now = self._just_now
        if name in just_now:
            just_now.move_to_end(name)
            return True
        just_now[name] = None
        while len(just_now) > max(1, min(_JUST_NOW_MAX, int(held_count * _JUST_NOW_RATIO))):
            just_now.popitem(last=False)
        return False

    def _note_interval(self, interval: int) -> None:
        self._interval_count += 1
        # A plain mean at first, then a running one.
        weight = max(_INTERVAL_WEIGHT, 1 / self._interval_count)
        self.interval_mean += weight * (interval - self.interval_mean)
        self._interval_square_mean += weight * (interval * interval - self._interval_square_mean)

    def _trim(self, held_count: int) -> None:
        """Forget what was last read long ago, and look at fewer names if there are too many to remember."""
        horizon = self.time - _DATASET_RATIO_MAX * max(held_count, 64)
        while next(iter(self._last_read.values())) < horizon:
            self._last_read.popitem(last=False)
        if len(self._last_read) > _REMEMBERED_MAX:
            self._sampled //= 2
            self._last_read = OrderedDict((mark, at) for mark, at in self._last_read.items() if mark < self._sampled)
        elif self._sampled < _HASH_RANGE and len(self._last_read) < _REMEMBERED_MAX // 8:
            self._sampled *= 2  # names that come in now are new to us, though not to the cache: one epoch long


class AutoPolicy(S3FifoPolicy):
    """S3-FIFO that admits nothing while there is a scan, unless in the place of what nobody reads any more."""

    def __init__(self) -> None:
        super().__init__()
        self._detector = ScanDetector()
        # Held names with the time of their last read (or arrival), the longest unread first.
        self._last_use: OrderedDict[str, int] = OrderedDict()
        self._last_hit = 0

    @property
    def is_scan(self) -> bool:
        """Whether nothing new is admitted just now."""
        return self._detector.is_scan

    @property
    def remembered_count(self) -> int:
        """How many names are remembered, held or not."""
        return self._detector.remembered_count

    def add(self, name: str) -> None:
        """See EvictionPolicy."""
        super().add(name)
        self._use(name)

    def touch(self, name: str) -> None:
        """See EvictionPolicy."""
        self._detector.read(name, len(self))
        if name in self._last_use:
            if self.reads_of(name) >= 0:  # not the read that it came for
                self._last_hit = self._detector.time
            self._use(name)
        super().touch(name)

    def remove(self, name: str) -> None:
        """See EvictionPolicy."""
        self._last_use.pop(name, None)
        super().remove(name)

    def evict(self, name: str) -> None:
        """See EvictionPolicy."""
        if self._is_deserted() or self._is_dead(name):
            self.remove(name)
        else:
            super().evict(name)

    def admits(self, name: str) -> bool:
        """See EvictionPolicy."""
        if not self._detector.is_scan:
            return True
        oldest = next(iter(self._last_use), None)
        return oldest is not None and self._is_dead(oldest)

    def victims(self) -> Iterator[str]:
        """See EvictionPolicy."""
        if self._is_deserted():
            yield from self._last_use
            return
        dead: set[str] = set()
        for name in self._last_use:
            if not self._is_dead(name):
                break
            dead.add(name)
            yield name
        yield from (name for name in super().victims() if name not in dead)

    def _use(self, name: str) -> None:
        self._last_use[name] = self._detector.time
        self._last_use.move_to_end(name)

    def _is_deserted(self) -> bool:
        """Whether no read of late found what it wanted here: then what is held has no right to stay."""
        return self._detector.time - self._last_hit > max(_DESERTED_MIN, len(self) * _DESERTED_RATIO)

    def _is_dead(self, name: str) -> bool:
        """Whether a held name should have been read again long ago, going by the others."""
        last_use = self._last_use.get(name)
        mean = self._detector.interval_mean
        return last_use is not None and 0 < _DEAD_RATIO * mean < self._detector.time - last_use
