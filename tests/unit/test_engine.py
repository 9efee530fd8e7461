"""The data path of a whole node: how often the store is asked, in what order, and how much is in flight.

The node runs in a thread over a store in memory that counts; clients are those that faces use.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestra.config import FetchConfig
from orchestra.engine.engine import Wanted
from orchestra.errors import (
    IsADirectoryPathError,
    NameTooLongError,
    NotADirectoryPathError,
    NotFoundError,
    UsageError,
)
from orchestra.fetch.budget import Priority
from orchestra.testing.fault_store import FaultStore, Stall
from orchestra.units import KIB
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.node import ThreadNode, thread_node
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


def at_once(count: int, call: Callable[[int], object]) -> list[object]:
    """Run `call` in so many threads that begin together; return the results."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> object:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# -- single flight -------------------------------------------------------------------------------------------------


def test_a_hundred_readers_of_a_cold_block_cost_one_get(tmp_path: Path, store: VersionedStore) -> None:
    """Threads of ten clients that miss the same block at one time wait for one request."""
    data = data_of("a", BLOCK)
    store.put("a", data)
    faults = FaultStore(store)
    with thread_node(tmp_path, faults) as node:
        clients = [node.client() for _ in range(10)]
        clients[0].stat("/data/a")
        stall = faults.inject(Stall(), on="read")
        with ThreadPoolExecutor(100) as pool:
            reading = [pool.submit(clients[index % 10].read_file, "/data/a") for index in range(100)]
            node.run(stall.wait_fired())
            while node.run(_ensures(node)) < 100:
                pass
            node.loop.call_soon_threadsafe(stall.release)
            assert [one.result() for one in reading] == [data] * 100
    assert store.reads == [("a", 0, BLOCK)]
    assert store.heads == ["a"]


async def _ensures(node: ThreadNode) -> int:
    return node.node.engine.statistics.ensures


def test_a_hundred_look_ups_at_once_cost_one_head(tmp_path: Path, store: VersionedStore) -> None:
    """Whoever asks for the same path while the question is under way shares its answer."""
    store.put("a", b"x")
    with thread_node(tmp_path, store) as node:
        clients = [node.client() for _ in range(10)]
        entries = at_once(100, lambda number: clients[number % 10].stat("/data/a"))
        assert len(set(entries)) == 1
    assert len(store.heads) == 1


