"""Whom a node of a cluster asks for an extent, in which order: copies, owners, those that stand in for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestra.cluster.peer_wire import ExtentPart
from orchestra.fetch.shared import SharedFetcher, SharedPart
from orchestra.values import ByteRange, ObjectId, ObjectInfo

NAME = ObjectId("s3://bucket/", "large", '"v1"')
WIRE = ExtentPart(NAME, NAME.digest(), 4096, 0, ByteRange(0, 4096))
INFO = ObjectInfo("large", 4096, 0, '"v1"')
# The ring's order for the one extent here.
ORDER = ("o1", "o2", "n", "a", "b")


@dataclass
class Nodes:
    """What is asked of the ring and of other nodes here; those that are `full` keep nothing and give nothing."""

    node_id: str
    full: tuple[str, ...] = ()
    holding: tuple[str, ...] = ORDER
    asked: list[str] = field(default_factory=list)
    heard: Any = None

    def owners(self, digest: str, extent_index: int, replicas: int) -> tuple[str, ...]:
        return ORDER[:replicas]

    def is_no_keeper(self, node_id: str) -> bool:
        return node_id in self.full

    async def read(self, part: ExtentPart, node_ids: Sequence[str]) -> bytes | None:
        for node_id in node_ids:
            self.asked.append(node_id)
            if node_id in self.holding and node_id not in self.full:
                return b"it"
        return None

    async def read_copy(self, part: ExtentPart, node_id: str, owners: Sequence[str]) -> bytes | None:
        return await self.read(part, (node_id,))

    @property
    def stalls(self) -> Nodes:
        return self

    def now_ns(self) -> int:
        return 0

    def shared(self, ufs_fallback: str = "allow") -> SharedFetcher:
        nodes: Any = self
        return SharedFetcher(nodes, nodes, nodes, nodes, ufs_fallback=ufs_fallback)


def part_of(replicas: int, *, is_kept: bool = True) -> SharedPart:
    store: Any = None
    return SharedPart(store, INFO, WIRE, ByteRange(0, 4096), replicas, is_for_peer=False, is_kept=is_kept)


async def asked_by(nodes: Nodes, replicas: int, *, is_kept: bool = True) -> list[str]:
    """Whom that node asks to read the extent through, one after another."""
    shared, part = nodes.shared(), part_of(replicas, is_kept=is_kept)
    owners = shared.asked_owners(part) if is_kept else shared.other_owners(part)
    await shared.from_peers(part, owners)
    return nodes.asked


@pytest.mark.parametrize(
    ("node_id", "replicas", "full", "is_kept", "asked"),
    [
        ("b", 1, ("o1",), True, ["o1", "o2"]),
        ("b", 1, ("o1", "o2"), True, ["o1", "n"]),
        ("b", 1, ("o1", "o2", "n"), True, ["o1"]),
        ("n", 1, ("o1",), True, ["o1", "o2"]),
        ("o2", 1, ("o1",), True, ["o1"]),
        ("o2", 1, ("o1",), False, ["o1", "n"]),
        ("o2", 2, ("o1",), True, ["o1"]),
        ("o2", 2, ("o1",), False, ["o1", "n"]),
        ("b", 2, ("o1", "o2"), True, ["o1", "o2", "n"]),
        ("b", 2, ("o1",), True, ["o1", "o2"]),
    ],
    ids=[
        "the first behind the owner",
        "the second, where that is full as well",
        "nobody, where both are",
        "the second asks the first",
        "the first asks nobody",
        "unless it keeps nothing",
        "an owner that can keep it asks nobody behind itself",
        "unless it cannot",
        "the first behind all owners",
        "nobody as long as an owner keeps it",
    ],
)
async def test_who_stands_in_for_owners_that_keep_nothing(
    node_id: str, replicas: int, full: tuple[str, ...], is_kept: bool, asked: list[str]
) -> None:
    """All nodes ask the same one, and no two that keep it ask one another."""
    assert await asked_by(Nodes(node_id, full), replicas, is_kept=is_kept) == asked


async def test_copies_are_asked_where_the_owner_gives_nothing() -> None:
    """With the store out of reach a known copy gives the bytes, whoever's turn it is, though the owner is gone."""
    nodes = Nodes("b", full=("o1",))
    shared = nodes.shared("fail")
    part = part_of(1)
    for _ in range(6):
        shared.ring_changed()
        shared.peers.heard(WIRE, 0b110)
        nodes.asked.clear()
        assert await shared.from_peers(part, ("o1",)) == b"it"
        assert nodes.asked in (["o2"], ["n"], ["o1", "o2"])
    assert shared.statistics.from_copies == 6
