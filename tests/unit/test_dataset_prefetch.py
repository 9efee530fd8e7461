"""`prefetch = "dataset"` on a whole node: what the first miss sets off, what it leaves alone, when it begins again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestra.clock import ManualClock, SystemClock
from orchestra.config import FetchConfig
from orchestra.errors import StoreError
from orchestra.prefetch.dataset import statuses_json
from orchestra.stores.registry import wrapped
from orchestra.testing.fault_store import Fail, FaultStore, Stall
from orchestra.values import ByteRange, ObjectInfo
from tests.support.cache import BLOCK, data_of
from tests.support.node import PATIENCE_S, ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def store() -> VersionedStore:
    store = VersionedStore()
    for index in range(40):
        store.put(f"{index // 10:02d}/{index:03d}", data_of(str(index), BLOCK))
    return store


class _HeldBack(VersionedStore):
    """Two data sets: four hundred small files, which are answered when they may (but for the first); and forty, with a
    large one."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()
        for index in range(400):
            self.put(f"first/{index:04d}", b"1")
        for index in range(40):
            self.put(f"second/{index:04d}", b"2")
        self.put("second/large", data_of("large", 20 * BLOCK))

    async def read(self, info: ObjectInfo, byte_range: ByteRange) -> bytes:
        if info.key.startswith("first/") and info.key != "first/0000":
            await self.may_go.wait()
        return await super().read(info, byte_range)


async def _ended(node: ThreadNode) -> list[dict[str, Any]]:
    async with asyncio.timeout(PATIENCE_S):
        while node.node.dataset.is_busy:
            await asyncio.sleep(0)
    return statuses_json(node.node.dataset)


async def _statuses(node: ThreadNode) -> list[dict[str, Any]]:
    return statuses_json(node.node.dataset)


def test_the_first_miss_loads_the_rest_of_the_mount(tmp_path: Path, store: VersionedStore) -> None:
    """One read, and everything comes, once; reads afterwards ask nobody for anything."""
    with thread_node(tmp_path, store, prefetch="dataset") as node:
        client = node.client()
        client.read_file("/data/02/025")
        (status,) = node.run(_ended(node))
        assert (status["state"], status["files_done"], status["files_failed"]) == ("complete", 40, 0)
        assert status["bytes_done"] == 40 * BLOCK
        assert len(store.reads) == len(set(store.reads)) == 40
        asked, sent = store.requests, client.messages_sent
        for index in range(40):
            path = f"/data/{index // 10:02d}/{index:03d}"
            assert client.read_file(path) == data_of(str(index), BLOCK)
        assert (store.requests, client.messages_sent) == (asked, sent)


def test_the_folder_that_is_being_read_comes_first(tmp_path: Path, store: VersionedStore) -> None:
    """The files beside the one that was missed are fetched before those of other folders."""
    with thread_node(tmp_path, store, prefetch="dataset") as node:
        node.client().read_file("/data/02/025")
        node.run(_ended(node))
    assert {key[:2] for key, _, _ in store.reads[:10]} == {"02"}


def test_it_goes_outwards_from_what_is_read(tmp_path: Path) -> None:
    """A data set is complete before another one in the same mount is begun, whatever their names; each file is looked
    at once."""
    store = VersionedStore()
    for name in ("other/00/0", "other/01/1", "mine/00/0", "mine/00/1", "mine/01/2", "mine/2", "top"):
        store.put(name, data_of(name, BLOCK))
    with thread_node(tmp_path, store, prefetch="dataset") as node:
        node.client().read_file("/data/mine/00/0")
        (status,) = node.run(_ended(node))
    assert {key for key, _, _ in store.reads[:2]} == {"mine/00/0", "mine/00/1"}
    assert {key for key, _, _ in store.reads[2:4]} == {"mine/01/2", "mine/2"}
    assert (status["state"], status["files_done"], status["bytes_done"]) == ("complete", 7, 7 * BLOCK)


def test_it_turns_to_where_readers_miss(tmp_path: Path) -> None:
    """Misses of files in one other folder have it go on there before what it had begun; each file is counted once."""
    store = _HeldBack()
    with thread_node(tmp_path, store, prefetch="dataset") as node:
        client = node.client()
        client.read_file("/data/first/0000")
        for index in range(10):
            client.read_file(f"/data/second/{index:04d}")
        node.loop.call_soon_threadsafe(store.may_go.set)
        (status,) = node.run(_ended(node))
    keys = [key for key, _, _ in store.reads]
    assert max(keys.index(f"second/{index:04d}") for index in range(40)) < keys.index("first/0399")
    assert (status["state"], status["files_done"]) == ("complete", 441)
    assert len(keys) == len(set(keys))


def test_one_file_that_is_read_elsewhere_does_not_make_it_turn(tmp_path: Path) -> None:
    """Its blocks are many misses of one file."""
    store = _HeldBack()
    with thread_node(tmp_path, store, prefetch="dataset") as node:
        client = node.client()
        client.read_file("/data/first/0000")
        handle = client.open("/data/second/large")
        for block in range(20):
            assert len(handle.read(block * BLOCK, BLOCK)) == BLOCK
        handle.close()
        node.loop.call_soon_threadsafe(store.may_go.set)
        (status,) = node.run(_ended(node))
    keys = [key for key, _, _ in store.reads]
    assert keys.index("first/0399") < keys.index("second/0000")
    assert (status["state"], status["files_done"]) == ("complete", 441)


