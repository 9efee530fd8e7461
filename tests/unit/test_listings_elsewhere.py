"""The catalog in a cluster: when another node's listing is used, how old it counts, and when this node lists itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestra.blocks.geometry import Geometry
from orchestra.blocks.layout import prepare
from orchestra.clock import ManualClock
from orchestra.metadata.catalog import Catalog
from orchestra.metadata.reader import MetadataReader
from orchestra.metadata.records import Record, restamped
from orchestra.namespace.paths import is_shown_name
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

FRESH = 60.0


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


class Node:
    """A catalog with a cache directory of its own, over a store that another node may have, too."""

    def __init__(self, root: Path, store: VersionedStore, clock: ManualClock) -> None:
        root.mkdir()
        layout = prepare(root, Geometry(4096, 16384))[0]
        self.boot = root.name.encode().ljust(16)
        self.clock = clock
        self.store = store
        self.reader = MetadataReader(layout.listing_file, layout.attr_file, clock=clock, boot_id=self.boot)
        self.catalog = Catalog(
            layout, str(layout.tmp), self.reader, clock=clock, boot_id=self.boot, is_shown_name=is_shown_name
        )

    async def names(self, *, refresh: bool = False) -> list[bytes]:
        """What the root of the store holds."""
        return [row.name for row in await self.catalog.list_directory(self.store, "", FRESH, refresh=refresh)]


class Owner:
    """The node `node`, as another asks it; see metadata.catalog.Elsewhere."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.asked: list[bool] = []
        self.is_away = False

    def lists(self, store_id: str, prefix: str) -> bool:
        return True

    async def listing(
        self, store_id: str, prefix: str, freshness_s: float, *, refresh: bool
    ) -> tuple[bytes, int] | None:
        self.asked.append(refresh)
        if self.is_away:
            return None
        catalog, store = self.node.catalog, self.node.store
        record = await catalog.list_directory(store, prefix, freshness_s, refresh=refresh, is_for_peer=True)
        return bytes(record.raw), record.fetched_ns


class Pair:
    """Two nodes over one store; `second` asks `owner` for listings."""

    def __init__(self, root: Path) -> None:
        self.clock, self.store = ManualClock(), VersionedStore()
        self.store.put("a", b"1")
        self.first, self.second = (Node(root / name, self.store, self.clock) for name in ("first", "second"))
        self.owner = Owner(self.first)
        self.second.catalog.elsewhere = self.owner


async def test_another_nodes_listing_is_published_here_with_its_age(tmp_path: Path) -> None:
    """It answers every process of this node for as long as it would at the node that listed, and no longer."""
    pair = Pair(tmp_path)
    assert await pair.first.names() == [b"a"]
    pair.clock.advance(40)
    assert await pair.second.names() == [b"a"]
    assert pair.second.catalog.statistics.list_runs == 0
    assert pair.second.catalog.statistics.lists_from_others == 1
    assert pair.second.reader.age_s(pair.store.store_id, "", FRESH) == 40
    pair.clock.advance(21)
    assert pair.second.reader.listing(pair.store.store_id, "", FRESH) is None
    assert await pair.second.names() == [b"a"]
    assert [node.catalog.statistics.list_runs for node in (pair.first, pair.second)] == [2, 0]


async def test_where_the_owner_cannot_this_node_lists(tmp_path: Path) -> None:
    """With the usual freshness, and it asks the owner again the next time."""
    pair = Pair(tmp_path)
    pair.owner.is_away = True
    assert await pair.second.names() == [b"a"]
    assert pair.second.catalog.statistics.list_runs == 1
    pair.owner.is_away = False
    pair.clock.advance(61)
    assert await pair.second.names() == [b"a"]
    assert pair.second.catalog.statistics.list_runs == 1


async def test_a_refresh_and_a_listing_found_wrong_are_asked_as_of_now(tmp_path: Path) -> None:
    """The owner's listing may be what was found to be wrong: it is not given a second time."""
    pair = Pair(tmp_path)
    assert await pair.second.names() == [b"a"]
    pair.store.put("b", b"2")
    assert await pair.second.names(refresh=True) == [b"a", b"b"]
    pair.store.put("c", b"3")
    pair.second.catalog.forget(pair.store.store_id, "b")
    assert await pair.second.names() == [b"a", b"b", b"c"]
    assert pair.owner.asked == [False, True, True]


async def test_a_strict_mount_asks_the_store_itself(tmp_path: Path) -> None:
    """What nobody may use twice is not asked of another node."""
    pair = Pair(tmp_path)
    record = await pair.second.catalog.list_directory(pair.store, "", 0.0)
    assert [row.name for row in record] == [b"a"]
    assert pair.owner.asked == []


async def test_a_record_is_restamped_and_nothing_else(tmp_path: Path) -> None:
    """Rows stay as they were; the boot and the time are this node's; what is damaged is refused."""
    pair = Pair(tmp_path)
    await pair.first.names()
    record = pair.first.reader.any_listing(pair.store.store_id, "")
    assert record is not None
    raw = restamped(record.raw, boot_id=b"n" * 16, fetched_ns=-5)
    again = Record(memoryview(raw), (0, 0))
    assert list(again) == list(record)
    assert (again.boot_id, again.fetched_ns, again.requests) == (b"n" * 16, 0, record.requests)
    with pytest.raises(ValueError, match="damaged"):
        restamped(raw[:-1] + b"?", boot_id=b"n" * 16, fetched_ns=0)
