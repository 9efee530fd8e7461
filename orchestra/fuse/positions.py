"""Where the readers of directories are, kept for the worker that goes on when another has died or is busy.

Owns: one place a handle in the shared memory: the offset and the name that were sent last. Leaves to others: the view.
A worker that has no view for a handle takes the present listing, and finds the place in it by the name: names are
sorted, so nothing that was there all the time is sent twice or left out.
"""

from __future__ import annotations

import os
from bisect import bisect_right

from orchestra.client.contract import DirectoryView
from orchestra.fuse.shared import POSITION_COUNT, POSITION_WORDS, POSITIONS, WORD_BYTES, SharedMemory

# "." and ".." come before the view's entries.
DOTS = 2


class Positions:
    """The table of places. Handles share a cell when their numbers are 1,024 apart; the later one has it."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory

    def put(self, fh: int, offset: int, name: bytes) -> None:
        """Note that `name` was sent last, and that `offset` comes next."""
        put, cell = self._memory.put, _cell_of(fh)
        put(cell, 0)  # a death in between leaves no place rather than a wrong one
        put(cell + 1, offset)
        put(cell + 2, len(name))
        at = (cell + 3) * WORD_BYTES
        self._memory.bytes[at : at + len(name)] = name
        put(cell, fh)

    def shift(self, fh: int, view: DirectoryView) -> int:
        """Return how much further on a reader is in `view` than its offset says; 0 if its place is not known."""
        words, cell = self._memory.words, _cell_of(fh)
        offset = words[cell + 1]
        if words[cell] != fh or offset <= DOTS:
            return 0
        at = (cell + 3) * WORD_BYTES
        name = os.fsdecode(self._memory.bytes[at : at + words[cell + 2]])
        following = bisect_right(view, name, key=lambda entry: entry.name)
        return int(following) + DOTS - offset


def _cell_of(fh: int) -> int:
    return POSITIONS + fh % POSITION_COUNT * POSITION_WORDS