def test_looking_at_names_loads_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Listing and stat are no reads."""
    with thread_node(tmp_path, store, prefetch="dataset") as node:
        client = node.client()
        assert len(client.list("/data/01")) == 10
        client.stat("/data/01/011")
        assert node.run(_statuses(node)) == []
    assert not store.reads


@pytest.mark.parametrize("prefetch", ["none", "readahead"])
def test_other_mounts_load_what_is_read(tmp_path: Path, store: VersionedStore, prefetch: str) -> None:
    """Without `dataset` a miss brings the file and nothing else."""
    with thread_node(tmp_path, store, prefetch=prefetch) as node:
        node.client().read_file("/data/02/025")
        assert node.run(_ended(node)) == []
    assert [key for key, _, _ in store.reads] == ["02/025"]


def test_it_stops_before_the_cache_is_full_and_evicts_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """It takes the space that is free but for a margin; nothing leaves the cache for it, and it does not begin again
    at the next miss."""
    clock = ManualClock()
    with thread_node(tmp_path, store, prefetch="dataset", clock=clock, cache={"size_bytes": 16 * BLOCK}) as node:
        client = node.client()
        client.read_file("/data/00/000")
        (status,) = node.run(_ended(node))
        assert status["state"] == "full"
        assert 10 <= len(store.reads) <= 15
        assert node.node.blocks.statistics().evicted_count == 0
        held = len(store.reads)
        clock.advance(3600)
        client.read_file("/data/03/039")
        node.run(_ended(node))
        assert len(store.reads) == held + 1
        assert node.run(_statuses(node))[0]["runs"] == 1


def test_it_stops_before_a_quota_is_full_and_evicts_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """A mount whose quota is smaller than its data set: what came first would leave for what comes last, and the whole
    data set be fetched for nothing."""
    with thread_node(tmp_path, store, prefetch="dataset", quota_bytes=16 * BLOCK) as node:
        node.client().read_file("/data/00/000")
        (status,) = node.run(_ended(node))
        assert status["state"] == "full"
        assert 10 <= len(store.reads) <= 15
        assert node.node.blocks.statistics().evicted_count == 0


def test_it_begins_again_when_something_is_missed_later(tmp_path: Path, store: VersionedStore) -> None:
    """New files are noticed at the first miss, after a pause, and come too."""
    clock = ManualClock()
    with thread_node(tmp_path, store, prefetch="dataset", clock=clock) as node:
        client = node.client()
        client.read_file("/data/00/000")
        node.run(_ended(node))
        store.put("04/040", b"new")
        store.put("04/041", b"new")
        store.put("04/042", b"new")
        assert client.read_file("/data/04/040") == b"new"
        node.run(_ended(node))
        assert len(store.reads) == 41, "too soon after the run before"
        clock.advance(61)  # also past the age that a listing may have
        assert client.read_file("/data/04/041") == b"new"
        assert node.run(_ended(node))[0]["runs"] == 2
        assert len(store.reads) == 43


def test_readers_go_first(tmp_path: Path, store: VersionedStore) -> None:
    """With the store stalled under all that prefetch may have in flight, a miss is answered before anything of it."""
    store.put("first", b"in the mount's own folder, so that all is one run")
    faults = FaultStore(store)
    limits = FetchConfig(requests_max=32)
    with thread_node(tmp_path, wrapped(faults, limits, clock=SystemClock()), prefetch="dataset", fetch=limits) as node:
        stall = faults.inject(Stall(), on="read", at=2, times=31)
        client = node.client()
        client.read_file("/data/first")
        while faults.requests["read"] < 32:
            node.run(asyncio.sleep(0))
        assert client.read_file("/data/03/039") == data_of("39", BLOCK)
        assert [key for key, _, _ in store.reads] == ["first", "03/039"]
        node.loop.call_soon_threadsafe(stall.release)
        assert node.run(_ended(node))[0]["state"] == "complete"


def test_what_fails_ahead_of_readers_is_counted_and_no_error_of_theirs(tmp_path: Path, store: VersionedStore) -> None:
    """A file that cannot be fetched in the background is a number in the status; a reader of it asks again."""
    faults = FaultStore(store)
    with thread_node(tmp_path, faults, prefetch="dataset") as node:
        fault = faults.inject(Fail(StoreError("lost")), on="read", at=12, times=3)
        client = node.client()
        client.read_file("/data/00/000")
        (status,) = node.run(_ended(node))
        assert (status["state"], status["files_done"], status["files_failed"]) == ("complete", 37, 3)
        assert fault.fired == 3
        for index in range(40):
            assert client.read_file(f"/data/{index // 10:02d}/{index:03d}") == data_of(str(index), BLOCK)


def test_a_store_that_is_down_ends_it(tmp_path: Path) -> None:
    """After fifty failures in a row it gives up; a slow or dead store is not asked for everything."""
    store = VersionedStore()
    for index in range(2000):
        store.put(f"{index:04d}", b"x")
    faults = FaultStore(store)
    with thread_node(tmp_path, faults, prefetch="dataset", fetch=FetchConfig(requests_max=8)) as node:
        faults.inject(Fail(StoreError("down")), on="read", at=2, times=None)
        node.client().read_file("/data/0000")
        (status,) = node.run(_ended(node))
        assert status["state"] == "failed"
        assert faults.requests["read"] < 2000


def test_a_node_that_stops_ends_it(tmp_path: Path, store: VersionedStore) -> None:
    """Stopping the node in the middle of it leaves nothing running and nothing hanging."""
    faults = FaultStore(store)
    with thread_node(tmp_path, faults, prefetch="dataset") as node:
        stall = faults.inject(Stall(), on="read", at=2, times=None)
        node.client().read_file("/data/00/000")
        node.run(stall.wait_fired())
        assert node.run(_statuses(node))[0]["state"] == "loading"
    assert store.reads == [("00/000", 0, BLOCK)]
