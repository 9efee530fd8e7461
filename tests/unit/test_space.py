"""Pins, free, quotas and ages, from a client's read to the files that stay or leave."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra.client.node import NodeClient
from orchestra.clock import ManualClock
from orchestra.config import CacheConfig, Config, DaemonConfig, MountConfig
from orchestra.daemon.main import follow_notes
from orchestra.errors import CacheDirectoryError, NotFoundError
from orchestra.units import GIB, KIB
from orchestra.values import ObjectId
from tests.support.node import ThreadNode
from tests.support.ram import ram_folder
from tests.support.versioned_store import VersionedStore

BLOCK = 4 * KIB


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder for the cache."""
    with ram_folder() as folder:
        yield folder


@contextmanager
def node(
    root: Path, *mounts: MountConfig, size: int = GIB, eviction: str = "lru", clock: ManualClock | None = None
) -> Iterator[tuple[ThreadNode, NodeClient, dict[str, VersionedStore]]]:
    """A node with stores of twenty files of a block each, /NAME/0 ... /NAME/19, and a client of it."""
    stores = {mount.path: VersionedStore(f"versioned:/{mount.path}/") for mount in mounts}
    for store in stores.values():
        for number in range(20):
            store.put(f"{number}", bytes([number]) * BLOCK)
    cache = CacheConfig(root / "cache", size, 0.0, BLOCK, 4 * BLOCK, eviction)
    config = Config(cache, mounts, DaemonConfig(autostart=False))
    running = ThreadNode(config, {f"memory://{path}": store for path, store in stores.items()}, clock)
    try:
        yield running, running.client(), stores
    finally:
        running.close()


def mount(path: str = "/d", *, quota: int | None = None, ttl: float | None = None) -> MountConfig:
    """A mount with nothing read ahead."""
    return MountConfig(path, (f"memory://{path}",), prefetch="none", quota_bytes=quota, ttl_s=ttl)


def read(client: NodeClient, numbers: range, path: str = "/d") -> None:
    """Read these files and check their bytes."""
    for number in numbers:
        assert client.read_file(f"{path}/{number}") == bytes([number]) * BLOCK


def cached(client: NodeClient, path: str = "/d") -> list[int]:
    """The numbers of the files that are cached whole; none is cached in part."""
    sizes = {number: client.cached_bytes(client.stat(f"{path}/{number}")) for number in range(20)}
    assert set(sizes.values()) <= {0, BLOCK}
    return [number for number, size in sizes.items() if size]


# -- free ----------------------------------------------------------------------------------------------------------


def test_free_drops_what_is_below_the_path_and_nothing_beside_it(root: Path) -> None:
    """Of /d/a and /d/ab only what lies in the first leaves, with the versions that the store has no more."""
    with node(root, mount()) as (running, client, stores):
        store = stores["/d"]
        for key in ("a/x", "a/y/z", "ab", "b"):
            store.put(key, b"1" * 100)
            client.read_file(f"/d/{key}")
        store.put("a/x", b"2" * 200)
        client.stat("/d/a/x", refresh=True)
        client.read_file("/d/a/x")
        freed = running.run(running.node.space.free("/d/a"))
        assert (freed.freed_bytes, freed.pinned_bytes, freed.busy_bytes) == (3 * BLOCK, 0, 0)
        left = {key: client.cached_bytes(client.stat(f"/d/{key}")) for key in ("a/x", "a/y/z", "ab", "b")}
        assert left == {"a/x": 0, "a/y/z": 0, "ab": 100, "b": 100}
        assert running.node.blocks.statistics().freed_bytes == 3 * BLOCK
        assert running.node.blocks.statistics().evicted_count == 0
        assert client.read_file("/d/a/x") == b"2" * 200


def test_an_open_reader_keeps_what_was_freed(root: Path) -> None:
    """Who has a file open reads its bytes on, without asking the store; who opens it later fetches it."""
    with node(root, mount()) as (running, client, stores):
        read(client, range(1))
        handle = client.open("/d/0")
        assert handle.read(0, 10) == bytes(10)
        running.run(running.node.space.free("/d"))
        fetched = len(stores["/d"].reads)
        assert handle.read(0, BLOCK) == bytes(BLOCK)
        assert len(stores["/d"].reads) == fetched
        handle.close()
        read(client, range(1))
        assert len(stores["/d"].reads) == fetched + 1


