"""What will be read in which order, and what follows from it now. Pure: values in, values out.

A plan is one reader's order (a rank's share): epoch after epoch of sample indexes, laid end to end on one line of
steps. A reader draws steps; what is drawn is read soon after, by workers that are some batches behind. The standing of
a plan is three marks on the line:

    done ....... position ............ frontier .................. known
    (read)  drawn, being read   fetched or being fetched   not looked at yet

Owns: the line of steps, how far to look ahead, whose turn it is. Leaves to others: fetching (planned), the paths
(path_table), eviction (blocks, which is told next uses).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from orchestra.errors import UsageError

# Samples of one message: 4 MiB of 32-bit indexes.
ORDER_PART_SAMPLES = 1 << 20
# How far the next epoch is known in advance; a shuffled million is looked ahead of for minutes at any rate.
NEXT_SAMPLES_MAX = 1 << 20
# Steps between position and frontier: what a plan keeps in memory for each is 200 bytes, and 65,536 samples are 30 s of
# the fastest store's small objects (2,500/s at 50 ms).
AHEAD_STEPS_MAX = 1 << 16
# A cache that is full gives a plan this much of itself to be ahead with: what was fetched too early took the place of
# something that would have been read again, so this share is what the hit ratio can lose.
_AHEAD_CAPACITY_RATIO = 1 / 64
# ... but two seconds of reading, at the rate at which the reader goes, are worth more than that, up to a 16th: that is
# 40 round trips of 50 ms, and what a reader that is bound by the store needs in flight is one.
_AHEAD_S = 2.0
_AHEAD_CAPACITY_RATIO_MAX = 1 / 16
# Files looked at before any file's size is known.
_BLIND_STEPS_MAX = 4
# A new observation of the rate counts for this much.
_RATE_WEIGHT = 0.3

INDEX_TYPE = "I"
# Indexes of one chunk of a set: half a kilobyte of bits.
_CHUNK_BITS = 12
_CHUNK_MASK = (1 << _CHUNK_BITS) - 1
_NOWHERE = 0xFFFFFFFF  # no offset: an epoch has at most 2**26 samples
assert array(INDEX_TYPE).itemsize == 4, "indexes travel as 32 bits"


@dataclass(slots=True)
class _Epoch:
    number: int
    base: int  # the step of its first sample
    total: int  # samples in it, known or not yet
    samples: array[int]
    # Offset by sample, for as many samples as had come when it was made.
    offsets: array[int] | None = None
    offsets_of_count: int = 0

    @property
    def known_stop(self) -> int:
        return self.base + len(self.samples)

    def offset_of(self, index: int) -> int | None:
        """Where that sample comes first in this epoch, None if not known."""
        offsets = self.offsets
        if offsets is None or self.offsets_of_count != len(self.samples):
            offsets = self.offsets = offsets_of(self.samples)
            self.offsets_of_count = len(self.samples)
        offset = offsets[index] if index < len(offsets) else _NOWHERE
        return None if offset == _NOWHERE else offset


class Timeline:
    """Epochs laid end to end. Steps only grow; an epoch that was replaced begins where it began before."""

    def __init__(self) -> None:
        self._epochs: list[_Epoch] = []

    @property
    def known_stop(self) -> int:
        """The first step that is not known: the end of the first epoch that is not whole, or of the last."""
        for epoch in self._epochs:
            if len(epoch.samples) < epoch.total:
                return epoch.known_stop
        return self._epochs[-1].known_stop if self._epochs else 0

    @property
    def first_step(self) -> int:
        """The first step that is still kept."""
        return self._epochs[0].base if self._epochs else 0

    def put(self, number: int, first: int, total: int, samples: array[int]) -> bool:
        """Add samples `first`... of an epoch of `total`; True if what was known before changed.

        `first` 0 begins the epoch anew (and drops later ones, unless the samples are the ones that were known);
        otherwise it must go on where the last part ended. Raises UsageError.
        """
        if not 0 <= first <= first + len(samples) <= total:
            raise UsageError(f"samples [{first}, {first + len(samples)}) of an epoch of {total}")
        epoch = self._find(number)
        if epoch is not None and first == len(epoch.samples) and epoch.total == total:
            epoch.samples.extend(samples)
            return False
        if first:
            known = len(epoch.samples) if epoch is not None else 0
            raise UsageError(f"epoch {number} is known up to sample {known}, and the next part begins at {first}")
        if epoch is not None and epoch.total == total and epoch.samples[: len(samples)] == samples:
            return False
        return self._begin(number, total, samples)

    def _begin(self, number: int, total: int, samples: array[int]) -> bool:
        kept = [epoch for epoch in self._epochs if epoch.number < number]
        changed = len(kept) < len(self._epochs)
        base = kept[-1].base + kept[-1].total if kept else self.first_step
        self._epochs = [*kept, _Epoch(number, base, total, samples)]
        return changed

    def step_of(self, number: int, offset: int) -> int | None:
        """The step of that sample of that epoch, None if nothing is known of the epoch."""
        epoch = self._find(number)
        return None if epoch is None else epoch.base + min(offset, epoch.total)

    def index_at(self, step: int) -> int | None:
        """The sample at that step, None if it is not known."""
        for epoch in self._epochs:
            if epoch.base <= step < epoch.known_stop:
                return epoch.samples[step - epoch.base]
        return None

    def length_of(self, number: int) -> int:
        """The samples of that epoch, 0 if nothing is known of it."""
        epoch = self._find(number)
        return 0 if epoch is None else epoch.total

    def use_after(self, step: int, index: int) -> int | None:
        """The step at which that sample comes first in a known epoch that begins after `step`, None if not known."""
        for epoch in self._epochs:
            if epoch.base > step and (offset := epoch.offset_of(index)) is not None:
                return epoch.base + offset
        return None

    def forget_before(self, step: int) -> None:
        """Drop epochs that lie wholly before `step`, but never the last."""
        while len(self._epochs) > 1 and self._epochs[0].base + self._epochs[0].total <= step:
            del self._epochs[0]

    def _find(self, number: int) -> _Epoch | None:
        return next((epoch for epoch in self._epochs if epoch.number == number), None)


class IndexSet:
    """A set of sample indexes, a bit each where any are: ten million take 1.3 MB, a few cost little, and clearing is
    quick."""

    __slots__ = ("_chunks",)

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}

    def __contains__(self, index: int) -> bool:
        chunk = self._chunks.get(index >> _CHUNK_BITS)
        return chunk is not None and bool(chunk[(index & _CHUNK_MASK) >> 3] & 1 << (index & 7))

    def add(self, index: int) -> None:
        """Add one."""
        chunk = self._chunks.get(index >> _CHUNK_BITS)
        if chunk is None:
            chunk = self._chunks[index >> _CHUNK_BITS] = bytearray((_CHUNK_MASK + 1) // 8)
        chunk[(index & _CHUNK_MASK) >> 3] |= 1 << (index & 7)

    def clear(self) -> None:
        """Remove all."""
        self._chunks.clear()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one plan is."""

    position: int  # the step that the reader draws next
    frontier: int  # the first step that was not looked at
    known_stop: int
    ahead_bytes: int  # fetched or being fetched for steps from `position` on
    in_flight: int  # steps that are being looked at or fetched
    size_mean_bytes: float  # of the files looked at so far, at least 1; 0: none yet


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """What bounds one plan now."""

    ahead_bytes_max: int
    in_flight_max: int
    ahead_steps_max: int = AHEAD_STEPS_MAX


