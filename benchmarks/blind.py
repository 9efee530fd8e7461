"""What is the most that fetching ahead can hide in overlap.py for somebody who does not know the order?

A computed training on a perfect node: nothing but the link and the latency takes time. What readers ask for goes before
everything else, from one byte to the next; every other moment of the link brings some file that is not here yet,
without latency. Readers are a DataLoader's workers: each takes a batch file by file, some batches ahead of the
training, which takes them in order. Owns: that sum. Leaves to others: measuring (overlap.py).
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections import deque
from dataclasses import dataclass, field

# Batches that a DataLoader asks of each worker ahead.
PREFETCH_FACTOR = 2
_ORDERS = 5


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and on what."""

    files: int
    workers: int
    batch: int
    latency_s: float
    io_s: float  # all files over the link
    compute_s: float  # all batches


@dataclass(slots=True)
class _Training:
    """One epoch in one order."""

    setting: Setting
    order: list[int]  # file by position
    unfetched: list[int]  # in the order in which they are fetched ahead
    here: set[int] = field(default_factory=set)
    asked: set[int] = field(default_factory=set)
    busy: deque[tuple[float, float]] = field(default_factory=deque)  # of the link, for readers
    free_at: float = 0.0
    looked_at: float = 0.0
    idle_s: float = 0.0  # of the link, not used yet

    def file_s(self) -> float:
        return self.setting.io_s / self.setting.files

    def look(self, now: float) -> None:
        """Have come what was fetched ahead in the moments that readers left until now."""
        at = self.looked_at
        while self.busy and self.busy[0][0] < now:
            begin, end = self.busy[0]
            self.idle_s += max(0.0, begin - at)
            at = max(at, min(end, now))
            if end > now:
                break
            self.busy.popleft()
        self.idle_s += max(0.0, now - at)
        self.looked_at = now
        while self.idle_s >= self.file_s() and self.unfetched:
            file = self.unfetched.pop()
            if file not in self.here and file not in self.asked:
                self.here.add(file)
                self.idle_s -= self.file_s()

    def read(self, file: int, now: float) -> float:
        """A worker reads a file; return when it has it."""
        self.look(now)
        if file in self.here:
            return now
        begin = max(now + self.setting.latency_s, self.free_at)
        self.free_at = begin + self.file_s()
        self.busy.append((begin, self.free_at))
        self.asked.add(file)
        return self.free_at

    def seconds(self) -> float:
        """How long the epoch takes."""
        setting = self.setting
        batches = [self.order[at : at + setting.batch] for at in range(0, setting.files, setting.batch)]
        ready = [0.0] * len(batches)
        waiting = [deque(range(worker, len(batches), setting.workers)) for worker in range(setting.workers)]
        taken = [0.0] * len(batches)  # when the training took it, once it has
        events = [(0.0, who, 0) for who, given in enumerate(waiting) if given]  # when, who, files of its batch it has
        trained, count = 0.0, 0
        while count < len(batches):
            now, worker, done = heapq.heappop(events)
            number = waiting[worker][0]
            if done < len(batches[number]):
                heapq.heappush(events, (self.read(batches[number][done], now), worker, done + 1))
                continue
            waiting[worker].popleft()
            ready[number] = now
            while count < len(batches) and ready[count]:
                taken[count] = max(trained, ready[count])
                trained = taken[count] + setting.compute_s * len(batches[count]) / setting.files
                count += 1
            self._go_on(events, waiting, taken, count, now)
        return trained

    def _go_on(
        self,
        events: list[tuple[float, int, int]],
        waiting: list[deque[int]],
        taken: list[float],
        count: int,
        now: float,
    ) -> None:
        """Have every idle worker begin its next batch if it was given: when one PREFETCH_FACTOR before was taken."""
        at_work = {worker for _, worker, _ in events}
        ahead = PREFETCH_FACTOR * self.setting.workers
        for worker, numbers in enumerate(waiting):
            if worker not in at_work and numbers and numbers[0] < count + ahead:
                given = taken[numbers[0] - ahead] if numbers[0] >= ahead else 0.0
                heapq.heappush(events, (max(now, given), worker, 0))


def blind_limit(setting: Setting) -> float:
    """Return max(T_compute, T_io) / T_epoch at most, as the mean of some orders."""
    seconds = []
    for seed in range(_ORDERS):
        chance = random.Random(seed)
        order, unfetched = list(range(setting.files)), list(range(setting.files))
        chance.shuffle(order)
        chance.shuffle(unfetched)
        seconds.append(_Training(setting, order, unfetched).seconds())
    return max(setting.compute_s, setting.io_s) / statistics.fmean(seconds)
