"""Which requests bring the missing blocks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Neighbouring small blocks share a request up to this size. Larger blocks go alone: a 4 MiB range is already past the
# point where the first byte's latency matters, and several side by side fill the link (S3 gives about 90 MB/s each).
PART_SIZE_BYTES = 4 * 1024 * 1024


def plan_parts(
    missing: Iterable[int], *, block_size_bytes: int, part_size_bytes: int = PART_SIZE_BYTES
) -> Iterator[range]:
    """Group ascending block indexes into runs of neighbours of at most a part (at least one block) each.

    [0, 1, 2, 7] with 2-block parts -> 0..2, 2..3, 7..8 as half-open ranges.
    """
    count_max = max(1, part_size_bytes // block_size_bytes)
    start = stop = -1
    for index in missing:
        if index == stop and stop - start < count_max:
            stop += 1
            continue
        if start >= 0:
            yield range(start, stop)
        start, stop = index, index + 1
    if start >= 0:
        yield range(start, stop)
