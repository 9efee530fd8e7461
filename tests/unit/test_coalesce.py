"""Which requests bring the missing blocks: neighbours together up to a part, nothing twice, nothing else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.fetch.coalesce import PART_SIZE_BYTES, plan_parts
from orchestra.units import KIB, MIB


def plan(missing: list[int], block: int, part: int) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in plan_parts(missing, block_size_bytes=block, part_size_bytes=part)]


@pytest.mark.parametrize(
    ("missing", "parts"),
    [
        ([], []),
        ([0], [(0, 1)]),
        ([0, 1, 2, 7], [(0, 2), (2, 3), (7, 8)]),
        ([5, 6], [(5, 7)]),
        ([1, 3, 5], [(1, 2), (3, 4), (5, 6)]),
    ],
)
def test_neighbours_share_a_request(missing: list[int], parts: list[tuple[int, int]]) -> None:
    """Two-block parts: neighbours go together, others alone."""
    assert plan(missing, 4096, 8192) == parts


def test_a_large_block_goes_alone() -> None:
    """A block of a part's size or more is a request of its own."""
    assert plan([0, 1, 2], 4 * MIB, PART_SIZE_BYTES) == [(0, 1), (1, 2), (2, 3)]
    assert plan([0, 1], 16 * MIB, PART_SIZE_BYTES) == [(0, 1), (1, 2)]


@given(st.sets(st.integers(0, 3000), max_size=200), st.sampled_from([4 * KIB, 64 * KIB, 4 * MIB, 8 * MIB]))
def test_parts_hold_each_missing_block_once(missing: set[int], block: int) -> None:
    """All requests together bring exactly what is missing; none is over the limit, and no two could have been one."""
    parts = list(plan_parts(sorted(missing), block_size_bytes=block))
    assert [index for part in parts for index in part] == sorted(missing)
    limit = max(1, PART_SIZE_BYTES // block)
    assert all(0 < len(part) <= limit for part in parts)
    for one, other in itertools.pairwise(parts):
        assert one.stop < other.start or len(one) == limit