def test_freeing_everything_empties_the_cache(root: Path) -> None:
    """`free /` also drops what belongs to no mount any more."""
    with node(root, mount("/d"), mount("/e")) as (running, client, _):
        read(client, range(3), "/d")
        read(client, range(3), "/e")
    with node(root, mount("/d")) as (running, client, _):
        assert running.node.blocks.statistics().used_bytes == 6 * BLOCK
        assert running.run(running.node.space.free("/d")).freed_bytes == 3 * BLOCK
        assert running.run(running.node.space.free("/")).freed_bytes == 3 * BLOCK
        assert running.node.blocks.statistics().used_bytes == 0


def test_half_an_object_is_counted_as_half(root: Path) -> None:
    """`cached_bytes` is exact for a large object of which a block is here, and after it was freed."""
    with node(root, mount()) as (running, client, stores):
        stores["/d"].put("large", bytes(10 * BLOCK + 5))
        assert client.read_file("/d/large", 0, 10) == bytes(10)
        entry = client.stat("/d/large")
        assert client.cached_bytes(entry) == BLOCK
        client.read_file("/d/large", 10 * BLOCK, 10 * BLOCK + 5)
        assert client.cached_bytes(entry) == BLOCK + 5
        assert running.run(running.node.space.usage("/d/large")).held_bytes == 2 * BLOCK
        running.run(running.node.space.free("/d/large"))
        assert client.cached_bytes(entry) == 0


def test_a_path_that_no_mount_covers_is_an_error(root: Path) -> None:
    """The mounts are named."""
    with node(root, mount()) as (running, _, _), pytest.raises(NotFoundError, match="no mount covers /x"):
        running.run(running.node.space.free("/x"))


# -- pins ----------------------------------------------------------------------------------------------------------


def test_what_is_pinned_never_leaves(root: Path) -> None:
    """Neither for what is read later nor by free; what is fetched below the pin afterwards stays too."""
    with node(root, mount(), size=8 * BLOCK) as (running, client, _):
        read(client, range(2))
        running.run(running.node.space.pin("/d/0"))
        running.run(running.node.space.pin("/d/7"))
        read(client, range(2, 20))
        assert {0, 7} <= set(cached(client))
        assert 1 not in cached(client)
        freed = running.run(running.node.space.free("/d"))
        assert (freed.freed_bytes, freed.pinned_bytes) == (6 * BLOCK, 2 * BLOCK)
        assert cached(client) == [0, 7]
        assert running.run(running.node.space.free("/d", pinned=True)).freed_bytes == 2 * BLOCK
        read(client, range(20))
        assert {0, 7} <= set(cached(client)), "the pins are still there"


def test_pins_survive_a_restart(root: Path) -> None:
    """The next daemon knows what may not leave, whose it is, and what is unpinned again."""
    with node(root, mount(), size=8 * BLOCK) as (running, client, _):
        read(client, range(3))
        running.run(running.node.space.pin("/d/0"))
        running.run(running.node.space.pin("/d/1"))
        running.run(running.node.space.unpin("/d/1"))
    with node(root, mount(), size=8 * BLOCK) as (running, client, _):
        assert running.node.space.pins == ["/d/0"]
        client.list("/d")
        read(client, range(3, 20))
        assert 0 in cached(client)
        assert 1 not in cached(client)


def test_pins_hold_for_what_a_crash_left_without_an_owner(root: Path) -> None:
    """Where the index was lost, the listings tell whose the files are."""
    with node(root, mount(), size=8 * BLOCK) as (running, client, _):
        client.list("/d")
        read(client, range(3))
        running.run(running.node.space.pin("/d/0"))
    (root / "cache" / "index.sqlite3").unlink()
    with node(root, mount(), size=8 * BLOCK) as (running, client, _):
        running.run(running.node.space.adopt())
        assert running.node.blocks.space.unknown_digests() == set()
        read(client, range(3, 20))
        assert 0 in cached(client)


