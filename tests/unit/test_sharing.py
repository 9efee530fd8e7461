"""Which blocks a node of a cluster keeps: its own, copies where its mount allows them, what no owner can keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from orchestra.blocks.geometry import Geometry
from orchestra.config import MountConfig, Replication
from orchestra.engine.sharing import ClusterSharing

NANOSECONDS = 1_000_000_000


@dataclass
class Node:
    """What a node's sharing asks of its surroundings."""

    owns: bool = True
    now_ns: int = 0
    errors: int = 0
    marks: list[bool] = field(default_factory=list)

    def sharing(self) -> ClusterSharing:
        surroundings: Any = self
        return ClusterSharing(
            *(surroundings, surroundings, Geometry(4096, 16384)), replicas=1, disk_errors=lambda: self.errors
        )

    @property
    def fetcher(self) -> Any:
        return _Stalls(self)

    @property
    def space(self) -> Node:
        return self

    def is_owner(self, digest: str, index: int, replicas: int) -> bool:
        return self.owns

    def names_of(self, digest: str, size_bytes: int, blocks: range) -> list[str]:
        return [digest]

    def expect_copies(self, names: list[str], *, is_copy: bool) -> None:
        self.marks.append(is_copy)


class _Stalls:
    def __init__(self, node: Node) -> None:
        self.stalls, self._node = self, node

    def now_ns(self) -> int:
        return self._node.now_ns


@dataclass
class Asked:
    """What is wanted, as far as it matters here."""

    passive: bool = True
    is_for_peer: bool = False

    @property
    def mount(self) -> Any:
        return self

    @property
    def config(self) -> MountConfig:
        return MountConfig("/data", ("memory://x",), replication=Replication(passive=self.passive))

    @property
    def info(self) -> Any:
        return self

    size_bytes: int = 4096


def may_keep(sharing: ClusterSharing, asked: Asked, *, is_asked_for: bool = False) -> bool:
    wanted: Any = asked
    return sharing.may_keep("0" * 32, wanted, 0, is_asked_for=is_asked_for)


@pytest.mark.parametrize(
    ("owns", "passive", "is_for_peer", "is_kept"),
    [
        (True, False, False, True),
        (False, True, False, True),
        (False, False, False, False),
        (False, False, True, True),
    ],
    ids=["its own", "a passive copy", "none where the mount has no copies", "what no owner can keep"],
)
def test_what_a_node_keeps(owns: bool, passive: bool, is_for_peer: bool, is_kept: bool) -> None:
    """What it does not own is a copy, and marked as one: it leaves first."""
    node = Node(owns)
    assert may_keep(node.sharing(), Asked(passive, is_for_peer)) is is_kept
    assert node.marks == [not owns]


def test_after_a_block_that_the_disk_did_not_take_nothing_is_fetched_to_be_kept_for_a_while() -> None:
    """For five seconds each such fetch would be made twice; then the disk is tried again, and each failure counts
    anew. A load tries it at once: a no would end it."""
    node = Node()
    sharing = node.sharing()
    assert may_keep(sharing, Asked())
    node.errors = 1
    assert not may_keep(sharing, Asked())
    assert may_keep(sharing, Asked(), is_asked_for=True)
    node.now_ns = 5 * NANOSECONDS - 1
    assert not may_keep(sharing, Asked())
    node.now_ns = 5 * NANOSECONDS
    assert may_keep(sharing, Asked())
    node.errors = 2
    assert not may_keep(sharing, Asked())
