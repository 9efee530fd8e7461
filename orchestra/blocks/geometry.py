"""Block and extent arithmetic. Pure.

A block is the unit of fetch and checksum, an extent a run of blocks in one local file. An object of at most one block
is small: its file holds the whole object and needs no presence map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestra.errors import ConfigError
from orchestra.units import GIB, KIB
from orchestra.values import ByteRange

BLOCK_SIZE_MIN_BYTES = 4 * KIB  # a page: O_DIRECT and mmap need whole ones
BLOCK_SIZE_MAX_BYTES = 1 * GIB


@dataclass(frozen=True, slots=True)
class Geometry:
    """How objects are cut. Fixed for the life of a cache directory."""

    block_size_bytes: int
    extent_size_bytes: int

    def __post_init__(self) -> None:
        block, extent = self.block_size_bytes, self.extent_size_bytes
        if not BLOCK_SIZE_MIN_BYTES <= block <= BLOCK_SIZE_MAX_BYTES or block & (block - 1):
            raise ConfigError(f"cache.block_size {block} must be a power of two from 4KiB to 1GiB")
        if extent % block or not block <= extent <= 1024 * block:
            raise ConfigError(
                f"cache.extent_size {extent} must be a multiple of cache.block_size {block}, at most 1024 of them"
            )

    @property
    def blocks_per_extent(self) -> int:
        """Blocks in a full extent."""
        return self.extent_size_bytes // self.block_size_bytes

    def is_small(self, size_bytes: int) -> bool:
        """Whether the object is one block at most."""
        return size_bytes <= self.block_size_bytes

    def block_count(self, size_bytes: int) -> int:
        """Blocks of an object; 0 for an empty one."""
        return -(-size_bytes // self.block_size_bytes)

    def extent_count(self, size_bytes: int) -> int:
        """Extents of an object; 0 for an empty one."""
        return -(-size_bytes // self.extent_size_bytes)

    def extent_length(self, size_bytes: int, extent_index: int) -> int:
        """Bytes of the object in that extent."""
        return min(self.extent_size_bytes, size_bytes - extent_index * self.extent_size_bytes)

    def block_range(self, size_bytes: int, block_index: int) -> ByteRange:
        """The block's bytes within the object."""
        start = block_index * self.block_size_bytes
        return ByteRange(start, min(start + self.block_size_bytes, size_bytes))

    def blocks_of(self, byte_range: ByteRange) -> range:
        """Indexes of the blocks that the range touches."""
        if not byte_range.length:
            return range(0)
        return range(byte_range.start // self.block_size_bytes, -(-byte_range.stop // self.block_size_bytes))

    def extents_of(self, blocks: range) -> Iterator[tuple[int, range]]:
        """Yield (extent index, the blocks of `blocks` in it)."""
        per_extent = self.blocks_per_extent
        start = blocks.start
        while start < blocks.stop:
            index = start // per_extent
            stop = min(blocks.stop, (index + 1) * per_extent)
            yield index, range(start, stop)
            start = stop