def test_with_everything_pinned_reads_go_on_uncached(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reader gets its bytes, the store is asked once, one warning says why, and every refusal is counted."""
    with node(root, mount(), size=4 * BLOCK) as (running, client, stores), caplog.at_level(logging.WARNING):
        running.run(running.node.space.pin("/d"))
        read(client, range(4))
        fetched = len(stores["/d"].reads)
        read(client, range(4, 14))
        assert len(stores["/d"].reads) == fetched + 10
        assert cached(client) == [0, 1, 2, 3]
        assert running.node.blocks.statistics().refused_count == 10
        warnings = [record.getMessage() for record in caplog.records if "no room" in record.getMessage()]
        assert len(warnings) == 1
        assert f"{4 * BLOCK} of {4 * BLOCK} bytes are pinned" in warnings[0]


def test_unpinning_says_what_keeps_a_path(root: Path) -> None:
    """A path that is pinned only by a pin above it cannot be unpinned; the error names that one."""
    with node(root, mount()) as (running, _, _):
        running.run(running.node.space.pin("/d"))
        with pytest.raises(NotFoundError, match="/d/1 is not pinned; it is kept by the pin on /d"):
            running.run(running.node.space.unpin("/d/1"))
        with pytest.raises(NotFoundError, match="no mount covers /x"):
            running.run(running.node.space.pin("/x"))


def test_damaged_pins_are_not_taken_for_none(root: Path) -> None:
    """A file of pins that cannot be read keeps the daemon from starting: it would let go of what must stay."""
    with node(root, mount()):
        pass
    (root / "cache" / "pins.json").write_text("{")
    with pytest.raises(CacheDirectoryError, match=r"pins\.json is damaged"), node(root, mount()):
        pass


# -- what was read -------------------------------------------------------------------------------------------------


def test_the_policy_learns_of_reads_that_send_no_message(root: Path) -> None:
    """A file read again from the cache directory outlives one that came after it: the readers' notes say so."""
    with node(root, mount(), size=3 * BLOCK) as (running, client, _):
        read(client, range(3))
        messages = client.messages_sent
        read(client, range(1))
        assert client.messages_sent == messages
        follow_notes(running.node, running.node.accesses.collect())
        read(client, range(3, 4))
        assert cached(client) == [0, 2, 3]


def test_the_default_sees_a_scan_in_what_readers_note(root: Path) -> None:
    """Epochs over twice what fits: from the second on the cached half is hit, and next to nothing is written."""
    with node(root, mount(), size=10 * BLOCK, eviction="auto") as (running, client, stores):
        chance = random.Random(5)
        written = []
        for _ in range(6):
            for number in chance.sample(range(20), 20):
                read(client, range(number, number + 1))
                follow_notes(running.node, running.node.accesses.collect())
            written.append(running.node.blocks.statistics().written_bytes // BLOCK)
        assert written[-1] == written[2], f"still written after the second epoch: {written}"
        fetched = len(stores["/d"].reads)
        read(client, range(20))
        assert len(stores["/d"].reads) == fetched + 10


# -- quotas and ages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eviction", ["auto", "lru", "never", "plan", "s3fifo", "sieve"])
def test_a_quota_holds_and_takes_nothing_from_others(root: Path, eviction: str) -> None:
    """A mount never has more than its quota, and fills it at its own cost; the other mount keeps what it has."""
    mounts = mount("/d", quota=5 * BLOCK), mount("/e")
    with node(root, *mounts, size=20 * BLOCK, eviction=eviction) as (running, client, stores):
        read(client, range(10), "/e")
        read(client, range(20), "/d")
        assert len(cached(client, "/d")) == 5
        assert len(cached(client, "/e")) == 10
        assert running.node.blocks.space.used_by_store()[stores["/d"].store_id] == 5 * BLOCK


def test_a_quota_that_shrank_is_kept_to(root: Path) -> None:
    """What is above it leaves at the next look, the longest unused first; what is pinned stays."""
    with node(root, mount()) as (running, client, _):
        read(client, range(10))
        running.run(running.node.space.pin("/d/0"))
    with node(root, mount(quota=4 * BLOCK)) as (running, client, _):
        client.list("/d")
        assert running.node.blocks.keep_limits() == 6
        assert cached(client) == [0, 7, 8, 9]
        assert running.node.blocks.keep_limits() == 0


def test_what_is_not_read_for_its_ttl_leaves(root: Path) -> None:
    """Age counts from the last read; what is pinned has none, and a restart does not begin it anew."""
    clock = ManualClock()
    with node(root, mount(ttl=100.0), clock=clock) as (running, client, stores):
        read(client, range(4))
        running.run(running.node.space.pin("/d/0"))
        clock.advance(60)
        one = ObjectId(stores["/d"].store_id, "1", client.stat("/d/1").version)
        running.node.blocks.touch(one.digest(), 0)
        assert running.node.blocks.keep_limits() == 0
    with node(root, mount(ttl=100.0), clock=clock) as (running, client, _):
        clock.advance(50)
        assert running.node.blocks.keep_limits() == 2
        client.list("/d")
        assert cached(client) == [0, 1]
        clock.advance(60)
        assert running.node.blocks.keep_limits() == 1
        assert cached(client) == [0]
        assert running.node.blocks.statistics().expired_count == 3
