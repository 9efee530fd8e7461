"""The shares of a load that all nodes do together: with one another they are the whole, as often as was asked for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.blocks.geometry import Geometry
from orchestra.cluster.ring import Ring, RingNode, extent_key, ring_of
from orchestra.config import MountConfig
from orchestra.daemon.jobs.share import Share
from orchestra.engine.engine import Wanted
from orchestra.engine.mounted import OpenedMount
from orchestra.prefetch.tree import TreeFile
from orchestra.values import ByteRange, ObjectInfo
from tests.support.versioned_store import VersionedStore

GEOMETRY = Geometry(4096, 16384)
MOUNT = OpenedMount(MountConfig("/data", ("memory://x",)), "config", VersionedStore())


def tree_file(size_bytes: int, name: str = "a") -> TreeFile:
    info = ObjectInfo(name, size_bytes, 0, "v1")
    return TreeFile(f"/data/{name}", Wanted(MOUNT, info, ByteRange(0, size_bytes)))


def shares(ring: Ring, replicas: int) -> list[Share]:
    return [Share(ring, node.node_id, GEOMETRY, lambda _: replicas) for node in ring.nodes]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 200_000), nodes=st.integers(1, 9), replicas=st.integers(1, 4), name=st.integers(0, 999))
def test_all_shares_are_the_file_as_often_as_it_has_owners(size: int, nodes: int, replicas: int, name: int) -> None:
    """Every byte is in min(replicas, nodes) shares, in pieces that begin and end with extents; one share counts it."""
    ring = ring_of(0, [RingNode(f"node-{number}", 1 + number) for number in range(nodes)])
    file = tree_file(size, str(name))
    times: Counter[int] = Counter()
    counted = 0
    for share in shares(ring, replicas):
        for part in share.of(file):
            span = part.wanted.byte_range
            assert span.start % GEOMETRY.extent_size_bytes == 0
            assert span.length == GEOMETRY.extent_length(size, span.start // GEOMETRY.extent_size_bytes)
            owners = ring.owners(extent_key(part.wanted.object_id, span.start // GEOMETRY.extent_size_bytes), replicas)
            assert share.node_id in {owner.node_id for owner in owners}
            times[span.start] += 1
            counted += share.counts(part)
    assert times == dict.fromkeys(range(0, size, GEOMETRY.extent_size_bytes), min(replicas, nodes))
    assert counted == 1


def test_an_empty_file_is_one_nodes_alone() -> None:
    """It is counted once, whatever the replicas."""
    ring = ring_of(0, [RingNode(f"node-{number}", 1) for number in range(4)])
    parts = [(share, part) for share in shares(ring, 3) for part in share.of(tree_file(0))]
    assert [part.wanted.byte_range for _, part in parts] == [ByteRange(0, 0)]
    assert [share.counts(part) for share, part in parts] == [True]


@pytest.mark.parametrize("body", [{}, {"ring": []}, {"ring": [["a"]]}, {"ring": [["a", 0]]}, {"ring": [["a", 1]] * 2}])
def test_a_ring_that_is_none_is_refused(body: dict[str, Any]) -> None:
    """What another node sends is checked as a user's input is."""
    from orchestra.daemon.jobs.parts import _ring_of
    from orchestra.errors import UsageError

    with pytest.raises(UsageError, match="ring"):
        _ring_of(body.get("ring"))