def test_overlapping_reads_share_blocks(tmp_path: Path, store: VersionedStore) -> None:
    """Readers of ranges that overlap, from every side, bring each block once."""
    data = data_of("a", 10 * EXTENT)
    store.put("a", data)
    with thread_node(tmp_path, store) as node:
        client = node.client()

        def read(number: int) -> bool:
            start = (number * 7919) % (len(data) - 5000)
            return client.read_file("/data/a", start, start + 5000) == data[start : start + 5000]

        assert all(at_once(32, read))
        asked = [block for _, start, stop in store.reads for block in range(start // BLOCK, -(-stop // BLOCK))]
        assert len(asked) == len(set(asked)), "a block came twice"


def test_a_closed_engine_begins_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Who comes from looking at files after it was closed gets what those got whose fetch it stopped."""
    store.put("a", b"x")
    with thread_node(tmp_path, store) as node:

        async def play() -> None:
            engine = node.node.engine
            entry = await engine.stat("/data/a")
            wanted = engine.want("/data/a", entry.version, 1, ByteRange(0, 1))
            await engine.close()
            with pytest.raises(asyncio.CancelledError):
                await engine.ensure(wanted)
            soon = engine.ensure_soon(wanted)
            assert not isinstance(soon, bool)
            assert soon.cancelled()
            assert not engine.is_coming(wanted)

        node.run(play())
    assert not store.reads


# -- how much is asked for -----------------------------------------------------------------------------------------


def test_small_blocks_share_a_request(tmp_path: Path, store: VersionedStore) -> None:
    """Missing neighbours are one GET, up to 4 MiB; what lies between two of them is not fetched again."""
    data = data_of("a", 8 * BLOCK)
    store.put("a", data)
    with thread_node(tmp_path, store) as node:
        client = node.client()
        assert client.read_file("/data/a", 3 * BLOCK, 4 * BLOCK) == data[3 * BLOCK : 4 * BLOCK]
        handle = client.open("/data/a")
        node.run(_ensure(node, "/data/a", 0, len(data)))
        assert handle.read(0, len(data)) == data
        handle.close()
    assert store.reads == [("a", 3 * BLOCK, 4 * BLOCK), ("a", 0, 3 * BLOCK), ("a", 4 * BLOCK, 8 * BLOCK)]


async def _ensure(node: ThreadNode, path: str, start: int, stop: int, priority: Priority = Priority.DEMAND) -> bool:
    entry = await node.node.engine.stat(path)
    wanted = node.node.engine.want(path, entry.version, entry.size_bytes, ByteRange(start, stop))
    return await node.node.engine.ensure(wanted, priority)


def test_a_request_is_never_larger_than_a_part(tmp_path: Path, store: VersionedStore) -> None:
    """A long read goes out as several requests of at most 4 MiB, side by side."""
    store.put("a", bytes(10 * 1024 * KIB))
    with thread_node(tmp_path, store, extent_size_bytes=4096 * KIB) as node:
        assert len(node.client().read_file("/data/a")) == 10 * 1024 * KIB
    assert max(stop - start for _, start, stop in store.reads) <= 4096 * KIB
    assert sum(stop - start for _, start, stop in store.reads) == 10 * 1024 * KIB


def test_bytes_in_flight_are_bounded(tmp_path: Path, store: VersionedStore) -> None:
    """With forty readers at once no more is asked of the store than the budget allows; in the end it is empty."""
    for index in range(40):
        store.put(str(index), data_of(str(index), BLOCK))
    faults = FaultStore(store)
    with thread_node(tmp_path, faults, fetch=FetchConfig(in_flight_bytes_max=4 * BLOCK)) as node:
        client = node.client()
        client.list("/data")
        stall = faults.inject(Stall(), on="read", times=None)

        async def all_wait() -> tuple[int, int]:
            while node.node.budget.used_bytes + node.node.budget.waiting_count * BLOCK < 40 * BLOCK:
                await asyncio.sleep(0)
            return node.node.budget.used_bytes, len(store.reads) + stall.fired

        with ThreadPoolExecutor(40) as pool:
            reading = [pool.submit(client.read_file, f"/data/{index}") for index in range(40)]
            assert node.run(all_wait()) == (4 * BLOCK, 4)
            node.loop.call_soon_threadsafe(stall.release)
            assert [one.result() for one in reading] == [data_of(str(index), BLOCK) for index in range(40)]
        assert node.node.budget.peak_bytes == 4 * BLOCK
        assert node.node.budget.used_bytes == 0


def test_what_is_demanded_goes_before_what_is_read_ahead(tmp_path: Path, store: VersionedStore) -> None:
    """With the budget full and a queue of read-ahead, a demand is next; and a queued read-ahead that is demanded moves
    up to it."""
    for name in "abcd":
        store.put(name, data_of(name, BLOCK))
    faults = FaultStore(store)
    with thread_node(tmp_path, faults, fetch=FetchConfig(in_flight_bytes_max=BLOCK)) as node:
        stall = faults.inject(Stall(), on="read")

        async def play() -> None:
            loop = asyncio.get_running_loop()
            for name in "abcd":
                await node.node.engine.stat(f"/data/{name}")
            ahead = Priority.READAHEAD
            tasks = [loop.create_task(_ensure(node, "/data/a", 0, BLOCK))]
            await stall.wait_fired()
            for name, priority in (("b", ahead), ("c", ahead), ("d", Priority.DEMAND), ("c", Priority.DEMAND)):
                tasks.append(loop.create_task(_ensure(node, f"/data/{name}", 0, BLOCK, priority)))
                for _ in range(5):
                    await asyncio.sleep(0)
            stall.release()
            assert await asyncio.gather(*tasks) == [True] * 5

        node.run(play())
    assert [key for key, _, _ in store.reads] == ["a", "c", "d", "b"]


def test_a_cache_without_room_is_not_filled_in_vain(tmp_path: Path, store: VersionedStore) -> None:
    """What cannot be kept is fetched once for its reader, not once to be thrown away and once more to be sent."""
    data = data_of("a", 3 * BLOCK)
    store.put("a", data)
    with thread_node(tmp_path, store, cache={"size_bytes": 0}) as node:
        assert node.client().read_file("/data/a") == data
        assert node.client().read_file("/data/a", BLOCK, BLOCK + 10) == data[BLOCK : BLOCK + 10]
        assert node.node.engine.statistics.uncached_bytes == len(data) + 10
    assert sum(stop - start for _, start, stop in store.reads) == len(data) + 10


# -- hits ----------------------------------------------------------------------------------------------------------


def test_a_hit_sends_nothing(tmp_path: Path, store: VersionedStore) -> None:
    """Another client of the node reads and lists what is here without a request to the daemon or to the store."""
    store.put("d/small", data_of("s", 100))
    store.put("d/large", data_of("l", EXTENT + 1))
    with thread_node(tmp_path, store) as node:
        first = node.client()
        first.list("/data/d")
        first.list("/data")
        for name in ("small", "large"):
            first.read_file(f"/data/d/{name}")
        requests, served = store.requests, node.activity.requests_total
        second = node.client()
        assert [entry.name for entry in second.list("/data/d")] == ["large", "small"]
        assert second.stat("/data/d/small").size_bytes == 100
        assert second.stat("/data/d").is_directory
        assert second.read_file("/data/d/small") == data_of("s", 100)
        assert second.read_file("/data/d/large", 5, EXTENT) == data_of("l", EXTENT + 1)[5:EXTENT]
        assert second.read_many(["/data/d/small"] * 3) == [data_of("s", 100)] * 3
        with pytest.raises(NotFoundError):
            second.stat("/data/d/nothing")
        handle = second.open("/data/d/small")
        assert handle.backing_fd() is not None
        handle.close()
        assert second.messages_sent == 0
        assert (store.requests, node.activity.requests_total) == (requests, served)


def test_an_open_handle_finds_what_was_fetched_anew(tmp_path: Path, store: VersionedStore) -> None:
    """When what it has open was evicted, and fetched again for it, a handle reads the new files from disk: the bytes
    do not come through the daemon, and come from the store once."""
    for key, size in (("small", 1000), ("large", 2 * EXTENT)):
        store.put(key, data_of(key, size))
    with thread_node(tmp_path, store) as node:
        client = node.client()
        for key, size in (("small", 1000), ("large", 2 * EXTENT)):
            handle = client.open(f"/data/{key}")
            handle.read(0, 100)
            node.node.blocks.evict(1 << 30)
            assert handle.read(size - 100, 100) == data_of(key, size)[-100:]
            store.reads.clear()
            assert handle.read(0, size) == data_of(key, size)
            assert handle.read(0, size) == data_of(key, size)
            asked = [block for _, start, stop in store.reads for block in range(start // BLOCK, -(-stop // BLOCK))]
            assert len(asked) == len(set(asked))
            assert (handle.backing_fd() is None) == (key == "large")
            handle.close()
        assert node.node.engine.statistics.uncached_bytes == 0


def test_read_many_brings_what_is_missing_together(tmp_path: Path, store: VersionedStore) -> None:
    """A batch of cold files costs one message for the data, and one GET a file."""
    names = [f"{index:03}" for index in range(50)]
    for name in names:
        store.put(name, data_of(name, 100))
    with thread_node(tmp_path, store) as node:
        client = node.client()
        client.list("/data")
        sent = client.messages_sent
        assert client.read_many([f"/data/{name}" for name in names]) == [data_of(name, 100) for name in names]
        assert client.messages_sent == sent + 1
    assert sorted(key for key, _, _ in store.reads) == names
    assert store.heads == []


def test_read_many_raises_the_error_of_a_file(tmp_path: Path, store: VersionedStore) -> None:
    """One that is not there fails the batch with its own error."""
    store.put("a", b"x")
    with thread_node(tmp_path, store) as node, pytest.raises(NotFoundError, match="/data/nothing"):
        node.client().read_many(["/data/a", "/data/nothing", "/data/a"])


# -- read-ahead ----------------------------------------------------------------------------------------------------


def test_a_sequential_reader_is_read_ahead_of(tmp_path: Path, store: VersionedStore) -> None:
    """Reading block after block, most are there before they are asked for, each was fetched once, and none beyond the
    object's end."""
    data = data_of("a", 64 * BLOCK)
    store.put("a", data)
    with thread_node(tmp_path, store, prefetch="readahead") as node:
        client = node.client()
        handle = client.open("/data/a")
        misses = 0
        for at in range(0, len(data), BLOCK):
            piece = bytearray(BLOCK)
            if handle.readinto_cached(at, piece) is None:
                misses += 1
                handle.readinto(at, piece)
                node.run(_until_idle(node))
            assert bytes(piece) == data[at : at + BLOCK]
        handle.close()
        assert misses <= 8
    asked = [block for _, start, stop in store.reads for block in range(start // BLOCK, -(-stop // BLOCK))]
    assert sorted(asked) == list(range(64))


async def _until_idle(node: ThreadNode) -> None:
    while node.node.prefetch.is_following:
        await asyncio.sleep(0)


def test_prefetch_none_fetches_what_is_read(tmp_path: Path, store: VersionedStore) -> None:
    """A mount that asks for no read-ahead gets none."""
    store.put("a", data_of("a", 64 * BLOCK))
    with thread_node(tmp_path, store, prefetch="none") as node:
        handle = node.client().open("/data/a")
        handle.read(0, 2 * BLOCK)
        handle.close()
        node.run(_until_idle(node))
    assert store.reads == [("a", 0, 2 * BLOCK)]


# -- paths ---------------------------------------------------------------------------------------------------------


def test_what_is_no_file_is_said_to_be_none(tmp_path: Path, store: VersionedStore) -> None:
    """Directories, files and nothing are told apart, with the errors that Python's own functions raise."""
    store.put("d/file", b"x")
    with thread_node(tmp_path, store) as node:
        client = node.client()
        for path in ("/", "/data", "/data/d"):
            with pytest.raises(IsADirectoryError):
                client.open(path)
            with pytest.raises(IsADirectoryPathError):
                client.read_file(path)
            assert client.stat(path).is_directory
        with pytest.raises(NotADirectoryPathError):
            client.list("/data/d/file")
        with pytest.raises(NotADirectoryPathError):
            client.list("/data/d/file")  # now from what is known
        for path in ("/data/nothing", "/data/d/nothing/x", "/elsewhere", "/data/d/file/x"):
            with pytest.raises(FileNotFoundError):
                client.stat(path)
            with pytest.raises(FileNotFoundError):
                client.list(path)


@pytest.mark.parametrize("path", ["data/a", "/data/../etc", "/data/./a", "/data/a\0b", ""])
def test_bad_paths_are_refused_by_every_call(tmp_path: Path, store: VersionedStore, path: str) -> None:
    """Without a request, whichever method gets one."""
    with thread_node(tmp_path, store) as node:
        client = node.client()
        for call in (client.stat, client.list, client.open, client.read_file, client.freshness_s):
            with pytest.raises(UsageError):
                call(path)
        with pytest.raises(NameTooLongError):
            client.stat("/data/" + "é" * 128)
    assert store.requests == 0


@pytest.mark.parametrize(
    "name", ["a b", "ü", "日本", "\n\t\x1b[31m", "a//b", "..a", "caf\u0301e", "\udcff\udc80", "a%2Fb", "a?b#c"]
)
def test_odd_names_are_read_listed_and_found(tmp_path: Path, store: VersionedStore, name: str) -> None:
    """Whatever a name is made of, also bytes that are no text: it is listed, looked up, fetched and read."""
    store.put(f"d/{name}", b"content")
    with thread_node(tmp_path, store) as node:
        client = node.client()
        assert client.read_file(f"/data/d/{name}") == b"content"
        first = name.split("/")[0]
        assert [entry.name for entry in node.client().list("/data/d")] == [first]
        assert client.stat(f"/data/d/{name}", refresh=True).size_bytes == 7
        with pytest.raises(NotFoundError):
            client.stat(f"/data/d/{name}.other")


def test_nested_mounts_are_one_tree(tmp_path: Path, store: VersionedStore) -> None:
    """A mount inside a mount hides what lies under it there; names that only lead to it are directories."""
    inner = VersionedStore("versioned://inner/")
    store.put("file", b"outer")
    store.put("labels/hidden", b"hidden")
    inner.put("x", b"inner")
    with thread_node(tmp_path, {"/data": store, "/data/labels": inner, "/data/deep/down": inner}) as node:
        client = node.client()
        assert [entry.name for entry in client.list("/")] == ["data"]
        assert [entry.name for entry in client.list("/data")] == ["deep", "file", "labels"]
        assert [entry.name for entry in client.list("/data/deep")] == ["down"]
        assert [entry.name for entry in client.list("/data/labels")] == ["x"]
        assert client.read_file("/data/labels/x") == b"inner"
        assert client.read_file("/data/deep/down/x") == b"inner"
        with pytest.raises(NotFoundError):
            client.stat("/data/labels/hidden")
        for refresh in (False, True):
            assert client.stat("/data/deep", refresh=refresh).is_directory
            assert client.stat("/data/deep/down", refresh=refresh).is_directory
            assert [entry.name for entry in client.list("/data/deep", refresh=refresh)] == ["down"]


def test_the_engine_cuts_what_is_wanted_at_the_end(tmp_path: Path, store: VersionedStore) -> None:
    """A range beyond the object asks for nothing that is not there."""
    store.put("a", data_of("a", 100))
    with thread_node(tmp_path, store) as node:

        async def wanted() -> Wanted:
            return node.node.engine.want("/data/a", '"v1"', 100, ByteRange(50, 5000))

        assert node.run(wanted()).byte_range == ByteRange(50, 100)
        assert node.client().read_file("/data/a", 50, 5000) == data_of("a", 100)[50:]
        assert node.client().read_file("/data/a", 5000) == b""
