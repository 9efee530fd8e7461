"""F-12 to F-21: a cache disk that is full, fails, goes read-only or is evicted from under readers costs speed, never a
byte and never an error to a reader.

With a disk that fails on order in a node in a thread; and with real small file systems under a real daemon.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestra.blocks.files import BlockFiles
from orchestra.blocks.index import BlockIndex, IndexUnavailableError
from orchestra.blocks.rules import SpaceRules, StoreRule
from orchestra.client.node import NodeClient
from orchestra.units import KIB
from orchestra.values import ByteRange
from tests.support.cache import BLOCK, EXTENT, data_of
from tests.support.disks import HookedDisk, failing
from tests.support.node import PATIENCE_S, DaemonNode, ThreadNode, daemon_node, thread_node
from tests.support.ram import needs_root, ram_folder, small_disk
from tests.support.reading import read_in_new_process, sha256
from tests.support.versioned_store import VersionedStore

OBJECTS = {f"s{index}": data_of(f"s{index}", 900 * index + 1) for index in range(5)}
OBJECTS |= {f"l{index}": data_of(f"l{index}", EXTENT * index + 99) for index in range(1, 4)}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: see tests/support/ram.py."""
    with ram_folder() as folder:
        yield folder


@pytest.fixture
def store() -> VersionedStore:
    made = VersionedStore()
    for key, data in OBJECTS.items():
        made.put(key, data)
    return made


def read_all(client: NodeClient) -> None:
    assert [entry.name for entry in client.list("/data")] == sorted(OBJECTS)
    for key, data in OBJECTS.items():
        assert client.read_file(f"/data/{key}") == data
        assert client.read_file(f"/data/{key}", 10, 3000) == data[10:3000]


def use_disk(node: ThreadNode, disk: HookedDisk) -> HookedDisk:
    """Have the node write through `disk` from now on."""
    files = node.node.blocks._files
    assert isinstance(files, BlockFiles)
    files._disk = disk
    return disk


# -- disks that fail on order --------------------------------------------------------------------------------------


OPERATIONS = ["create", "write_at", "set_length", "set_attribute", "rename", "close"]
FAILURES = [(operation, error) for operation in OPERATIONS for error in (errno.ENOSPC, errno.EIO)]
FAILURES += [("create", errno.EROFS), ("create", errno.EMFILE), ("write_at", errno.EDQUOT)]


@pytest.mark.parametrize(("operation", "error"), FAILURES)
def test_a_disk_that_cannot_be_written_serves_uncached(
    tmp_path: Path, store: VersionedStore, operation: str, error: int
) -> None:
    """F-12, F-14: whatever call fails, and however: readers get right bytes; the failures are counted; when the disk
    is well again things are kept, and the accounts are true."""
    with thread_node(tmp_path, store) as node:
        disk = use_disk(node, failing(operation, error))
        read_all(node.client())
        read_all(node.client())
        statistics = node.node.engine.statistics
        assert operation in disk.calls
        assert statistics.cache_write_errors > 0 or (operation, error) == ("set_attribute", errno.ENOSPC)
        # A lack of descriptors is not the disk's.
        assert (statistics.disk_errors > 0) == (statistics.cache_write_errors > 0 and error != errno.EMFILE)
        disk.before = lambda operation, number: None
        read_all(node.client())
        reads = len(store.reads)
        read_all(node.client())
        assert len(store.reads) == reads, "kept by now"
    with thread_node(tmp_path, store) as node:
        for index_file in node.node.layout.root.glob("index*"):
            index_file.unlink()
        exact = node.node.blocks.statistics().used_bytes
    with thread_node(tmp_path, store) as node:
        assert node.node.blocks.statistics().used_bytes == exact


