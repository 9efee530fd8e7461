"""How far to read ahead inside one object. Pure.

A window grows while reads go forward and closes when they jump: after a read of block b that continues the stream,
blocks up to b + window are worth fetching. The first read of an object opens no window unless it starts at block 0.
"""

from __future__ import annotations

from dataclasses import dataclass

# Doubling would take six round trips to reach a window that fills a long pipe, a factor of four takes three.
_GROWTH = 4
# 32 blocks of 4 MiB: 128 MiB, one second of a gigabit link, 50 ms first byte and 90 MB/s a connection filled 30 times.
WINDOW_BLOCKS_MAX = 32


@dataclass(slots=True)
class Stream:
    """What is known of one object's reader. Not shared between objects."""

    position: int = 0  # the block after the last one read
    ahead: int = 0  # the block after the last one asked for
    window: int = 0

    def is_continued_by(self, blocks: range) -> bool:
        """Whether a read of `blocks` starts inside or right after what was read or asked for."""
        return self.ahead > 0 and self.position - 1 <= blocks.start <= self.ahead

    def read(self, blocks: range, block_count: int, *, window_max: int = WINDOW_BLOCKS_MAX) -> range:
        """Note a read of `blocks` in an object of `block_count`; return the blocks to fetch ahead now.

        A read that starts inside or right after what was read or asked for continues the stream.
        """
        is_start = self.ahead == 0 and blocks.start == 0
        if not (is_start or self.is_continued_by(blocks)):
            self.position, self.ahead, self.window = blocks.stop, blocks.stop, 0
            return range(0)
        has_moved = blocks.stop > self.position
        self.position = max(self.position, blocks.stop)
        self.ahead = max(self.ahead, self.position)
        if not has_moved:
            return range(0)
        # Ask again when half of the window is used up: the pipe never runs dry, and requests come in batches.
        if self.ahead - self.position > self.window // 2:
            return range(0)
        self.window = min(window_max, max(1, self.window * _GROWTH))
        start, stop = self.ahead, min(block_count, self.position + self.window)
        if stop <= start:
            return range(0)
        self.ahead = stop
        return range(start, stop)


# Readers of one object at a time that are told apart: the workers of a DataLoader, each in a part of one large file.
STREAMS_MAX = 8


class Streams:
    """All readers of one object. A read goes on with the stream that it continues; one that continues none begins
    another, in the place of the one that was longest without a read."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def read(self, blocks: range, block_count: int) -> range:
        """Note a read; return the blocks to fetch ahead now. See Stream."""
        found = next((stream for stream in reversed(self._streams) if stream.is_continued_by(blocks)), None)
        if found is not None:
            self._streams.remove(found)
        else:
            found = Stream()
            if len(self._streams) >= STREAMS_MAX:
                del self._streams[0]
        self._streams.append(found)
        return found.read(blocks, block_count)