def steps_to_look_at(standing: Standing, limits: PlanLimits) -> range:
    """Return the steps to fetch now, the next ones first; empty while the plan is as far ahead as it may be.

    A file larger than all that may be ahead is fetched when nothing else is ahead.
    """
    stop = min(standing.known_stop, standing.position + limits.ahead_steps_max)
    count = limits.in_flight_max - standing.in_flight
    if standing.size_mean_bytes >= 1:
        fitting = max(0, int((limits.ahead_bytes_max - standing.ahead_bytes) / standing.size_mean_bytes))
        count = min(count, max(fitting, int(standing.ahead_bytes == 0)))
    else:
        count = min(count, _BLIND_STEPS_MAX - standing.in_flight)
    return range(standing.frontier, max(standing.frontier, min(stop, standing.frontier + max(0, count))))


def ahead_limit_bytes(*, room_bytes: int, ahead_bytes: int, capacity_bytes: int, rate_bytes_per_s: float) -> int:
    """Return how many bytes all plans of a node may be ahead of their readers.

    `room_bytes` is what can be kept without evicting anything: that is free, and used first. Otherwise two seconds of
    reading, at least a 64th of the cache, at most a 16th of it.
    """
    wanted = max(int(capacity_bytes * _AHEAD_CAPACITY_RATIO), int(rate_bytes_per_s * _AHEAD_S))
    return max(min(wanted, int(capacity_bytes * _AHEAD_CAPACITY_RATIO_MAX)), ahead_bytes + room_bytes)


def next_rate(rate: float, amount: float, seconds: float) -> float:
    """Return the running mean after another `amount` in `seconds`; the first one counts whole."""
    if seconds <= 0:
        return rate
    now = amount / seconds
    return now if rate <= 0 else rate + _RATE_WEIGHT * (now - rate)


def most_urgent(distances: Iterable[int]) -> int:
    """Return which plan to fetch for: the one whose frontier is nearest to its reader. (Readers of one job go at one
    pace: the rank that would wait first makes all wait.)"""
    return min(enumerate(distances), key=lambda item: item[1])[0]


def offsets_of(samples: array[int]) -> array[int]:
    """Return the first offset of each sample by its index: 4 bytes a sample, 60 ns to make."""
    offsets = array(INDEX_TYPE, [_NOWHERE]) * (max(samples, default=-1) + 1)
    for offset in range(len(samples) - 1, -1, -1):
        offsets[samples[offset]] = offset
    return offsets


def packed_samples(samples: array[int]) -> bytes:
    """Return sample indexes as they travel: 32 bits each, little-endian."""
    if sys.byteorder == "big":
        samples = samples[:]
        samples.byteswap()
    return samples.tobytes()


def unpacked_samples(raw: bytes) -> array[int]:
    """Return what `packed_samples` packed. Raises UsageError for a body that was cut."""
    samples = array(INDEX_TYPE)
    try:
        samples.frombytes(raw)
    except ValueError as error:
        raise UsageError(f"an order of {len(raw)} bytes is not a whole number of samples") from error
    if sys.byteorder == "big":
        samples.byteswap()
    return samples