def test_a_block_that_a_quota_has_no_room_for_is_no_error_of_the_disk(tmp_path: Path) -> None:
    """Two blocks at a time into a quota of one: both are let in, the second does not fit; other mounts go on."""
    store, size, go_on = VersionedStore(), 512 * KIB, threading.Event()
    for key in ("a", "b"):
        store.put(key, bytes(size))
    with thread_node(tmp_path, store, block_size_bytes=size, extent_size_bytes=size) as node:
        node.node.blocks.space.set_rules(SpaceRules(stores={store.store_id: StoreRule(quota_bytes=size)}))
        use_disk(node, HookedDisk(lambda operation, number: None if number > 1 else _wait(go_on)))
        engine = node.node.engine

        async def ensure(path: str) -> bool:
            entry = await engine.stat(path)
            return await engine.ensure(engine.want(path, entry.version, size, ByteRange(0, size)))

        async def both() -> list[bool]:
            tasks = [asyncio.create_task(ensure(f"/data/{key}")) for key in ("a", "b")]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            go_on.set()
            return sorted([await task for task in tasks])

        assert node.run(both()) == [False, True]
        assert (engine.statistics.cache_write_errors, engine.statistics.disk_errors) == (1, 0)


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


def test_a_disk_that_fails_now_and_then(tmp_path: Path, store: VersionedStore) -> None:
    """Every seventh call fails while four clients read: right bytes throughout."""

    def before(operation: str, number: int) -> None:
        if number % 7 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with thread_node(tmp_path, store, cache={"size_bytes": 4 * EXTENT}) as node:
        disk = use_disk(node, HookedDisk(before))
        clients = [node.client() for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read_all, clients))
        assert len(disk.calls) > 50
        assert node.node.engine.statistics.cache_write_errors > 0


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_what_the_disk_cannot_read_is_fetched_again(
    tmp_path: Path, store: VersionedStore, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-13: a cached file that gives I/O errors is dropped, counted and replaced; the reader sees right bytes."""
    with thread_node(tmp_path, store) as node:
        client = node.client()
        read_all(client)
        bad = {os.stat(path).st_ino for path in (node.node.layout.root / "extents").rglob("*") if path.is_file()}
        calls = {"preadv": os.preadv, "pread": os.pread}

        def broken(name: str) -> object:
            def call(fd: int, what: object, offset: int) -> object:
                if os.fstat(fd).st_ino in bad:
                    raise OSError(error, os.strerror(error))
                return calls[name](fd, what, offset)  # type: ignore[operator]

            return call

        for name in calls:
            monkeypatch.setattr(os, name, broken(name))
        reads = len(store.reads)
        read_all(client)
        assert len(store.reads) > reads
        assert node.node.blocks.statistics().corrupt_count > 0
        reads = len(store.reads)
        read_all(node.client())
        assert len(store.reads) == reads, "the new files are good"


def test_an_index_that_cannot_be_written_stops_nobody(
    tmp_path: Path, store: VersionedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-24: rows that find no place are kept for the next flush; a stop without them says that the index is not exact,
    and the next daemon counts the files."""
    write = BlockIndex.write
    with monkeypatch.context() as patched:

        def full(*_: object) -> None:
            raise IndexUnavailableError("database or disk is full")

        patched.setattr(BlockIndex, "write", full)
        with thread_node(tmp_path, store) as node:
            read_all(node.client())
            assert node.node.blocks.flush() is False
            used = node.node.blocks.statistics().used_bytes
    assert BlockIndex.write is write
    with thread_node(tmp_path, store) as node:
        assert node.node.blocks.statistics().used_bytes == used
        reads = len(store.reads)
        read_all(node.client())
        assert len(store.reads) == reads


# -- eviction against readers --------------------------------------------------------------------------------------


def test_readers_and_eviction_race(tmp_path: Path, store: VersionedStore) -> None:
    """F-21: a cache of a third of the data under eight readers who keep files open and mapped: every byte right, the
    limit kept."""
    with thread_node(tmp_path, store, cache={"size_bytes": 3 * EXTENT}) as node:

        def read(number: int) -> None:
            client = node.client()
            keys = list(OBJECTS)
            handles = []
            for turn in range(60):
                key = keys[(number * 3 + turn * 5) % len(keys)]
                handle = client.open(f"/data/{key}")
                handles.append((handle, OBJECTS[key]))
                start = (turn * 977) % max(1, len(OBJECTS[key]))
                assert handle.read(start, 5000) == OBJECTS[key][start : start + 5000]
                fd = handle.backing_fd()
                if fd is not None:
                    assert os.pread(fd, len(OBJECTS[key]) + 1, 0) == OBJECTS[key]
                if len(handles) > 5:
                    old, data = handles.pop(0)
                    assert old.read(0, len(data)) == data
                    old.close()
            for handle, _ in handles:
                handle.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
        statistics = node.node.blocks.statistics()
        assert statistics.evicted_count > 10
        assert statistics.used_bytes <= 3 * EXTENT
        assert statistics.corrupt_count == 0


# -- real file systems under a real daemon -------------------------------------------------------------------------


@contextmanager
def node_on(disk: Path, root: Path, **cache: object) -> Iterator[tuple[DaemonNode, dict[str, bytes]]]:
    """A daemon whose cache lies on `disk`, over a folder of 120 files that are 8 MiB together."""
    folder = root / "store"
    folder.mkdir()
    files = {f"f{index:03}": data_of(f"f{index}", 70_000) for index in range(119)} | {
        "huge": data_of("huge", 1_500_000)
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    settings = {"dir": disk / "c", "size": "1GiB", "block_size": "64KiB", "extent_size": "256KiB", **cache}
    mounts = [{"path": "/data", "uri": f"file://{folder}"}]
    with daemon_node(root, mounts=mounts, cache=settings) as node:
        yield node, files


def read_and_compare(node: DaemonNode, files: dict[str, bytes]) -> None:
    told = read_in_new_process(node.config_path, [f"/data/{name}" for name in files])
    assert told["hashes"] == {f"/data/{name}": sha256(data) for name, data in files.items()}


@needs_root
@pytest.mark.system
@pytest.mark.parametrize("options", ["size=4m", "size=40m,nr_inodes=900"], ids=["bytes", "inodes"])
def test_a_full_disk(tmp_path: Path, options: str) -> None:
    """F-12: on a disk with room for half of the data, or for too few files, everything is read right, twice; the daemon
    lives, keeps what it can, and comes back after a kill."""
    with small_disk(tmp_path / "disk", options) as disk, node_on(disk, tmp_path) as (node, files):
        for _ in range(2):
            read_and_compare(node, files)
        status = node.status()
        assert status["blocks"]["evicted_count"] + status["engine"]["cache_write_errors"] > 0
        assert status["used_bytes"] > 1_000_000
        os.kill(status["pid"], signal.SIGKILL)
        read_and_compare(node, files)


@needs_root
@pytest.mark.system
def test_a_disk_that_others_filled(tmp_path: Path) -> None:
    """F-12: when somebody else's file takes all the space, the daemon starts, and serves; with the file gone it keeps
    things again."""
    with small_disk(tmp_path / "disk", "size=8m") as disk, node_on(disk, tmp_path) as (node, files):
        read_and_compare(node, files)
        node.stop()
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
            while True:
                os.write(file.fileno(), bytes(65536))
        read_and_compare(node, files)
        read_and_compare(node, files)
        ballast.unlink()
        read_and_compare(node, files)
        assert node.status()["used_bytes"] > 1_000_000


@pytest.mark.system
def test_few_descriptors(tmp_path: Path) -> None:
    """F-22: a daemon that may open 72 files, and is filling more extents than that, keeps a reserve: every reader is
    served and everything is kept."""
    (tmp_path / "disk").mkdir()
    with node_on(tmp_path / "disk", tmp_path) as (node, files):
        start = [sys.executable, "-m", "orchestra", "--config", str(node.config_path), "daemon", "start"]
        subprocess.run(["prlimit", "--nofile=72:72", *start], check=True, stdout=subprocess.DEVNULL)
        pid = node.status()["pid"]
        client = node.client()
        client.list("/data")
        with ThreadPoolExecutor(4) as pool:
            for begun in pool.map(lambda name: client.read_file(f"/data/{name}", 66_000, 66_100), files):
                assert len(begun) == 100
        assert len(os.listdir(f"/proc/{pid}/fd")) < 60
        for name, data in files.items():
            assert client.cached_bytes(client.stat(f"/data/{name}")) < len(data), "these are being filled"
        read_and_compare(node, files)
        assert node.status()["pid"] == pid
        for name, data in files.items():
            assert client.cached_bytes(client.stat(f"/data/{name}")) == len(data)


def test_blocks_of_this_test_cross_borders() -> None:
    """The objects above are of every kind: empty of none, small, one extent and more."""
    sizes = [len(data) for data in OBJECTS.values()]
    assert min(sizes) <= BLOCK < EXTENT < max(sizes)
